import gc
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import suppress
from multiprocessing import resource_sharer
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import get_worker_info

from shards import loader
from shards.__main__ import main
from shards.dataset import Split
from shards.errors import InputError, run
from shards.joined import Joined
from shards.jpeg import decode
from shards.loader import Loader
from shards.pack import pack
from shards.pixels import decode_image
from shards.plan import EpochPlan, Shares
from shards.sources.item import Item, Source
from shards.targets import SingleLabel
from shards.tars import build_index


def positions(plan, epoch, start, *, batch, world):
    """What all ranks read, batch by batch: [(rank, positions that count)]."""
    samplers = [list(Shares(plan, epoch, start, batch=batch, rank=r, world=world)) for r in range(world)]
    assert len({len(s) for s in samplers}) == 1, "ranks with different numbers of batches would hang"
    return [
        [share.positions if share.counts else np.array([], int) for share in step]
        for step in zip(*samplers, strict=True)
    ]


@pytest.mark.parametrize("shards_", [1, 2, 5, 9])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_every_sample_exactly_once(shards_, world, batch):
    sizes = np.random.default_rng(shards_).integers(0, 13, shards_) + 1
    for shuffle in (True, False):
        plan = EpochPlan(sizes, 3, window=2, shuffle=shuffle)
        seen = np.concatenate([p for step in positions(plan, 1, 0, batch=batch, world=world) for p in step])
        assert sorted(seen) == list(range(sizes.sum()))


def test_orders_differ_between_epochs_and_seeds_but_not_between_runs():
    plan = EpochPlan([10, 10, 10], 0)
    assert (plan.order(0, 0, 30) == EpochPlan([10, 10, 10], 0).order(0, 0, 30)).all()
    assert (plan.order(0, 0, 30) != plan.order(1, 0, 30)).any()
    assert (plan.order(0, 0, 30) != EpochPlan([10, 10, 10], 1).order(0, 0, 30)).any()


def test_any_slice_is_a_slice_of_the_whole_order():
    plan = EpochPlan([5, 3, 9, 1, 4, 4, 7], 5, window=3)
    whole = plan.order(2, 0, 33)
    for start in range(33):
        for stop in (start + 1, start + 6, 40):
            assert (plan.order(2, start, stop) == whole[start:stop]).all()


@pytest.mark.parametrize("worlds", [(1, 1), (2, 2), (2, 3), (4, 1), (1, 4)])
def test_a_resume_reads_exactly_the_rest(worlds):
    plan, batch = EpochPlan([7, 9, 6, 8, 1], 1, window=2), 3
    before, after = worlds
    steps = positions(plan, 0, 0, batch=batch, world=before)
    for k in range(len(steps)):
        first = [p for step in steps[:k] for part in step for p in part]
        rest = [p for step in positions(plan, 0, len(first), batch=batch, world=after) for part in step for p in part]
        assert sorted(first + rest) == list(range(31))


def test_a_resume_with_the_same_settings_has_the_same_batches():
    plan = EpochPlan([7, 9, 6, 8, 1], 1, window=2)
    steps = positions(plan, 0, 0, batch=3, world=2)
    for k in range(len(steps)):
        taken = sum(len(part) for step in steps[:k] for part in step)
        rest = positions(plan, 0, taken, batch=3, world=2)
        assert [[part.tolist() for part in step] for step in rest] == [
            [part.tolist() for part in step] for step in steps[k:]
        ]


def sizes_of(n: int, batch: int, world: int) -> list[list[int]]:
    return [[len(p) for p in step] for step in positions(EpochPlan([n], shuffle=False), 0, 0, batch=batch, world=world)]


