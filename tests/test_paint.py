import numpy as np
import pytest
import torch

from shards.phantom import phantom
from trainer.lungs.paint import Painting, collapse, devices, frame, gas, opacity, paint, sides, tone


@pytest.fixture(scope="module")
def chest():
    sample = phantom("x", "No Finding", np.random.default_rng(0), 128)
    return torch.from_numpy(sample.image).float() / 255, torch.from_numpy(sample.mask) > 0


def test_sides_are_the_two_lungs(chest):
    _, mask = chest
    left, right = sides(mask)
    assert (left.mask | right.mask == mask).all()
    assert not (left.mask & right.mask).any()
    assert (left.sign, right.sign) == (-1, 1)
    for side in (left, right):
        inside = side.depth[side.mask]
        assert 0 <= inside.min() < 0.05
        assert 0.95 < inside.max() <= 1
        assert side.across[side.mask].max() == 1
    assert sides(torch.zeros_like(mask)) == []
    assert len(sides(left.mask)) in (1, 2)  # one lung alone is cut somewhere, or not at all


@pytest.mark.parametrize("kind", ["effusion", "whiteout"])
def test_an_opacity_makes_one_lung_white_and_leaves_the_other(chest, kind):
    image, mask = chest
    left, right = sides(mask)
    painted = opacity(image, mask, left, np.random.default_rng(0), kind=kind, strength=1.0, level=0.5)
    base = left.mask & (left.depth > 0.75)
    tissue = image[~mask & (image > 0.3)].mean()
    assert painted[base].mean() > 0.75 * tissue > image[base].mean()
    assert (painted - image).abs()[right.mask & (right.across > 0.2)].max() < 0.02
    apex = left.mask & (left.depth < 0.2) & (left.across < 0.8)
    changed = (painted - image)[apex].mean()
    assert changed > 0.1 if kind == "whiteout" else changed < 0.03


def test_the_meniscus_climbs_to_the_chest_wall(chest):
    image, mask = chest
    side = sides(mask)[0]
    painted = opacity(image, mask, side, np.random.default_rng(1), kind="effusion", strength=1.0, level=0.5)
    wet = side.mask & (painted - image > 0.1)
    outer, inner = wet & (side.across > 0.7), wet & (side.across < 0.4)
    assert side.depth[outer].min() < side.depth[inner].min()


def test_gas_is_outside_the_lungs(chest):
    image, mask = chest
    darker = torch.zeros_like(image)
    for seed in range(8):
        darker = torch.maximum(darker, image - gas(image, mask, np.random.default_rng(seed)))
    assert darker[mask].max() < 0.1
    assert darker[~mask].max() > 0.2


def test_everything_stays_in_range_and_away_from_the_mask(chest):
    image, mask = chest
    for seed in range(6):
        for draw in (
            lambda rng: collapse(image, sides(mask)[0], rng),
            lambda rng: devices(image, rng),
            lambda rng: tone(image, rng),
            lambda rng: frame(image, mask, rng),
            lambda rng: opacity(image, mask, sides(mask)[1], rng, kind="consolidation", strength=0.8),
            lambda rng: opacity(image, mask, sides(mask)[1], rng, kind="haze", strength=0.8),
        ):
            painted = draw(np.random.default_rng(seed))
            assert painted.shape == image.shape
            assert painted.isfinite().all()
            assert 0 <= painted.min() <= painted.max() <= 1
        framed = frame(image, mask, np.random.default_rng(seed))
        assert (framed[mask] == image[mask]).all()


def test_a_painting_depends_on_the_sample_alone(chest):
    image, mask = chest
    images, masks = image.expand(3, 1, -1, -1), mask.expand(3, -1, -1)
    every = Painting(1, 1, 1, 1, 1, 1, 1)
    together, moved = paint(images, masks, 0, 2, [5, 6, 7], every)
    alone, alone_mask = paint(images[:1], masks[:1], 0, 2, [6], every)
    assert (together[1] == alone[0]).all()
    assert (moved[1] == alone_mask[0]).all()
    assert (together[0] != together[1]).any()
    other, _ = paint(images[:1], masks[:1], 0, 3, [6], every)
    assert (other != alone).any()
    nothing, same = paint(images, masks, 0, 0, [0, 1, 2], Painting())
    assert (nothing == images).all()
    assert (same == masks).all()


def test_only_a_warp_moves_the_mask(chest):
    image, mask = chest
    still = Painting(opacity=1, gas=1, collapse=1, devices=1, tone=1, frame=1)
    for index in range(6):
        assert (paint(image[None, None], mask[None], 0, 0, [index], still)[1][0] == mask).all()
    moved = paint(image[None, None], mask[None], 0, 0, [1], Painting(warp=1))[1][0]
    assert 0.7 < 2 * (moved & mask).sum() / (moved.sum() + mask.sum()) < 1


def test_an_image_without_lungs_is_painted_all_the_same(chest):
    image, mask = chest
    images, masks = paint(image[None, None], torch.zeros_like(mask)[None], 0, 0, [0], Painting(1, 1, 1, 1, 1, 1, 1))
    assert images.isfinite().all()
    assert not masks.any()
