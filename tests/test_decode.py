"""--decode device: loader processes hand the radiographs over as they are stored, and the device decodes them."""

import pickle
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from shards import jpeg
from shards.batch import Reader, decoded
from shards.dataset import Split
from shards.errors import InputError
from shards.loader import Loader
from shards.pack import pack
from shards.phantom import Phantoms
from shards.plan import EpochPlan, Share
from trainer import checkpoint, guards
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
    monkeypatch.setattr("shards.batch.gray_jpeg_shape", lambda data: (0, 0) if data == one else known(data))
    for own, other in zip(batches(split), batches(split, 0, None), strict=True):
        assert torch.equal(own.image, other.image)
    assert sum(asked) == len(split) - 4


def test_what_is_small_goes_by_value_and_the_rest_by_shared_memory(split):
    """Each tensor that goes by a file of its own has to be asked for while the step waits."""
    batch = Reader(split, encoded=True)[Share(np.arange(4), True, np.zeros(4, np.int64), 4)]
    sent = batch.__getstate__()
    assert {name for name, value in sent.items() if isinstance(value, torch.Tensor)} == {"image", "jpegs"}
    got = pickle.loads(ForkingPickler.dumps(batch))
    assert got.tensors().keys() == batch.tensors().keys()
    assert all(torch.equal(value, got.tensors()[name]) for name, value in batch.tensors().items())


@pytest.mark.parametrize("way", ["cut off", "colour", "12 bits", "lossless", "EXIF", "too large", "PNG"])
def test_only_whole_gray_jpegs_of_8_bits_are_handed_over(split, way, monkeypatch):
    data = bytearray(split.image_bytes(3))
    frame = data.index(b"\xff\xc0")
    if way == "cut off":
        del data[-2:]
    elif way == "EXIF":
        data[2:2] = b"\xff\xe1\x00\x08Exif\x00\x00"
    elif way == "PNG":
        data = bytearray(b"\x89PNG" + data)
    else:
        at, by = {
            "colour": (9, b"\x03"),
            "12 bits": (4, b"\x0c"),
            "lossless": (1, b"\xc3"),
            "too large": (5, b"\xff" * 4),
        }[way]
        data[frame + at : frame + at + len(by)] = by
    plain = split.image_bytes
    reader = Reader(split, encoded=True)
    assert len(reader._jpegs([2, 3])) == 2
    monkeypatch.setattr(split, "image_bytes", lambda p: bytes(data) if p == 3 else plain(p))
    assert reader._jpegs([2, 3]) == []


def test_one_that_the_device_does_not_decode_is_named(split):
    changed(split, 5, b"\xff\xda", b"\x00\x00")  # no scan begins
    with pytest.raises(InputError, match=r"^\S*000000\.tar:train-000005: cannot be decoded.*remove it$"):
        batches(split, 2)


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (
            RuntimeError("nvjpegDecode failed: 5"),
            r"the cpu does not decode images of \S+ \(nvjpegDecode failed: 5\); train",
        ),
        (torch.OutOfMemoryError("no room"), "no room"),
    ],
)
def test_what_the_device_alone_does_not_decode_is_told(split, monkeypatch, problem, told):
    def fails(*_):
        raise problem

    monkeypatch.setattr("shards.batch.decode_on", fails)
    with pytest.raises(InputError if told != "no room" else torch.OutOfMemoryError, match=told):
        batches(split)


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

    class Image(torch.Tensor):
        def record_stream(self, stream):
            done.append(f"read by {stream}")

    def decode(encoded, mode, device):
        done.append(str(device))
        return [torch.zeros(1, 2, 2, dtype=torch.uint8).as_subclass(Image) for _ in encoded]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "the step")
    monkeypatch.setattr(jpeg, "_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(jpeg, "decode_jpeg", decode)
    assert jpeg.decode_on(torch.device("cuda", 1), [torch.zeros(3, dtype=torch.uint8)] * 5).shape == (5, 1, 2, 2)
    assert done == ["begin", "wait", "cuda:1", "wait", "end", "read by the step"]


def test_without_torchvision_s_decoder_pillow_decodes(split, monkeypatch):
    before = [split.image(p) for p in range(4)]
    monkeypatch.setattr(jpeg, "decode_jpeg", None)
    assert all((split.image(p) == image).all() for p, image in enumerate(before))
    with pytest.raises(InputError, match=r"the cpu does not decode images of .* no JPEG decoder.*--decode loader"):
        guards.decoder(split, CPU)


def test_the_first_image_is_tried_before_the_run(split, monkeypatch):
    assert guards.decoder(split, CPU) == ["note: there is no GPU that could decode; the training process does"]
    monkeypatch.setattr(split, "image_bytes", lambda _: b"\x89PNG")
    (said,) = guards.decoder(split, CPU)
    assert "train-000000 is no gray JPEG of 8 bits" in said


def test_a_run_is_the_same_and_goes_on_either_way(flags, tmp_path, capsys, monkeypatch):
    run, weights, asked = str(tmp_path / "run"), [], []
    monkeypatch.setattr("shards.loader.decoded", lambda *a: asked.append(len(a[0].lengths)) or decoded(*a))
    for first, then in (("device", "loader"), ("loader", "device")):
        out = f"{run}_{first}"
        loop.main([*flags, "--out", out, "--epochs", "1", "--workers", "2", "--decode", first])
        assert ("no GPU that could decode" in capsys.readouterr().out) == (first == "device")
        assert sum(asked) == (30 if first == "device" else 0)  # those of train; never val and test
        loop.main(["--out", out, "--resume", "--epochs", "2", "--decode", then])
        assert f"note: decode was {first} before, now it is {then}" in capsys.readouterr().out
        assert sum(asked) == 30
        asked.clear()
        weights.append(checkpoint.load(f"{out}/checkpoints/last.pt")["model"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
