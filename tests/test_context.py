import numpy as np
import pytest
import torch

from trainer.context import Swap, blend, kept_box, kept_mask, lend_devices, partners, swap_context, under
from trainer.probe import blurred, probed
from trainer.rules import Rule

S = 40
ALWAYS = Swap(probability=1.0, dilate=0.0, feather=0.0)


def swap(*args, **options) -> torch.Tensor:
    """The images; who lent to whom agrees with them."""
    images, boxes, inside, *more = args
    options = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in options.items()}
    swapped, lenders = swap_context(images, boxes, torch.tensor(inside), *more, **options)
    changed = (swapped != images).flatten(1).any(1).tolist()
    assert all(lender != b for b, lender in enumerate(lenders.tolist()) if changed[b])
    return swapped


def test_the_kept_box_by_hand():
    kept = kept_box(torch.tensor([[10, 20, 30, 40]]), S, 0.0, 0.0)[0]
    assert (kept[20:40, 10:30] == 1).all()
    assert kept.sum() == 400
    # Dilated by a tenth of each side; a seam of 4 pixels falls linearly: 7/8, 5/8, 3/8, 1/8 at the middles of the
    # pixels.
    soft = kept_box(torch.tensor([[10, 10, 30, 20]]), S, 0.1, 0.1)[0]
    assert (soft[9:21, 8:32] == 1).all()
    assert soft[15, :8].tolist() == pytest.approx([0, 0, 0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8])
    assert soft[21:26, 20].tolist() == pytest.approx([7 / 8, 5 / 8, 3 / 8, 1 / 8, 0])
    assert soft[22, 6] == pytest.approx(5 / 8 * 5 / 8)


def test_the_kept_box_reaches_as_far_as_any_region():
    """Regions reach beyond the lung box by a share of the image;
    all kept boxes do, so that a seam tells nobody apart.
    """
    kept = kept_box(torch.tensor([[10, 8, 30, 28]]), S, 0.05, 0.0, reach=0.1)[0]
    assert (kept[4:32, 6:34] == 1).all()
    assert kept.sum() == 28 * 28
    assert under(torch.tensor([[10, 20, 30, 40], [7, 17, 33, 43]]), S, 0.0, 0.0)[0].tolist() == [True, False]
    assert under(torch.tensor([[10, 20, 30, 40], [7, 17, 33, 43]]), S, 0.0, 0.0, reach=0.1)[0].tolist() == [True, True]


def test_a_kept_mask_is_whole_and_falls_off_around():
    mask = torch.zeros(1, S, S, dtype=torch.bool)
    mask[0, 15:25, 18:22] = True
    kept = kept_mask(mask, 0.05)
    assert (kept[mask] == 1).all()
    assert 0 < kept[0, 20, 16] < 1
    assert kept[0, 20, 8] == 0
    assert (kept_mask(torch.zeros_like(mask), 0.05) == 0).all()


def test_partners():
    draws = torch.tensor([[0.1, 0.0], [0.1, 0.99], [0.9, 0.5], [0.1, 0.5]])
    # The third does not want, the fourth has nobody.
    candidates = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert partners(candidates, draws, 0.5).tolist() == [1, 2, 2, 3]


def test_every_candidate_is_as_likely():
    draws = torch.from_numpy(np.random.default_rng(0).random((4000, 2)))
    candidates = torch.zeros(4000, 4000, dtype=torch.bool)
    candidates[:, 1:4] = True
    counts = np.bincount(partners(candidates, draws, 1.0).numpy(), minlength=4)
    assert counts[0] == 0
    assert counts[1:4] == pytest.approx([4000 / 3] * 3, rel=0.1)


def test_which_boxes_lie_under_which():
    boxes = torch.tensor([[20, 20, 60, 60], [18, 18, 62, 62], [16, 20, 60, 60], [30, 30, 50, 50]])
    # The first reaches 2 pixels further by its sides' twentieth, and 1 by the seam; the small one 1 and 1.
    assert under(boxes, 100, 0.05, 0.01)[0].tolist() == [True, True, False, True]
    assert under(boxes, 100, 0.05, 0.01)[3].tolist() == [False, False, False, True]
    assert under(boxes, 100, 0.0, 0.0)[1].tolist() == [True, True, False, True]


