"""python -m trainer.evaluate --run RUN --shards DIR: the figures of a finished run, again or on other shards.

Legend: N images of a split, K classes, S pixels of a side.
"""

if __name__ == "__main__":  # what is wrong with the flags is said before torch is imported, which takes seconds
    from pathlib import Path as _Path

    from shards.errors import run as _run
    from trainer.command import parse as _parse
    from trainer.command import run_at as _run_at
    from trainer.command import there as _there
    from trainer.options import EvaluateConfig as _Config

    def _check() -> None:
        asked = _parse(_Config, None, prog="trainer.evaluate")
        _run_at(_Path(asked.run))
        if asked.shards:
            _there(asked.shards)

    _run(_check)

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import numpy as np

from shards.dataset import Split
from shards.errors import InputError, nearest, run
from shards.sample import SPLITS
from shards.store import open_store
from shards.targets import ABSENT, PRESENT
from trainer import __version__, presence
from trainer.command import parse
from trainer.config import Config
from trainer.content import Content, Measured, Training
from trainer.gallery import gallery
from trainer.groups import at_prevalence, by_column, limits_of, per_unit, units_of, values_of
from trainer.launching import close, on_main, set_threads, start
from trainer.lesion_figures import lesion_figures
from trainer.lungs import LungFinder
from trainer.maps import refuse_full, write_maps
from trainer.measure import Evaluator
from trainer.options import EvaluateConfig
from trainer.outcome import Outcome
from trainer.report.tables import as_text, asked_for
from trainer.report.words import MEASURED, file_name, shown_split, table
from trainer.report.write import write_run
from trainer.rules import Finding, to_yaml
from trainer.run import evaluator_of, open_run, read_report, task_of
from trainer.task import Task
from trainer.tiles import first_of_each, tiles


def finish(
    evaluator: Evaluator,
    config: Config,
    findings: Mapping[str, Finding],
    training: Training,
    out: Path,
    known: Content | None = None,
    *,
    foreign: bool = False,
    by: Sequence[str] = (),
    per: tuple[str, str] = ("", ""),
    prevalence: Mapping[str, float] | None = None,
    maps: str = "",
    run: str = "",
) -> tuple[Content, dict[str, Outcome]]:
    """Evaluate val and test, probe the model, and write the run's reports. Returns the content of report.json, and what
    was measured of each split.

    Args:
        known: what a report.json of the run says already. What is not measured now stays as it is there, and where
            there is no val, thresholds are those that the run's own validation images chose.
        foreign: whether these are other images than the run's own, whose val then chooses nothing that is known.
        by: columns of the samples that figures are split by.
        per: a column, and how its images are pooled, of figures of studies or patients.
        prevalence: by finding, of all others under the empty name, for PPV and NPV there.
        maps: a folder for the maps of what the report shows.
        run: its name; empty: the folder's.

    InputError: the report could not be written; the run is as it was.
    """
    accelerator, splits, lungs = evaluator.accelerator, evaluator.splits, evaluator.lungs
    known = known or {}
    outcomes: dict[str, Outcome] = {name: evaluator.measure(name) for name in ("val", "test") if name in splits}
    for name in outcomes:
        if name in lungs:
            lungs[name].share(accelerator)
    lost = {name: finder.memory.not_found().tolist() for name, finder in lungs.items()}
    content: Content = {
        "run": run or out.resolve().name,
        "findings": evaluator.task.findings,
        "dataset": next(iter(splits.values())).dataset,
        "training": training,
    }
    content["images"] = known.get("images", {}) | {name: split.fingerprint for name, split in splits.items()}
    content["regions"] = to_yaml(findings)
    content["written"] = f"cxr-focus {__version__}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    content["data"] = known.get("data", {}) | {name: data_of(split, evaluator.task) for name, split in splits.items()}
    without = {name: [splits[name].key(p) for p in positions] for name, positions in lost.items()}
    content["lungs_not_found"] = known.get("lungs_not_found", {}) | without
    replaced = {name: int(outcome.replaced.sum()) for name, outcome in outcomes.items()}
    content["regions_replaced"] = known.get("regions_replaced", {}) | replaced
    foreign = foreign and "threshold" in known
    chooses = "val" in outcomes and not foreign
    thresholds = outcomes["val"].thresholds() if chooses else known.get("iou_threshold")
    point = outcomes["val"].operating_point() if chooses else known.get("threshold")
    content["iou_threshold"], content["threshold"], content["foreign"] = thresholds, point, foreign
    how = evaluator.task.threshold if chooses else known.get("operating_point")
    content |= {"operating_point": how} if how else {}
    content["calibration"] = fitted = outcomes["val"].calibration() if chooses else known.get("calibration")
    for split in MEASURED:
        if split in outcomes:
            content[split] = outcomes[split].report(
                intervals=True, chosen=thresholds, threshold=point, calibration=fitted
            )
        elif split in known:
            content[split] = known[split]
    boxes = known.get("box_threshold")
    lesions, content["box_threshold"] = lesion_figures(evaluator, outcomes, point, boxes, keep=foreign)
    for split in MEASURED:
        if split in lesions:
            content[split]["lesions"] = lesions[split]
    for split in MEASURED:
        if by and split in outcomes:
            content[split]["by"] = {column: by_column(outcomes[split], column, point) for column in by}
        if per[0] and split in outcomes:
            content[split]["per"] = per_unit(outcomes[split], *per, point)
        if prevalence and split in outcomes:
            content[split]["at_prevalence"] = at_prevalence(content[split], evaluator.task.findings, prevalence)
    content["config"] = known.get("config") or asdict(config)
    shown: Measured = "test" if "test" in splits else "val"
    content[shown]["probe"] = evaluator.probe(shown, outcomes[shown])

    if maps:
        evaluator.accelerator.print(
            f"{write_maps(evaluator, shown, outcomes[shown], point, Path(maps))} maps of {shown} are in {maps}"
        )

    def write() -> None:
        try:
            images = gallery(evaluator, shown, outcomes[shown], point)
            write_run(
                out,
                config,
                content,
                outcomes,
                tiles(evaluator, shown, first_of_each(evaluator, shown)),
                images,
                splits,
                lost,
            )
        except Exception as error:  # a picture or a name that cannot be made costs the report, not the run
            why = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise InputError(
                f"{out}: the report could not be written ({why}). The model is there: `python -m trainer.evaluate "
                "--run RUN` tries again"
            ) from error

    on_main(accelerator, write)
    return content, outcomes


