"""python -m trainer.predict --run RUN IMAGE...: a JSON line and an overlay for each image file."""

if __name__ == "__main__":  # what is wrong with the flags is said before torch is imported, which takes seconds
    from shards.errors import run as _run
    from trainer.command import parse as _parse
    from trainer.command import positionals as _positionals
    from trainer.options import PredictConfig as _Config

    def _check() -> None:
        _parse(_Config, _positionals(None)[0], prog="trainer.predict")

    _run(_check)

import contextlib
import glob
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards import atomic
from shards.errors import InputError, listed, nearest, run
from shards.files import walk
from shards.pixels import IMAGE_SUFFIXES, Frame, fit, is_dicom, load_image
from shards.sample import clean_key
from trainer.command import parse, positionals
from trainer.drawing import short
from trainer.launching import set_threads, start
from trainer.look import look
from trainer.lungs import LungFinder
from trainer.options import PredictConfig
from trainer.regions import Regions, has_region
from trainer.report.figures import Tile, panel, png
from trainer.report.words import file_name, printable
from trainer.rules import rules_of
from trainer.run import open_run, read_report, task_of


def main(argv: list[str] | None = None) -> None:
    """One JSON line on standard output for each image, in order; messages go to standard error.

    Of several findings an image ``predicted`` are those from their thresholds on, which val chose, ``cam_of`` the same
    (the most probable one where there is none), and ``energy_in_region`` is by finding.

    ``lung_box`` is x0 y0 x1 y1 in pixels of the image file, ends exclusive; it and ``energy_in_region`` are null where
    no lungs were found, the energy also where the CAM is zero everywhere.
    """
    flags, names = positionals(argv)
    options = parse(PredictConfig, flags, prog="trainer.predict")
    if not names:
        raise InputError("no images named: python -m trainer.predict --run RUN IMAGE...")
    opened = open_run(Path(options.run))
    config, model, segmenter, metadata, rules = (
        opened.config,
        opened.model,
        opened.segmenter,
        opened.metadata,
        rules_of(opened.findings),
    )
    if unfinished(Path(options.run)):
        print(
            f"{options.run} has not finished: its best model so far is used, of epoch {int(metadata['epoch']) + 1}",
            file=sys.stderr,
        )
    task, size = task_of(config, opened.findings), config.size
    findings = task.findings
    if options.look_at and options.look_at not in findings:
        raise InputError(f"--look_at {options.look_at}: is no finding of the run; {nearest(options.look_at, findings)}")
    images = named_files(names)
    point = read_report(Path(options.run)).get("threshold")
    if task.several and not point:
        print(
            f"{options.run} has no thresholds yet, which its report chooses: nothing is called present", file=sys.stderr
        )
    set_threads()
    accelerator = start(config.seed, opened.precision)
    device = accelerator.device
    model.to(device)
    finder = LungFinder(segmenter.to(device), size, len(images), "") if segmenter is not None else None
    regions = Regions(findings, rules, size, device)
    stored = json.loads(metadata.get("stored", "{}")) or {"size": int(metadata["stored_size"])}
    side, aspect = int(stored["size"]), str(stored.get("aspect", "stretch"))
    scales = [(float(low), float(high)) for low, high in stored.get("scales", ())]
    out = Path(options.out) if options.out else Path(options.run) / "predictions"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error

    taken: set[str] = set()
    bad: list[str] = []
    for number, path in enumerate(images):
        try:
            image = load_image(path, scales)
        except InputError as error:  # the others get their line all the same
            bad.append(str(error))
            continue
        raw = torch.from_numpy(fit(image, side, aspect).copy())[None, None].to(device)  # as packed for training
        index = torch.tensor([number])
        # One forward, and the map of every finding.
        every = torch.arange(len(findings), device=device)[None]
        seen = look(accelerator, model, raw, index, every, finder, regions, index * 0)
        probability = task.probabilities(seen.logits)[0].tolist()
        named = task.named(seen.logits, point)[0]
        shown = [options.look_at] if options.look_at else named or [findings[int(task.predicted(seen.logits)[0])]]
        found, outlined = bool(seen.found[0]), seen.lungs
        box = seen.boxes[0] if seen.boxes is not None and found else None
        nothing = torch.zeros(size, size)
        cams = {n: seen.cam[0, findings.index(n)].float().cpu() if seen.cam is not None else nothing for n in shown}
        places = dict.fromkeys(shown, nothing > 0)
        if found and seen.boxes is not None:
            places = {
                name: regions(torch.tensor([findings.index(name)]), seen.boxes, outlined).region[0].cpu()
                for name in shown
            }
        line: dict[str, Any] = {"image": str(path), "predicted": named if task.several else named[0]}
        line["probability"] = {name: round(p, 6) for name, p in zip(findings, probability, strict=True)}
        line["cam_of"] = _one(shown, task.several) if seen.cam is not None else None
        if finder is not None:
            # In pixels of the file, so that it can be drawn on the original.
            share = (
                Frame.of(image.shape, side, aspect).share((box * (side / size)).tolist()) if box is not None else None
            )
            line["lung_box"] = (
                [round(v * s) for v, s in zip(share, image.shape[::-1] * 2, strict=True)] if share is not None else None
            )
            energies = {name: energy_in(cams[name], places[name]) for name in shown if name in rules}
            if task.several:
                line["energy_in_region"] = energies
            elif energies:
                line["energy_in_region"] = energies[shown[0]]
        lost = finder is not None and not found
        if lost:
            print(
                f"warning: no lungs were found in {path}: is it a frontal chest radiograph? Its figures mean little",
                file=sys.stderr,
            )
        for name in shown:
            if seen.cam is not None and not cams[name].any():
                print(f"warning: the CAM of {name} is zero everywhere in {path}: it lies nowhere", file=sys.stderr)
        name = file_name(clean_key(path.stem))
        while name in taken:
            name += "_"
        taken.add(name)
        overlay = out / f"{name}.png"
        pixels = seen.images[0, 0].float().cpu().numpy()
        lungs = outlined[0].cpu().numpy() if found and outlined is not None else np.zeros((size, size), bool)
        tiles = []
        for one in shown:
            title = f"{printable(path.name)}\n"
            title += (
                f"{short(one)} {probability[findings.index(one)]:.2f}{'' if named else ', none above its threshold'}"
                if task.several
                else f"{named[0]} {max(probability):.2f}, CAM of {one}"
            )
            title += ", no lungs found" if lost else ""
            tiles.append(
                Tile(title, pixels, cams[one].numpy(), places[one].numpy(), np.zeros((size, size), bool), lungs)
            )
        atomic.write(overlay, png(panel(tiles, cam_of="each finding" if task.several else shown[0]), dpi=150))
        line["overlay"] = str(overlay)
        print(json.dumps(line), flush=True)
    if bad:
        raise InputError(f"{len(bad)} of {len(images)} images could not be used: {'; '.join(bad)}")


