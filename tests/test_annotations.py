import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from shards.__main__ import main
from shards.dataset import Split
from shards.errors import InputError
from shards.index import parse_index
from shards.loader import Loader
from shards.plan import EpochPlan
from trainer.augment import draw, lung_masks
from trainer.build import build
from trainer.command import resolve
from trainer.regions.lesions import LesionRegions, boxes_to_mask


@pytest.fixture
def split(shards):
    return Split(shards, "train", ("No Finding", "Effusion", "Pneumothorax"))


def finding_of(split):
    return split.targets().argmax(1)


@pytest.fixture
def flags(flags):
    return [*flags, "--task", "nep"]


def test_boxes_are_drawn_outward_at_any_size():
    region = boxes_to_mask([[(10, 20, 31, 40), (60.5, 0, 64, 1)], []], (64, 64), 32).numpy()
    expected = np.zeros((32, 32), bool)
    expected[10:20, 5:16] = True
    expected[0:1, 30:32] = True
    assert (region[0] == expected).all()
    assert not region[1].any()
    (wide,) = boxes_to_mask([[(0, 0, 10, 10)]], (40, 20), 40)  # height, width
    assert boxes_to_mask([[], []], (64, 64), 8).shape == (2, 8, 8)
    assert wide.sum() == 10 * 20


def test_a_share_is_part_of_a_larger_one_and_the_seed_decides(split):
    everything = LesionRegions(split, 1.0, 0)
    positives = int((finding_of(split) > 0).sum())
    assert everything.known == len(everything.used) == positives
    chosen = [set(LesionRegions(split, share, 0).used) for share in (0.0, 0.01, 0.3, 0.7, 1.0)]
    assert [len(c) for c in chosen] == [0, 1, -(-3 * positives // 10), -(-7 * positives // 10), positives]
    assert all(a <= b for a, b in itertools.pairwise(chosen))
    assert set(LesionRegions(split, 0.3, 1).used) != chosen[2]
    assert set(LesionRegions(split, 0.3, 0).used) == chosen[2]


def test_regions_are_those_of_the_images_that_are_used(split):
    used = LesionRegions(split, 0.3, 0)
    index, findings = torch.arange(len(split)), torch.from_numpy(finding_of(split))
    regions = used.regions(index, findings, (64, 64), 64)
    full = LesionRegions(split).regions(index, findings, (64, 64), 64)
    for position in range(len(split)):
        expected = full[position] if position in used.used else torch.zeros(64, 64, dtype=torch.bool)
        assert torch.equal(regions[position], expected)
    assert full.flatten(1).any(1).tolist() == (findings > 0).tolist()
    ill = int(np.flatnonzero(finding_of(split) == 1)[0])
    assert LesionRegions(split).boxes(ill, 1) == [box.xyxy for box in split.meta(ill)["boxes"]]
    assert LesionRegions(split).boxes(ill, 2) == []


def test_boxes_are_read_from_the_table_or_from_the_samples(shards, tmp_path):
    """Shards of an earlier version have no table of boxes and ids."""
    shutil.copytree(shards, tmp_path / "old")
    index = json.loads((tmp_path / "old" / "index.json").read_text())
    assert index.pop("boxed") == ["Effusion", "Pneumothorax", "Subcutaneous Emphysema"]
    for name, entry in index["splits"].items():
        for kind in ("boxes", "ids"):
            del entry["tables"][f"{name}.{kind}.npy"]
            (tmp_path / "old" / f"{name}.{kind}.npy").unlink()
    (tmp_path / "old" / "index.json").write_text(json.dumps(index))
    task = ("No Finding", "Pneumothorax")
    new, old = (Split(root, "train", task) for root in (shards, tmp_path / "old"))
    assert len(new.lesions().position)
    for a, b in zip(new.lesions(), old.lesions(), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    assert np.array_equal(new.ids(), old.ids())
    lazily = Split(tmp_path / "old", "train", task)
    for position in range(len(new)):
        assert lazily.lesion_boxes(position, 1) == new.lesion_boxes(position, 1) == old.lesion_boxes(position, 1)
    assert lazily._lesions is None, "a sample is asked when its boxes are wanted, not all of them"
    assert main(["verify", str(tmp_path / "old")]) is None
    # Indexed again they have the tables, and say of themselves what they said.
    main(["index", str(tmp_path / "old")])
    again = json.loads((tmp_path / "old" / "index.json").read_text())
    assert {name: again[name] for name in ("dataset", "stored")} == {
        name: index[name] for name in ("dataset", "stored")
    }
    assert Split(tmp_path / "old", "train", task).lesions().xyxy.tolist() == new.lesions().xyxy.tolist()


@pytest.mark.parametrize("region", ["anatomy", "annotation", "both"])
def test_which_region_an_image_gets(flags, region):
    more = [] if region == "anatomy" else ["--attention.annotated", "0.5"]
    job = build(resolve([*flags, "--attention.region", region, "--swap.probability", "0", *more]))
    split = job.splits["train"]
    batch = next(iter(Loader(split, EpochPlan(split.shard_sizes()), batch=20, workers=0).batches(0)))
    seen = job.prepare(batch, True)
    known = job.lungs["train"](batch.image, batch.index)
    anatomy = job.regions(batch.target.argmax(1), known.boxes, lung_masks(known.outlines, known.boxes, (64, 64))).weight
    for b, position in enumerate(batch.index.tolist()):
        used = job.annotations is not None and position in job.annotations.used
        if used:
            boxes = job.annotations.boxes(position, int(batch.target[b].argmax()))
            assert torch.equal(seen.region[b] > 0, boxes_to_mask([boxes], (64, 64), 64)[0])
        else:
            assert torch.equal(seen.region[b], anatomy[b] if region != "annotation" else torch.zeros(64, 64))
        assert seen.has_region[b] == float((seen.region[b] > 0).any())


def test_annotations_move_with_the_image(flags):
    job = build(
        resolve([*flags, "--attention.region", "annotation", "--swap.probability", "0", "--augment.shift", "0.2"])
    )
    split = job.splits["train"]
    batch = next(iter(Loader(split, EpochPlan(split.shard_sizes()), batch=20, workers=0).batches(0)))
    moved, still = job.prepare(batch, True), job.annotations.regions(batch.index, batch.target.argmax(1), (64, 64), 64)
    draws = draw(0, 0, batch.index)
    for b, label in enumerate(batch.target.argmax(1).tolist()):
        if label:
            dx, dy = ((2 * draws[b, :2] - 1) * 0.2 * 64).tolist()
            centre = [torch.nonzero(r).float().mean(0) for r in (still[b], moved.region[b])]
            if 8 < float(centre[0][0] + dy) < 56 and 8 < float(centre[0][1] + dx) < 56:
                assert (centre[1] - centre[0]).tolist() == pytest.approx([dy, dx], abs=4)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--attention.annotated", "0"],
            r"--attention.annotated 0.0 leaves none of \d+ images with lesions; pack lesions \(--boxes, --lesions\)",
        ),
        (
            ["--task", "No Finding,Subcutaneous Emphysema", "--attention.annotated", "2"],
            r"--attention.annotated 2.0: must lie in \[0, 1\]",
        ),
    ],
)
def test_no_annotations_is_said_at_once(flags, tmp_path, more, words):
    with pytest.raises(InputError, match=words):
        build(resolve([*flags, "--attention.region", "annotation", *more]))


