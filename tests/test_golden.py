"""A refactoring moves no figure: small trainings against those that curves.json keeps,
to the bit where that was made.
"""

import json

import curves
import pytest
from jobs import TOGETHER

from trainer import train as loop
from trainer.build import build
from trainer.command import resolve
from trainer.loop import Trainer

KEPT = json.loads(curves.FILE.read_text())


def same(found, kept, where="") -> None:
    """Equal to the last bit on the machine that made the file, to 1e-5 on others, where sums are added up in another
    order.
    """
    if isinstance(kept, dict | list):
        assert type(found) is type(kept), where
        assert len(found) == len(kept), where
        for key in kept if isinstance(kept, dict) else range(len(kept)):
            same(found[key], kept[key], f"{where}/{key}")
    elif isinstance(kept, float) and KEPT["machine"] != curves.machine():
        assert found == pytest.approx(kept, rel=1e-5, abs=1e-5), where
    else:
        assert found == kept, where


@pytest.mark.parametrize("name", curves.RUNS)
def test_a_run_has_the_figures_that_are_kept(shards, tmp_path, name):
    loop.main(curves.flags(name, shards, tmp_path / "run"))
    same(curves.figures(tmp_path / "run"), KEPT["runs"][name])


def test_so_has_one_that_was_interrupted(shards, tmp_path, monkeypatch):
    ordinary = Trainer.step

    def dies(self, group, lam):
        if self.state.step == 8:
            raise InterruptedError
        return ordinary(self, group, lam)

    monkeypatch.setattr(Trainer, "step", dies)
    with pytest.raises(InterruptedError):
        build(resolve([*curves.flags("resnet", shards, tmp_path / "run"), "--save_every", "3"])).train()
    monkeypatch.setattr(Trainer, "step", ordinary)
    loop.main(["--out", str(tmp_path / "run"), "--resume"])
    same(curves.figures(tmp_path / "run"), KEPT["runs"]["resnet"])


@TOGETHER
def test_so_has_one_of_two_processes(shards, tmp_path):
    done = curves.launch(
        "--mixed_precision", "no", "-m", "trainer.train", *curves.flags("resnet", shards, tmp_path / "run", 2)
    )
    assert done.returncode == 0, done.stderr
    same(curves.figures(tmp_path / "run"), KEPT["runs"]["resnet, two processes"])


def test_a_figure_that_moves_is_seen():
    for moved in (1.00002, None):
        with pytest.raises(AssertionError, match="/log/0/ce"):
            same({"log": [{"ce": moved}]}, {"log": [{"ce": 1.0}]})