def plain(*values: float) -> torch.Tensor:
    return torch.stack([torch.full((1, S, S), v) for v in values])


def test_the_swap_keeps_the_box_and_takes_the_rest():
    images = plain(0.2, 0.8)
    boxes = torch.tensor([[10, 10, 30, 30], [11, 9, 31, 29]])
    swapped = swap(images, boxes, [True, True], torch.zeros(2, 2), Swap(1.0, 0.0, 1 / S))
    for b, (own, other) in enumerate([(0.2, 0.8), (0.8, 0.2)]):
        x0, y0, x1, y1 = boxes[b].tolist()
        assert swapped[b, 0, y0:y1, x0:x1].unique().tolist() == pytest.approx([own])
        seam = (x1 - x0 + 2) * (y1 - y0 + 2)
        assert S * S - seam == torch.isclose(swapped[b], torch.tensor(other)).sum()
    assert images[0].unique().tolist() == pytest.approx([0.2])  # what came in is as it was


def test_findings_outside_the_box_neither_take_nor_lend():
    images = plain(0.1, 0.5, 0.9)
    boxes = torch.tensor([[10, 10, 30, 30]] * 3)
    swapped = swap(images, boxes, [True, False, True], torch.zeros(3, 2), ALWAYS)
    assert torch.equal(swapped[1], images[1])
    assert swap_context(
        images, boxes, torch.tensor([True, False, True]), torch.zeros(3, 2), ALWAYS
    ).lenders.tolist() == [2, 1, 0]
    assert swapped[0, 0, 0, 0] == images[2, 0, 0, 0]
    assert swapped[2, 0, 0, 0] == images[0, 0, 0, 0]


def test_probability_zero_changes_nothing_and_one_half_about_half():
    images = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[2, 2, 6, 6]] * 400)
    draws = torch.from_numpy(np.random.default_rng(1).random((400, 2), np.float32))
    assert torch.equal(swap(images, boxes, [True] * 400, draws, Swap(0.0, 0.0, 0.0)), images)
    changed = (swap(images, boxes, [True] * 400, draws, Swap(0.5, 0.0, 0.0)) != images).flatten(1).any(1)
    assert 160 < changed.sum() < 240


def test_nothing_of_the_lenders_lungs_shows():
    """Whose lungs would show beside the box that is kept does not lend; the other way round it may."""
    images = torch.full((2, 1, 64, 64), 0.2)
    images[0] += torch.linspace(0, 0.1, 64)
    images[1, 0, 6:58, 8:56] = 1.0  # lungs full of disease
    boxes = torch.tensor([[16, 12, 48, 44], [8, 6, 56, 58]])
    swapped = swap(images, boxes, [True, True], torch.zeros(2, 2), Swap(1.0, 0.05, 0.04))
    assert torch.equal(swapped[0], images[0])
    assert torch.equal(swapped[1, 0, 6:58, 8:56], images[1, 0, 6:58, 8:56])
    assert torch.equal(swapped[1, 0, 0], images[0, 0, 0])
    # Without lungs the box is the whole image: it fits nowhere else.
    boxes[1] = torch.tensor([0, 0, 64, 64])
    assert torch.equal(swap(images, boxes, [True, True], torch.zeros(2, 2), Swap(1.0, 0.05, 0.04)), images)