def data_of(split: Split, task: Task) -> dict[str, Any]:
    """What a split has: images, patients (None: not known), and of each finding how many with it and without."""
    known = np.unique(split.ids()["patient"])
    tallies = [split.tally(state).tolist() for state in (PRESENT, ABSENT)]
    return {
        "images": len(split),
        "patients": int((known != 0).sum()) or None,
        "findings": {name: list(of) for name, *of in zip(task.findings, *tallies, strict=True)},
    }


def overlap(train: Split, split: Split) -> tuple[int, int]:
    """How many images of ``split`` have the key or the bytes of a training image, and how many others the ID of a
    patient of theirs.
    """
    there, here = train.ids(), split.ids()
    known = np.isin(here["key"], there["key"])
    order = np.argsort(train.image_lengths(), kind="stable")
    lengths, own = train.image_lengths()[order], split.image_lengths()
    first, last = np.searchsorted(lengths, own), np.searchsorted(lengths, own, side="right")
    for p in np.flatnonzero(~known & (first < last)).tolist():
        known[p] = any(train.image_bytes(q) == split.image_bytes(p) for q in order[first[p] : last[p]].tolist())
    patients = there["patient"][there["patient"] != 0]
    return int(known.sum()), int((~known & np.isin(here["patient"], patients)).sum())


def tell_overlap(
    config: Config, trained_on: str | None, findings: Mapping[str, Finding], splits: Mapping[str, Split]
) -> None:
    """Say how many images of other shards the run has most likely been trained on: figures on those prove nothing."""
    try:
        train = (
            Split(open_store(config.shards), "train", task_of(config, findings).labels)
            if os.path.isdir(config.shards)
            else None
        )
    except InputError:
        train = None
    if train is None or trained_on not in (None, train.fingerprint):
        print(
            f"note: the images that the run was trained on are not in {config.shards} any more, so it was not checked "
            "whether some are among these"
        )
        return
    for name, split in splits.items():
        images, patients = overlap(train, split)
        message = (
            f"of the {len(split)} {name} images {images or 'none'} have the name or the bytes of a training image "
            "of this run, "
        )
        message += (
            f"{patients or 'none'} of the others are of a patient who is in training"
            if train.ids()["patient"].any()
            else "patients are not known"
        )
        print(
            f"WARNING: {message}: if they are the same, the figures say nothing about new ones"
            if images or patients
            else message
        )


def refuse_to_overwrite(out: Path, path: Path, splits: Mapping[str, Split]) -> None:
    """InputError where ``out`` is another run, or holds the evaluation of other images."""
    if (out / "config.yaml").is_file() and out.resolve() != path.resolve():
        raise InputError(
            f"--out {out}: is another run's folder, whose report would be overwritten; name another folder"
        )
    other = read_report(out).get("images", {})
    if any(other.get(name, split.fingerprint) != split.fingerprint for name, split in splits.items()):
        raise InputError(f"--out {out}: holds the report of other images; name another folder for this one")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def folder_of(run_folder: Path, dataset: str) -> Path:
    """Where the evaluation of other shards goes; a dataset's name cannot lead out of the run folder."""
    return run_folder / file_name(f"evaluate_{dataset}")