def test_the_batches_of_an_epoch_are_nearly_equal():
    assert sizes_of(36, 5, 1) == [[5], [5], [5], [5], [4], [4], [4], [4]]
    assert sizes_of(7, 3, 2) == [[2, 2], [2, 1]]
    assert sizes_of(10, 3, 2) == [[3, 2], [3, 2]]
    assert sizes_of(64, 8, 4) == [[8] * 4, [8] * 4]
    assert sizes_of(1, 8, 2) == [[1, 0]]
    for n in range(1, 200):
        for batch, world in ((5, 1), (4, 2), (8, 3), (32, 1)):
            totals = [sum(step) for step in sizes_of(n, batch, world)]
            assert len(totals) == -(-n // (batch * world))
            assert max(totals) - min(totals) <= 1
            if n >= 2 * world and batch >= 4:
                assert min(size for step in sizes_of(n, batch, world) for size in step) >= 2
            shares = Shares(EpochPlan([n], shuffle=False), 0, 0, batch=batch, rank=0, world=world)
            assert shares.smallest() == max(1, min(size for step in sizes_of(n, batch, world) for size in step))


def test_a_process_without_images_has_two_stand_ins(shards):
    split = Split(shards, "train")
    plan = EpochPlan([4], shuffle=False)
    (batch,) = Loader(split, plan, batch=1, rank=5, world=6, workers=0).batches(0)
    assert batch.weight.tolist() == [0, 0]
    assert batch.total == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_carry_images_labels_and_weights(shards, workers):
    split = Split(shards, "train", ("No Finding", "Effusion"))
    plan = EpochPlan(split.shard_sizes(), 0)
    seen = []
    for batch in Loader(split, plan, batch=4, workers=workers).batches(0):
        assert batch.image.dtype == torch.uint8
        assert batch.image.shape[1:] == (1, 64, 64)
        for i, p in enumerate(batch.index.tolist()):
            assert (batch.image[i, 0].numpy() == split.image(p)).all()
            assert split.meta(p)["findings"] == [split.classes[batch.target[i].argmax()]]
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(30))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves the tars open
def test_any_webdataset_reader_reads_the_shards(shards):
    split = Split(shards, "val")
    theirs = webdataset.WebDataset(
        [f"{split.store.name}/{shard['name']}" for shard in split.shards], shardshuffle=False, empty_check=False
    )
    keys = {sample["__key__"]: sample for sample in theirs}
    del theirs
    gc.collect()
    assert sorted(keys) == sorted(split.key(i) for i in range(len(split)))
    assert json.loads(keys[split.key(3)]["json"])["findings"] == split.meta(3)["findings"]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Folders with 1 to 9 shards of 3 images of 8 px, the last shard smaller; keys are known."""
    root = tmp_path_factory.mktemp("grid")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(root / "i.png")
    for n in range(1, 10):
        items = [
            Item(split, f"{split}{i}", ("No Finding",), str(root / "i.png"))
            for split in ("train", "val")
            for i in range(3 * n - 1 - n % 2)
        ]
        pack(Source(items, size=8), root / str(n), dataset="grid", per_shard=3)
    return root


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("number", range(1, 10))
def test_every_key_exactly_once_whatever_divides(grid, number, world, workers):
    """The real loader, for training and for evaluation, with as many batches on every rank, so that none waits for
    another.
    """
    for name, shuffle in (("train", True), ("val", False)):
        split = Split(grid / str(number), name)
        assert len(split.shards) == number
        plan = EpochPlan(split.shard_sizes(), 1, window=2, shuffle=shuffle)
        read = [
            list(Loader(split, plan, batch=2, rank=r, world=world, workers=workers).batches(3)) for r in range(world)
        ]
        assert len({len(batches) for batches in read}) == 1
        keys = [
            split.key(int(p))
            for batches in read
            for b in batches
            for p, weight in zip(b.index, b.weight, strict=True)
            if weight
        ]
        assert sorted(keys) == sorted(f"{name}{i}" for i in range(3 * number - 1 - number % 2))
        split.close()


def ten_million(root: Path) -> Path:
    """An index of 10 million samples in 40,000 shards; each shard is a link to the same tar."""
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "i.png")
    items = [Item("train", f"{i:06d}", (("No Finding", "Effusion")[i % 2],), str(root / "i.png")) for i in range(250)]
    pack(Source(items, size=8), root / "one", dataset="x", per_shard=250)
    index = json.loads((root / "one/index.json").read_text())
    entry = index["splits"]["train"]
    shard = entry["shards"][0]
    (root / "many/train").mkdir(parents=True)
    for i in range(40_000):
        os.symlink(root / "one/train/000000.tar", root / f"many/train/{i:06d}.tar")
    entry["shards"] = [shard | {"name": f"train/{i:06d}.tar"} for i in range(40_000)]
    entry["samples"] = 10_000_000
    for name in ("train.npy", "train.labels.npy", "train.ids.npy", "train.boxes.npy"):
        np.save(root / "many" / name, np.tile(np.load(root / "one" / name), 40_000))
    (root / "many/index.json").write_text(json.dumps(index))
    return root / "many"


def test_ten_million_samples_open_and_resume_at_once(tmp_path, monkeypatch):
    """What is counted is the work: windows of the order that are made, and lines of Python that are run."""
    root = ten_million(tmp_path)

    def lines(action) -> int:
        """Lines of this project that are run by an action: the same on any machine."""
        count = 0

        def trace(frame, event, _):
            nonlocal count
            count += event == "line"
            return trace if "shards" in frame.f_code.co_filename else None

        sys.settrace(trace)
        try:
            action()
        finally:
            sys.settrace(None)
        return count

    split = Split(root, "train", ("No Finding", "Effusion"))
    assert len(split) == 10_000_000
    # Opening looks at each shard once, and at no sample in Python.
    assert lines(lambda: Split(root, "train", ("No Finding", "Effusion"))) < 40 * len(split.shards)
    made = []
    ordinary = EpochPlan._window
    monkeypatch.setattr(
        EpochPlan, "_window", lambda self, epoch, w, shards: made.append(w) or ordinary(self, epoch, w, shards)
    )
    first = {}
    for step in (0, 10, 100_000):
        plan = EpochPlan(split.shard_sizes(), 0)
        made.clear()
        batches = Loader(split, plan, batch=32, rank=1, world=2, workers=0).batches(0, step * 64)
        first[step] = lines(lambda batches=batches: next(batches))
        assert len(set(made)) <= 2, "a resume makes the windows of its first batch, not those before it"
    assert max(first.values()) < 1.5 * min(first.values())


@pytest.fixture
def copied(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "copy")
    return tmp_path / "copy"


def test_shards_without_an_index_name_the_command_and_it_works(copied):
    before = (copied / "train.npy").read_bytes()
    for file in (copied / "index.json", *copied.glob("*.npy")):
        file.unlink()
    with pytest.raises(InputError, match="python -m shards index"):
        Split(copied, "train")
    main(["index", str(copied)])
    assert (copied / "train.npy").read_bytes() == before
    main(["verify", str(copied)])


def test_an_index_that_does_not_match_its_tars(copied):
    tar = copied / "train" / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(InputError, match=r"000001\.tar: has .* bytes, its index says"):
        Split(copied, "train")
    tar.unlink()
    with pytest.raises(InputError, match=r"000001\.tar: is in the index but not on disk"):
        Split(copied, "train")


def test_a_changed_shard_is_found_by_verify(copied):
    tar = copied / "train" / "000001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 255
    tar.write_bytes(data)
    with pytest.raises(InputError, match="1 problem, above"):
        main(["verify", str(copied)])


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"version": 99}', b"not json"])
def test_a_damaged_index(copied, damage):
    (copied / "index.json").write_bytes(damage)
    with pytest.raises(InputError, match="shards index"):
        Split(copied, "train")


def test_a_pickled_table_is_not_loaded(copied):
    np.save(copied / "train.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"train\.npy: cannot be read"):
        Split(copied, "train")


def test_an_index_cannot_point_outside_its_folder(copied):
    index = json.loads((copied / "index.json").read_text())
    index["splits"]["train"]["shards"][0]["name"] = "../../etc/passwd"
    (copied / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="outside the folder"):
        Split(copied, "train")


def test_unknown_findings_and_splits(shards):
    with pytest.raises(InputError, match=r"'Efusion'; did you mean Effusion"):
        Split(shards, "train", ("No Finding", "Efusion"))
    with pytest.raises(InputError, match="no split 'dev'"):
        Split(shards, "dev")


def test_foreign_tars_with_class_numbers(tmp_path):
    image = np.zeros((8, 8), np.uint8)
    with webdataset.TarWriter(str(tmp_path / "train-000.tar")) as writer:
        for i in range(4):
            writer.write({"__key__": f"s{i}", "png": image, "cls": i % 2})
    with pytest.raises(InputError, match="--findings"):
        build_index(tmp_path, dataset="x")
    build_index(tmp_path, dataset="x", classes=["No Finding", "Nodule"])
    assert Split(tmp_path, "train", ("No Finding", "Nodule")).counts() == {"No Finding": 2, "Nodule": 2}


def test_two_samples_with_one_key(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "train-000.tar"), encoder=False) as writer:
        for _ in range(2):
            writer.write({"__key__": "same", "png": b"x"})
    with pytest.raises(InputError, match="'same' has two image members"):
        build_index(tmp_path, dataset="x")


def jpeg(image: Image.Image) -> bytearray:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return bytearray(buffer.getvalue())


def test_images_decode_as_pillow_does_it():
    rng = np.random.default_rng(0)
    gray, colour = rng.integers(0, 255, (40, 30), np.uint8), rng.integers(0, 255, (40, 30, 3), np.uint8)
    for image in (Image.fromarray(gray), Image.fromarray(colour), Image.fromarray(colour).convert("CMYK")):
        data = jpeg(image)
        assert (decode(data, lambda: "x") == decode_image(data, "x")).all()


def test_images_that_do_not_decode_are_named():
    whole = jpeg(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)))
    for data in (whole[: len(whole) // 2], whole[:4], whole[:2], bytearray(b""), bytearray(b"x" * 50)):
        with pytest.raises(InputError, match=r"here.*cannot be decoded"):
            decode(data, lambda: "here")
    at = whole.index(b"\xff\xc0")
    whole[at + 5 : at + 9] = b"\xff\xff\xff\xff"  # 65535 x 65535
    with pytest.raises(InputError, match=r"here: 65535 x 65535 pixels is beyond the limit|here: cannot be decoded"):
        decode(whole, lambda: "here")


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_damaged_tars_are_not_indexed(copied, damage):
    tar = copied / "train" / "000001.tar"
    tar.write_bytes({"empty": b"", "cut": tar.read_bytes()[:3000], "text": b"<html>" * 2000}[damage])
    with pytest.raises(InputError, match=r"000001\.tar: not a whole tar file"):
        main(["index", str(copied)])


def test_one_key_in_two_tars_of_a_split(copied):
    shutil.copy(copied / "train/000000.tar", copied / "train/000009.tar")
    with pytest.raises(InputError, match=r"000009\.tar: the key 'train-000000' is in 000000\.tar, too"):
        main(["index", str(copied)])


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png"])
def test_members_that_would_escape_are_refused(copied, name):
    with tarfile.open(copied / "train/000009.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(InputError, match="not a plain relative name"):
        main(["index", str(copied)])
    with tarfile.open(copied / "train/000009.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(InputError, match="not a plain file"):
        main(["index", str(copied)])


def test_a_batch_is_not_overwritten_while_somebody_holds_it(shards):
    split = Split(shards, "train")
    plan = EpochPlan(split.shard_sizes(), 0)
    kept = list(Loader(split, plan, batch=4, workers=0).batches(0))
    for batch in kept:
        assert all(
            (image[0].numpy() == split.image(int(p))).all() for p, image in zip(batch.index, batch.image, strict=True)
        )
    addresses = set()
    for batch in Loader(split, plan, batch=4, workers=0).batches(0):
        addresses.add(batch.image.data_ptr())
    assert len(addresses) <= 4, "memory is not used again"


def test_an_error_in_a_loader_process_is_one_line(copied):
    split = Split(copied, "train")
    at = int(split.table[5]["image_at"])
    tar = copied / "train/000000.tar"
    data = bytearray(tar.read_bytes())
    data[at : at + 20] = b"x" * 20
    tar.write_bytes(data)
    plan = EpochPlan(split.shard_sizes(), shuffle=False)
    with pytest.raises(InputError, match=r"^\S*000000\.tar:train-000005: cannot be decoded.*remove it$"):
        list(Loader(split, plan, batch=4, workers=1).batches(0))


def foreign(root: Path, members: dict[str, bytes], name: str = "train-0.tar") -> Path:
    with tarfile.open(root / name, "w") as tar:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            if data is None:
                info.type = tarfile.DIRTYPE
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    return root


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "PNG")
    return buffer.getvalue()


META = b'{"findings": ["Mass"]}'


@pytest.mark.parametrize(
    "members",
    [
        {"A.PNG": png(1), "A.JSON": META},
        {"./": None, "./A.png": png(1), "./A.json": META},
        {"dir": None, "A.png": png(1), "._A.png": b"junk", "A.json": META, "._A.json": b"junk", "x/._A.png": b"junk"},
        {"A.image.png": png(1), "A.json": META},
        {"A.png": png(1), "A.overlay.png": png(2), "A.json": META},
        {"A.overlay.png": png(2), "A.png": png(1), "A.json": META},
        {"A.Jpeg": jpeg(Image.new("L", (8, 8), 1)), "A.json": META, "A.txt": b"hello"},
        {"A.gif": png(1), "A.mask.png": png(255), "A.json": META},
        {"__meta.png": b"junk", "A.png": png(1), "A.json": META},
    ],
)
def test_tars_of_others_are_read_as_webdataset_reads_them(tmp_path, members):
    build_index(foreign(tmp_path, members), dataset="x")
    split = Split(tmp_path, "train", ("Mass",))
    assert (len(split), split.key(0), int(split.image(0)[0, 0])) == (1, "A", 1)


@pytest.mark.parametrize(
    "names",
    [("training-0.tar", "validation-0.tar"), ("Train_000.tar", "valid_000.tar"), ("train.000.tar", "validate.000.tar")],
)
def test_splits_of_tars_have_the_names_that_people_give_them(tmp_path, names):
    for name in names:
        foreign(tmp_path, {f"{name[:3]}.png": png(1), f"{name[:3]}.json": META}, name)
    assert list(build_index(tmp_path, dataset="x")["splits"]) == ["train", "val"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_deeply_nested_json_is_one_line(copied, text):
    (copied / "index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json: is not an index"):
        Split(copied, "train")
    (copied / "index.json").unlink()
    foreign(copied, {"A.png": png(1), "A.json": text.encode()}, "train/9.tar")
    with pytest.raises(InputError, match="nested too deeply"):
        build_index(copied, dataset="x")


held: list = []  # connections that stay open


class Troubled(Split):
    """A split whose loader processes meet with something."""

    trouble = ""

    def image(self, position):
        if get_worker_info() is not None and self.trouble == "freeze later":  # while the first batch is handed over
            sharer = resource_sharer._resource_sharer
            sharer._serve = lambda: (
                held.append(sharer._listener.accept()),
                os.kill(os.getpid(), signal.SIGSTOP),
                threading.Event().wait(),
            )
        if get_worker_info() is not None and position >= 8:
            if self.trouble == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
        return super().image(position)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sockets of the lost process
@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("kill", "a loader process was killed"),
        ("freeze", "have delivered nothing for 2 s"),
        ("freeze later", "have delivered nothing for 2 s"),
    ],
)
def test_a_loader_process_that_is_lost_ends_the_run_in_one_line(shards, monkeypatch, trouble, words):
    monkeypatch.setattr(loader, "STALLED", 2)
    monkeypatch.setattr(Troubled, "trouble", trouble)
    split = Troubled(shards, "train")
    plan = EpochPlan(split.shard_sizes(), shuffle=False)
    with pytest.raises(InputError, match=words):
        list(Loader(split, plan, batch=4, workers=1).batches(0))
    gc.collect()
    assert not [child for child in multiprocessing.active_children() if child.is_alive() and trouble != "kill"]


def lose(process, trouble):
    """Stop a loader's process between two epochs, or kill it: then torch's signal handler raises at once, in the main
    one.
    """
    if trouble == "stop":
        os.kill(process.pid, signal.SIGSTOP)
        return
    with suppress(RuntimeError):
        os.kill(process.pid, signal.SIGKILL)
        time.sleep(1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("trouble", "words"), [("stop", "have delivered nothing for 2 s"), ("kill", "a loader process was killed")]
)
def test_a_loader_process_that_is_lost_between_two_epochs_is_found_at_the_next(shards, monkeypatch, trouble, words):
    monkeypatch.setattr(loader, "STALLED", 2 if trouble == "stop" else 60)  # torch looks after 5 s whether all live
    split = Split(shards, "train")
    batches = Loader(split, EpochPlan(split.shard_sizes(), shuffle=False), batch=8, workers=2)
    assert len(list(batches.batches(0)))
    lose(batches.processes[0], trouble)
    with pytest.raises(InputError, match=words):
        list(batches.batches(1))


def test_a_loader_process_that_is_killed_in_the_middle_of_a_step_is_one_line(capsys):
    """Torch's signal handler raises wherever the main process is."""

    def main():
        raise RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")

    with pytest.raises(SystemExit, match="2"):
        run(main)
    assert capsys.readouterr().err.startswith(
        "error: a loader process was killed, most likely for want of memory or of space in /dev/shm"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="a small /dev/shm can be mounted on Linux only")
