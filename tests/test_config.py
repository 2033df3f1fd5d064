import os
import subprocess
import sys
from pathlib import Path

import pytest
from curves import ROOT

from shards.errors import InputError, read_yaml
from trainer.build import build
from trainer.command import from_yaml, parse, resolve, to_yaml
from trainer.config import Config
from trainer.options import LungsTrainConfig

NEEDED = ["--shards", "s", "--out", "o"]


def test_a_config_file_comes_first_wherever_it_stands(tmp_path):
    (tmp_path / "c.yaml").write_text("attention: {threshold: 0.3, form: coverage}\nbatch: 4\n")
    config = parse(Config, [*NEEDED, "--attention.threshold", "0.7", "--config", str(tmp_path / "c.yaml")])
    assert config.attention.threshold == 0.7
    assert config.attention.form == "coverage"
    assert config.batch == 4


def test_what_is_written_is_read_back(tmp_path):
    config = parse(
        Config,
        [*NEEDED, "--balance.policy", "ratio", "--resume", "--pretrained", "false", "--task", "No Finding,Nodule"],
    )
    assert config.resume
    assert config.pretrained == "false"
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert from_yaml(Config, tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--treshold", "1"], r"unknown flag --treshold; did you mean --attention\.threshold"),
        (["--attention.thresh", "0.5"], r"unknown flag --attention\.thresh; did you mean --attention\.threshold"),
        (["--attention.threshold", "1.5"], r"--attention\.threshold 1\.5: must lie in \[0, 1\]"),
        (["--balance.lam", "-0.1"], r"--balance\.lam -0\.1: must lie in"),
        (["--batch", "0", "--epochs", "0"], r"--batch 0.*--epochs 0"),
        (["--batch", "many"], "batch"),
        (["--attention.form", "area"], "energy"),
        (["--task", "nee"], "did you mean ne"),
        (["--config", "none.yaml"], r"none\.yaml: cannot be read"),
    ],
)
def test_wrong_values_say_what_and_where(flags, words):
    with pytest.raises(InputError, match=words):
        parse(Config, [*NEEDED, *flags])


def test_a_missing_flag_is_named():
    with pytest.raises(InputError, match="shards"):
        parse(Config, ["--out", "o"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("attention: {treshold: 1}", r"attention\.treshold; did you mean threshold"),
        ("atention: {}", "did you mean attention"),
        ("attention: 3", "is a section"),
        ("- 1", "name: value"),
        ("a: [", "is not YAML"),
        ("task: !!python/object/apply:os.system ['touch executed']", "is not YAML"),
    ],
)
def test_wrong_yaml(tmp_path, text, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        parse(Config, [*NEEDED, "--config", "c.yaml"])
    assert not Path("executed").exists()


def test_the_help_has_every_docstring(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "CAM values above it are hot" in out
    assert "Folder or URL (s3, gs, http, https, file) of packed shards" in out


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).parents[1] / "launch" / "recipes").glob("*.yaml")), ids=lambda p: p.name
)
def test_recipes_are_valid(recipe):
    parse(LungsTrainConfig if "lungs" in recipe.name else Config, [*NEEDED, "--config", str(recipe)])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch", "abc"], "^--batch abc: expected a whole number; see --help$"),
        (
            ["--attention.form", "x"],
            "^--attention.form x: expected one of published, coverage, energy, lift; see --help$",
        ),
        (["--balance.lam", "nan"], "^--balance.lam nan: expected a number; see --help$"),
        (["--swap.probability", "foo"], "^--swap.probability foo: expected a number; see --help$"),
        (["--resume", "maybe"], "^--resume maybe: expected true or false; see --help$"),
    ],
)
def test_values_of_the_wrong_kind(flags, words):
    with pytest.raises(InputError, match=words):
        parse(Config, ["--shards", "s", "--out", "o", *flags])


def test_lists_are_no_reason_to_complain():
    lungs = ["--shards", "x", "--out", "y", "--channels", "[24,48,96]"]
    with pytest.raises(InputError, match=r"^--batch abc: expected a whole number; see --help$"):
        parse(LungsTrainConfig, [*lungs, "--batch", "abc"])
    with pytest.raises(InputError, match=r"^--channels 8,x: expected whole numbers, such as \[16,32\]; see --help$"):
        parse(LungsTrainConfig, [*lungs[:4], "--channels", "8,x"])
    with pytest.raises(InputError, match=r"^--seed 9+: expected a whole number"):
        parse(LungsTrainConfig, [*lungs, "--seed", "9" * 400, "--batch", "abc"])


def test_what_is_missing_is_named_as_a_flag():
    with pytest.raises(InputError, match=r"^missing: --shards, --out; see --help$"):
        parse(Config, [])


