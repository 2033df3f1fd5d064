"""Figures of a finished run, again or on other images."""

import html
import json
import shutil

import numpy as np
import pytest
import torch
from jobs import SMALL, Stopped, content_of
from PIL import Image
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from shards.__main__ import main as shards_main
from shards.dataset import Split
from shards.errors import InputError
from shards.pack import pack
from shards.phantom import Phantoms
from trainer import evaluate, predict
from trainer import train as loop
from trainer.build import build
from trainer.classifier import FocusClassifier, Prediction
from trainer.command import resolve
from trainer.report.__main__ import main as report_main
from trainer.report.verdict import verdict
from trainer.report.words import PROBES, notes


def test_images_without_lungs_are_listed_and_shown(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trainer.lungs.cleanup.believable", lambda masks, *_: torch.arange(len(masks)) % 2 == 0)
    loop.main([*flags, "--epochs", "1"])
    lost = json.loads((tmp_path / "run" / "report.json").read_text())["lungs_not_found"]
    split = Split(flags[1], "test", ("No Finding", "Effusion"))
    assert set(lost) == {"train", "val", "test"}
    assert lost["test"]
    assert set(lost["test"]) <= {split.key(i) for i in range(len(split))}
    assert (tmp_path / "run" / "no_lungs.png").is_file()
    assert "No lungs found" in (tmp_path / "run" / "report.html").read_text()
    assert f"note: run: in {len(lost['test'])} of {len(split)} images no lungs were found" in capsys.readouterr().out


def test_the_probes_of_a_run_are_reported(flags, tmp_path):
    loop.main([*flags, "--task", "nep", "--epochs", "1"])
    content = json.loads((tmp_path / "run/report.json").read_text())
    found = content["test"]["probe"]
    assert found["auc"] == content["test"]["auc"]
    for name in ("drop_outside", "drop_inside"):
        low, high = found[f"{name}_95"]
        assert low <= high
        assert -1 <= found[name] <= 1
    assert 0 <= found["random"]["energy"] <= 1
    assert -1 <= found["random"]["similarity"] <= 1
    place = content["test"]["localization"]["expected"]["all"]
    assert found["random"]["images"] + found["random"]["without_map"] == place["images"]
    assert content["iou_threshold"]["expected"] in range(15)
    place = content["test"]["localization"]["expected"]["all"]
    assert 0 <= place["iou"] <= 1
    assert place["iou_threshold"] == (1 + content["iou_threshold"]["expected"]) / 16
    text = (tmp_path / "run/test_resnet_phantom_nep_la0.4_t0.5.txt").read_text()
    page = (tmp_path / "run/report.html").read_text()
    for figure in PROBES:
        assert figure in text
        assert figure in page


def test_what_cannot_be_told_is_said(trained):
    """Of random weights how many maps there are, and a finding whose probability on val says nothing of who has it."""
    content = json.loads((trained / "report.json").read_text())
    content["calibration"] = {"Effusion": [0.0, -0.4], "Mass": [0.0, 1.0], "Edema": [0.5, 0.0]}
    (said,) = [note for note in notes({"run": content}) if "says nothing, or the opposite" in note]
    assert said.startswith("run: on val the probability of Effusion says nothing")
    content["calibration"]["Effusion"] = [0.1, -0.4]
    assert not [note for note in notes({"run": content}) if "says nothing" in note]
    figures = content["test"]
    figures["probe"]["random"] = {"energy": 0.02, "without_map": 8}
    assert any("random weights has 2% (8 of its maps are zero everywhere)." in line for line in verdict(content))


def test_predictions_name_the_files_that_were_packed(tmp_path, segmenter):
    for name in ("No Finding", "Effusion"):
        (tmp_path / "files" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((20, 30), 20 * i, np.uint8)).save(tmp_path / "files" / name / f"größe {i} 'x'.png")
    shards_main(["folder", "--path", str(tmp_path / "files"), "--out", str(tmp_path / "shards"), "--size", "64"])
    flags = ["--shards", str(tmp_path / "shards"), "--out", str(tmp_path / "run"), "--lungs.weights", str(segmenter)]
    loop.main([*flags, *SMALL, "--epochs", "1", "--batch", "2"])
    lines = [json.loads(line) for line in (tmp_path / "run/predictions_test.jsonl").read_text().splitlines()]
    assert lines
    assert {line["source"] for line in lines} <= {f"größe {i} 'x'.png" for i in range(12)}


def test_images_that_the_run_was_trained_on_are_counted(trained, flags, tmp_path, shards, capsys):
    """Shards whose test images are another's training images: evaluating there is no test."""
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    index = json.loads((other / "index.json").read_text())
    index["splits"] = {"test": index["splits"]["train"]}
    for old, new in (("train.npy", "test.npy"), ("train.labels.npy", "test.labels.npy")):
        (other / old).replace(other / new)
        index["splits"]["test"]["tables"][new] = index["splits"]["test"]["tables"].pop(old)
    (other / "index.json").write_text(json.dumps(index))
    train, test = (Split(shards, name, ("No Finding", "Effusion")) for name in ("train", "test"))
    assert evaluate.overlap(train, Split(other, "test", ("No Finding", "Effusion"))) == (len(train), 0)
    assert evaluate.overlap(train, test) == (0, 0)
    run = str(tmp_path / "run")
    evaluate.main(["--run", run, "--shards", str(other), "--workers", "0"])
    assert (
        f"WARNING: of the {len(train)} test images {len(train)} have the name or the bytes of a training image of this "
        "run, patients are not known" in capsys.readouterr().out
    )
    evaluate.main(["--run", run, "--shards", str(other), "--workers", "0"])  # the same once more
    third = tmp_path / "third"
    pack(Phantoms(100, 9, size=64), third, dataset="phantom")
    with pytest.raises(InputError, match="holds the report of other images"):
        evaluate.main(["--run", run, "--shards", str(third), "--workers", "0"])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.yaml").write_text("")
    with pytest.raises(InputError, match="is another run's folder"):
        evaluate.main(["--run", run, "--shards", str(third), "--out", str(tmp_path / "theirs"), "--workers", "0"])
    text = (tmp_path / "run/config.yaml").read_text().replace(str(shards), str(tmp_path / "gone"))
    (tmp_path / "run/config.yaml").write_text(text)
    evaluate.main(["--run", run, "--shards", str(third), "--out", str(tmp_path / "there"), "--workers", "0"])
    assert "it was not checked whether some are among these" in capsys.readouterr().out


def test_patients_that_the_run_was_trained_on_are_counted(tmp_path):
    class Seen(Phantoms):
        def load(self, item):
            sample = super().load(item)
            sample.extra["patient"] = f"P{int(item.key[-2:]) % 40}"
            return sample

    pack(Seen(100, 0, size=64), tmp_path / "shards", dataset="phantom")
    train, test = (Split(tmp_path / "shards", name, ("No Finding", "Effusion")) for name in ("train", "test"))
    known = {train.meta(p)["patient"] for p in range(len(train))}
    images = sum(test.meta(p)["patient"] in known for p in range(len(test)))
    assert images > 0
    assert evaluate.overlap(train, test) == (0, images)


def test_images_under_other_names_are_known_by_their_bytes(tmp_path):
    class Renamed(Phantoms):
        def load(self, item):
            sample = super().load(item)
            sample.key = f"x{sample.key}"
            return sample

    split = {}
    for kind in (Phantoms, Renamed):
        pack(kind(40, 0, size=64), tmp_path / kind.__name__, dataset="phantom")
        split[kind] = Split(tmp_path / kind.__name__, "train", ("No Finding", "Effusion"))
    assert evaluate.overlap(split[Phantoms], split[Renamed]) == (len(split[Renamed]), 0)


def test_figures_of_each_class_and_a_page_that_says_whose_they_are(flags, tmp_path):
    names = ("No Finding", "Effusion", "Pneumothorax")
    loop.main([*flags, "--backbone", "resnet18", "--task", "nep", "--epochs", "1"])
    out = tmp_path / "elsewhere"
    evaluate.main(["--run", str(tmp_path / "run"), "--workers", "0", "--out", str(out)])  # its own shards
    lines = [json.loads(line) for line in (out / "predictions_test.jsonl").read_text().splitlines()]
    score = np.array([[line["probability"][name] for name in names] for line in lines])
    label = np.array([names.index(line["label"]) for line in lines])
    rows = json.loads((out / "report.json").read_text())["test"]["per_class"]
    for k, row in enumerate(rows):
        truth, named = label == k, score.argmax(1) == k
        tn, fp, fn, tp = confusion_matrix(truth, named).ravel()
        assert row["auc"] == pytest.approx(roc_auc_score(truth, score[:, k]), abs=0.01)  # written to six digits: ties
        assert row["auprc"] == pytest.approx(average_precision_score(truth, score[:, k]), abs=0.01)
        assert (row["sensitivity"], row["specificity"]) == pytest.approx((tp / (tp + fn), tn / (tn + fp)))
        assert row["npv"] == pytest.approx(tn / (tn + fn))
        assert row["support"] == truth.sum()
        for name in ("auc", "auprc", "sensitivity", "specificity", "npv"):
            low, high = row[f"{name}_95"]
            assert low <= row[name] <= high
    page = (out / "report.html").read_text()
    assert "<h1>Effusion, Pneumothorax on phantom: run</h1>" in page
    assert f"{rows[1]['specificity']:.3f}" in page
    drawn, of_run = (out / "curves.svg").read_text(), (tmp_path / "run/curves.svg").read_text()
    assert "ROC, and its area" in drawn
    assert "plain cross-entropy" not in drawn  # of the training nothing is known there, so nothing is said
    assert "attention loss and lambda" not in drawn
    assert "attention loss and lambda" in of_run


def test_maps_that_are_zero_are_nothing_to_compare_with(flags, tmp_path, monkeypatch):
    def dead(model, seed):
        twin = model.untrained().eval()
        torch.nn.init.zeros_(twin.net.fc.weight)
        return twin

    monkeypatch.setattr("trainer.measure.random_twin", dead)
    loop.main([*flags, "--epochs", "1"])
    assert json.loads((tmp_path / "run/report.json").read_text())["test"]["probe"]["random"] is None
    assert "energy, random weights" not in (tmp_path / "run/test_resnet_phantom_ne_la0.4_t0.5.txt").read_text()


def test_a_report_is_of_its_checkpoint(flags, tmp_path, monkeypatch, capsys):
    loop.main([*flags, "--epochs", "1"])
    resume = ["--out", str(tmp_path / "run"), "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", lambda *_: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            loop.main([*resume, "--epochs", "2"])  # trained, killed in the final evaluation
    assert content_of(tmp_path / "run")["training"]["epochs"] == 1
    capsys.readouterr()
    loop.main(resume)
    assert "nothing is left" not in capsys.readouterr().out
    assert content_of(tmp_path / "run")["training"]["epochs"] == 2


def test_a_report_of_an_unfinished_run_does_not_finish_it(flags, tmp_path, shards, capsys):
    build(resolve([*flags, "--epochs", "1"])).train()
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(shards), "--workers", "0"])
    capsys.readouterr()
    loop.main(["--out", str(tmp_path / "run"), "--resume"])
    assert "nothing is left" not in capsys.readouterr().out
    assert "unfinished" not in content_of(tmp_path / "run")["training"]