def test_a_full_shared_memory_ends_the_run_in_one_line(shards):
    script = f"""
from shards.errors import run
from shards.dataset import Split
from shards.loader import Loader
from shards.plan import EpochPlan
split = Split("{shards}", "train")
run(lambda: print(len(list(Loader(split, EpochPlan(split.shard_sizes()), batch=32, workers=2).batches(0)))))
"""
    inside = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", inside, sys.executable, script],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no small /dev/shm can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith(
        "error: the loader's processes have no room left in /dev/shm; use fewer --workers"
    )


@pytest.mark.parametrize(
    "table",
    [{}, {"bytes": "many", "sha256": "0" * 64}, {"bytes": 5, "sha256": "../../../etc/passwd"}, {"sha256": "0" * 64}],
)
def test_a_table_is_described_by_size_and_checksum(copied, table):
    index = json.loads((copied / "index.json").read_text())
    index["splits"]["train"]["tables"]["train.npy"] = table
    (copied / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="is not an index"):
        Split(copied, "train")


def test_files_that_are_no_samples_are_told_and_no_more(tmp_path, capsys):
    members = {
        "README": b"hello",
        "Thumbs.db": b"x",
        "dataset_info.json": META,
        "__meta__": b"x",
        "__A.png": png(1),
        "__A.json": META,
    }
    build_index(foreign(tmp_path, members), dataset="x")
    split = Split(tmp_path, "train")
    assert [split.key(i) for i in range(len(split))] == ["__A"]
    assert "1 files without an image are no samples: dataset_info" in capsys.readouterr().err


