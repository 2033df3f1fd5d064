import json
import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

from shards.errors import InputError
from shards.phantom import phantom
from trainer.augment import lung_masks
from trainer.lungs import LungFinder, LungMemory, LungSegmenter
from trainer.lungs.__main__ import main
from trainer.lungs.box import GRID, Lungs, lung_boxes, outlines
from trainer.lungs.load import SHIPPED, load_segmenter
from trainer.lungs.paint import negative
from trainer.lungs.unet import UNet


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


def test_segmenter_takes_any_size_and_round_trips(tmp_path):
    segmenter = LungSegmenter([2, 4, 8, 16, 32], 32).eval()
    segmenter.save(tmp_path / "s.safetensors")
    loaded = load_segmenter(tmp_path / "s.safetensors")
    images = torch.rand(2, 1, 50, 70)
    assert loaded(images).shape == (2, 50, 70)
    assert loaded(images).dtype == torch.bool
    assert (loaded(images) == segmenter(images)).all()
    assert loaded.fingerprint() == segmenter.fingerprint()
    assert (
        load_segmenter(tmp_path / "s.safetensors").fingerprint() != LungSegmenter([2, 4, 8, 16, 32], 32).fingerprint()
    )


def test_files_that_are_no_segmenter(tmp_path):
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
    with pytest.raises(InputError, match=r"e1\.conv\.conv1\.weight: expected \(2, 1, 3, 3\), got \(1,\)"):
        load_segmenter(tmp_path / "b.safetensors")


def published(width=4):
    """The published U-Net, small, as modules of the classes that its pickle names."""
    module = types.ModuleType("model")
    classes = {
        name: type(name, (torch.nn.Module,), {"__module__": "model"})
        for name in ("build_unet", "encoder_block", "conv_block", "decoder_block")
    }
    for name, kind in classes.items():
        setattr(module, name, kind)
    ours = UNet([width * 2**k for k in range(5)])

    def rebuilt(net):
        kind = {
            "_Encoder": "encoder_block",
            "_Convs": "conv_block",
            "_Decoder": "decoder_block",
            "UNet": "build_unet",
        }.get(type(net).__name__)
        if kind is None:
            return net
        copy = classes[kind]()
        for name, child in net.named_children():
            setattr(copy, name, rebuilt(child))
        return copy

    return module, ours, rebuilt(ours)


def test_the_published_pickle_is_read_and_not_executed(tmp_path, monkeypatch, capsys):
    module, ours, pickled = published()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "model", module)
        torch.save(pickled, tmp_path / "unet_model.pt")
    assert "model" not in sys.modules
    segmenter = load_segmenter(tmp_path / "unet_model.pt")
    assert segmenter.settings["size"] == 512
    assert not segmenter.settings["standardise"]
    assert not segmenter.settings["clean_up"]
    for name, tensor in ours.state_dict().items():
        assert (segmenter.unet.state_dict()[name] == tensor).all()

    torch.save({"module." + name: tensor for name, tensor in ours.state_dict().items()}, tmp_path / "state.pth")
    assert load_segmenter(tmp_path / "state.pth").fingerprint() == segmenter.fingerprint()
    main(["convert", str(tmp_path / "unet_model.pt"), str(tmp_path / "out.safetensors")])
    assert "use it with --lungs.weights" in capsys.readouterr().out
    assert load_segmenter(tmp_path / "out.safetensors").fingerprint() == segmenter.fingerprint()
    main(["convert", str(tmp_path / "unet_model.pt"), str(tmp_path / "half.safetensors"), "--half"])
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "out.safetensors").stat().st_size
    with pytest.raises(InputError, match="usage"):
        main(["convert", "--half"])
    capsys.readouterr()
    main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m trainer.lungs convert FILE")
    with pytest.raises(InputError, match="is there already"):
        main(["convert", str(tmp_path / "unet_model.pt"), str(tmp_path / "out.safetensors")])


