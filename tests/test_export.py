"""A run for others: its ONNX graph gives what the run gives, by other means; its card says what it is."""

import json
import shutil

import numpy as np
import pytest
import torch
from jobs import SMALL
from PIL import Image
from scipy import ndimage

import trainer
from shards.errors import InputError
from shards.pack import pack
from shards.phantom import Phantoms, SeveralPhantoms
from trainer import predict
from trainer import train as loop
from trainer.export import __main__ as export
from trainer.export.session import EXPORTED, GRAPH, session_of
from trainer.export.write import LIMITS, checked
from trainer.launching import start
from trainer.lungs import cleanup
from trainer.predictor import Predictor

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.xdist_group("export")  # one run and its export, which take half a minute


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run with the shipped lungs, and its export; phantoms of 128 px kept in their aspect."""
    root = tmp_path_factory.mktemp("exported")
    pack(Phantoms(60, 5, size=128, findings=("No Finding", "Effusion")), root / "shards", dataset="phantom")
    flags = ["--shards", str(root / "shards"), "--out", str(root / "run"), *SMALL, "--size", "96", "--epochs", "1"]
    loop.main(flags)
    export.main([str(root / "run"), "--out", str(root / "export")])
    return root


def radiographs(root, count=4):
    """Phantoms that nobody trained on, one of them not square and of an odd name."""
    source = Phantoms(30, 9, size=200, findings=("No Finding", "Effusion"))
    images = [source.load(item).image for item in source.items[:count]]
    images[0] = images[0][:, 10:170]
    files = [root / name for name in ("Th\u00f6rax 50% $1$.png", "b.png", "c.png", "d.png")[:count]]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    return files


def test_an_export_gives_what_the_run_gives(exported, tmp_path):
    run, other = Predictor(exported / "run", start(0, cpu=True)), trainer.load(exported / "export")
    assert not isinstance(other, Predictor)
    files = radiographs(tmp_path)
    squares = torch.stack([torch.from_numpy(run.packed(run.read(file)).copy()) for file in files])
    for part in (squares, squares[:1]):
        ours, theirs = run.see(part), other.see(part)
        assert (ours.logits - theirs.logits).abs().max() < 1e-4
        assert (ours.cam - theirs.cam).abs().max() < 1e-4
        assert ours.found.equal(theirs.found)
        assert ours.boxes.equal(theirs.boxes)
        assert (ours.lungs != theirs.lungs).float().mean() < 1e-3
        assert ours.regions.keys() == theirs.regions.keys() == {"Effusion"}
        assert (ours.regions["Effusion"] != theirs.regions["Effusion"]).float().mean() < 1e-3
    assert ours.found.all()  # or boxes say nothing
    for file in files:
        ours, theirs = run.predict(file), other.predict(file)
        assert theirs.probability == pytest.approx(ours.probability, abs=1e-4)
        assert theirs.calibrated == pytest.approx(ours.calibrated, abs=1e-4)
        assert (theirs.threshold, theirs.lung_box) == (ours.threshold, ours.lung_box)
        assert theirs.cam["Effusion"].shape == ours.cam["Effusion"].shape


def test_probabilities_of_the_graph_are_the_task_s_own(exported, tmp_path):
    other = trainer.load(exported / "export")
    squares = np.stack([other.packed(other.read(file)) for file in radiographs(tmp_path)])
    got = other.run(squares)
    wanted = other.task.probabilities(got["logits"])
    assert got["probability"].numpy() == pytest.approx(wanted.numpy(), abs=1e-6)
    wanted = other.task.calibrated(got["logits"], other.calibration)
    assert got["calibrated"].numpy() == pytest.approx(wanted.numpy(), abs=1e-6)


def test_predict_runs_an_export(exported, tmp_path, capsys):
    files = radiographs(tmp_path, 2)
    lines = {}
    for kind in ("run", "export"):
        capsys.readouterr()
        predict.main(["--run", str(exported / kind), "--out", str(tmp_path / kind), *map(str, files)])
        lines[kind] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for ours, theirs in zip(lines["run"], lines["export"], strict=True):
        assert ours.keys() == theirs.keys()
        assert theirs["probability"] == pytest.approx(ours["probability"], abs=1e-4)
        assert theirs["lung_box"] == ours["lung_box"]
        with Image.open(theirs["overlay"]) as one, Image.open(ours["overlay"]) as other:
            assert one.size == other.size


def test_the_card_says_what_it_is_and_its_snippet_runs(exported, tmp_path, monkeypatch, capsys):
    card = (exported / "export/README.md").read_text()
    report = json.loads((exported / "run/report.json").read_text())
    assert f"{report['test']['auc']:.3f}" in card
    assert "Not a medical device" in card
    assert "CC BY-NC-SA" in card
    assert "<" not in card.replace("<br>", "")
    assert str(exported) not in card + (exported / "export/config.yaml").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    file = radiographs(tmp_path, 1)[0]
    monkeypatch.chdir(exported / "export")
    exec(code.replace('"FILE"', repr(str(file))), {})
    told = dict(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines())
    wanted = trainer.load(exported / "run").predict(file).probability
    assert {name: float(p) for name, p in told.items()} == pytest.approx(wanted, abs=1e-4)


def test_an_export_is_whole_or_none(exported, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="0 runs named"):
        export.main(["--out", str(tmp_path / "x")])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        export.main([str(exported / "run"), "--out", str(tmp_path / "mine")])
    (tmp_path / "alike").mkdir()
    (tmp_path / "alike/README.md").write_text("mine")  # of a name that an export has, too
    with pytest.raises(InputError, match="holds files of these names that are of no export"):
        export.main([str(exported / "run"), "--out", str(tmp_path / "alike")])
    assert (tmp_path / "alike/README.md").read_text() == "mine"
    with pytest.raises(InputError, match="is an export; name the run"):
        export.main([str(exported / "export"), "--out", str(tmp_path / "y")])
    shutil.copytree(exported / "export", tmp_path / "half")
    (tmp_path / "half/model.onnx").write_bytes(b"half")
    with pytest.raises(InputError, match=r"model\.onnx: onnxruntime cannot open it"):
        trainer.load(tmp_path / "half")
    (tmp_path / "half" / EXPORTED).write_text("{}")
    with pytest.raises(InputError, match=r"export\.json: is not of an export \(KeyError\('outputs'\)\)"):
        trainer.load(tmp_path / "half")
    shutil.copytree(exported / "run", tmp_path / "run")
    report = json.loads((tmp_path / "run/report.json").read_text())
    report["training"]["unfinished"] = True
    (tmp_path / "run/report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="has not finished"):
        export.main([str(tmp_path / "run"), "--out", str(tmp_path / "y")])
    # What is wrong anywhere is refused; an export that was there before stays, and nothing else is left
    shutil.copytree(exported / "export", tmp_path / "there")
    for name in LIMITS:
        with pytest.raises(InputError, match="comes out otherwise than the run"):
            checked({name: LIMITS[name] * 1.01 + 1e-9}, tmp_path / "far")
        checked({name: LIMITS[name]}, tmp_path / "far")
    monkeypatch.setitem(LIMITS, "region", -1.0)
    graph = (exported / "export" / GRAPH).read_bytes()
    monkeypatch.setattr("trainer.export.write.to_onnx", lambda _: graph)  # it takes half a minute, and is the same
    for name in ("far", "there"):
        with pytest.raises(InputError, match="the graph comes out otherwise than the run"):
            export.main([str(exported / "run"), "--out", str(tmp_path / name)])
    assert not (tmp_path / "far").exists()
    assert (tmp_path / "there" / EXPORTED).read_bytes() == (exported / "export" / EXPORTED).read_bytes()
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


def test_without_onnx_the_remedy_is_told(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"onnxscript, onnxruntime, which is not installed: pip install '\.\[onnx\]'"):
        export.main([str(exported / "run"), "--out", str(tmp_path / "y")])


def test_several_findings_and_no_lungs(tmp_path):
    """Binary findings with Platt's scaling; cross-entropy alone has no segmenter, and its graph none of its outputs."""
    pack(SeveralPhantoms(60, 3, size=64), tmp_path / "shards", dataset="phantom")
    flags = ["--shards", str(tmp_path / "shards"), "--out", str(tmp_path / "run"), *SMALL, "--epochs", "1"]
    findings = "Effusion,Mass,Cardiomegaly"
    loop.main([*flags, "--task", findings, "--labels.kind", "any", "--balance.lam", "1", "--swap.probability", "0"])
    export.main([str(tmp_path / "run"), "--out", str(tmp_path / "export")])
    run, other = Predictor(tmp_path / "run", start(0, cpu=True)), trainer.load(tmp_path / "export")
    assert other.looks_for_lungs == run.looks_for_lungs
    square = torch.from_numpy(run.packed(run.read(radiographs(tmp_path, 1)[0])).copy())[None]
    ours, theirs = run.see(square), other.see(square)
    assert (ours.cam - theirs.cam).abs().max() < 1e-4
    got = other.run(square.numpy())
    wanted = run.task.calibrated(ours.logits, run.calibration)
    assert got["calibrated"].numpy() == pytest.approx(wanted.numpy(), abs=1e-5, nan_ok=True)


