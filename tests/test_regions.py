import numpy as np
import pytest
import torch

from shards.errors import InputError
from trainer.regions import PUBLISHED, TASKS, finding_regions, placed, task_findings, without_rule


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


@pytest.mark.parametrize("finding", ["No Finding", "Effusion", "Pneumothorax", "Subcutaneous Emphysema", "Cardiomegaly"])
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
    assert placed(region).tolist() == [False, False, True]


def test_tasks():
    assert set(TASKS) == {"ne", "np", "ns", "nc", "nep", "neps"}
    assert task_findings("No Finding, Nodule") == ("No Finding", "Nodule")
    assert without_rule(("No Finding", "Effusion", "Cardiomegaly"), PUBLISHED) == ["Cardiomegaly"]
    with pytest.raises(InputError, match="did you mean nep"):
        task_findings("nepp")
    with pytest.raises(InputError, match="different names"):
        task_findings("Effusion,Effusion")
