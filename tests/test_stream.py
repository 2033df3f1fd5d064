import gc
import json
import shutil

import numpy as np
import pytest
import torch
import webdataset

from shards.__main__ import main
from shards.errors import InputError
from shards.pack import build_index
from shards.stream import EpochPlan, Shares, Split


def positions(plan, epoch, start, *, batch, world):
    """What all ranks read, batch by batch: [(rank, positions that count)]."""
    samplers = [list(Shares(plan, epoch, start, batch=batch, rank=r, world=world)) for r in range(world)]
    assert len({len(s) for s in samplers}) == 1, "ranks with different numbers of batches would hang"
    return [[share.positions if share.counts else np.array([], int) for share in step] for step in zip(*samplers, strict=True)]


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
        rest = [p for step in positions(plan, 0, k * batch * before, batch=batch, world=after) for part in step for p in part]
        assert sorted(first + rest) == list(range(31))


def test_the_last_batch_is_split_evenly():
    last = positions(EpochPlan([10], shuffle=False), 0, 0, batch=3, world=2)[-1]
    assert [len(p) for p in last] == [2, 2]
    last = positions(EpochPlan([7], shuffle=False), 0, 0, batch=3, world=2)[-1]
    assert [len(p) for p in last] == [1, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_carry_images_labels_and_weights(shards, workers):
    split = Split(shards, "train", ("No Finding", "Effusion"))
    plan = EpochPlan(split.shard_sizes(), 0)
    seen = []
    for batch in split.loader(plan, 0, 0, batch=4, rank=0, world=1, workers=workers):
        assert batch.image.dtype == torch.uint8
        assert batch.image.shape[1:] == (1, 64, 64)
        for i, p in enumerate(batch.index.tolist()):
            assert (batch.image[i, 0].numpy() == split.image(p)).all()
            assert split.meta(p)["findings"] == [split.classes[batch.label[i]]]
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(30))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves the tars open
def test_any_webdataset_reader_reads_the_shards(shards):
    split = Split(shards, "val")
    theirs = webdataset.WebDataset([str(p) for p in split.paths], shardshuffle=False, empty_check=False)
    keys = {sample["__key__"]: sample for sample in theirs}
    del theirs
    gc.collect()
    assert sorted(keys) == sorted(split.key(i) for i in range(len(split)))
    assert json.loads(keys[split.key(3)]["json"])["findings"] == split.meta(3)["findings"]


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
    with pytest.raises(InputError, match="problems"):
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