class Clean(torch.nn.Module):
    """Clean-up as a graph sees it."""

    def forward(self, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept, count = cleanup.tidy(masks)
        return kept, count


def test_components_in_a_graph_are_scipy_s(tmp_path):
    """A winding way, whose ends are far apart along itself; diagonals; specks; nothing; everything."""
    size = 48
    winding = np.zeros((size, size), bool)
    winding[::2] = True
    winding[1:-1:4, -1] = winding[3:-1:4, 0] = True
    rng = np.random.default_rng(0)
    noise, alike = [rng.random((size, size)) > share for share in (0.6, 0.9)], np.ones((size, size), bool)
    masks = np.stack([winding, np.eye(size, dtype=bool), *noise, ~alike, alike])
    assert ndimage.label(winding, np.ones((3, 3)))[1] == 1
    program = torch.onnx.export(
        Clean().eval(),
        (torch.from_numpy(masks),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("images")},),
        input_names=["masks"],
        opset_version=18,
        verbose=False,
    )
    program.save(tmp_path / "clean.onnx")
    kept, count = session_of(tmp_path / "clean.onnx").run(None, {"masks": masks})
    ours = cleanup.tidy(torch.from_numpy(masks))
    assert count.tolist() == ours[1].tolist()
    # Of two components of the same size either may be the second one
    assert kept.sum((1, 2)).tolist() == ours[0].sum((1, 2)).tolist()
    assert (kept[[0, 1, 4, 5]] == ours[0].numpy()[[0, 1, 4, 5]]).all()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["pvt", "vgg", "resnet", "vit_tiny_patch16_224"])
def test_backbones(shards, tmp_path, backbone):
    """Those that were published, and one of tokens."""
    small = [*SMALL]
    small[small.index("--backbone") + 1] = backbone
    loop.main(["--shards", str(shards), "--out", str(tmp_path / "run"), *small, "--size", "224", "--epochs", "1"])
    export.main([str(tmp_path / "run"), "--out", str(tmp_path / "export")])
    far = json.loads((tmp_path / "export" / EXPORTED).read_text())["distance"]
    assert max(far["probability"], far["cam"]) < 1e-4
    assert far["lung_box"] == 0
