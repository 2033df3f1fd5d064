import json
import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import save_file

from shards.errors import InputError
from trainer.cleanup import two_largest
from trainer.lungs import BoxMemory, LungBoxes, LungSegmenter, UNet, load_segmenter, lung_boxes


def test_the_published_unet():
    expected = json.loads((GOLDEN / "unet.json").read_text())
    net = UNet().eval()
    state = net.state_dict()
    assert [[name, list(tensor.shape)] for name, tensor in state.items()] == expected["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == 31_043_521
    for i, (name, tensor) in enumerate(state.items()):
        if name.endswith("num_batches_tracked"):
            continue
        values = torch.sin(0.7 * torch.arange(tensor.numel(), dtype=torch.float64) + i).reshape(tensor.shape)
        if name.endswith("running_var"):
            values = 1 + 0.5 * values
        elif ".bn" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        elif values.ndim == 4:
            values = values * math.sqrt(2 / math.prod(tensor.shape[1:]))
        else:
            values = 0.1 * values
        tensor.copy_(values)
    channel, row, column = torch.meshgrid(torch.arange(3.0), torch.arange(64.0), torch.arange(64.0), indexing="ij")
    with torch.no_grad():
        out = net((0.5 + 0.5 * torch.sin(6 * row / 64 + 4 * column / 64 + 3 * channel))[None])[0, 0]
    assert [out[r, c].item() for r, c in expected["output_rows_cols"]] == pytest.approx(expected["output"], abs=1e-4)
    assert out.mean().item() == pytest.approx(expected["mean"], abs=1e-4)
    assert out.std().item() == pytest.approx(expected["std"], abs=1e-4)


def test_published_boxes(golden):
    masks = torch.from_numpy(np.unpackbits(golden["mask_bits"]).reshape(24, 512, 512))
    boxes = lung_boxes(masks, 224).numpy()
    expected = golden["mask_boxes_xywh"]
    expected = np.concatenate([expected[:, :2], expected[:, :2] + expected[:, 2:]], 1)
    off = np.abs(boxes - expected).max(1)
    assert off.max() <= 1
    assert (off == 0).mean() >= 0.75


def test_boxes_have_exclusive_ends_and_fall_back_to_the_whole_image():
    masks = torch.zeros(3, 10, 10, dtype=torch.bool)
    masks[0, 2:5, 3:9] = True
    masks[2, 9, 9] = True
    boxes = lung_boxes(masks, 10)
    assert boxes.dtype == torch.int64
    assert boxes.tolist() == [[3, 2, 9, 5], [0, 0, 10, 10], [9, 9, 10, 10]]


def test_two_largest_components_of_each_image():
    masks = torch.zeros(4, 33, 40, dtype=torch.bool)
    masks[0, 2:12, 2:8] = True
    masks[0, 2:10, 20:26] = True
    masks[0, 30, 30] = True
    masks[1, 5:7, 5:7] = True
    masks[2] = True
    cleaned, count = two_largest(masks)
    assert count.tolist() == [2, 1, 1, 0]
    assert cleaned[0].sum() == masks[0].sum() - 1
    assert not cleaned[0, 30, 30]
    assert (cleaned[1:] == masks[1:]).all()


def test_segmenter_takes_any_size_and_round_trips(tmp_path):
    segmenter = LungSegmenter([2, 4, 8, 16, 32], 32).eval()
    segmenter.save(tmp_path / "s.safetensors")
    loaded = load_segmenter(tmp_path / "s.safetensors")
    images = torch.rand(2, 1, 50, 70)
    assert loaded(images).shape == (2, 50, 70)
    assert loaded(images).dtype == torch.bool
    assert (loaded(images) == segmenter(images)).all()
    assert loaded.fingerprint() == segmenter.fingerprint()
    assert load_segmenter(tmp_path / "s.safetensors").fingerprint() != LungSegmenter([2, 4, 8, 16, 32], 32).fingerprint()


def test_files_that_are_no_segmenter(tmp_path):
    with pytest.raises(InputError, match=r"train_lungs"):
        load_segmenter()
    with pytest.raises(InputError, match="no such file"):
        load_segmenter(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="not a lung segmenter"):
        load_segmenter(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="not a lung segmenter"):
        load_segmenter(tmp_path / "a.safetensors")
    settings = {"lung_unet": json.dumps(LungSegmenter([2, 4, 8, 16, 32], 32).settings)}
    save_file({"e1.conv.conv1.weight": torch.zeros(1)}, tmp_path / "b.safetensors", metadata=settings)
    with pytest.raises(InputError, match=r"e1\.conv\.conv1\.weight: expected \(2, 3, 3, 3\), got \(1,\)"):
        load_segmenter(tmp_path / "b.safetensors")


class Counting(LungSegmenter):
    """Foreground is what is brighter than half; counts the images it sees."""

    def __init__(self) -> None:
        super().__init__([1] * 5, 16)
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return images[:, 0] > 0.5


def test_an_image_is_segmented_once_and_the_box_is_right():
    images = torch.zeros(4, 1, 20, 20, dtype=torch.uint8)
    for i in range(3):
        images[i, 0, 4 * i : 4 * i + 4, 2:8] = 255  # image 3 has no lungs
    segmenter = Counting()
    boxes = LungBoxes(segmenter, 10, 4, "shards")
    first = boxes(images[[0, 3]], torch.tensor([0, 3]))
    assert first.tolist() == [[1, 0, 4, 2], [0, 0, 10, 10]]
    for _ in range(3):
        all_of_them = boxes(images, torch.arange(4))
    assert segmenter.seen == 4
    assert all_of_them[2].tolist() == [1, 4, 4, 6]
    assert boxes.memory.not_found().tolist() == [3]


def test_a_memory_of_another_segmenter_is_not_taken():
    mine, same, other = BoxMemory(3, "a"), BoxMemory(3, "a"), BoxMemory(3, "b")
    mine.table[1] = 7
    assert same.load_state_dict(mine.state_dict())
    assert (same.table == mine.table).all()
    assert not other.load_state_dict(mine.state_dict())
    assert (other.table == -1).all()