def test_a_server_that_never_answers_does_not_keep_the_process(shards, tmp_path):
    """Both the loader's process and the threads that fetch ahead are stuck; the run ends with one line all the same."""
    script = f"""
import http.server, threading, time
from functools import partial
from shards import loader
from shards.errors import run
from shards.dataset import Split
from shards.loader import Loader
from shards.plan import EpochPlan

class Stuck(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path.endswith(".tar"):
            time.sleep(1000)
        super().do_GET()
    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Stuck, directory="{shards}"))
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
loader.STALLED = 3
split = Split(f"http://127.0.0.1:{{server.server_port}}", "train")
run(lambda: print(len(list(Loader(split, EpochPlan(split.shard_sizes()), batch=4, workers=1).batches(0)))))
"""
    environment = os.environ | {"CXR_FOCUS_CACHE": str(tmp_path / "cache"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "error: the loader's processes have delivered nothing for 3 s" in done.stderr


def test_the_loader_s_processes_stay_for_the_whole_run(shards):
    split = Split(shards, "train", ("No Finding", "Effusion"))
    plan = EpochPlan(split.shard_sizes(), 0)
    loader = Loader(split, plan, batch=4, workers=2)
    seen = [[batch.index.tolist() for batch in loader.batches(0)]]
    processes = [child.pid for child in loader.processes]
    assert len(processes) == 2
    left = loader.batches(1)  # an epoch that is left in the middle, as by an error that is caught
    next(left)
    left.close()
    seen.append([batch.index.tolist() for batch in loader.batches(1, 8)])
    assert [child.pid for child in loader.processes] == processes
    assert all(child.is_alive() for child in loader.processes)
    alone = Loader(split, plan, batch=4)
    assert seen == [
        [batch.index.tolist() for batch in alone.batches(0)],
        [batch.index.tolist() for batch in alone.batches(1, 8)],
    ]


def test_a_spawned_process_opens_the_index_itself(shards):
    for split in (
        Split(shards, "train", SingleLabel(("No Finding", "Effusion"), ("Effusion",))),
        Split(shards, "val", masks=True),
        Split(shards, "train", SingleLabel(("No Finding", "Effusion")), of_each=2),
    ):
        data = pickle.dumps(split)
        assert len(data) < 1000
        other = pickle.loads(data)
        assert other.fingerprint == split.fingerprint
        assert other.masks == split.masks
        assert len(other) == len(split)
        assert (other.image(3) == split.image(3)).all()
    both = pickle.loads(pickle.dumps(Joined([Split(shards, "train", masks=True), Split(shards, "val", masks=True)])))
    assert len(both) == 80


def test_joined_splits_are_read_by_processes(shards):
    joined = Joined([Split(shards, "train", masks=True), Split(shards, "val", masks=True)])
    plan = EpochPlan(joined.shard_sizes(), 0)
    batches = list(Loader(joined, plan, batch=16, workers=1).batches(0))
    assert sorted(i for batch in batches for i in batch.index.tolist()) == list(range(80))
    assert all(batch.mask is not None and batch.mask.shape == batch.image[:, 0].shape for batch in batches)