def test_a_file_may_say_false_and_is_checked_like_flags(tmp_path):
    (tmp_path / "c.yaml").write_text("pretrained: false\n")
    assert parse(Config, ["--shards", "s", "--out", "o", "--config", str(tmp_path / "c.yaml")]).pretrained == "false"
    (tmp_path / "c.yaml").write_text("batch: abc\n")
    with pytest.raises(InputError, match=r"^--batch abc: expected a whole number; see --help$"):
        parse(Config, ["--shards", "s", "--out", "o", "--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["--balance.lam", "0.3", "--balance.policy", "ratio"],
            r"--balance\.lam 0\.3: is of the policy fixed, ratio finds its own",
        ),
        (
            ["--attention.annotated", "0.1"],
            r"--attention\.annotated 0\.1: no lesions are used with --attention\.region anatomy",
        ),
        (["--best", "last", "--patience", "3"], "--patience 3: with --best last no epoch is better"),
    ],
)
def test_settings_without_effect_are_told(flags, given, words):
    with pytest.raises(InputError, match=words):
        resolve([*flags, *given])


def test_deeply_nested_yaml_is_one_line(tmp_path):
    (tmp_path / "x.yaml").write_text("[" * 20_000)
    with pytest.raises(InputError, match=r"x\.yaml: is (nested too deeply|not YAML)"):
        read_yaml(tmp_path / "x.yaml", "--config")


@pytest.mark.parametrize(
    "module", ["trainer.train", "trainer.train_lungs", "trainer.evaluate", "trainer.predict", "trainer.report"]
)
def test_wrong_settings_are_told_before_torch_is_imported(tmp_path, module):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    wrong = "--epochz" if "train" in module.partition(".")[2] else "--ouut"
    command = [sys.executable, "-m", module, "--out", "y", wrong, "3"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: unknown flag {wrong}; did you mean --")


def test_recipes_have_names(tmp_path):
    config = resolve(["--config", "published", "--shards", "x", "--out", str(tmp_path / "y")])
    assert (config.findings, config.attention.form) == ("published", "published")
    with pytest.raises(
        InputError, match=r"--config publishd: no such file, and no ready-made recipe; did you mean published"
    ):
        resolve(["--config", "publishd"])


def test_settings_that_do_nothing_are_told(flags, capsys):
    idle = ["--optim.warmup", "5", "--balance.high", "0.9", "--attention.form", "coverage", "--swap.dilate", "0.1"]
    build(resolve([*flags, *idle, "--balance.lam", "1"]))
    said = capsys.readouterr().out
    for words in (
        "--optim.warmup 5 is of --optim.schedule cosine",
        "--balance.high 0.9 is of the policies",
        "--attention.form coverage trains nothing",
    ):
        assert f"note: {words}" in said
    assert "note: --swap.dilate 0.1 is of the context swap, which is off" in said


@pytest.mark.parametrize(
    ("more", "lam", "ramp"),
    [
        ([], 0.2, 0.0),
        (["--labels.kind", "any", "--task", "nih14"], 0.2, 0.0),
        (["--pretrained", "false"], 0.4, 0.5),  # what a finding looks like has to be learnt first
        (["--pretrained", "false", "--labels.kind", "any", "--task", "nih14"], 0.4, 0.5),
        (["--pretrained", "weights.safetensors"], 0.2, 0.0),
        (["--balance.lam", "0.5"], 0.5, 0.0),  # what is said is so throughout
        (["--pretrained", "false", "--balance.lam", "0.5"], 0.5, 0.0),
        (["--balance.lam", "0.5", "--balance.ramp", "0.2"], 0.5, 0.2),
        (["--pretrained", "false", "--balance.ramp", "0"], 0.4, 0.0),
        (["--balance.policy", "ratio"], 0.2, 0.0),
        (["--attention.form", "published"], 0.5, 0.0),
    ],
)
def test_what_lambda_is_where_nothing_is_said(tmp_path, more, lam, ramp):
    config = parse(Config, [*NEEDED, *more])
    assert (config.balance.lam, config.balance.ramp) == (lam, ramp)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    again = from_yaml(Config, tmp_path / "c.yaml")
    assert (again.balance.lam, again.balance.ramp) == (lam, ramp)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("trainer.train --shards nothing --out y", "nothing: no such folder; make one with"),
        ("trainer.train_lungs --shards nothing --out y", "nothing: no such folder; make one with"),
        ("trainer.evaluate --run nothing --shards nothing", "--run nothing: is not a run folder"),
        ("trainer.predict --run nothing x.png", "--run nothing: is not a run folder"),
        ("trainer.export nothing --out y", "nothing: is not a run folder"),
        ("trainer.report --out x.html nothing", "nothing: is not a run folder"),
    ],
)
def test_what_is_not_there_is_said_before_torch_is_imported(command, words, tmp_path):
    no_torch = tmp_path / "torch"
    no_torch.mkdir()
    (no_torch / "__init__.py").write_text("raise SystemExit('torch was imported')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_config_of_another_time_or_place_is_taken(tmp_path):
    """What nobody said stands in it, too: lambda of a policy that has its own, as the default was, or will be there."""
    for said in (["--balance.lam", "0.4"], ["--balance.lam", "0.2", "--pretrained", "False"], ["--balance.lam", "0.7"]):
        assert parse(Config, [*NEEDED, "--balance.policy", "ratio", *said]).idle() == []
    assert parse(Config, [*NEEDED, "--balance.policy", "ratio", "--balance.lam", "0.3"]).idle()
    assert parse(Config, [*NEEDED, "--pretrained", "False"]).balance.lam == 0.4
