import numpy as np
import pytest
import torch
from scipy import ndimage

from trainer.lungs import cleanup
from trainer.lungs.cleanup import (
    _labelled_by_kornia,
    _labelled_by_scipy,
    believable,
    clean,
    complete,
    components,
    fill_holes,
    tidy,
    two_largest,
)

EIGHT = np.ones((3, 3), bool)


def random_masks(seed, count=300, size=24):
    """Blobs, noise, rings and empty masks: everything that can go wrong with labels."""
    rng = np.random.default_rng(seed)
    masks = []
    for k in range(count):
        noise = rng.random((size, size))
        if k % 3:
            noise = ndimage.gaussian_filter(noise, rng.uniform(0.4, 3))
        masks.append(noise > np.quantile(noise, rng.uniform(0.3, 0.98)))
    masks[0][:] = False
    masks[1][:] = True
    return torch.from_numpy(np.stack(masks))


LABELLED = {"scipy": _labelled_by_scipy, "kornia": _labelled_by_kornia}


@pytest.mark.parametrize("by", LABELLED)
@pytest.mark.parametrize("size", [24, 33])
def test_components_are_those_of_scipy(size, by, monkeypatch):
    monkeypatch.setattr(cleanup, "_labelled_by_scipy", LABELLED[by])
    masks = random_masks(5, 60, size)
    labels, area = components(masks)
    for b in range(len(masks)):
        expected, n = ndimage.label(masks[b].numpy(), EIGHT)
        assert sorted(area[b][area[b] > 0].tolist()) == sorted(np.bincount(expected.ravel())[1:].tolist())
        for k in range(1, n + 1):
            assert len(np.unique(labels[b].numpy()[expected == k])) == 1


@pytest.mark.parametrize("by", LABELLED)
def test_a_spiral_is_one_component(by):
    """Union-find is exact; a search of 100 steps, kornia's default elsewhere, cuts it into pieces."""
    size = 96
    mask = np.zeros((size, size), bool)
    low, high = 0, size - 1
    while high - low > 4:
        mask[low, low : high + 1] = mask[low : high + 1, high] = mask[high, low : high + 1] = True
        mask[low + 2 : high + 1, low] = True
        mask[low + 2, low : low + 3] = True
        low, high = low + 2, high - 2
    labels = LABELLED[by](torch.from_numpy(mask)[None])
    assert len(labels.unique()) - 1 == ndimage.label(mask, EIGHT)[1]


def pair(size, *, left=True, right=True):
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    one = ((x - 0.3) / 0.13) ** 2 + ((y - 0.5) / 0.3) ** 2 < 1
    two = ((x - 0.7) / 0.13) ** 2 + ((y - 0.5) / 0.3) ** 2 < 1
    return torch.from_numpy((one & left) | (two & right))[None]


def test_specks_and_holes_go_and_two_lungs_stay():
    masks = pair(64)
    dirty = masks.clone()
    dirty[0, 60:62, 60:62] = True
    dirty[0, 1, 1] = True
    dirty[0, 30:34, 18:21] = False
    assert (two_largest(dirty)[0] | masks == masks).all()
    cleaned, count = tidy(dirty)
    assert (cleaned == masks).all()
    assert count.tolist() == [2]
    assert (fill_holes(dirty)[0, 30:34, 18:21]).all()


def test_a_lung_that_is_missing_is_mirrored():
    for side in ({"left": False}, {"right": False}):
        masks = pair(64, **side)
        whole = complete(masks, torch.tensor([1]))
        assert (whole & masks == masks).all()
        assert whole.sum() == 2 * masks.sum()
        both = clean(masks, masks.float())
        assert both.sum() == 2 * masks.sum()
    assert (complete(pair(64), torch.tensor([2])) == pair(64)).all()


@pytest.mark.parametrize("by", LABELLED)
@pytest.mark.parametrize("seed", range(3))
def test_tidied_by_hand(seed, by, monkeypatch):
    """Of each mask the largest component, a second one if it is no speck, and their holes filled: by scipy."""
    monkeypatch.setattr(cleanup, "_labelled_by_scipy", LABELLED[by])
    masks = torch.cat([random_masks(seed), pair(24), pair(24, left=False)])
    cleaned, count = tidy(masks)
    compared = 0
    for mask, result, n in zip(masks.numpy(), cleaned.numpy(), count.tolist(), strict=True):
        labels, _ = ndimage.label(mask, EIGHT)
        areas = np.bincount(labels.ravel(), minlength=3)[1:]
        largest = np.argsort(-areas, kind="stable")[:2]
        wanted = [k + 1 for k in largest if areas[k] and areas[k] >= cleanup.SPECK * areas.max()]
        assert n == len(wanted)
        if len(areas) > 2 and np.sort(areas)[-3] in areas[[k - 1 for k in wanted]]:
            continue  # which of two equal ones is the second, nobody says
        assert (result == ndimage.binary_fill_holes(np.isin(labels, wanted), EIGHT)).all()
        compared += 1
    assert compared > 200


def nothing(size=64):
    return torch.zeros(1, size, size, dtype=torch.bool)


def box(y0, y1, x0, x1, size=64):
    masks = nothing(size)
    masks[0, int(y0 * size) : int(y1 * size), int(x0 * size) : int(x1 * size)] = True
    return masks


@pytest.mark.parametrize(
    "masks",
    [
        nothing(),
        ~nothing(),  # everything
        box(0.1, 0.9, 0.1, 0.9),  # one huge blob
        box(0.45, 0.55, 0.3, 0.36) | box(0.45, 0.55, 0.6, 0.66),  # tiny
        box(0.2, 0.8, 0.4, 0.6),  # one lung in the middle, as in a lateral view
        box(0.1, 0.3, 0.1, 0.4) | box(0.7, 0.9, 0.6, 0.9),  # one above the other
    ],
    ids=["empty", "full", "blob", "tiny", "lateral", "diagonal"],
)
def test_what_is_no_pair_of_lungs_is_nothing(masks):
    assert not clean(masks, masks.float()).any()


def test_a_pair_is_believed_only_where_the_net_is_sure():
    masks = pair(64)
    assert believable(masks, torch.tensor([0.95])).all()
    assert not believable(masks, torch.tensor([0.6])).any()
    batch = torch.cat([masks, nothing(), masks])
    assert clean(batch, batch.float()).flatten(1).any(1).tolist() == [True, False, True]
