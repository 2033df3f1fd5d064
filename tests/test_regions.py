import math

import numpy as np
import pytest
import torch

from shards.errors import InputError
from trainer.regions import (
    PUBLISHED,
    TASKS,
    Regions,
    Rule,
    between,
    finding_regions,
    has_region,
    task_findings,
    wider,
    without_rule,
)
from trainer.regions.place import HEART


def published(box, finding, size):
    """The published slices, in plain Python."""
    x, y, w, h = box
    region = np.zeros((size, size), bool)
    if finding == "Effusion":
        region[round(y + h / 2) : y + h, x : x + w] = True
    elif finding == "Pneumothorax":
        region[y : round(y + h / 2), x : x + w] = True
    elif finding == "Subcutaneous Emphysema":
        region[:] = True
        region[y:size, x : x + w] = False
    return region


@pytest.mark.parametrize(
    "finding", ["No Finding", "Effusion", "Pneumothorax", "Subcutaneous Emphysema", "Cardiomegaly"]
)
def test_regions_are_the_published_slices(finding):
    rng = np.random.default_rng(0)
    xy = rng.integers(0, 150, (200, 2))
    wh = np.minimum(rng.integers(1, 224, (200, 2)), 224 - xy)
    boxes = torch.from_numpy(np.concatenate([xy, xy + wh], 1))
    regions = finding_regions(boxes, [finding] * 200, 224).numpy()
    for region, box in zip(regions, np.concatenate([xy, wh], 1).tolist(), strict=True):
        assert (region == published(box, finding, 224)).all()


def test_halves_meet_at_half_to_even():
    boxes = torch.tensor([[0, 0, 4, 5], [0, 1, 4, 6]])  # middles 2.5 -> 2 and 3.5 -> 4
    top = finding_regions(boxes, ["Pneumothorax"] * 2, 8)
    bottom = finding_regions(boxes, ["Effusion"] * 2, 8)
    assert top[0, :, 0].sum() == 2
    assert bottom[0, :, 0].sum() == 3
    assert top[1, :, 0].sum() == 3
    assert not (top & bottom).any()


def test_no_lungs_found_leaves_emphysema_an_empty_region():
    assert not finding_regions(torch.tensor([[0, 0, 8, 8]]), ["Subcutaneous Emphysema"], 8).any()


def test_regions_that_say_nothing():
    region = torch.zeros(3, 4, 4, dtype=torch.bool)
    region[1], region[2, :2] = True, True
    assert has_region(region).tolist() == [False, False, True]
    assert has_region(region.float()).tolist() == [False, False, True]
    assert has_region(torch.full((1, 4, 4), 0.5)).tolist() == [True]


def chest() -> tuple[torch.Tensor, torch.Tensor]:
    """Two lungs in an image of 40 pixels, columns 6 to 14 and 24 to 34, rows 8 to 28 and 8 to 32, and their box."""
    lungs = torch.zeros(1, 40, 40, dtype=torch.bool)
    lungs[0, 8:28, 6:14] = True
    lungs[0, 8:32, 24:34] = True
    return lungs, torch.tensor([[6, 8, 34, 32]])


def weight_of(rule: Rule, lungs: torch.Tensor | None = None) -> torch.Tensor:
    known, box = chest()
    return Regions(["No Finding", "Mine"], {"Mine": rule}, 40)(
        torch.tensor([1]), box, known if lungs is None else lungs
    ).weight[0]


def filled(*rectangles: tuple[int, int, int, int]) -> torch.Tensor:
    region = torch.zeros(40, 40, dtype=torch.bool)
    for x0, y0, x1, y1 in rectangles:
        region[y0:y1, x0:x1] = True
    return region


