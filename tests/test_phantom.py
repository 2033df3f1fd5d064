import numpy as np
import pytest
import torch

from shards.__main__ import main
from shards.dataset import Split
from shards.errors import InputError
from shards.lesions import bounds
from shards.phantom import Phantoms, split_sizes
from shards.sample import FINDINGS, NO_FINDING
from trainer.lungs import lung_boxes
from trainer.regions import finding_regions


def make(count=60, seed=1, **options):
    source = Phantoms(count, seed, **{"size": 64, **options})
    return [(item.split, source.load(item)) for item in source.items]


def test_the_same_seed_gives_the_same_images_and_another_seed_others():
    one, two, three = make(20, 1), make(20, 1), make(20, 2)
    assert all((a.image == b.image).all() and a.key == b.key for (_, a), (_, b) in zip(one, two, strict=True))
    assert not any((a.image == c.image).all() for (_, a), (_, c) in zip(one, three, strict=True))


@pytest.mark.parametrize("size", [32, 64, 200])
def test_any_size_has_lungs_of_plausible_area(size):
    for _, s in make(24, size=size):
        assert s.image.shape == s.mask.shape == (size, size)
        assert 0.12 < (s.mask > 0).mean() < 0.5


def test_lesions_lie_where_the_finding_is_expected():
    inside = {name: [] for name in FINDINGS}
    for _, s in make(200, size=128):
        (finding,) = s.findings
        assert bool(s.boxes) == (finding != NO_FINDING)
        region = finding_regions(lung_boxes(torch.from_numpy(s.mask)[None] > 0, 128), [finding], 128)[0].numpy()
        for box in s.boxes:
            x0, y0, x1, y1 = map(int, box.xyxy)
            assert 0 <= x0 < x1 <= 128
            assert 0 <= y0 < y1 <= 128
            inside[finding].append(region[y0:y1, x0:x1].mean())
    assert np.mean(inside["Effusion"]) > 0.85
    assert np.mean(inside["Pneumothorax"]) > 0.95
    assert np.mean(inside["Subcutaneous Emphysema"]) > 0.7  # the box of streaks beside a lung takes a strip of it along


@pytest.mark.parametrize(
    ("planted", "low", "high"), [(0.0, -0.2, 0.2), (0.7, 0.5, 0.9), (1.0, 1.0, 1.0), (-1.0, -1.0, -1.0)]
)
def test_the_markers_correlation_is_the_parameter(planted, low, high):
    pairs = [
        (s.findings[0] == "Effusion", s.extra["marker"])
        for _, s in make(300, findings=FINDINGS[:2], shortcut=planted, size=32, shortcut_test=planted)
    ]
    assert low - 1e-9 <= np.corrcoef(np.array(pairs, float).T)[0, 1] <= high + 1e-9


def test_the_marker_lies_outside_the_lungs():
    for (_, plain), (_, marked) in zip(
        make(40, size=128), make(40, size=128, shortcut=1.0, shortcut_test=1.0), strict=True
    ):
        assert marked.extra["marker"] == FINDINGS.index(marked.findings[0])
        assert plain.findings == marked.findings
        changed = plain.image != marked.image
        assert changed[:17, :17].any()
        assert not changed[17:].any()
        assert not changed[:, 17:].any()
        assert not (changed & (marked.mask > 0)).any()


def test_every_split_has_as_many_of_each_finding():
    assert split_sizes(100) == (60, 20, 20)
    for split in ("train", "val", "test"):
        counts = [sum(s.findings == (name,) for where, s in make(100, size=32) if where == split) for name in FINDINGS]
        assert len(set(counts)) == 1


@pytest.mark.parametrize("wrong", [{"count": 5}, {"size": 8}, {"shortcut": 2.0}, {"findings": ["Nodule"]}])
def test_impossible_requests_are_refused(wrong):
    with pytest.raises(InputError, match="--"):
        make(**wrong)


def test_the_tube_lies_in_a_lung_and_its_kind_is_the_class():
    names = ("No Finding", "Effusion", "Pneumothorax", "Subcutaneous Emphysema")
    with_tube = Phantoms(100, 3, size=256, findings=names, shortcut=1.0, kind="tube")
    without = Phantoms(100, 3, size=256, findings=names)
    counts = {}
    for item, bare in zip(with_tube.items[:24], without.items[:24], strict=True):
        sample, plain = with_tube.load(item), without.load(bare)
        assert sample.extra["marker"] == names.index(sample.findings[0])
        assert (sample.mask == plain.mask).all()
        assert [box.xyxy for box in sample.boxes] == [box.xyxy for box in plain.boxes]
        tube = sample.image.astype(int) - plain.image > 25
        assert 20 < tube.sum() < 1500
        # It lies among the lungs, away from the upper and lower ends of their box, where the lesions are looked for.
        rows, columns = np.nonzero(sample.mask)
        at = np.nonzero(tube)
        assert np.isin(sample.mask[tube], 255).mean() > 0.4
        assert rows.min() < at[0].min()
        assert at[0].max() < rows.max()
        assert columns.min() - 8 < at[1].min()
        assert at[1].max() < columns.max() + 8
        counts.setdefault(sample.extra["marker"], []).append(int(tube.sum()))
    assert len(counts) == 4
    with pytest.raises(InputError, match="--shortcut-kind wire: expected marker or tube"):
        Phantoms(100, 0, shortcut=1.0, kind="wire")
    with pytest.raises(InputError, match="--shortcut-kind tube: say how well it agrees"):
        Phantoms(100, 0, kind="tube")


def test_the_tubes_correlation_is_the_parameter():
    source = Phantoms(
        1000, 1, size=32, findings=("No Finding", "Effusion"), shortcut=0.5, shortcut_test=-1.0, kind="tube"
    )
    agree = {name: [] for name in ("train", "test")}
    for item in source.items:
        if item.split in agree:
            sample = source.load(item)
            agree[item.split].append(sample.extra["marker"] == source.classes.index(sample.findings[0]))
    assert 0.68 < np.mean(agree["train"]) < 0.82  # 0.5 its own, half of the others by chance
    assert np.mean(agree["test"]) == 0


def test_outlines_of_lesions_are_kept_where_they_are_wanted(tmp_path):
    main(["phantom", "--out", str(tmp_path / "with"), "--count", "20", "--size", "64", "--seed", "0", "--lesion-masks"])
    main(["phantom", "--out", str(tmp_path / "without"), "--count", "20", "--size", "64", "--seed", "0"])
    several = ["--several", "0.5", "--unknown", "0.3", "--count", "30", "--size", "64", "--seed", "0", "--lesion-masks"]
    main(["phantom", "--out", str(tmp_path / "several"), *several])
    found, other, many = (Split(tmp_path / name, "train") for name in ("with", "without", "several"))
    for p in range(len(found)):
        meta = found.meta(p)
        assert meta["boxes"] == other.meta(p)["boxes"]
        assert "lesion_masks" not in other.meta(p) or not other.meta(p)["lesion_masks"]
        assert [mask.finding for mask in meta["lesion_masks"]] == [box.finding for box in meta["boxes"]]
        for mask, box in zip(meta["lesion_masks"], meta["boxes"], strict=True):
            assert bounds(mask.runs.mask()) == box.xyxy
        assert (found.image(p) == other.image(p)).all()
    masks = [
        (mask.finding, meta["findings"])
        for p in range(len(many))
        for meta in [many.meta(p)]
        for mask in meta["lesion_masks"]
    ]
    assert masks
    assert all(name in shown for name, shown in masks)
