import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.__main__ import main
from shards.dataset import Split
from shards.errors import InputError
from shards.merge import merge
from shards.pack import pack
from shards.pixels import FORMATS
from shards.sources.item import Item, Source
from shards.store import open_store
from shards.verify import verify


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """60 + 20 + 20 images in class folders."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 10), ("test", 10)):
        for name in ("0NoFinding", "1Effusion"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (40, 30), np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


def command(pictures: Path, out: Path, *more: str) -> list[str]:
    return ["folder", "--path", str(pictures), "--out", str(out), "--size", "32", "--per-shard", "7", *more]


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_bytes_whatever_the_number_of_workers(pictures, tmp_path, form):
    for workers in ("1", "3"):
        main(command(pictures, tmp_path / workers / "out", "--workers", workers, "--format", form))
    assert files(tmp_path / "1") == files(tmp_path / "3")
    assert not list(tmp_path.rglob("*.partial"))
    assert verify(str(tmp_path / "3" / "out"), 2)[1] == []
    main(command(pictures, tmp_path / "larger", "--size", "48", "--format", form, "--workers", "1"))
    assert Split(tmp_path / "larger", "train").image(0).shape == (48, 48)


def test_lossless_formats_are_lossless(pictures, tmp_path):
    for form in ("png", "webp"):
        main(command(pictures, tmp_path / form, "--format", form))
    one, two = Split(tmp_path / "png", "train"), Split(tmp_path / "webp", "train")
    assert all((one.image(i) == two.image(i)).all() for i in range(len(one)))


@pytest.mark.parametrize("attempts", [[3, 4], pytest.param(range(20), marks=pytest.mark.slow)], ids=["two", "twenty"])
def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_bytes(pictures, tmp_path, attempts):
    main(command(pictures, tmp_path / "whole" / "out"))
    expected, random_ = files(tmp_path / "whole"), random.Random(0)
    code = (
        "import sys, time\nfrom shards.sources.item import Source\nload = Source.load\n"
        "def slow(self, item):\n    time.sleep(0.004)\n    return load(self, item)\n"
        "Source.load = slow\nfrom shards.__main__ import main\nmain(sys.argv[1:])\n"
    )
    kept = 0
    out = tmp_path / "killed" / "out"
    for attempt in attempts:
        shutil.rmtree(out, ignore_errors=True)
        more = ("--workers", "2") if attempt % 5 == 4 else ()
        for _ in range(1 + attempt % 2):  # killed once or twice
            process = subprocess.Popen(
                [sys.executable, "-c", code, *command(pictures, out, *more)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            partial = out.with_name("out.partial")
            while process.poll() is None and not partial.exists():
                time.sleep(0.005)
            time.sleep(random_.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not out.exists() or (out / "index.json").is_file()
        kept += len(list(partial.rglob("notes/*.json")))
        if not out.exists():
            main(command(pictures, out))
        assert files(tmp_path / "killed") == expected
    assert kept > len(attempts), "hardly anything was ever kept: the kills came too early to test anything"


def test_workers_end_with_their_parent(pictures, tmp_path):
    code = (
        "import sys, time\nfrom shards.sources.item import Item, Source\nfrom shards.pack import pack\nfrom pathlib "
        "import Path\n"
        "from tests.test_pack import Endless\n"
        "if __name__ == '__main__':\n    pack(Endless([Item('train', str(i)) for i in range(100)]), Path(sys.argv[1]), "
        "dataset='x', per_shard=5, workers=2)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    }
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "out")], env=environment, stderr=subprocess.DEVNULL
    )
    mark = tmp_path / "out.partial" / "shards" / "train"
    deadline = time.monotonic() + 60
    while len(list(mark.glob(".*")) if mark.is_dir() else []) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    workers = [int(path.name.rpartition(".")[2]) for path in mark.glob(".*")]
    process.kill()
    process.wait()
    while any(
        Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" for pid in workers
    ):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)


class Endless(Source):
    """Its items never load."""

    def load(self, item):
        time.sleep(3600)


def test_a_changed_file_is_packed_anew_and_the_rest_is_kept(pictures, tmp_path):
    bad = pictures / "test" / "1Effusion" / "3.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:50])
    with pytest.raises(InputError, match=r"3\.png: cannot be decoded.*finished shards are kept"):
        main(command(pictures, tmp_path / "out"))
    notes = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.partial").rglob("notes/*.json")}
    assert len(notes) >= 9
    with pytest.raises(InputError, match="packing has not finished"):
        Split(tmp_path / "out", "train")
    bad.write_bytes(good)
    other = pictures / "train" / "0NoFinding" / "5.png"
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(other)
    main(command(pictures, tmp_path / "out"))
    main(command(pictures, tmp_path / "fresh" / "out"))
    assert files(tmp_path / "out") == files(tmp_path / "fresh" / "out")


def test_bad_images_are_skipped_counted_and_named(pictures, tmp_path, capsys):
    for name in ("train/1Effusion/3.png", "train/1Effusion/4.png", "val/0NoFinding/1.png"):
        (pictures / name).write_bytes(b"broken")
    main(command(pictures, tmp_path / "out", "--on-bad", "skip"))
    said = capsys.readouterr().out
    assert "skipped 3 that could not be used" in said
    assert "1Effusion-3: cannot be decoded" in said
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [s["key"] for s in index["skipped"]].count("1Effusion-3") == 1
    assert Split(tmp_path / "out", "train", ("No Finding", "Effusion")).counts() == {"No Finding": 30, "Effusion": 28}
    for path in pictures.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="every sample was skipped"):
        main(command(pictures, tmp_path / "none", "--on-bad", "skip"))


def test_parts_make_the_whole(pictures, tmp_path):
    main(command(pictures, tmp_path / "whole" / "out"))
    out = tmp_path / "parts" / "out"
    main(command(pictures, out, "--part", "2/3"))
    assert not out.exists()
    with pytest.raises(InputError, match=r"10 of 15 shards are not made yet: train/000000\.tar"):
        main(["index", "--merge", str(out)])
    main(command(pictures, out, "--part", "1/3"))
    with pytest.raises(InputError, match="begun with other settings"):
        main(command(pictures, out, "--part", "3/3", "--aspect", "pad"))
    main(command(pictures, out, "--part", "3/3"))
    main(["index", "--merge", str(out)])
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    with pytest.raises(InputError, match="already holds something"):
        merge(out)


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "-1/2"])
def test_impossible_parts(pictures, tmp_path, part):
    with pytest.raises(InputError, match="--part"):
        main(command(pictures, tmp_path / "out", f"--part={part}"))


def test_a_disk_that_fills_up(pictures, tmp_path):
    """A limit on the size of files stands for it: the write fails in the same way."""
    code = (
        "import resource, signal, sys\nfrom shards.__main__ import main\nfrom shards.errors import "
        "run\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\nrun(lambda: main(sys.argv[1:]))\n"
    )
    flags = [*command(pictures, tmp_path / "out"), "--size", "200", "--format", "png"]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path).rglob("*.tar"))


def test_two_commands_do_not_pack_into_one_folder(pictures, tmp_path):
    import fcntl

    work = tmp_path / "out.partial"
    work.mkdir()
    with (work / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is packing there"):
            main(command(pictures, tmp_path / "out"))
    main(command(pictures, tmp_path / "out"))


def test_keys_that_collide_or_escape(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    image = str(tmp_path / "a.png")
    with pytest.raises(InputError, match="would have the same key"):
        pack(Source([Item("train", "k", (), image), Item("train", "k", (), image)]), tmp_path / "out", dataset="x")
    for key in ("../k", "/k", "a/../../k"):
        with pytest.raises(InputError, match="not a plain relative name"):
            pack(Source([Item("train", key, (), image)]), tmp_path / "out", dataset="x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_verify_finds_one_patient_and_one_image_in_two_splits(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (16, 16), np.uint8)).save(tmp_path / f"{i}.png")
    shutil.copy(tmp_path / "0.png", tmp_path / "7.png")
    splits = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    items = [
        Item(s, f"k{i}", ("No Finding",), str(tmp_path / f"{i}.png"), extra=(("patient", f"p{i % 5}"),))
        for i, s in enumerate(splits)
    ]
    pack(Source(items, size=16), tmp_path / "out", dataset="x", form="png")
    assert open_store(tmp_path / "out").index()["in_two_splits"] == 1
    with pytest.raises(InputError, match="4 problems, above"):
        main(["verify", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "patient p0 is in train and val" in said
    assert "the same image is in train and test: train/000000.tar:k0, test/000000.tar:k7" in said


def test_verify_finds_what_reading_would(pictures, tmp_path):
    main(command(pictures, tmp_path / "out"))
    table = np.load(tmp_path / "out" / "train.npy")
    table["image_at"][3] += 512
    np.save(tmp_path / "out" / "train.npy", table)
    problems = verify(str(tmp_path / "out"))[1]
    assert any("train.npy: changed since it was written" in p for p in problems)
    assert any("its members are not those of the index" in p for p in problems)


def test_shards_are_kept_when_the_folder_cannot_get_its_name(pictures, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(16, "Device or resource busy")))
        with pytest.raises(InputError, match=r"finished shards are kept"):
            main(command(pictures, out))
    assert list((tmp_path / "out.partial").rglob("*.tar"))
    main(command(pictures, out))
    assert verify(str(out))[1] == []
    assert not (tmp_path / "out.partial").exists()


def test_out_that_is_a_link_is_refused_before_any_work(pictures, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(InputError, match="is a link"):
        main(command(pictures, tmp_path / "link"))
    assert not (tmp_path / "link.partial").exists()


def test_parts_of_other_items_do_not_go_together(tmp_path):
    rows = []
    for i in range(24):
        Image.fromarray(np.full((16, 16), 5 * i, np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'Mass' if i % 2 else 'No Finding'},P{i // 2}")
    (tmp_path / "t.csv").write_text("path,finding,patient\n" + "\n".join(rows))
    flags = [
        "csv",
        "--csv",
        str(tmp_path / "t.csv"),
        "--images",
        str(tmp_path),
        "--patient-column",
        "patient",
        "--out",
        str(tmp_path / "out"),
        "--size",
        "16",
    ]
    main([*flags, "--part", "1/2", "--seed", "0"])
    with pytest.raises(InputError, match="other settings or other files"):
        main([*flags, "--part", "2/2", "--seed", "1"])


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_tar_damaged_in_a_later_header_is_not_indexed(pictures, tmp_path, damage):
    main(command(pictures, tmp_path / "out"))
    path = tmp_path / "out" / "train" / "000000.tar"
    data = bytearray(path.read_bytes())
    row = Split(tmp_path / "out", "train").table[3]
    header = int(row["image_at"]) - 512
    if damage == "flip":
        data[header + 5] ^= 1
    path.write_bytes(data if damage == "flip" else data[: header + 100])
    with pytest.raises(InputError, match=r"000000\.tar"):
        main(["index", str(tmp_path / "out")])


def test_a_table_that_is_gone_or_counts_that_are_wrong_are_problems(pictures, tmp_path, capsys):
    main(command(pictures, tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    index["splits"]["train"]["findings"]["Effusion"] = 999
    index["splits"]["train"]["masks"] = 3
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    problems = verify(str(tmp_path / "out"))[1]
    assert any("Effusion" in p and "999" in p for p in problems)
    assert any("masks" in p for p in problems)
    (tmp_path / "out" / "train.npy").unlink()
    with pytest.raises(InputError, match=r"train\.npy"):
        verify(str(tmp_path / "out"))


def test_foreign_tars_with_class_numbers_verify(tmp_path):
    import webdataset

    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        with webdataset.TarWriter(str(tmp_path / split / "0.tar"), encoder=False) as tar:
            for i in range(3):
                image = Image.fromarray(np.full((16, 16), 10 * i + len(split), np.uint8))
                image.save(tmp_path / "x.png")
                tar.write(
                    {"__key__": f"{split}{i}", "png": (tmp_path / "x.png").read_bytes(), "cls": str(i % 2).encode()}
                )
    main(["index", str(tmp_path), "--findings", "No Finding,Mass"])
    main(["verify", str(tmp_path)])


def test_out_is_a_path_whatever_it_looks_like(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run:1", "pipe:touch pwned; cat >"):
        main(command(pictures, Path(name)))
        assert (tmp_path / name / "index.json").is_file()
    assert not (tmp_path / "pwned").exists()


def test_what_a_killed_part_left_is_removed(pictures, tmp_path):
    out = tmp_path / "out"
    main(command(pictures, out, "--part", "1/1"))
    (tmp_path / "out.partial" / "shards" / "train" / ".000000.tar.12345").write_bytes(b"half")
    main(["index", str(out), "--merge"])
    assert not [p for p in out.rglob("*") if p.name.startswith(".")]


def test_bad_arguments_are_one_line(pictures, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--seed"):
        main(["phantom", "--count", "20", "--seed", "-1", "--out", str(tmp_path / "a")])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="the working folder"):
        main(command(pictures, Path(".")))


def test_a_class_that_skipping_has_emptied_is_told(pictures, tmp_path, capsys):
    for path in (pictures / "test" / "1Effusion").iterdir():
        path.write_bytes(b"")
    main(command(pictures, tmp_path / "out", "--on-bad", "skip"))
    assert "warning: test has no image of Effusion" in capsys.readouterr().out


def test_other_settings_after_a_stop_are_told(pictures, tmp_path, capsys):
    bad = pictures / "test" / "1Effusion" / "3.png"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    with pytest.raises(InputError, match="kept"):
        main(command(pictures, tmp_path / "out"))
    bad.write_bytes(good)
    main(command(pictures, tmp_path / "out", "--size", "40"))
    assert "begun with other settings or files" in capsys.readouterr().err


def test_collisions_are_told_all_at_once(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    items = [Item("train", key, (), str(tmp_path / "a.png")) for key in ("k", "k", "l", "l", "m")]
    with pytest.raises(InputError, match=r"2 images would have the same key as another: .*'k'.*'l'"):
        pack(Source(items), tmp_path / "out", dataset="x")


def test_cores_are_those_of_the_control_group(tmp_path, monkeypatch):
    from shards.cores import _cgroup_shares, cores

    (tmp_path / "v2/a/b").mkdir(parents=True)
    (tmp_path / "v2/a/b/cpu.max").write_text("max 100000\n")
    (tmp_path / "v2/a/cpu.max").write_text("150000 100000\n")
    (tmp_path / "own").write_text("0::/a/b\n")
    assert list(_cgroup_shares(tmp_path / "v2", tmp_path / "own")) == [1.5]
    (tmp_path / "v1/cpu/x").mkdir(parents=True)
    (tmp_path / "v1/cpu/x/cpu.cfs_quota_us").write_text("400000")
    (tmp_path / "v1/cpu/x/cpu.cfs_period_us").write_text("100000")
    (tmp_path / "own").write_text("4:memory:/x\n3:cpu,cpuacct:/x\n")
    assert list(_cgroup_shares(tmp_path / "v1", tmp_path / "own")) == [4.0]
    assert list(_cgroup_shares(tmp_path / "nowhere", tmp_path / "nothing")) == []
    monkeypatch.setattr("shards.cores._cgroup_shares", lambda: iter([0.3]))
    assert cores() == 1


def test_damaged_notes_are_made_again(tmp_path):
    source = Source([Item("train", str(i), ("Mass",), str(tmp_path / f"{i}.png")) for i in range(4)], size=8)
    for i in range(4):
        Image.new("L", (8, 8), 20 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"")
    with pytest.raises(InputError, match="finished shards are kept"):
        pack(source, tmp_path / "out", dataset="x", per_shard=1)
    (tmp_path / "out.partial/notes/train-000000.tar.json").write_text("[" * 100_000)
    Image.new("L", (8, 8), 60).save(tmp_path / "3.png")
    assert pack(source, tmp_path / "out", dataset="x", per_shard=1)["splits"]["train"]["samples"] == 4


def test_parts_of_an_earlier_version_are_merged(tmp_path):
    """Their notes say nothing of boxes and ids; their shards do."""

    def parts(name):
        for part in ("1/2", "2/2"):
            command = ["phantom", "--count", "40", "--size", "32", "--per-shard", "5", "--out", str(tmp_path / name)]
            main([*command, "--part", part])

    for name in ("new", "old"):
        parts(name)
    notes = list((tmp_path / "old.partial").rglob("notes/*.json"))
    assert notes
    for path in notes:
        note = json.loads(path.read_text())
        del note["ids"], note["boxes"]
        path.write_text(json.dumps(note))
    for name in ("new", "old"):
        main(["index", "--merge", str(tmp_path / name)])
    for path in (tmp_path / "new").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "old" / path.name).read_bytes()
    assert Split(tmp_path / "old", "train", ("No Finding", "Effusion")).lesions().xyxy.any()