def test_lesions_are_laid_into_a_healthy_image():
    images = plain(0.9, 0.3, 0.6)
    lesions = torch.zeros(3, S, S, dtype=torch.bool)
    lesions[0, 12:18, 12:18] = True
    boxes = torch.tensor([[10, 10, 30, 30]] * 3)
    swapped = swap(images, boxes, [True] * 3, torch.zeros(3, 2), ALWAYS, lesions=lesions, healthy=[False, True, False])
    assert (swapped[0, 0][lesions[0]] == 0.9).all()
    assert swapped[0, 0, 25, 25] == pytest.approx(0.3)  # inside the lungs, but of the healthy image
    # A second healthy image: the host has a seam of the same shape, its own inside, the other healthy one outside.
    swapped = swap(images, boxes, [True] * 3, torch.zeros(3, 2), ALWAYS, lesions=lesions, healthy=[False, True, True])
    assert (swapped[1, 0][lesions[0]] == 0.3).all()
    assert swapped[1, 0, 25, 25] == pytest.approx(0.6)
    # Nobody healthy: the lung box is what stays.
    swapped = swap(images, boxes, [True] * 3, torch.zeros(3, 2), ALWAYS, lesions=lesions, healthy=[False] * 3)
    assert swapped[0, 0, 25, 25] == pytest.approx(0.9)
    assert swapped[0, 0, 0, 0] == pytest.approx(0.3)


def told(boxes, inside, healthy, marked, draws, settings):
    """Who lends to whom, image after image, as a reader would do it."""
    every = range(len(boxes))
    fits, alike = (
        under(boxes, S, dilate, feather).tolist()
        for dilate, feather in ((settings.dilate, settings.feather), (0.2, 0.0))
    )

    def one(theirs, b, probability):
        whether, whom = draws[b].double().tolist()
        return theirs[int(whom * len(theirs))] if theirs and whether < probability else b

    homes = [[k for k in every if healthy[k] and k != b and alike[b][k] and alike[k][b]] for b in every]
    hosts = [one(homes[b] if marked[b] else [], b, settings.probability) for b in every]
    others = [one(homes[b], b, 1.0) for b in every]
    lenders, pieces = list(hosts), {b: b for b in every if hosts[b] != b}
    for b in every:
        host = hosts[b]
        if host != b and others[host] != host and lenders[host] == host:
            lenders[host], pieces[host] = others[host], b
    free = [inside[b] and lenders[b] == b for b in every]
    swapped = [
        one([k for k in every if free[b] and inside[k] and k != b and fits[b][k]], b, settings.probability)
        for b in every
    ]
    return [swapped[b] if free[b] else lenders[b] for b in every], pieces


@pytest.mark.parametrize("seed", range(20))
def test_the_device_decides_as_a_reader_would(seed):
    rng = np.random.default_rng(seed)
    count, settings = 24, Swap(0.7, 0.1, 0.02)
    low = torch.from_numpy(rng.integers(8, 11, (count, 2)))
    boxes = torch.cat([low, low + torch.from_numpy(rng.integers(18, 22, (count, 2)))], 1)
    inside, healthy, marked = (torch.from_numpy(rng.random(count) < share) for share in (0.8, 0.3, 0.5))
    marked &= ~healthy
    lesions = torch.zeros(count, S, S, dtype=torch.bool)
    for b in marked.nonzero()[:, 0].tolist():
        x, y = rng.integers(8, 24, 2)
        lesions[b, y : y + 5, x : x + 5] = True
    draws, images = torch.from_numpy(rng.random((count, 2), np.float32)), torch.rand(count, 1, S, S)
    lenders, pieces = told(boxes, inside.tolist(), healthy.tolist(), marked.tolist(), draws, settings)
    swapped = swap_context(images, boxes, inside, draws, settings, lesions=lesions, healthy=healthy)
    assert swapped.lenders.tolist() == lenders
    assert len(set(pieces) - set(marked.nonzero()[:, 0].tolist())) > 0, "some host keeps a piece"
    for b, piece in pieces.items():
        expected = blend(
            images[b : b + 1],
            kept_mask(lesions[piece : piece + 1], settings.feather / 2),
            images[lenders[b] : lenders[b] + 1],
        )
        assert torch.equal(swapped.images[b], expected[0])


