import numpy as np
import pytest
import torch
from scipy.stats import kstest

from trainer.augment import Strength, augment, draw, lung_masks, resize
from trainer.lungs import lung_boxes, outlines


def rectangles(n=16, size=64):
    """Bright rectangles on black with their boxes."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(18, 26, (n, 2), generator=generator)
    high = torch.randint(36, 46, (n, 2), generator=generator)
    images = torch.zeros(n, 1, size, size)
    for image, (x0, y0), (x1, y1) in zip(images, low, high, strict=True):
        image[0, y0:y1, x0:x1] = 1
    return images, torch.cat([low, high], 1)


@pytest.mark.parametrize(
    "strength",
    [Strength(shift=0.1), Strength(scale=0.2), Strength(flip=1.0), Strength(shift=0.1, scale=0.2, rotate=8, flip=0.5)],
)
def test_the_box_moves_with_the_image(strength):
    images, boxes = rectangles()
    moved = augment(images, draw(0, 0, range(16)), strength, boxes=boxes, masks=images[:, 0] > 0.5)
    for image, mask, box in zip(moved.images[:, 0], moved.masks, moved.boxes, strict=True):
        rows, columns = torch.nonzero(image > 0.5, as_tuple=True)
        seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (box - seen).abs().max() <= (3 if strength.rotate else 1)
        assert ((image > 0.5) == mask).float().mean() > 0.99
    assert (moved.boxes != boxes).any()


@pytest.mark.parametrize(
    "strength", [Strength(), Strength(flip=1.0), Strength(shift=0.1, scale=0.2, rotate=15, flip=0.5)]
)
def test_the_outline_moves_with_the_image(strength):
    """An outline of a grid, drawn once at its final place, is the mask that moves pixel by pixel."""
    size, at = 96, torch.arange(96)
    disc = (
        (at[None, :, None] - 50) ** 2 / 2 + (at[None, None, :] - torch.tensor([30, 40])[:, None, None]) ** 2
    ) < 18**2
    masks = disc | ((at[None, :, None] - 45) ** 2 + (at[None, None, :] - 70) ** 2 < 12**2)
    boxes = lung_boxes(masks, size)
    grids = outlines(masks, boxes, size)
    moved = augment(masks[:, None].float(), draw(0, 0, range(2)), strength, boxes=boxes, masks=masks, outlines=grids)
    iou = (moved.lungs & moved.masks).flatten(1).sum(1) / (moved.lungs | moved.masks).flatten(1).sum(1)
    assert iou.min() > 0.93, iou
    assert torch.equal(
        augment(masks[:, None].float(), draw(0, 0, range(2)), Strength(), boxes=boxes, outlines=grids).lungs,
        lung_masks(grids, boxes, (size, size)),
    )
    assert augment(masks[:, None].float(), draw(0, 0, range(2)), strength, boxes=boxes).lungs is None
    # Rows and columns apart give what a warp that moves nothing gives.
    still = torch.eye(3).repeat(2, 1, 1)
    assert (lung_masks(grids, boxes, (size, size), still) != lung_masks(grids, boxes, (size, size))).sum() <= 2, (
        "but for a tie"
    )


def test_nothing_asked_nothing_changed():
    images, boxes = rectangles()
    same = augment(images, draw(0, 0, range(16)), Strength(), boxes=boxes)
    assert (same.images == images).all()
    assert (same.boxes == boxes).all()


def test_a_sample_is_transformed_alike_in_any_batch_and_differently_in_each_epoch():
    images, _ = rectangles()
    strength = Strength(rotate=10, scale=0.1, shift=0.1, contrast=0.2, brightness=0.1, gamma=0.3, noise=0.1, invert=0.3)
    whole = augment(images, draw(3, 1, range(16)), strength).images
    part = augment(images[5:7], draw(3, 1, torch.tensor([5, 6])), strength).images
    assert torch.allclose(whole[5:7], part, atol=1e-5)
    assert not torch.allclose(whole, augment(images, draw(3, 2, range(16)), strength).images)
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_a_box_is_cut_at_the_image_and_never_empty():
    images, _ = rectangles(4)
    boxes = torch.tensor([[0, 0, 64, 64], [0, 0, 1, 1], [63, 63, 64, 64], [0, 60, 64, 64]])
    moved = augment(images, draw(0, 0, range(4)), Strength(shift=0.5, scale=0.5, rotate=30), boxes=boxes).boxes
    assert (moved >= 0).all()
    assert (moved <= 64).all()
    assert (moved[:, 2:] > moved[:, :2]).all()


def test_resize():
    images = torch.full((2, 1, 50, 70), 51, dtype=torch.uint8)
    assert torch.allclose(resize(images, 32), torch.full((2, 1, 32, 32), 0.2))


def test_noise_is_normal_and_of_the_image_alone():
    from trainer.augment import _normal

    seeds = torch.tensor([3, 2**52 + 1, -7])
    noise = _normal(seeds, 300, 200)
    assert noise.shape == (3, 1, 300, 200)
    assert torch.equal(_normal(seeds[1:2], 300, 200)[0], noise[1])
    flat = noise.flatten(1).double()
    assert flat.mean(1).abs().max() < 4 / 60_000**0.5
    assert (flat.std(1) - 1).abs().max() < 0.02
    for sample in flat.numpy():
        assert kstest(sample, "norm").pvalue > 1e-3
        assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 0.02
        assert abs(np.corrcoef(sample[:-200], sample[200:])[0, 1]) < 0.02
    assert np.abs(np.corrcoef(flat.numpy())[np.triu_indices(3, 1)]).max() < 0.02
    assert flat.abs().max() > 3.5