@pytest.mark.parametrize("damage", [b"", b"[1, 2", b'"text"', b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_report_is_one_line_and_is_written_again(trained, flags, tmp_path, shards, damage):
    path = tmp_path / "run/report.json"
    path.write_bytes(damage)
    for main, argv in (
        (evaluate.main, ["--run", str(tmp_path / "run"), "--shards", str(shards)]),
        (report_main, ["--out", str(tmp_path / "x.html"), str(tmp_path / "run")]),
    ):
        with pytest.raises(InputError, match=r"report\.json: is not|is a run of trainer\.train_lungs"):
            main(argv)
    with (tmp_path / "run/metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe not text\n" + b"[" * 100_000 + b"\n")
    loop.main(["--out", str(tmp_path / "run"), "--resume"])
    assert content_of(tmp_path / "run")["training"]["epochs"] == 1


def test_evaluate_leaves_what_it_does_not_measure(trained, flags, tmp_path, shards):
    before = content_of(tmp_path / "run")
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(shards), "--workers", "1", "--batch", "3"])
    after = content_of(tmp_path / "run")
    assert after["images"] == before["images"]
    assert set(after["images"]) == {"train", "val", "test"}
    assert after["lungs_not_found"] == before["lungs_not_found"]
    assert after["config"] == before["config"]
    assert after["training"] == before["training"]
    # Packed anew, the same folder holds other images: their figures go beside the run's.
    shutil.copytree(shards, tmp_path / "before")
    other = tmp_path / "shards"
    pack(Phantoms(60, 5, size=64), other, dataset="phantom")
    text = (tmp_path / "run/config.yaml").read_text().replace(str(shards), str(other))
    (tmp_path / "run/config.yaml").write_text(text)
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(other), "--workers", "0"])
    assert content_of(tmp_path / "run")["images"] == before["images"]
    assert (tmp_path / "run/evaluate_phantom/report.json").is_file()