BOX = ((0.0, 0.0, 1.0, 1.0),)
LOWER = ((0.0, 0.5, 1.0, 1.0),)  # from row 20 of the chest


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(BOX, place="within"), filled((6, 8, 14, 28), (24, 8, 34, 32))),
        # Beyond the box's edges, which do not cut
        (
            Rule(BOX, place="within", dilate=0.05),
            filled((4, 6, 16, 30), (22, 6, 36, 34)),
        ),
        (Rule(LOWER, place="within", dilate=0.05), filled((4, 20, 16, 30), (22, 20, 36, 34))),
        (Rule(LOWER, place="within", outside=True), filled((6, 8, 14, 20), (24, 8, 34, 20))),  # all but the lower half
        (Rule(BOX, place="between"), filled((14, 8, 24, 28))),  # below row 28 there is one lung alone
        (Rule(LOWER, place="between", dilate=0.05), filled((12, 20, 26, 30))),
        # The lower outer quarter of each lung, of which one has a higher base than the other
        (Rule(LOWER, place="within", each=((0.5, 0.5, 1, 1),)), filled((6, 18, 10, 28), (29, 20, 34, 32))),
        (
            Rule(LOWER, place="within", dilate=0.05, each=((0.5, 0.5, 1, 1),)),
            filled((4, 18, 10, 30), (29, 20, 36, 34)),
        ),
        (
            Rule(LOWER, place="within", outside=True, each=((0.5, -math.inf, 1, math.inf),)),
            filled((10, 8, 14, 28), (24, 8, 29, 32)),
        ),
        # Neither lungs nor what is between them
        (
            Rule(BOX, place="outside"),
            ~filled((6, 8, 34, 28), (24, 8, 34, 32)),
        ),
        (
            Rule(((-math.inf, -math.inf, math.inf, 1.0),), place="outside", dilate=0.05),
            filled((0, 0, 40, 32)) & ~filled((4, 6, 36, 30), (22, 6, 36, 34)),
        ),
        (
            Rule(BOX, place="rim", dilate=0.05),
            filled((4, 6, 16, 30), (22, 6, 36, 34)) & ~filled((8, 10, 12, 26), (26, 10, 32, 30)),
        ),
    ],
)
def test_places_by_hand(rule, expected):
    weight = weight_of(rule)
    assert set(weight.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(weight > 0, expected)


def test_a_place_may_have_another_weight_beyond_its_part():
    weight = weight_of(Rule(LOWER, place="within", elsewhere=0.25))
    upper, lower = filled((6, 8, 14, 20), (24, 8, 34, 20)), filled((6, 20, 14, 28), (24, 20, 34, 32))
    assert (weight[upper] == 0.25).all()
    assert (weight[lower] == 1).all()
    assert (weight[~(upper | lower)] == 0).all()


def test_the_hollow_of_one_lungs_base_is_not_between_the_two():
    lungs, _ = chest()
    lungs[0, 22:28, 8:12] = False  # the dome of the diaphragm under one lung: its own recess on either side
    middle = between(lungs)[0]
    assert torch.equal(middle[:22], filled((14, 8, 24, 22))[:22])
    hollow = lungs.clone()
    hollow[0, :, 20:] = False
    hollow[0, 8:28, 14:20] = True  # one wide lung alone, with a hollow base: there is no other
    assert not between(hollow)[0, :22].any()


def test_where_the_lungs_are_unknown_or_leave_nothing_the_part_of_the_box_stands_in():
    lungs, box = chest()
    one = lungs.clone()
    one[0, :, 20:] = False  # nothing lies between one lung and none
    rules = {"Below": Rule(LOWER, place="within"), "Between": Rule(BOX, place="between"), "Boxed": Rule(LOWER)}
    regions = Regions(["No Finding", *rules], rules, 40)
    labels = torch.tensor([0, 1, 2, 3])
    for given, replaced in (
        (lungs, [0, 0, 0, 0]),
        (one, [0, 0, 1, 0]),
        (torch.zeros_like(lungs), [0, 1, 1, 0]),
        (None, [0, 1, 1, 0]),
    ):
        found = regions(labels, box.repeat(4, 1), None if given is None else given.repeat(4, 1, 1))
        assert found.replaced.tolist() == list(map(bool, replaced))
        for b, name in enumerate(rules, 1):
            if found.replaced[b] or name == "Boxed":
                assert torch.equal(
                    found.weight[b] > 0, filled((6, 20, 34, 32)) if name != "Between" else filled((6, 8, 34, 32))
                )
        assert not found.weight[0].any()
    # Beyond the box stands in for what lies outside of the lungs, here not below them; in the box for what lies inside,
    # whatever the part takes away.
    beyond = Rule(((-math.inf, -math.inf, math.inf, 1.0),), place="outside")
    upper = Rule(LOWER, outside=True, place="within")
    found = Regions(["Beyond", "Upper"], {"Beyond": beyond, "Upper": upper}, 40)(
        torch.tensor([0, 1]), box.repeat(2, 1), None
    )
    assert torch.equal(found.weight[0] > 0, filled((0, 0, 40, 32)) & ~filled((6, 8, 34, 32)))
    assert torch.equal(found.weight[1] > 0, filled((6, 8, 34, 20)))
    # Without lungs the box is the whole image: what has no narrower part says nothing, and does not count.
    whole = Regions(["Mine"], {"Mine": Rule(BOX, place="within")}, 40)(
        torch.tensor([0]), torch.tensor([[0, 0, 40, 40]]), torch.zeros_like(lungs)
    )
    assert not has_region(whole.weight)[0]


def test_figures_take_the_region_where_its_weight_is_a_half_or_more():
    found = Regions(["Mine"], {"Mine": Rule(LOWER, place="within", elsewhere=0.25)}, 40)(
        torch.tensor([0]), chest()[1], chest()[0]
    )
    assert torch.equal(found.region[0], filled((6, 20, 14, 28), (24, 20, 34, 32)))
    assert (found.weight[0] > 0).sum() > found.region[0].sum()


def test_the_smaller_lung_has_the_larger_weight():
    lungs, box = chest()  # 160 and 240 pixels
    rule = Rule(LOWER, place="within", sided=5)
    left, right = filled((6, 20, 14, 28)), filled((24, 20, 34, 32))
    found = Regions(["Mine"], {"Mine": rule}, 40)(torch.tensor([0]), box, lungs)
    share = 1 / (1 + math.exp(-5 * ((240 - 160) / 400 + HEART)))
    assert (found.weight[0][left] == 1).all()
    assert torch.allclose(found.weight[0][right], torch.tensor((1 - share) / share))
    assert (found.weight[0][~(left | right)] == 0).all()
    assert torch.equal(found.region[0], left | right), "figures know no side"
    other = Regions(["Mine"], {"Mine": rule}, 40)(torch.tensor([0]), box, lungs.flip(2))
    share = 1 / (1 + math.exp(-5 * ((240 - 160) / 400 - HEART)))
    assert torch.allclose(other.weight[0].flip(1)[right], torch.tensor((1 - share) / share))
    gone = Regions(["Mine"], {"Mine": rule}, 40)(torch.tensor([0]), box, torch.zeros_like(lungs))
    assert torch.equal(gone.weight[0] > 0, filled((6, 20, 34, 32)))


def test_the_hearts_share_is_no_sign_of_a_side():
    lungs = torch.zeros(1, 100, 100, dtype=torch.bool)
    lungs[0, 10:60, 5 : 5 + 43] = True
    lungs[0, 10:60, 55 : 55 + 37] = True  # 0.075 of both less
    weight = weight_of_lungs(Rule(((0, 0, 1, 1),), place="within", sided=10), lungs)
    assert weight[lungs[0]].min() > 0.94


def weight_of_lungs(rule, lungs):
    size = lungs.shape[-1]
    box = torch.tensor([[0, 0, size, size]])
    return Regions(["Mine"], {"Mine": rule}, size)(torch.tensor([0]), box, lungs).weight[0]


def test_one_lung_alone_is_not_where_the_other_would_be():
    lungs, _ = chest()
    lungs[0, :, 20:] = False
    weight = weight_of(Rule(BOX, place="within", sided=10), lungs)
    assert torch.equal(weight > 0, filled((6, 8, 14, 28)))
    assert torch.isfinite(weight).all()


def test_a_rim_is_never_thinner_than_a_pixel():
    assert weight_of(Rule(BOX, place="rim", dilate=0.001)).any()


def test_rules_of_one_batch_do_not_mix():
    lungs, box = chest()
    rules = {
        str(k): Rule(BOX, place=place, dilate=d)
        for k, (place, d) in enumerate([("within", 0.0), ("within", 0.1), ("between", 0.1), ("rim", 0.05)])
    }
    labels = torch.tensor([3, 1, 0, 2, 1])
    together = Regions(list(rules), rules, 40)(labels, box.repeat(5, 1), lungs.repeat(5, 1, 1)).weight
    for b, k in enumerate(labels.tolist()):
        assert torch.equal(together[b], weight_of(rules[str(k)]))


def test_wider_reaches_the_corners_and_stops_at_the_image():
    mask = filled((0, 0, 1, 1), (20, 20, 21, 21))[None]
    assert torch.equal(wider(mask, 3)[0], filled((0, 0, 4, 4), (17, 17, 24, 24)))
    assert wider(mask, 0) is mask
    assert not between(torch.zeros(1, 8, 8, dtype=torch.bool)).any()


def test_tasks():
    assert set(TASKS) == {"ne", "np", "ns", "nc", "nep", "neps"}
    assert task_findings("No Finding, Nodule") == ("No Finding", "Nodule")
    assert without_rule(("No Finding", "Effusion", "Cardiomegaly"), PUBLISHED) == ["Cardiomegaly"]
    with pytest.raises(InputError, match="did you mean nep"):
        task_findings("nepp")
    with pytest.raises(InputError, match="different names"):
        task_findings("Effusion,Effusion")
