"""The command line and YAML files of settings: jsonargparse makes flags, help and errors out of the dataclasses of
`trainer.config`.

``--config FILE`` is applied before all other flags, wherever it stands.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import jsonargparse
import yaml

from shards.errors import InputError, nearest, read_yaml
from shards.store import open_store
from trainer.config import Config

T = TypeVar("T")

RECIPES = Path(__file__).parents[1] / "launch" / "recipes"


class _Refused(Exception):
    """What jsonargparse says of a command line."""


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message: str, *_: Any) -> None:  # type: ignore[override]
        raise _Refused(" ".join(str(message).split()))


def parse(kind: type[T], argv: list[str] | None = None, *, prog: str = "") -> T:
    """Build ``kind`` from the command line; InputError names every problem at once."""
    argv = list(sys.argv[1:] if argv is None else argv)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=prog or None, description=kind.__doc__, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings; flags override it.")
    parser.add_class_arguments(kind)
    argv, files = _split_config(argv)
    flags = [option for action in parser._actions for option in action.option_strings]
    argv = _bare_switches(kind, argv)
    for token in argv:
        name = token.partition("=")[0]
        if name.startswith("--") and name not in flags:
            raise InputError(f"unknown flag {name}; {nearest(name, flags)}")
    settings = [_read_yaml(kind, recipe(file)) for file in files]
    try:
        namespace = parser.parse_args(
            [part for content in settings for part in ("--config", yaml.safe_dump(content))] + argv
        )
    except _Refused as refused:  # its sentences are its own business: what is wrong is found from the settings' types
        given = [pair for content in settings for pair in flat(content).items()] + _pairs(argv)
        raise InputError(f"{_problem(kind, given) or refused}; see --help") from None
    config = kind(**_sections(kind, namespace))
    problems = config.problems()  # type: ignore[attr-defined]
    if problems:
        raise InputError("; ".join(problems))
    return config


def _pairs(argv: list[str]) -> list[tuple[str, Any]]:
    """Names and values of ``--name value`` and ``--name=value``."""
    pairs = []
    for token, after in zip(argv, [*argv[1:], ""], strict=False):
        if token.startswith("--"):
            name, given, value = token[2:].partition("=")
            pairs.append((name, value if given else after))
    return pairs


def _problem(kind: type, given: list[tuple[str, Any]]) -> str:
    """Which setting has a value that is none of its type, or is missing, in words; empty: neither."""
    kinds = _types(kind)
    for name, value in given:
        allowed = _alternatives(kinds[name]) if name in kinds else ()
        if allowed and not any(_fits(one, value) for one in allowed):
            return (
                f"--{name} {value}: expected {' or '.join(_in_words(one) for one in allowed if one is not type(None))}"
            )
    needed = [
        item.name for item in dataclasses.fields(kind) if item.default is item.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in dict(given)]
    return f"missing: {', '.join(f'--{name}' for name in missing)}" if missing else ""


def _types(kind: type, prefix: str = "") -> dict[str, Any]:
    """The type of each setting by its dotted name."""
    kinds: dict[str, Any] = {}
    for name, of in typing.get_type_hints(kind).items():
        kinds |= (
            _types(of, f"{prefix}{name}.")
            if dataclasses.is_dataclass(of) and isinstance(of, type)
            else {f"{prefix}{name}": of}
        )
    return kinds


def _alternatives(of: Any) -> tuple[Any, ...]:
    return typing.get_args(of) if isinstance(of, types.UnionType) else (of,)


def _fits(of: Any, value: Any) -> bool:
    text = str(value)
    if typing.get_origin(of) is list:
        return of == list[int] and bool(re.fullmatch(r"\[?\s*\d+(\s*,\s*\d+)*\s*\]?", text))
    if typing.get_origin(of) is Literal:
        return text in map(str, typing.get_args(of))
    if of in (int, float):
        try:
            return not math.isnan(of(text)) and not isinstance(value, bool)
        except (ValueError, OverflowError):
            return False
    if of is bool:
        return text.lower() in ("true", "false")
    return of is str or text.lower() in ("none", "null")


def _in_words(of: Any) -> str:
    if typing.get_origin(of) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(of)))}"
    if typing.get_origin(of) is list:
        return "whole numbers, such as [16,32]"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(of, "text")


def resumed(argv: list[str] | None, prog: str) -> list[str]:
    """The command line; with ``--resume``, the run folder's config.yaml before it, so that flags given now win."""
    argv = list(sys.argv[1:] if argv is None else argv)
    peek = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--out", type=Path)
    peek.add_argument("--resume", nargs="?", const="true", default="false")
    with contextlib.suppress(argparse.ArgumentError):  # the real parser says it better
        seen, _ = peek.parse_known_args(argv)
        if seen.resume == "auto" and seen.out:
            begun = (seen.out / "config.yaml").is_file()
            argv = [*_without_resume(argv), *(["--resume=true"] if begun else [])]
            seen.resume = "true" if begun else "false"
        if seen.out and yaml.safe_load(seen.resume) is True:
            if not (seen.out / "config.yaml").is_file():
                raise InputError(f"--resume: {seen.out} holds no run (no config.yaml); start it without --resume")
            argv = ["--config", str(seen.out / "config.yaml"), *argv]
    return argv