def main(argv: list[str] | None = None) -> None:
    """Evaluate, write the reports, print where they are."""
    options = parse(EvaluateConfig, argv, prog="trainer.evaluate")
    path = Path(options.run)
    set_threads()
    opened = open_run(path)
    shards = options.shards or opened.config.shards
    store = open_store(shards)
    accelerator = start(opened.config.seed, opened.precision, timeout=opened.config.timeout)
    try:
        store.there()
    except InputError as error:
        if options.shards:
            raise
        raise InputError(f"{path}: its shards are not at {shards} any more; name them with --shards") from error
    config, model, segmenter = opened.config, opened.model, opened.segmenter
    index = store.index()
    # As the report last chose, unless it is said anew
    old = read_report(path)
    how = options.operating_point or old.get("operating_point") or config.labels.operating_point
    config = replace(config, labels=replace(config.labels, operating_point=how))
    task = task_of(config, opened.findings)
    splits = {name: Split(store, name, task.labels) for name in SPLITS[1:] if name in index["splits"]}
    if not splits:
        raise InputError(f"--shards {store.name}: has neither val nor test; pack one")

    own = os.path.realpath(shards) == os.path.realpath(config.shards) or shards.rstrip("/") == config.shards.rstrip("/")
    # The run's own shards, if they are still those that it was trained on.
    own = own and all(
        old.get("images", {}).get(name, split.fingerprint) == split.fingerprint for name, split in splits.items()
    )
    out = Path(options.out) if options.out else path if own else folder_of(path, index["dataset"])
    if out.resolve() != path.resolve():
        refuse_to_overwrite(out, path, splits)
    out.mkdir(parents=True, exist_ok=True)
    so_far: Training = {"unfinished": True, "best_epoch": int(opened.metadata["epoch"]) + 1}
    training = old.get("training", so_far)
    if training.get("unfinished") and accelerator.is_main_process:
        print(f"{path} has not finished: these are figures of its best model so far, of epoch {training['best_epoch']}")
    if not own and accelerator.is_main_process:
        tell_overlap(config, old.get("images", {}).get("train"), opened.findings, splits)
    for column in options.columns:  # what is wrong with one is said before anything is measured
        for split in splits.values():
            values_of(split, column)
    for split in splits.values() if options.per else ():
        units_of(split, options.pooled[0])
    if wrong := set(options.prevalences) - {"", *task.findings}:
        name = sorted(wrong)[0]
        raise InputError(f"--prevalence {name}: is no finding of the run; {nearest(name, task.findings)}")
    if options.operating_point and not (own and "val" in splits):
        raise InputError(
            f"--operating_point {options.operating_point}: thresholds are chosen on the run's own val, never on other "
            f"images; evaluate {path} on its own shards with that flag, then these keep to it"
        )
    if options.maps:
        if not model.has_map:
            raise InputError(f"--maps {options.maps}: this run's backbone, {config.backbone}, has no feature map")
        refuse_full(Path(options.maps))
        accelerator.wait_for_everyone()  # before one of them makes it
    model.to(accelerator.device)
    lungs = {}
    if segmenter is not None and model.has_map:
        segmenter.to(accelerator.device)
        lungs = {n: LungFinder(segmenter, config.size, len(s), s.fingerprint) for n, s in splits.items()}
    chosen = ("iou_threshold", "box_threshold", "threshold", "operating_point", "calibration", "config")
    kept = old if own else {name: old.get(name) for name in chosen if name in old}
    known = cast(Content, {"config": asdict(config)} | dict(kept))
    evaluator = evaluator_of(
        accelerator,
        model,
        replace(config, batch=options.batch, workers=options.workers),
        task,
        opened.findings,
        splits,
        lungs,
    )
    content, _ = finish(
        evaluator,
        config,
        opened.findings,
        training,
        out,
        known,
        foreign=not own,
        by=options.columns,
        per=options.pooled,
        prevalence=options.prevalences,
        maps=options.maps,
        run=path.resolve().name,
    )
    if accelerator.is_main_process:
        print(table({path.resolve().name: content}))
        for rows in asked_for(content[shown_split(content)]):
            print(f"\n{as_text(rows)}")
        if options.operating_point:
            before, now = (limits_of(task.findings, c.get("threshold")) for c in (old, content))
            each = (f"{n} {_number(at)} (was {_number(before.get(n))})" for n, at in now.items())
            print(f"thresholds of {out}, chosen on val by {options.operating_point}: {', '.join(each) or 'none'}")
        print(f"wrote {out / 'report.html'}")
    close(accelerator)


if __name__ == "__main__":
    run(lambda: presence.explained(main))
