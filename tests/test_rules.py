import itertools

import numpy as np
import pytest
import torch

from shards.errors import InputError
from shards.sample import LesionBox, Sample
from shards.targets import SingleLabel
from trainer.regions import finding_regions
from trainer.rules import Finding, Rule, read_findings, rules_of, to_yaml, without_rule

BOX = torch.tensor([[10, 20, 50, 80]])  # 40 wide, 60 high


def written(tmp_path, text: str) -> str:
    (tmp_path / "mine.yaml").write_text(text)
    return str(tmp_path / "mine.yaml")


def region_of(tmp_path, region: str) -> np.ndarray:
    rules = rules_of(read_findings(written(tmp_path, f"Mine:\n  region: {region}\n")))
    return finding_regions(BOX, ["Mine"], 100, rules)[0].numpy()


def filled(*rectangles: tuple[int, int, int, int]) -> np.ndarray:
    region = np.zeros((100, 100), bool)
    for x0, y0, x1, y1 in rectangles:
        region[y0:y1, x0:x1] = True
    return region


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ("{half: lower}", filled((10, 50, 50, 80))),
        ("{half: left}", filled((10, 20, 30, 80))),
        ("{quadrant: upper right}", filled((30, 20, 50, 50))),
        ("{lung: right}", filled((10, 20, 30, 80))),  # the patient's right lies on the image's left
        ("{box: true}", filled((10, 20, 50, 80))),
        ("{box: true, dilate: 0.1}", filled((6, 14, 54, 86))),
        ("{box: true, outside: true}", ~filled((10, 20, 50, 80))),
        ("{rectangles: [[0, 0, 0.5, 0.5], [0.75, 0.75, 1, 1]]}", filled((10, 20, 30, 50), (40, 65, 50, 80))),
        ("{rectangles: [[-.inf, 0.5, .inf, .inf]]}", filled((0, 50, 100, 100))),
        ("{rectangles: [[-2, -2, 0, 0]]}", filled((0, 0, 10, 20))),  # cut at the image
    ],
)
def test_every_shape(tmp_path, region, expected):
    assert (region_of(tmp_path, region) == expected).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Mine: [1", "is not YAML"),
        ("- Mine", "expected `Name:` lines"),
        ("Mine: 3", "Mine: expected a name with settings under it"),
        ("Mine:\n  regoin: {half: lower}", "Mine: unknown setting regoin; did you mean region"),
        (
            "Mine:\n  region: lower",
            r"Mine: region: expected a place or a part of the lung box, such as \{within: lungs\} or \{half: lower\}",
        ),
        ("Mine:\n  region: {half: middle}", "half: middle: expected one of upper, lower, left, right"),
        ("Mine:\n  region: {half: [lower]}", "half: .*expected one of upper, lower, left, right"),
        ("Mine:\n  region: {half: lower, lung: left}", "expected exactly one of .*, got half, lung"),
        ("Mine:\n  region: {dilate: 0.1}", "expected exactly one of .*, got none"),
        ("Mine:\n  region: {half: lower, widen: 0.1}", "unknown setting widen"),
        ("Mine:\n  region: {half: lower, dilate: 2}", "dilate: 2: expected a share"),
        ("Mine:\n  region: {half: lower, dilate: true}", "dilate: True: expected a share"),
        ("Mine:\n  region: {half: lower, outside: 1}", "outside: 1: expected true, false or lungs"),
        ("Mine:\n  region: {within: lung}", "within: lung: expected lungs"),
        ("Mine:\n  region: {within: true, half: lower}", "within: True: expected lungs"),
        (
            "Mine:\n  region: {within: lungs, between: lungs}",
            "expected at most one of within, between, outside, rim, got within, between",
        ),
        ("Mine:\n  region: {wihtin: lungs}", "unknown setting wihtin; did you mean within"),
        (
            "Mine:\n  region: {within: lungs, dilate: 0.3}",
            "dilate: 0.3: expected a share of the image's side, 0 to 0.2",
        ),
        ("Mine:\n  region: {rim: lungs}", "rim: expected its width beside it, such as dilate: 0.03"),
        (
            "Mine:\n  region: {within: lungs, sided: 200}",
            "sided: 200: expected a slope from 0 to 100",
        ),
        (
            "Mine:\n  region: {between: lungs, sided: 5}",
            "sided: is of a place at the lungs, within or rim",
        ),
        (
            "Mine:\n  region: {within: lungs, half: lower, elsewhere: 1}",
            "elsewhere: 1: expected a weight from 0 to below 1",
        ),
        (
            "Mine:\n  region: {half: lower, elsewhere: 0.5}",
            "elsewhere: is the weight of a place beyond its part; give both",
        ),
        (
            "Mine:\n  region: {within: lungs, outside: true}",
            "outside: true takes what is left of a place beyond its part, and this part is all of it",
        ),
        (
            "Mine:\n  region: {rim: lungs, dilate: 0.1, rectangles: [[0, 0, 1, 1]], elsewhere: 0.5}",
            "elsewhere: is the weight .* this part is all of it",
        ),
        (
            "Mine:\n  region: {within: lungs, elsewhere: 0.5}",
            "elsewhere: is the weight of a place beyond its part; give both",
        ),
        ("Mine:\n  region: {each: [[0, 0, 1, 1]]}", "each: is a part of a place at the lungs, within or rim"),
        ("Mine:\n  region: {between: lungs, each: [[0, 0, 1, 1]]}", "each: is a part of a place at the lungs"),
        (
            "Mine:\n  region: {within: lungs, each: [[1, 0, 0.5, 1]]}",
            r"each: expected \[\[spine, top, wall, bottom\], ...\] in shares of the box of each lung, spine < wall",
        ),
        ("Mine:\n  region: {box: false}", "box: False: expected true"),
        ("Mine:\n  region: {rectangles: [[0, 0, 0, 1]]}", "left < right, top < bottom; got"),
        ("Mine:\n  region: {rectangles: [0, 0, 1, 1]}", "left < right, top < bottom; got"),
        ("Mine:\n  region: {rectangles: []}", "left < right, top < bottom"),
        ("Mine:\n  region: {rectangles: [[0, 0, .nan, 1]]}", "left < right, top < bottom; got"),
        ("Mine:\n  region: {rectangles: [[20, 30, 200, 300]]}", "looks like pixels"),
        ("No Finding:\n  region: {half: lower}", "No Finding is the absence of findings"),
        ("Mine:\n  images: some", "images: some: expected only .* or any"),
        ("Mine: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("? [1, 2]\n: {images: any}", "is not YAML"),
        ("!!map text", "is not YAML"),
        ("Mine:\n  images: any\nMine:\n  images: only", "mine.yaml, line 3: 'Mine' is given twice; remove one"),
        ("Mine:\n  source: 2020-99-99", "is not YAML"),
        ("Mine:", "Mine: expected a name with settings under it"),
        ("Mine, too:\n  images: any", "Mine, too: must not hold a comma"),
        ("Mine:\n  region: {rectangles: [[0, 0, 1, inf]]}", r"the image's edge is \.inf, with a point"),
    ],
)
def test_what_is_no_finding_is_refused_by_name(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        read_findings(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"no such file, and no ready-made set \(nih, published\)"):
        read_findings(str(tmp_path / "none.yaml"))


def test_a_file_extends_and_replaces_the_ready_made_ones(tmp_path):
    ready = read_findings()
    mine = read_findings(written(tmp_path, "Effusion:\n  region: {box: true}\nPlaque:\n  images: any\n"))
    assert mine["Effusion"].rule == Rule(((0, 0, 1, 1),))
    assert mine["Plaque"] == Finding(None, "any")
    assert {name: f for name, f in mine.items() if name not in ("Effusion", "Plaque")} == {
        n: f for n, f in ready.items() if n != "Effusion"
    }


def test_an_entry_without_a_region_keeps_the_ready_made_one(tmp_path):
    ready = read_findings()["Effusion"]
    assert read_findings(written(tmp_path, "Effusion: {images: any}"))["Effusion"] == Finding(
        ready.rule, "any", ready.source
    )
    assert read_findings(written(tmp_path, "Effusion: {images: any, region: null}"))["Effusion"] == Finding(None, "any")
    merged = "Base: &b {images: any}\nMine: {<<: *b, region: {half: lower}}\nOther: {<<: *b, images: only}\n"
    # A name that a merge brings may be given again
    assert read_findings(written(tmp_path, merged))["Other"].images == "only"


def test_what_is_written_reads_back(tmp_path):
    everything = read_findings() | {"Nowhere": Finding(None, "any", "nobody: knows")}
    again = read_findings(written(tmp_path, to_yaml(everything)))
    assert again == everything


def test_ready_made_findings_have_sources_and_the_published_ones_are_among_them():
    nih, published = read_findings("nih"), read_findings("published")
    assert len(nih) >= 14
    assert all(finding.source and finding.rule for finding in nih.values())
    assert all(published[name].rule.place == "" and nih[name].rule.place for name in published)
    assert set(published) == {"Effusion", "Pneumothorax", "Subcutaneous Emphysema"}
    assert without_rule(("No Finding", "Effusion", "Cardiomegaly"), rules_of(published)) == ["Cardiomegaly"]
    assert without_rule(("No Finding", "Effusion", "Cardiomegaly"), rules_of(nih)) == []


def test_which_regions_lie_inside_the_box():
    boxed, nih = rules_of(read_findings("published")), rules_of(read_findings())
    assert boxed["Effusion"].inside()
    assert not boxed["Subcutaneous Emphysema"].inside(1.0)
    assert not Rule(((-0.05, 0, 1, 1),)).inside()
    assert Rule(((-0.05, 0, 1, 1),)).inside(0.05)
    # The swap keeps a place of the lungs, however wide; what lies outside of them it cannot.
    assert all(nih[name].inside() for name in ("Effusion", "Pneumothorax", "Cardiomegaly", "Pleural_Thickening"))
    assert not nih["Subcutaneous Emphysema"].inside(1.0)


@pytest.mark.parametrize("place", ["", "within", "between", "outside", "rim"])
def test_every_rule_that_is_accepted_reads_back(tmp_path, place):
    """A run keeps its rules as a file of its own: what could not be read back would end it."""
    parts = [
        "half: lower",
        "quadrant: upper left",
        "lung: left",
        "box: true",
        "rectangles: [[0, 0, 1, 1]]",
        "rectangles: [[-.inf, 0.2, 0.3, .inf], [0.5, 0, 1, 1]]",
        "each: [[0.5, 0.75, 1, 1], [0, 0, .inf, 0.2]]",
        "",
    ]
    accepted = 0
    for part, dilate, elsewhere, outside in itertools.product(parts, (0, 0.05), (0, 0.25), (False, True)):
        settings = [f"{place}: lungs"] if place else []
        settings += [part] if part else []
        settings += [f"dilate: {dilate}"] if dilate else []
        settings += [f"elsewhere: {elsewhere}"] if elsewhere else []
        settings += ["outside: true"] if outside and place != "outside" else []
        try:
            found = read_findings(written(tmp_path, f"Mine:\n  region: {{{', '.join(settings)}}}\n"))
        except InputError:
            continue
        accepted += 1
        text = to_yaml({"Mine": found["Mine"]})  # with six digits
        assert to_yaml({"Mine": read_findings(written(tmp_path, text))["Mine"]}) == text, settings
    assert accepted >= 12


def test_findings_of_a_file_reach_the_samples(tmp_path):
    """`images: any` in a file: images with further findings belong to the class."""
    from shards.dataset import Split
    from shards.pack import pack
    from shards.sources.item import Item, Source

    labels = [("No Finding",), ("Mine",), ("Mine", "Other"), ("Other",)] * 2

    class Few(Source):
        def load(self, item):
            return Sample(
                item.key,
                np.full((40, 40), int(item.key[1:]) * 9, np.uint8),
                item.findings,
                None,
                [LesionBox("Mine", (4, 4, 9, 9))],
            )

        def settings(self):
            return {}

    items = [Item("train", f"a{i}", found) for i, found in enumerate(labels)]
    pack(Few(items, {}, ("No Finding", "Mine", "Other"), 40), tmp_path / "shards", dataset="few", workers=1)
    only = Split(tmp_path / "shards", "train", ("No Finding", "Mine"))
    both = Split(tmp_path / "shards", "train", SingleLabel(("No Finding", "Mine"), ["Mine"]))
    assert only.counts() == {"No Finding": 2, "Mine": 2}
    assert both.counts() == {"No Finding": 2, "Mine": 4}
    assert (only.left_out, both.left_out) == (4, 2)
    # An image of two classes of the task is of neither.
    two = Split(tmp_path / "shards", "train", SingleLabel(("Mine", "Other"), ["Mine", "Other"]))
    assert two.counts() == {"Mine": 2, "Other": 2}


def test_findings_that_only_come_together_are_counted(tmp_path):
    """`images: any` for two findings of one task: images that show both belong to neither, and the message says how
    many.
    """
    from shards.dataset import Split
    from shards.pack import pack
    from shards.sources.item import Item, Source

    class Few(Source):
        def load(self, item):
            return Sample(item.key, np.zeros((8, 8), np.uint8), item.findings)

        def settings(self):
            return {}

    labels = [("No Finding",), ("Effusion", "Infiltration"), ("Effusion", "Infiltration", "Mass"), ("Infiltration",)]
    pack(
        Few([Item("train", f"a{i}", found) for i, found in enumerate(labels)]),
        tmp_path / "shards",
        dataset="few",
        workers=1,
    )
    words = (
        r"no image of Effusion alone of the task's classes \(2 show Effusion and another of them: an image "
        r"belongs to one class or to none\)"
    )
    with pytest.raises(InputError, match=words):
        Split(
            tmp_path / "shards",
            "train",
            SingleLabel(("No Finding", "Effusion", "Infiltration"), ["Effusion", "Infiltration"]),
        )