def test_annotations_without_any_box_in_the_shards(flags, tmp_path):
    from shards.pack import pack
    from shards.phantom import Phantoms

    class Bare(Phantoms):
        def load(self, item):
            sample = super().load(item)
            sample.boxes.clear()
            return sample

    pack(Bare(30, 0, size=64), tmp_path / "bare", dataset="phantom", workers=1)
    with pytest.raises(
        InputError, match=r"--attention.region both: no training image has a lesion of its finding; pack lesions"
    ):
        build(resolve([*flags, "--shards", str(tmp_path / "bare"), "--attention.region", "both"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda boxes: boxes["row"].fill(60), "names samples or findings that index.json does not have"),
        (lambda boxes: boxes["finding"].fill(9), "names samples or findings that index.json does not have"),
        (lambda boxes: boxes["xyxy"].fill(np.nan), "has a box of no numbers"),
    ],
    ids=["row", "finding", "nan"],
)
def test_a_table_of_boxes_that_does_not_fit_is_one_line(shards, tmp_path, change, words, capsys):
    shutil.copytree(shards, tmp_path / "other")
    path = tmp_path / "other/train.boxes.npy"
    boxes = np.load(path)
    change(boxes)
    np.save(path, boxes)
    with pytest.raises(InputError, match=words):
        Split(tmp_path / "other", "train", ("No Finding", "Effusion")).lesions()
    with pytest.raises((InputError, SystemExit)):
        main(["verify", str(tmp_path / "other")])


@pytest.mark.parametrize("value", [None, 5, {}, "abc", [1], [["Effusion"]]])
def test_names_of_boxes_are_checked(shards, tmp_path, value):
    index = json.loads((shards / "index.json").read_text()) | {"boxed": value}
    with pytest.raises(InputError, match="is not an index"):
        parse_index(json.dumps(index), "index.json", "index it again")
