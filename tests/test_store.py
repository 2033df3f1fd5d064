"""Shards at a URL: real servers on loopback, nothing mocked."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from shards import cache as cached
from shards import dataset
from shards.__main__ import main
from shards.cache import Cache
from shards.dataset import Split
from shards.errors import InputError
from shards.files import file_sha256
from shards.loader import Loader
from shards.plan import EpochPlan
from shards.store import open_store

pytest.importorskip("aiohttp", reason="the extra http is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and short pauses."""
    monkeypatch.setenv("CXR_FOCUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cached, "FIRST_PAUSE", 0.01)
    return tmp_path / "cache"


class Flaky(http.server.SimpleHTTPRequestHandler):
    """A static file server. ``faults``: for each path, what to do to the next requests: drop, truncate, 500."""

    faults: ClassVar[dict[str, list[str]]] = {}
    seen: ClassVar[list[str]] = []

    def do_GET(self):
        self.seen.append(self.path)
        pending = self.faults.get(self.path) or self.faults.get("*") or []
        fault = pending.pop(0) if pending else ""
        if fault == "500":
            self.send_error(500)
        elif fault:
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if fault == "truncate" else b"")
            self.wfile.flush()
            self.connection.close()
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def served(shards):
    """(url, handler) of the phantom shards."""
    handler = type("Handler", (Flaky,), {"faults": {}, "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(shards)))
    server.handle_error = lambda *_: None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def read(split: Split, workers: int = 0, epoch: int = 0) -> dict[int, np.ndarray]:
    plan = EpochPlan(split.shard_sizes(), 0, window=2)
    images = {}
    for batch in Loader(split, plan, batch=7, workers=workers).batches(epoch):
        images |= {int(p): image[0].numpy().copy() for p, image in zip(batch.index, batch.image, strict=True)}
    return images


@pytest.mark.parametrize("workers", [0, 2])
def test_http_gives_the_same_images_and_fetches_each_shard_once(served, shards, workers):
    url, handler = served
    split, local = Split(url, "train", ("No Finding", "Effusion")), Split(shards, "train", ("No Finding", "Effusion"))
    assert split.fingerprint == local.fingerprint
    for epoch in range(2):
        got = read(split, workers, epoch)
        assert sorted(got) == list(range(len(local)))
        assert all((image == local.image(p)).all() for p, image in got.items())
    tars = [path for path in handler.seen if path.endswith(".tar")]
    assert len(tars) == len(set(tars)) == 9
    read(Split(url, "train", ("No Finding", "Effusion")), workers)
    assert len([path for path in handler.seen if path.endswith(".tar")]) == 9


@pytest.mark.parametrize("fault", ["drop", "truncate", "500"])
def test_a_server_that_fails_now_and_then(served, shards, fault):
    url, handler = served
    handler.faults |= {
        f"/{name}": [fault] * 2 for name in ("index.json", "train.npy", "train/000000.tar", "train/000003.tar")
    }
    assert sorted(read(Split(url, "train"))) == list(range(60))
    assert handler.seen.count("/train/000003.tar") >= 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_stays_broken_stops_with_its_name(served, workers, monkeypatch):
    url, handler = served
    split = Split(url, "train")
    handler.faults["/train/000002.tar"] = ["truncate"] * 1000
    with pytest.raises(InputError, match=rf"^{url}/train/000002\.tar: could not be read in 6 attempts"):
        read(split, workers)


def test_a_shard_that_changed_stops_with_its_name(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "copy")
    split = Split(f"file://{tmp_path}/copy", "train")
    tar = tmp_path / "copy/train/000004.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(
        InputError, match=r"train/000004\.tar: could not be read .*checksum.*changed since it was packed"
    ):
        read(split)
    tar.unlink()
    with pytest.raises(InputError, match=r"train/000004\.tar: is not there"):
        read(split)


def test_the_cache_is_bounded_and_what_was_dropped_comes_back(shards, tmp_path, cache, monkeypatch):
    largest = max(path.stat().st_size for path in (shards / "train").iterdir())
    limit = int(2.5 * largest)
    monkeypatch.setenv("CXR_FOCUS_CACHE_GB", str(limit / 1e9))
    monkeypatch.setattr(dataset, "MAX_OPEN_REMOTE", 2)
    split = Split(f"file://{shards}", "train")
    used = []
    for epoch in range(3):
        assert sorted(read(split, epoch=epoch)) == list(range(60))
        used.append(sum(path.stat().st_size for path in cache.iterdir()))
        assert not list(cache.glob("*.hold"))
    assert max(used) <= limit
    assert len(split._files) <= 2, "bytes of a deleted file that is open stay on the disk"
    split.close()
    monkeypatch.setenv("CXR_FOCUS_CACHE_GB", str(largest / 2 / 1e9))
    with pytest.raises(InputError, match="do not fit into the cache"):
        read(Split(f"file://{shards}", "train"))


@pytest.mark.parametrize("value", ["0", "-1", "much", "nan"])
def test_an_impossible_bound(value, monkeypatch):
    monkeypatch.setenv("CXR_FOCUS_CACHE_GB", value)
    with pytest.raises(InputError, match="CXR_FOCUS_CACHE_GB"):
        Cache.default()


def test_leftovers_of_a_killed_process_are_cleared(shards, cache):
    cache.mkdir()
    old, young = cache / "x.part", cache / "y.part"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    read(Split(f"file://{shards}", "train"))
    assert not old.exists()
    assert young.exists()


def test_processes_share_the_cache(served, shards):
    url, handler = served
    code = (
        "import sys\nfrom shards.dataset import Split\nfrom shards.loader import Loader\nfrom shards.plan import "
        "EpochPlan\n"
        "split = Split(sys.argv[1], 'train')\n"
        "plan = EpochPlan(split.shard_sizes(), 0)\n"
        "print(sum(len(b.index) for b in Loader(split, plan, batch=5, rank=int(sys.argv[2]), world=3, "
        "workers=1).batches(0)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, url, str(r)], env=environment, stdout=subprocess.PIPE, text=True)
        for r in range(3)
    ]
    assert sum(int(process.communicate()[0]) for process in processes) == 60
    tars = [path for path in handler.seen if path.endswith(".tar")]
    assert len(tars) == len(set(tars)) == 9


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_s3(shards, monkeypatch):
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server", reason="moto is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="bucket")
    for path in shards.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "bucket", f"some/shards/{path.relative_to(shards)}")
    local = Split(shards, "train")
    for workers in (0, 2):
        got = read(Split("s3://bucket/some/shards", "train"), workers)
        assert all((image == local.image(p)).all() for p, image in got.items())
        assert len(got) == 60
    with pytest.raises(InputError, match=r"s3://bucket/other/index\.json: is not there"):
        open_store("s3://bucket/other").index()
    main(["verify", "s3://bucket/some/shards"])
    server.stop()