def _without_resume(argv: list[str]) -> list[str]:
    kept = [token for token in argv if not token.startswith("--resume=")]
    while "--resume" in kept:
        at = kept.index("--resume")
        alone = kept[at + 1 : at + 2] == [] or kept[at + 1].startswith("--")
        kept[at : at + (1 if alone else 2)] = []
    return kept


def resolve(argv: list[str] | None) -> Config:
    """The configuration of trainer.train; with --resume, that of the run folder with the flags given now on top."""
    config = parse(Config, resumed(argv, "trainer.train"), prog="trainer.train")
    if not config.resume and (idle := config.idle()):
        raise InputError("; ".join(idle))
    # A run may be resumed from another working folder.
    config.shards = config.shards if "://" in config.shards else os.path.abspath(config.shards)
    config.lungs.weights = config.lungs.weights and os.path.abspath(config.lungs.weights)
    for name in ("pretrained", "findings"):
        value = getattr(config, name)
        setattr(config, name, os.path.abspath(value) if os.path.exists(value) else value)
    return config


def _sections(kind: type, namespace: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        value = namespace[item.name]
        values[item.name] = item.type(**vars(value)) if dataclasses.is_dataclass(item.type) else value  # type: ignore[operator]
    return values


def _split_config(argv: list[str]) -> tuple[list[str], list[str]]:
    """Take every ``--config FILE`` out of ``argv``."""
    rest, files = [], []
    tokens = iter(argv)
    for token in tokens:
        if token == "--config":
            file = next(tokens, None)
            if file is None:
                raise InputError("--config: expected a YAML file after it")
            files.append(file)
        elif token.startswith("--config="):
            files.append(token.partition("=")[2])
        else:
            rest.append(token)
    return rest, files


def positionals(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """``--name value`` and ``--name=value`` pairs, and the words among them,
    for commands that take files or folders; ``--no-name`` is ``--name=false``.
    """
    flags: list[str] = []
    words: list[str] = []
    tokens = iter(sys.argv[1:] if argv is None else argv)
    for token in tokens:
        if not token.startswith("--"):
            words.append(token)
        elif token.startswith("--no-"):
            flags.append(f"--{token.removeprefix('--no-')}=false")
        elif "=" in token or token == "--help":
            flags.append(token)
        else:
            flags += [token, *([value] if (value := next(tokens, None)) is not None else [])]
    return flags, words


def _bare_switches(kind: type, argv: list[str]) -> list[str]:
    """``--resume`` alone means ``--resume true``."""
    switches = {f"--{item.name}" for item in dataclasses.fields(kind) if item.type is bool}
    done = []
    for i, token in enumerate(argv):
        done.append(token)
        if token in switches and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            done.append("true")
    return done


def recipe(name: str) -> Path:
    """A file of settings, or a ready-made recipe by its name alone, such as ``published``."""
    path = Path(name)
    if path.exists() or "/" in name or path.suffix:
        return path
    known = {found.stem: found for found in sorted(RECIPES.glob("*.yaml"))}
    if name not in known:
        raise InputError(f"--config {name}: no such file, and no ready-made recipe; {nearest(name, known)}")
    return known[name]


def _read_yaml(kind: type, path: Path) -> dict[str, Any]:
    content = read_yaml(path, "--config")
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected settings as `name: value` lines")
    _check_names(kind, content, path, "")
    return content


def _check_names(kind: type, content: dict[str, Any], path: Path, prefix: str) -> None:
    known = {item.name: item.type for item in dataclasses.fields(kind)}
    for name, value in content.items():
        if name not in known:
            raise InputError(f"--config {path}: unknown setting {prefix}{name}; {nearest(str(name), known)}")
        section = known[name]
        if dataclasses.is_dataclass(section) and isinstance(section, type):
            if not isinstance(value, dict):
                raise InputError(f"--config {path}: {prefix}{name} is a section; expected `name: value` lines under it")
            _check_names(section, value, path, f"{prefix}{name}.")
        elif section is str and isinstance(value, bool):
            content[name] = str(value).lower()
        elif section is str and isinstance(value, int | float):
            content[name] = str(value)
        elif section is str and isinstance(value, dict):  # a policy by finding
            content[name] = ", ".join(f"{key}: {one}" for key, one in value.items())


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"optim.lr": 1e-5, ...}``."""
    named: dict[str, Any] = {}
    for name, value in settings.items():
        named |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return named


def run_at(path: Path, flag: str = "--run ") -> None:
    """InputError: the folder of no run of trainer.train. What is in it is not read. ``flag``: that named it."""
    if not (path / "config.yaml").is_file():
        why = "no config.yaml" if path.is_dir() else "there is no such folder"
        raise InputError(f"{flag}{path}: is not a run folder ({why}); name the --out of a trainer.train")
    if (path / "lung_unet.safetensors").is_file():
        raise InputError(f"{flag}{path}: is a run of trainer.train_lungs; name one of trainer.train")


def there(*roots: str) -> None:
    """InputError: of these shards some are not there. Of a job on several machines nothing is asked yet: one that lacks
    them says so when all have met, or the others would wait for it.
    """
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1"):
        for root in roots:
            open_store(root).there()


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML that ``--config`` takes."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def from_yaml(kind: type[T], path: Path) -> T:
    """Read back what `to_yaml` wrote."""
    return parse(kind, ["--config", str(path)])
