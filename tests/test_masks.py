"""Lesions as masks: read, kept in a few bytes, drawn, moved, measured."""

import csv
import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from shards.__main__ import main
from shards.coarse import BYTES, CUTS, coarse, packed
from shards.dataset import Split
from shards.errors import InputError
from shards.index import MASK
from shards.rle import Runs
from trainer import evaluate, loop, train
from trainer.augment import augment, draw, unpacked
from trainer.build import build
from trainer.command import resolve
from trainer.look import locate
from trainer.metrics import pointed
from trainer.regions.lesions import LesionRegions, masks_to_regions, touched
from trainer.sections import Strength


def ellipse(height, width, y, x, b, a):
    rows, columns = np.mgrid[:height, :width]
    return ((rows - y) / b) ** 2 + ((columns - x) / a) ** 2 <= 1


def back(mask, size=None):
    """A mask through its few bytes, drawn at its own size."""
    row = np.array([(0, 0, *coarse(mask))], MASK)
    size = size or mask.shape[0]
    return masks_to_regions(row, mask.shape, size)[0].numpy()


def iou(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


@pytest.mark.parametrize(("b", "a"), [(60, 90), (120, 15), (6, 6)])
def test_a_mask_comes_back_from_its_bytes(b, a):
    mask = ellipse(256, 256, 130, 120, b, a)
    assert iou(back(mask), mask) > 0.96
    assert np.array([(0, 0, *coarse(mask))], MASK).nbytes <= 300


def test_what_is_a_pixel_wide_does_not_vanish():
    mask = np.zeros((512, 512), bool)
    angle = np.linspace(0, np.pi, 3000)
    mask[(150 - 90 * np.sin(angle)).astype(int), (150 + 100 * np.cos(angle)).astype(int)] = True
    drawn = back(mask)
    assert (drawn & mask).sum() > 0.75 * mask.sum()
    assert drawn.sum() < 8 * mask.sum()
    single = np.zeros((64, 64), bool)
    single[40, 7] = True
    assert back(single)[40, 7]
    assert back(single).sum() == 1
    small = touched(torch.from_numpy(single), 8).numpy()
    assert np.argwhere(small).tolist() == [[5, 0]]
    assert coarse(np.zeros((4, 4), bool)) is None


def test_cells_are_packed_four_a_byte():
    levels = np.random.default_rng(0).integers(0, 4, (3, 22, 24)).astype(np.uint8)
    assert packed(levels).shape == (3, BYTES)
    assert (unpacked(torch.from_numpy(packed(levels))) * 3).round().numpy().astype(np.uint8).tolist() == levels.tolist()
    assert CUTS > int(coarse(np.ones((5, 5), bool)).cut) > 0


def test_a_mask_is_drawn_where_its_image_is_stretched():
    mask = ellipse(40, 80, 20, 60, 8, 10)  # height, width
    drawn = back(mask, 80)
    assert iou(drawn, np.repeat(mask, 2, 0)) > 0.9


# -- a set with masks -------------------------------------------------------------------------------------------

SIDE = 64


def images(root, count=24):
    """Black images, half of them with a bright ellipse, and what is known of it: name -> mask."""
    rng, lesions, rows = np.random.default_rng(1), {}, []
    (root / "x ä").mkdir(parents=True)
    for i in range(count):
        name = f"x ä/{i:02d}.png"
        pixels = rng.integers(40, 90, (SIDE, SIDE)).astype(np.uint8)
        if i % 2:
            lesions[name] = ellipse(SIDE, SIDE, rng.integers(20, 44), rng.integers(20, 44), 9, 6)
            pixels[lesions[name]] = 220
        Image.fromarray(pixels).save(root / name)
        rows.append(
            (name, "Mass" if i % 2 else "No Finding", ("train", "train", "val", "test")[i // 2 % 4], str(i % 3 % 2))
        )
    with (root / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "finding", "split", "drain"), *rows])
    return lesions


def contour(mask):
    """A polygon around a convex mask, in pixels."""
    rows = np.flatnonzero(mask.any(1))
    left = [(int(np.flatnonzero(mask[y])[0]), int(y)) for y in rows]
    right = [(int(np.flatnonzero(mask[y])[-1]) + 1, int(y)) for y in rows]
    return [*left, (left[-1][0], int(rows[-1]) + 1), (right[-1][0], int(rows[-1]) + 1), *right[::-1]]


def relative_runs(mask):
    """SIIM's."""
    flat = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    starts, ends = edges[::2], edges[1::2]
    return " ".join(f"{s - e} {t - s}" for s, t, e in zip(starts, ends, [0, *ends[:-1]], strict=True))


def as_polygons(root, lesions, shares=True):
    scale = SIDE if shares else 1
    content = {
        name: [{"finding": "Mass", "points": [[x / scale, y / scale] for x, y in contour(mask)]}]
        for name, mask in lesions.items()
    }
    (root / "lesions.json").write_text(json.dumps(content))


def as_pixels(root, lesions):
    as_polygons(root, lesions, shares=False)


def as_runs(root, lesions):
    runs = {name: Runs.drawn(mask) for name, mask in lesions.items()}
    content = {name: [{"finding": "Mass", "size": list(r.size), "counts": r.counts}] for name, r in runs.items()}
    (root / "lesions.json").write_text(json.dumps(content))


def as_coco(root, lesions):
    content = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "Mass"}]}
    for i, (name, mask) in enumerate(lesions.items()):
        content["images"].append({"id": i, "file_name": name.rpartition("/")[2], "width": SIDE, "height": SIDE})
        drawn = (
            {"size": [SIDE, SIDE], "counts": Runs.drawn(mask).counts}
            if i % 2
            else [[float(v) for point in contour(mask) for v in point]]
        )
        content["annotations"].append({"image_id": i, "category_id": 7, "segmentation": drawn})
    (root / "lesions.json").write_text(json.dumps(content))