def test_evaluate_takes_the_run_s_own_precision(flags, tmp_path, shards, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    loop.main([*flags, "--epochs", "1"])
    before = content_of(tmp_path / "run")["test"]
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(shards), "--workers", "0"])
    assert content_of(tmp_path / "run")["test"] == before


def test_every_operating_point_says_its_threshold(trained, flags, tmp_path):
    content = content_of(tmp_path / "run")
    point = content["threshold"]
    assert content["test"]["at_threshold"]["threshold"] == point == content["val"]["at_threshold"]["threshold"]
    known = [json.loads(line) for line in (tmp_path / "run/predictions_test.jsonl").read_text().splitlines()]
    ill = [line for line in known if line["label"] == "Effusion"]
    share = sum(line["probability"]["Effusion"] >= point - 1e-6 for line in ill) / len(ill)
    assert content["test"]["at_threshold"]["sensitivity"] == pytest.approx(share)
    page = html.unescape((tmp_path / "run/report.html").read_text())
    assert f"<td>{point:.3f}, the best Youden's index on val</td>" in page
    assert "threshold of the best Youden" not in page
    assert "float:left" not in page
    text = next((tmp_path / "run").glob("*.txt")).read_text()
    assert f"At the threshold {point:.4f}, chosen on val" in text
    assert "(Best Threshold above is chosen on test itself" in text