class Hostile:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_hostile_pickle_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match=r"asks for (posix|nt)\.system, which is not executed"):
        load_segmenter(tmp_path / "bad.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="no state dict"):
        load_segmenter(tmp_path / "list.pt")
    _, ours, _ = published()
    state = ours.state_dict() | {"d1.up.weight": torch.zeros(3)}
    torch.save(state, tmp_path / "wrong.pt")
    with pytest.raises(InputError, match=r"1 tensors do not fit .*d1\.up\.weight: expected .* got \(3,\)"):
        load_segmenter(tmp_path / "wrong.pt")
    assert not (tmp_path / "pwned").exists()


def test_sixteen_bits_keep_the_masks(tmp_path):
    torch.manual_seed(0)
    segmenter = LungSegmenter([4, 8, 8, 8, 8], 64, patch=2, clean_up=False).eval()
    segmenter.save(tmp_path / "a.safetensors")
    segmenter.save(tmp_path / "b.safetensors", half=True)
    assert (tmp_path / "b.safetensors").stat().st_size < 0.7 * (tmp_path / "a.safetensors").stat().st_size
    images = torch.rand(2, 1, 64, 64)
    one, two = load_segmenter(tmp_path / "a.safetensors")(images), load_segmenter(tmp_path / "b.safetensors")(images)
    assert (one == two).float().mean() > 0.99


def test_the_shipped_segmenter_is_small_and_light():
    segmenter = load_segmenter()
    assert SHIPPED.stat().st_size <= 8e6
    size = segmenter.settings["size"]
    with FlopCounterMode(display=False) as counter:
        segmenter.unet(torch.zeros(1, segmenter.settings["inputs"], size, size))
    assert counter.get_total_flops() / 2 <= 4e9
    assert (SHIPPED.parent / "README.md").is_file()


def test_the_shipped_segmenter_finds_the_lungs_of_phantoms():
    rng = np.random.default_rng(11)
    samples = [
        phantom(str(i), name, rng, 256)
        for i, name in enumerate(["No Finding", "Effusion", "Pneumothorax", "Subcutaneous Emphysema"] * 3)
    ]
    images = torch.from_numpy(np.stack([s.image for s in samples])).float()[:, None] / 255
    truth = lung_boxes(torch.from_numpy(np.stack([s.mask for s in samples])) > 0, 224).float()
    found = lung_boxes(load_segmenter()(images), 224).float()
    iou = box_iou(found, truth).diagonal()
    assert iou.min() >= 0.8
    assert iou.mean() >= 0.9


def no_chest(kind):
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.random((256, 256))
    if kind == "blank":
        return np.full((256, 256), 0.5)
    if kind == "black":
        return np.zeros((256, 256))
    chest = phantom("x", "No Finding", np.random.default_rng(3), 256)
    image = torch.from_numpy(chest.image).float() / 255
    return negative(image, torch.from_numpy(chest.mask) > 0, rng, kind).numpy()


@pytest.mark.parametrize("kind", ["noise", "blank", "black", "side", "limb", "turned"])
def test_what_is_no_chest_has_no_lungs(kind):
    image = torch.from_numpy(no_chest(kind)).float()[None, None]
    masks = load_segmenter()(image)
    assert not masks.any()
    assert lung_boxes(masks, 224).tolist() == [[0, 0, 224, 224]]


class Counting(LungSegmenter):
    """Foreground is what is brighter than half; counts the images it sees."""

    def __init__(self) -> None:
        super().__init__([1] * 5, 16)
        self.seen = 0

    def find(self, images, size):
        self.seen += len(images)
        masks = images[:, 0] > 0.5
        boxes = lung_boxes(masks, size)
        return Lungs(boxes, outlines(masks, boxes, size), masks.flatten(1).any(1))


def test_an_image_is_segmented_once_and_its_lungs_are_right():
    images = torch.zeros(4, 1, 20, 20, dtype=torch.uint8)
    for i in range(3):
        images[i, 0, 4 * i : 4 * i + 4, 2:8] = 255  # image 3 has no lungs
    segmenter = Counting()
    finder = LungFinder(segmenter, 10, 4, "shards")
    first = finder(images[[0, 3]], torch.tensor([0, 3]))
    assert first.boxes.tolist() == [[1, 0, 4, 2], [0, 0, 10, 10]]
    assert first.found.tolist() == [True, False]
    assert first.outlines[0].mean() > 0.8, "a full box, but for its soft edge"
    assert (first.outlines[1] == 0).all(), "no lungs, no outline"
    for _ in range(3):
        all_of_them = finder(images, torch.arange(4))
    assert segmenter.seen == 4
    assert all_of_them.boxes[2].tolist() == [1, 4, 4, 6]
    assert finder.memory.not_found().tolist() == [3]


def test_a_memory_of_another_segmenter_is_not_taken():
    mine, same, other = LungMemory(3, "a"), LungMemory(3, "a"), LungMemory(3, "b")
    mine.write(torch.tensor([1]), Lungs(torch.tensor([[1, 2, 3, 4]]), torch.ones(1, *GRID), torch.tensor([True])))
    assert same.load_state_dict(mine.state_dict())
    assert (same.table == mine.table).all()
    assert not other.load_state_dict(mine.state_dict())
    assert other.unknown(torch.arange(3)).tolist() == [0, 1, 2]


def phantom_masks(size: int = 256) -> torch.Tensor:
    """Lungs of eight phantoms, bool [8,size,size]."""
    rng = np.random.default_rng(4)
    return torch.from_numpy(np.stack([phantom(str(i), "No Finding", rng, size).mask for i in range(8)])) > 0


def test_an_outline_gives_the_mask_back_and_fits_into_150_bytes():
    masks = phantom_masks()
    boxes = lung_boxes(masks, 224)
    memory = LungMemory(8, "x")
    memory.write(torch.arange(8), Lungs(boxes, outlines(masks, boxes, 224), torch.ones(8, dtype=torch.bool)))
    assert memory.table.nbytes / 8 <= 150
    known = memory.read(torch.tensor([3, 0, 7]), torch.device("cpu"))
    assert torch.equal(known.boxes, boxes[[3, 0, 7]])
    whole = (
        torch.nn.functional.interpolate(masks[[3, 0, 7], None].float(), (224, 224), mode="bilinear", antialias=True)[
            :, 0
        ]
        >= 0.5
    )
    again = lung_masks(known.outlines, known.boxes, (224, 224))
    iou = (again & whole).flatten(1).sum(1) / (again | whole).flatten(1).sum(1)
    assert iou.min() > 0.94, iou
    # The largest image that there is, and lungs at its edges: coordinates need 16 bits.
    far = Lungs(torch.tensor([[0, 0, 30000, 30000]]), torch.zeros(1, *GRID), torch.tensor([False]))
    memory.write(torch.tensor([5]), far)
    assert memory.read(torch.tensor([5]), torch.device("cpu")).boxes.tolist() == far.boxes.tolist()


def test_ten_million_images_are_a_mapped_file(tmp_path):
    memory = LungMemory(10_000_000, "x", tmp_path)
    assert isinstance(memory.table, np.memmap)
    assert list(tmp_path.iterdir()) == [], "the file has no name: it goes with the process"
    assert memory.unknown(torch.tensor([0, 9_999_999])).tolist() == [0, 1]
    lungs = Lungs(torch.tensor([[1, 2, 3, 4]]), torch.ones(1, *GRID) / 3, torch.tensor([True]))
    memory.write(torch.tensor([9_999_999]), lungs)
    again = memory.read(torch.tensor([9_999_999]), torch.device("cpu"))
    assert all(torch.equal(one, other) for one, other in zip(again, lungs, strict=True))
    assert int(Path("/proc/self/statm").read_text().split()[1]) * 4096 < 3e9, "what was not written takes no memory"
    at, rows = memory.take_news()
    assert at.tolist() == [9_999_999]
    assert rows.shape == (1, LungMemory.ROW)
    assert len(memory.take_news()[0]) == 0, "news travel once"