def as_table(root, lesions, head, cell):
    rows = [(name, "Mass", cell(i, mask)) for i, (name, mask) in enumerate(lesions.items())]
    with (root / "lesions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "finding", head), *rows])


def as_siim(root, lesions):
    as_table(root, lesions, "rle", lambda _, mask: relative_runs(mask))


def as_files(root, lesions):
    def cell(i, mask):
        Image.fromarray(mask.astype(np.uint8) * 255).save(root / f"mask {i}.png")
        return f"mask {i}.png"

    as_table(root, lesions, "mask", cell)


LAYOUTS = {f.__name__.removeprefix("as_"): f for f in (as_polygons, as_pixels, as_runs, as_coco, as_siim, as_files)}


def pack(root, out, *more):
    file = next(iter(sorted(root.glob("lesions.*"))))
    where = ["--csv", str(root / "table.csv"), "--images", str(root), "--split-column", "split"]
    main(["csv", *where, "--lesions", str(file), "--size", str(SIDE), "--out", str(out), *more])
    return out


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    root = tmp_path_factory.mktemp("masked")
    lesions = images(root)
    as_runs(root, lesions)
    return pack(root, root / "shards", "--keep-column", "drain"), lesions


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_mask(tmp_path, layout, capsys):
    lesions = images(tmp_path)
    LAYOUTS[layout](tmp_path, lesions)
    out = pack(tmp_path, tmp_path / "out")
    said = capsys.readouterr().out
    assert f"{len(lesions)} lesion masks are on {len(lesions)} of the images" in said
    if layout in ("polygons", "pixels"):
        assert f"points are read as {'shares' if layout == 'polygons' else 'pixels'}" in said
    main(["verify", str(out)])
    found = 0
    for name in ("train", "val", "test"):
        split = Split(out, name, ("No Finding", "Mass"))
        for p in range(len(split)):
            meta = split.meta(p)
            for mask in meta["lesion_masks"]:
                truth = lesions[f"x ä/{meta['source']}"]
                assert iou(mask.runs.mask(), truth) > (0.85 if layout in ("polygons", "pixels", "coco") else 0.999)
                found += 1
        table = split.lesion_masks()
        assert len(table.position) == int((split.targets()[:, 1] == 1).sum())
        assert (table.finding == 1).all()
    assert found == len(lesions)


def test_kept_columns_are_in_the_samples(masked):
    split = Split(masked[0], "train", ("No Finding", "Mass"))
    assert {split.meta(p)["drain"] for p in range(len(split))} == {"0", "1"}


def test_masks_of_the_index_are_those_of_the_samples(masked, tmp_path):
    """Shards of an earlier version have no table of masks."""
    shutil.copytree(masked[0], tmp_path / "old")
    index = json.loads((tmp_path / "old" / "index.json").read_text())
    for name, entry in index["splits"].items():
        del entry["tables"][f"{name}.masks.npy"]
        (tmp_path / "old" / f"{name}.masks.npy").unlink()
    (tmp_path / "old" / "index.json").write_text(json.dumps(index))
    task = ("No Finding", "Mass")
    new, old = (Split(root, "train", task).lesion_masks() for root in (masked[0], tmp_path / "old"))
    assert new.position.tolist() == old.position.tolist()
    for name in ("xyxy", "cut", "cells"):
        assert new.rows[name].tolist() == old.rows[name].tolist()
    main(["index", str(tmp_path / "old")])
    main(["verify", str(tmp_path / "old")])
    again = Split(tmp_path / "old", "train", task).lesion_masks()
    assert again.rows["cells"].tolist() == new.rows["cells"].tolist()


def test_drawn_for_training_and_for_figures(masked):
    split, lesions = Split(masked[0], "train", ("No Finding", "Mass")), masked[1]
    index, mass = torch.arange(len(split)), torch.ones(len(split), dtype=torch.int64)
    rough = LesionRegions(split).regions(index, mass, (SIDE, SIDE), SIDE)
    exact = LesionRegions(split, exact=True).regions(index, mass, (SIDE, SIDE), SIDE)
    has = LesionRegions(split).has(index)
    for p in range(len(split)):
        truth = lesions.get(f"x ä/{split.meta(p)['source']}", np.zeros((SIDE, SIDE), bool))
        assert (exact[p].numpy() == truth).all()
        assert not truth.any() or iou(rough[p].numpy(), truth) > 0.9
        assert has[p].tolist() == [False, bool(truth.any())]
    assert len(LesionRegions(split, 0.5, 0).used) == -(-int(has[:, 1].sum()) // 2)


def test_masks_move_with_the_image(masked):
    split, mass = Split(masked[0], "train", ("No Finding", "Mass")), 1
    index = torch.from_numpy(np.flatnonzero(split.targets()[:, mass] == 1))
    pixels = torch.stack([torch.from_numpy(split.image(int(p))) for p in index])[:, None].float() / 255
    lesions = LesionRegions(split).regions(index, torch.full_like(index, mass), (SIDE, SIDE), SIDE)
    strength = Strength(rotate=15, scale=0.1, shift=0.1, flip=0.5)
    moved = augment(pixels, draw(0, 0, index), strength, masks=lesions)
    for image, region in zip(moved.images[:, 0].numpy(), moved.masks.numpy(), strict=True):
        assert iou(image > 0.6, region) > 0.75


def test_a_training_and_its_figures_use_masks(masked, tmp_path):
    flags = ["--shards", str(masked[0]), "--out", str(tmp_path / "run"), "--task", "No Finding,Mass"]
    flags += ["--backbone", "test_resnet", "--pretrained", "false", "--size", "64", "--batch", "4", "--epochs", "1"]
    flags += ["--workers", "0", "--tracker", "none", "--attention.region", "annotation"]
    job = build(resolve(flags))
    assert len(job.annotations.used) == 6
    job.train()
    outcome = job.evaluator.measure("val")
    assert int(outcome.report()["localization"]["lesion"]["Mass"]["images"]) == 3
    split = job.splits["val"]
    lesions = LesionRegions(split, exact=True).regions(outcome.pairs.image, outcome.pairs.finding, (SIDE, SIDE), SIDE)
    assert lesions.flatten(1).any(1).tolist() == (outcome.pairs.finding == 1).tolist()


@pytest.fixture(scope="module")
def trained(masked, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--shards", str(masked[0]), "--out", str(out), "--task", "No Finding,Mass", "--epochs", "1"]
    flags += ["--backbone", "test_resnet", "--pretrained", "false", "--size", "64", "--batch", "4"]
    train.main([*flags, "--workers", "0", "--tracker", "none"])
    return out


def middle(full):
    """Row and column of the largest of a map [H,W]; of several the one nearest to their middle."""
    full = np.asarray(full)
    ys, xs = np.nonzero(full == full.max())
    at = int(((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2).argmin())
    return int(ys[at]), int(xs[at])


def test_maps_are_written_for_whoever_measures_them(masked, trained, tmp_path):
    """As CheXlocalize's evaluation reads them: a pickle of a map each, and run lengths."""
    where = ["--run", str(trained), "--shards", str(masked[0]), "--workers", "0"]
    evaluate.main([*where, "--maps", str(tmp_path / "maps"), "--by", "drain"])
    lines = list(csv.DictReader((tmp_path / "maps" / "maps.csv").read_text().splitlines()))
    split = Split(masked[0], "test", ("No Finding", "Mass"))
    assert [line["finding"] for line in lines].count("Mass") == 3
    assert len(lines) == len(split) == 6
    truth = json.loads((tmp_path / "maps/chexlocalize/truth.json").read_text())
    hot = json.loads((tmp_path / "maps/chexlocalize/segmentations.json").read_text())
    hits = []
    for line in lines:
        raw = torch.from_numpy(np.load(tmp_path / "maps" / line["map"]))
        height, width = int(line["height"]), int(line["width"])
        full = torch.nn.functional.interpolate(raw[None, None], (height, width), mode="bilinear")[0, 0]
        at = pointed(raw[None])[0] * torch.tensor([height, width])
        assert [int(line["y"]), int(line["x"])] == [
            min(int(a), n - 1) for a, n in zip(at, (height, width), strict=True)
        ]
        assert np.asarray(Image.open(tmp_path / "maps" / line["picture"])).shape == (height, width)
        if line["finding"] != "Mass":
            continue
        image = line["image"].replace("/", "_")
        with (tmp_path / "maps/chexlocalize" / f"{image}_Mass_map.pkl").open("rb") as file:
            info = pickle.load(file)  # ours
        assert info["cxr_dims"] == (width, height)
        assert torch.equal(info["map"][0, 0], raw)
        lesion = Runs.of(**truth[image]["Mass"]).mask()
        assert bool(Runs.of(**hot[image]["Mass"]).mask().any()) == (line["named"] == "1" and bool(raw.any()))
        hits.append(bool(raw.any()) and bool(lesion[middle(full)]))
    report = json.loads((trained / "report.json").read_text())["test"]
    assert report["lesions"]["Mass"]["model"]["hit"] == np.mean(hits)
    # By drain: the same images, in parts.
    groups = report["by"]["drain"]
    assert set(groups) == {"0", "1"}
    assert sum(group["images"] for group in groups.values()) == 6
    assert sum(group["per_finding"]["Mass"]["present"] for group in groups.values() if group["per_finding"]) == 3
    page = (trained / "report.html").read_text()
    assert "by drain" in page
    for more, words in (
        (["--maps", str(tmp_path / "maps")], "is there and not an empty folder"),
        (["--by", "tube"], "have no such column"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate.main([*where, *more])


@pytest.mark.parametrize(
    ("lesion", "words"),
    [
        ({"finding": "Mass", "points": [[0.1, 0.1], [0.2, 0.2]]}, "a polygon of 2 points; expected three or more"),
        ({"finding": "Mass", "points": [[-5, 1], [7, 8], [9, 1]]}, "the point -5 1 is outside of its image, 64x64"),
        ({"finding": "Mass", "size": [64, 64], "counts": [4000, 97]}, "the runs cover 4097 pixels, the mask has 64x64"),
        ({"finding": "Mass", "size": [64, 20], "counts": [1000, 280]}, "the mask is 20x64 pixels, the image 64x64"),
        ({"finding": "Mass"}, "expected lesions by image"),
        ({"finding": "Nodule", "points": [[0.1, 0.1], [0.2, 0.2], [0.1, 0.3]]}, "not labelled with"),
    ],
)
def test_lesions_that_are_none(tmp_path, lesion, words):
    lesions = images(tmp_path)
    (tmp_path / "lesions.json").write_text(json.dumps({next(iter(lesions)): [lesion]}))
    with pytest.raises((InputError, SystemExit), match=words):
        pack(tmp_path, tmp_path / "out")


def test_what_is_avoided_is_no_region(tmp_path, monkeypatch):
    """A device inside the lesion's region: on healthy images, too."""
    lesions = images(tmp_path)
    as_runs(tmp_path, lesions)
    boxes = [(name, "Chest Drain", 20, 10, 30, 60) for name in [*lesions][:6]] + [
        ("x ä/00.png", "Chest Drain", 1, 1, 9, 9)
    ]
    with (tmp_path / "boxes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "finding", "x0", "y0", "x1", "y1"), *boxes])
    out = pack(tmp_path, tmp_path / "out", "--boxes", str(tmp_path / "boxes.csv"), "--devices", "Chest Drain")
    (tmp_path / "mass.yaml").write_text("Mass:\n  region: {rectangles: [[0, 0, 0.9, 0.9]]}\n")
    flags = ["--shards", str(out), "--task", "No Finding,Mass", "--backbone"]
    flags += ["test_resnet", "--pretrained", "false", "--size", "64", "--batch", "4", "--workers", "0"]
    flags += [
        "--tracker",
        "none",
        "--epochs",
        "1",
        "--swap.probability",
        "0",
        "--findings",
        str(tmp_path / "mass.yaml"),
    ]

    def made(name, *more):
        return build(resolve([*flags, "--out", str(tmp_path / name), *more]))

    plain = made("plain")
    for more in ([], ["--attention.region", "both"]):
        job = made(f"run{len(more)}", "--attention.avoid", "Chest Drain", *more)
        assert job.avoided.images > 1
        seen = 0
        for batch in job.loader.batches(0):
            region, whole = job.prepare(batch, True).region, plain.prepare(batch, True).region
            for b, position in enumerate(batch.index.tolist()):
                drain = [
                    box.xyxy for box in job.splits["train"].meta(position)["boxes"] if box.finding == "Chest Drain"
                ]
                if batch.target[b, 1] != 1 or more:
                    continue
                expected = whole[b].clone()
                for x0, y0, x1, y1 in drain:
                    expected[int(y0) : int(y1), int(x0) : int(x1)] = 0
                assert torch.equal(region[b], expected)
                seen += bool(drain)
        assert seen or more
    job.train()
    # Lent: none of these images has lungs
    monkeypatch.setattr(loop, "locate", lambda *a: replace(located := locate(*a), found=torch.ones_like(located.found)))
    more = ["--balance.lam", "1", "--batch", "12"]
    lends = made("lends", "--attention.avoid", "Chest Drain", "--swap.devices", "1", *more)
    plain, changed = made("cross-entropy", *more), 0
    for batch in lends.loader.batches(0):
        now, before = lends.prepare(batch, False).images, plain.prepare(batch, False).images
        other = (now != before).flatten(1).any(1)
        assert not (other & (batch.target[:, 1] == 1)).any()  # healthy ones alone
        changed += int(other.sum())
    assert changed
    lends.train()
    with pytest.raises(InputError, match="no training image has a box or mask of that name"):
        made("other", "--attention.avoid", "Pacemaker")


def test_a_table_of_masks_does_not_leave_its_folder(tmp_path):
    lesions = images(tmp_path)
    as_table(tmp_path, lesions, "mask", lambda *_: "../secret.png")
    with pytest.raises((InputError, SystemExit), match="leaves the folder of the table"):
        pack(tmp_path, tmp_path / "out")


def test_columns_that_cannot_be_kept(tmp_path):
    lesions = images(tmp_path)
    as_runs(tmp_path, lesions)
    for name, words in (("boxes", "has no column 'boxes'"), ("tube", "has no column 'tube'")):
        with pytest.raises((InputError, SystemExit), match=words):
            pack(tmp_path, tmp_path / "out", "--keep-column", name)