def test_a_cam_that_is_zero_everywhere_lies_nowhere(flags, tmp_path, shards, capsys, monkeypatch):
    loop.main([*flags, "--epochs", "1"])
    ordinary = FocusClassifier.forward

    def dead(self, *args, **kwargs):
        logits, cam = ordinary(self, *args, **kwargs)
        return Prediction(logits, None if cam is None else torch.zeros_like(cam))

    monkeypatch.setattr(FocusClassifier, "forward", dead)
    monkeypatch.setattr("trainer.lungs.cleanup.believable", lambda masks, *_: torch.ones(len(masks), dtype=torch.bool))
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(shards), "--workers", "0"])
    place = content_of(tmp_path / "run")["test"]["localization"]["lesion"]["all"]
    assert place["energy"] is None
    assert place["without_map"] == place["images"]
    assert place["pointing"] == 0
    assert "of them without a map: no energy, pointing misses" in (tmp_path / "run/report.html").read_text()
    line = json.loads((tmp_path / "run/predictions_test.jsonl").read_text().splitlines()[-1])
    assert line.get("expected", line.get("lesion", {"energy": None}))["energy"] is None
    Image.fromarray(Split(shards, "test").image(0)).save(tmp_path / "x.png")
    capsys.readouterr()
    predict.main(["--run", str(tmp_path / "run"), "--look_at", "Effusion", str(tmp_path / "x.png")])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["energy_in_region"] is None
    assert "the CAM of Effusion is zero everywhere" in captured.err


def test_another_run_s_report_is_never_overwritten(trained, flags, tmp_path, shards):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.yaml").write_text("")
    with pytest.raises(InputError, match="is another run's folder"):
        evaluate.main(
            [
                "--run",
                str(tmp_path / "run"),
                "--shards",
                str(shards),
                "--out",
                str(tmp_path / "theirs"),
                "--workers",
                "0",
            ]
        )


def test_other_images_are_measured_at_the_run_s_own_thresholds(trained, tmp_path):
    """Whatever val of their own they bring."""
    own = content_of(tmp_path / "run")
    for splits in (("val", "test"), ("val",)):
        other = tmp_path / "-".join(splits)
        pack(Phantoms(60, 5, size=64), other, dataset=other.name)
        index = json.loads((other / "index.json").read_text())
        index["splits"] = {name: entry for name, entry in index["splits"].items() if name in splits}
        (other / "index.json").write_text(json.dumps(index))
        evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(other), "--workers", "0"])
        content = content_of(tmp_path / "run" / f"evaluate_{other.name}")
        for name in ("threshold", "iou_threshold", "box_threshold"):
            assert content[name] == own[name]
        for split in splits:
            assert content[split]["at_threshold"]["threshold"] == own["threshold"]
            assert content[split]["images"]