def test_what_is_no_url_of_shards(served, tmp_path):
    url, _ = served
    with pytest.raises(InputError, match="is not there"):
        open_store(f"{url}/nowhere").index()
    with pytest.raises(InputError, match="s3, gcs, http, https and file URLs"):
        open_store("ftp://host/shards").index()
    (tmp_path / "index.json").write_text("<html>")
    with pytest.raises(InputError, match="is not an index"):
        open_store(f"file://{tmp_path}").index()


def test_the_cache_touches_its_own_files_only(tmp_path):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / "thesis.docx").write_bytes(b"x" * 900)
    origin = tmp_path / "origin"
    origin.write_bytes(b"y" * 1000)
    Cache(folder, 1500).fetch(origin.as_uri(), 1000, file_sha256(origin))
    assert (folder / "thesis.docx").exists()


def test_room_held_by_a_process_that_is_gone_is_given_back(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder = tmp_path / "held"
    folder.mkdir()
    with (folder / f"{gone.pid}-1.hold").open("wb") as hold:
        hold.truncate(1000)
    origin = tmp_path / "origin"
    origin.write_bytes(b"y" * 1000)
    done = threading.Thread(
        target=Cache(folder, 1500).fetch, args=(origin.as_uri(), 1000, file_sha256(origin)), daemon=True
    )
    done.start()
    done.join(5)
    assert not done.is_alive()


def test_verify_looks_at_the_server_and_not_at_the_cache(shards, served, tmp_path):
    from shards.verify import verify

    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    url = copy.as_uri()
    assert verify(url)[1] == []
    path = sorted(copy.glob("train/*.tar"))[1]
    path.write_bytes(path.read_bytes()[:5000])
    assert any(path.name in problem for problem in verify(url)[1])


class Swollen(Flaky):
    """Answers with more than it should: without end, or many zeros, compressed on the way."""

    swell: ClassVar[str] = ""
    sent: ClassVar[list[int]] = []

    def do_GET(self):
        if not self.path.endswith(self.swell):
            super().do_GET()
            return
        self.send_response(200)
        self.end_headers()
        total = 0
        try:
            while total < 2**31:
                self.wfile.write(bytes(2**20))
                total += 2**20
        except OSError:
            pass
        self.sent.append(total)
        self.close_connection = True


@pytest.mark.parametrize(
    ("swell", "words"),
    [
        ("index.json", "has more than the 1000000 bytes that an index may have"),
        ("train.npy", "bytes that its index says"),
    ],
)
def test_a_server_that_sends_too_much_is_not_believed(shards, cache, monkeypatch, swell, words):
    monkeypatch.setattr(cached, "INDEX_BYTES", 10**6)
    monkeypatch.setattr(cached, "ATTEMPTS", 2)
    handler = type("Handler", (Swollen,), {"faults": {}, "seen": [], "swell": swell, "sent": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(shards)))
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(InputError, match=words):
        Split(f"http://127.0.0.1:{server.server_port}", "train")
    server.shutdown()
    server.server_close()
    assert max(handler.sent) < 2**28
    assert sum(path.stat().st_size for path in cache.rglob("*")) < 10**6


@pytest.mark.parametrize("name", ["index.json", "train.npy"])
def test_a_file_url_whose_file_is_too_large(shards, tmp_path, monkeypatch, name):
    monkeypatch.setattr(cached, "INDEX_BYTES", 10**6)
    monkeypatch.setattr(cached, "ATTEMPTS", 2)
    shutil.copytree(shards, tmp_path / "copy")
    with (tmp_path / "copy" / name).open("ab") as file:
        file.truncate(10**9)
    with pytest.raises(InputError, match="has more than the"):
        Split(f"file://{tmp_path}/copy", "train")


def test_a_hold_that_ends_while_the_cache_is_listed_is_not_lost(tmp_path, monkeypatch):
    """Its bytes are those of a file that the listing was too early for: counted neither as hold nor as file, the cache
    would outgrow its bound.
    """
    cache = Cache(tmp_path, 100)
    ends = tmp_path / f"{os.getpid()}-1.hold"
    ends.write_bytes(b"x" * 60)
    listed = os.scandir

    @contextmanager
    def scandir(path):
        with listed(path) as listing:
            entries = list(listing)
        if ends.exists():
            ends.unlink()
            (tmp_path / ("a" * 64)).write_bytes(b"x" * 60)
        yield entries

    monkeypatch.setattr("shards.cache.os.scandir", scandir)
    assert not cache._made_room(60, tmp_path / "mine.hold"), "look again"
    assert cache._made_room(60, tmp_path / "mine.hold")
    assert not (tmp_path / ("a" * 64)).exists(), "what was used longest ago has gone"
