"""What a person gets, whatever the names in it."""

import html
import shutil
from dataclasses import replace

import pytest
from jobs import NAMES, SMALL
from matplotlib.figure import Figure

from shards.errors import InputError
from shards.pack import pack
from shards.phantom import Phantoms
from trainer import evaluate
from trainer import train as loop
from trainer.build import build
from trainer.command import resolve
from trainer.report.__main__ import main as report_main
from trainer.report.words import file_name


def test_an_unfinished_run_is_called_so(flags, tmp_path, capsys):
    job = build(resolve([*flags, "--epochs", "2"]))
    job.train()  # trained, but not evaluated
    run = str(tmp_path / "run")
    evaluate.main(["--run", run, "--shards", flags[1], "--workers", "0"])
    assert "has not finished: these are figures of its best model so far" in capsys.readouterr().out
    report_main(["--out", str(tmp_path / "page.html"), run])
    assert "note: run has not finished" in capsys.readouterr().out
    assert "has not finished" in (tmp_path / "page.html").read_text()


def test_reports_of_what_is_no_run(trained, flags, tmp_path):
    (tmp_path / "lungs").mkdir()
    (tmp_path / "lungs/report.json").write_text('{"dice": 0.9}')
    (tmp_path / "lungs/config.yaml").write_text("")
    (tmp_path / "lungs/lung_unet.safetensors").write_bytes(b"")
    for main, argv, words in (
        (report_main, ["--out", str(tmp_path / "x.html"), str(tmp_path / "lungs")], "is a run of trainer.train_lungs"),
        (report_main, ["--out", str(tmp_path / "x.html"), str(tmp_path)], "has no report.json"),
        (evaluate.main, ["--run", str(tmp_path / "lungs"), "--shards", flags[1]], "is a run of trainer.train_lungs"),
    ):
        with pytest.raises(InputError, match=words):
            main(argv)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match=r"the page is HTML; name a file that ends in \.html"):
        report_main(["--out", str(tmp_path / "x.pdf"), str(tmp_path / "run")])
    with pytest.raises(InputError, match="is a folder; name the HTML file"):
        report_main(["--out", str(tmp_path / "folder.html"), str(tmp_path / "run")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.html", "lungs", "run"]


def test_a_report_that_fails_costs_the_report(flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("trainer.report.write.panel", lambda *a, **k: Figure() if a[0][0].image.shape[0] == 8 else 1 / 0)
        with pytest.raises(
            InputError,
            match=r"the report could not be written \(ZeroDivisionError: division by zero\). The model is there",
        ):
            loop.main([*flags, "--epochs", "1"])
    assert (tmp_path / "run/model.safetensors").is_file()
    loop.main(["--out", str(tmp_path / "run"), "--resume"])
    assert (tmp_path / "run/report.json").is_file()


def test_what_the_report_needs_is_tried_at_the_start(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.report.write.png", lambda *_: 1 / 0)
    with pytest.raises(InputError, match="a report with these names cannot be made"):
        loop.main([*flags, "--epochs", "1"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "dataset"),
    [
        (NAMES, "phantom"),
        pytest.param(["No Finding", "a $ or two $x^{$"], "phantom", marks=pytest.mark.slow),
        (["No Finding", "Über/<b>..\\胸水_"], "a/b"),
        pytest.param(["No Finding", "x"], "/../../../escaped", marks=pytest.mark.slow),
    ],
)
def test_names_from_data_stay_names(tmp_path, segmenter, names, dataset):

    class Named(Phantoms):
        def __init__(self):
            super().__init__(8 * len(names) if len(names) > 8 else 60, 0, size=64, findings=("No Finding", "Effusion"))
            count: dict[str, int] = {}
            self.real = {item.key: item for item in self.items}
            for n, item in enumerate(self.items):
                k = count[item.split] = count.get(item.split, -1) + 1
                self.items[n] = replace(item, findings=(names[k % len(names)],))

        def load(self, item):
            sample = super().load(self.real[item.key])
            sample.findings, sample.boxes = item.findings, []
            return sample

    pack(Named(), tmp_path / "shards", dataset=dataset)
    flags = [
        "--shards",
        str(tmp_path / "shards"),
        "--out",
        str(tmp_path / "sub/run"),
        "--lungs.weights",
        str(segmenter),
        *SMALL,
    ]
    loop.main([*flags, "--task", ",".join(names), "--epochs", "1"])
    run = tmp_path / "sub/run"
    (text,) = run.glob("*.txt")
    assert len(text.name.encode()) < 255
    page = (run / "report.html").read_text()
    for name in names:
        assert not set("<>") & set(name) or (name not in page and html.escape(name) in page), "what is text stays text"
    shutil.copytree(tmp_path / "shards", tmp_path / "other")
    evaluate.main(["--run", str(run), "--shards", str(tmp_path / "other"), "--workers", "0"])
    assert len(list(run.glob("evaluate_*/report.json"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "shards", "sub"]


def test_file_names_are_names_of_one_file():
    assert file_name("pvt_nih_ne_la0.5_t0.1", ".txt") == "pvt_nih_ne_la0.5_t0.1.txt"
    for text in ("../x", "/etc/passwd", "a\0b", "a\nb", "..", "", "x" * 999, "胸" * 200, "\udcff"):
        name = file_name(text, ".txt")
        assert "/" not in name
        assert not name.startswith(".")
        assert len(name.encode()) <= 200
    assert file_name("x" * 999) != file_name("x" * 998)
