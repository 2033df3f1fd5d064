"""--decode device: loader processes hand the radiographs over as they are stored, and the device decodes them."""

from contextlib import contextmanager

import pytest
import torch

from shards import jpeg
from shards.dataset import Split
from shards.errors import InputError
from shards.loader import Loader
from shards.pack import pack
from shards.phantom import Phantoms
from shards.plan import EpochPlan
from trainer import checkpoint
from trainer import train as loop

CPU = torch.device("cpu")


@pytest.fixture
def split(tmp_path) -> Split:
    pack(Phantoms(20, 0, size=64), tmp_path / "own", dataset="phantom", per_shard=50)
    return Split(tmp_path / "own", "train")


def batches(split, workers=0, decoder=CPU):
    return list(Loader(split, EpochPlan(split.shard_sizes(), 0), batch=4, workers=workers, decoder=decoder).batches(0))


def changed(split, position, find, by):
    """The stored radiograph, with other bytes in the place of its first ``find``."""
    path = split.store.shard(split.shards[0])
    at = int(split.table[split.rows[position]]["image_at"])
    data = bytearray(path.read_bytes())
    at = data.index(find, at)
    data[at : at + len(by)] = by
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same(split, workers, monkeypatch):
    asked = []
    monkeypatch.setattr("shards.batch.decode_on", lambda *a: asked.append(len(a[1])) or jpeg.decode_on(*a))
    for own, other in zip(batches(split, workers), batches(split, 0, None), strict=True):
        assert own.tensors().keys() == other.tensors().keys()
        assert all(torch.equal(value, other.tensors()[name]) for name, value in own.tensors().items())
    assert sum(asked) == len(split)


def test_what_is_no_gray_jpeg_is_decoded_by_the_reader(split, monkeypatch):
    """The whole batch of it is: what the device would make of a JPEG, it would not make of the others."""
    asked = []
    monkeypatch.setattr("shards.batch.decode_on", lambda *a: asked.append(len(a[1])) or jpeg.decode_on(*a))
    one, known = split.image_bytes(3), jpeg.gray_jpeg_shape
    monkeypatch.setattr(jpeg, "gray_jpeg_shape", lambda data: (0, 0) if data == one else known(data))
    for own, other in zip(batches(split), batches(split, 0, None), strict=True):
        assert torch.equal(own.image, other.image)
    assert sum(asked) == len(split) - 4


def test_one_that_the_device_does_not_decode_is_named(split):
    changed(split, 5, b"\xff\xda", b"\x00\x00")  # no scan begins
    with pytest.raises(InputError, match=r"^\S*000000\.tar:train-000005: cannot be decoded.*remove it$"):
        batches(split, 2)


def test_what_only_the_device_does_not_decode_is_decoded_all_the_same(split, monkeypatch):
    def fails(*_):
        raise RuntimeError("nvjpegDecode failed: 5")

    monkeypatch.setattr("shards.batch.decode_on", fails)
    for own, other in zip(batches(split), batches(split, 0, None), strict=True):
        assert torch.equal(own.image, other.image)


def test_sizes_that_differ_are_told(split):
    changed(split, 5, b"\xff\xc0\x00\x0b\x08\x00\x40", b"\xff\xc0\x00\x0b\x08\x00\x20")
    with pytest.raises(InputError, match=r"different sizes in one batch \((64x64 and 64x32|64x32 and 64x64)\)"):
        batches(split)


def test_a_gpu_is_waited_for_before_and_after(split, monkeypatch):
    """Of memory that it has not read yet the GPU's engine makes the next images, without a word."""
    done = []

    class Stream:
        def synchronize(self):
            done.append("wait")

    @contextmanager
    def on(stream):
        done.append("begin")
        yield
        done.append("end")

    def decode(encoded, mode, device):
        done.append(str(device))
        return [torch.zeros(1, 2, 2, dtype=torch.uint8) for _ in encoded]

    monkeypatch.setattr(jpeg, "_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(jpeg, "decode_jpeg", decode)
    assert jpeg.decode_on(torch.device("cuda", 1), [torch.zeros(3, dtype=torch.uint8)] * 5).shape == (5, 1, 2, 2)
    assert done == ["begin", "wait", "cuda:1", "wait", "end"]


def test_without_torchvision_s_decoder_pillow_decodes(split, monkeypatch):
    before = [split.image(p) for p in range(4)]
    monkeypatch.setattr(jpeg, "decode_jpeg", None)
    assert all((split.image(p) == image).all() for p, image in enumerate(before))
    assert torch.equal(batches(split)[0].image, batches(split, 0, None)[0].image)


def test_a_run_is_the_same_and_goes_on_either_way(flags, tmp_path, capsys):
    run, weights = str(tmp_path / "run"), []
    for first, then in (("device", "loader"), ("loader", "device")):
        out = f"{run}_{first}"
        loop.main([*flags, "--out", out, "--epochs", "1", "--workers", "2", "--decode", first])
        assert ("no GPU that could decode" in capsys.readouterr().out) == (first == "device")
        loop.main(["--out", out, "--resume", "--epochs", "2", "--decode", then])
        weights.append(checkpoint.load(f"{out}/checkpoints/last.pt")["model"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