def _one(names: list[str], several: bool) -> list[str] | str:
    """As it is written: a list, or with one finding an image its one name."""
    return names if several else names[0]


def energy_in(cam: torch.Tensor, region: torch.Tensor) -> float | None:
    """The share of a CAM [S,S] in a region bool [S,S]; None where there is neither."""
    if not (cam.sum() > 0 and has_region(region[None])):
        return None
    return round(float((cam * region).sum()) / float(cam.sum()), 6)


def unfinished(folder: Path) -> bool:
    """Whether a run has no report of its own end."""
    with contextlib.suppress(InputError):
        return bool(read_report(folder).get("training", {"unfinished": True}).get("unfinished"))
    return True


def named_files(names: Sequence[str]) -> list[Path]:
    """Image files by name, by folder (all images in it, sorted) and by pattern. InputError: there are none."""
    images: list[Path] = []
    missing = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = list(walk(path))
            found = [p for p in inside if p.suffix.lower() in (*IMAGE_SUFFIXES, ".dcm") or is_dicom(p)]
            if len(found) < len(inside):
                print(f"{path}: {len(inside) - len(found)} files that are no images are left out", file=sys.stderr)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
        if not found:
            missing.append(f"{path} (a folder without images)" if path.is_dir() else name)
        images += found
    if missing:
        raise InputError(f"no such image file: {listed(missing)}")
    return images


if __name__ == "__main__":
    run(main)