def test_a_lesion_beyond_the_lung_box_stays():
    images = plain(0.9, 0.3)
    lesions = torch.zeros(2, S, S, dtype=torch.bool)
    lesions[0, 28:36, 12:18] = True
    boxes = torch.tensor([[10, 10, 30, 30]] * 2)
    swapped = swap(images, boxes, [True] * 2, torch.zeros(2, 2), ALWAYS, lesions=lesions, healthy=[False] * 2)
    assert (swapped[0, 0][lesions[0]] == 0.9).all()
    assert swapped[0, 0, 35, 35] == pytest.approx(0.3)


def test_devices_are_lent_to_healthy_images_without_any():
    """0 has a drain; 1 is free; 2 is ill; 3 is free and has a drain; 4 is free, and its lungs lie elsewhere."""
    images = torch.rand(5, 1, S, S)
    boxes = torch.tensor([[5, 5, 35, 35], [6, 5, 36, 35], [5, 5, 35, 35], [5, 6, 35, 36], [5, 5, 15, 15]])
    devices = torch.zeros(5, S, S, dtype=torch.bool)
    devices[0, 10:30, 8:10], devices[3, 12:20, 28:30] = True, True
    free, draws = torch.tensor([False, True, False, True, True]), torch.zeros(5, 2)
    settings = Swap(probability=0.0, feather=0.1, devices=1.0)
    lent, lenders = lend_devices(images, boxes, devices, free, draws, settings)
    assert lenders.tolist() == [0, 0, 2, 3, 4]
    assert torch.equal(lent[[0, 2, 3, 4]], images[[0, 2, 3, 4]])
    assert torch.equal(lent[1][:, devices[0]], images[0][:, devices[0]])
    far = kept_mask(devices[:1], 0.05)[0] == 0
    assert torch.equal(lent[1][:, far], images[1][:, far])
    assert far.float().mean() > 0.7
    draws[:, 1] = 0.9  # the other of the two
    assert lend_devices(images, boxes, devices, free, draws, settings).lenders.tolist() == [0, 3, 2, 3, 4]
    draws[:, 0] = 0.5
    assert lend_devices(images, boxes, devices, free, draws, Swap(devices=0.4)).lenders.tolist() == [0, 1, 2, 3, 4]


def test_blend_ends():
    a, b = plain(0.25), plain(0.75)
    assert torch.equal(blend(a, torch.ones(1, S, S), b), a)
    assert torch.equal(blend(a, torch.zeros(1, S, S), b), b)


def test_blur_removes_detail_there_and_nothing_else():
    image = torch.rand(2, 1, 112, 112, generator=torch.Generator().manual_seed(0))
    where = torch.zeros(2, 112, 112, dtype=torch.bool)
    where[0, 60:, :] = True
    out = blurred(image, where)
    assert out[0, 0, 64:108, 4:108].std() < 0.1 * image[0].std()
    assert torch.equal(out[0, 0, :50], image[0, 0, :50])
    assert torch.equal(out[1], image[1])  # an empty place
    flat = torch.full((1, 1, 112, 112), 0.4)
    # No dark rim at the border
    assert torch.allclose(blurred(flat, torch.ones(1, 112, 112, dtype=torch.bool)), flat, atol=1e-5)


def test_images_without_a_finding_are_blurred_like_one_of_the_others():
    rules = {"A": Rule(((0, 0, 1, 0.5),)), "B": Rule(((0, 0.5, 1, 1),))}

    def whose(labels, names):
        one = torch.eye(len(names), dtype=torch.bool)[labels]
        return [row.nonzero().flatten().tolist() for row in probed(one, torch.arange(len(labels)), names, rules)]

    assert whose([0, 1, 0, 3], ("No Finding", "A", "B", "C")) == [[1], [1], [1], [2]]
    assert whose([0, 1], ("No Finding", "C")) == [[], []]
    both = torch.tensor([[False, True, True, True]])
    assert probed(both, torch.tensor([5]), ("No Finding", "A", "B", "C"), rules).tolist() == [
        [False, True, True, False]
    ]
