"""python -m trainer.predict --run RUN IMAGE...: a JSON line and an overlay for each image file."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.errors import InputError, listed, nearest, run
from shards.pixels import fit, load_image
from shards.sample import clean_key
from trainer.augment import resize
from trainer.classifier import normalize_cam
from trainer.config import parse, positionals
from trainer.evaluate import open_run
from trainer.launching import start
from trainer.regions import finding_regions, placed
from trainer.rules import rules_of


@dataclass
class PredictConfig:
    """Predict image files with a finished run. Usage: python -m trainer.predict --run RUN [--out DIR] IMAGE..."""

    run: str
    """Run folder of trainer.train."""
    out: str = ""
    """Folder for the overlays; empty: RUN/predictions."""
    look_at: str = ""
    """Finding whose CAM is shown; empty: the predicted one."""

    def problems(self) -> list[str]:
        """Nothing beyond the types."""
        return []


def main(argv: list[str] | None = None) -> None:
    """One JSON line on standard output for each image, in order; messages go to standard error.

    ``lung_box`` is x0 y0 x1 y1 in pixels of the image file, ends exclusive; it and ``energy_in_region`` are null where no lungs were found.
    """
    flags, names = positionals(argv)
    images = [Path(name) for name in names]
    options = parse(PredictConfig, flags, prog="trainer.predict")
    if not images:
        raise InputError("no images named: python -m trainer.predict --run RUN IMAGE...")
    opened = open_run(Path(options.run))
    config, model, segmenter, metadata, rules = opened.config, opened.model, opened.segmenter, opened.metadata, rules_of(opened.findings)
    if not (Path(options.run) / "report.json").is_file():
        print(f"{options.run} has not finished: its best model so far is used, of epoch {int(metadata['epoch']) + 1}", file=sys.stderr)
    findings, size = json.loads(metadata["findings"]), config.size
    if options.look_at and options.look_at not in findings:
        raise InputError(f"--look_at {options.look_at}: is no finding of the run; {nearest(options.look_at, findings)}")
    folders = [path for path in images if path.is_dir()]
    if folders:
        raise InputError(f"{folders[0]}: is a folder; name image files, such as {folders[0]}/*.png")
    missing = [path for path in images if not path.is_file()]
    if missing:
        raise InputError(f"no such image file: {listed(missing)}")
    device = start(config.seed).device
    model.to(device)
    if segmenter is not None:
        segmenter.to(device)
    out = Path(options.out) if options.out else Path(options.run) / "predictions"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error

    from trainer import report

    taken: set[str] = set()
    bad: list[str] = []
    for path in images:
        try:
            image = load_image(path)
        except InputError as error:  # the others get their line all the same
            bad.append(str(error))
            continue
        stored = torch.from_numpy(fit(image, int(metadata["stored_size"])).copy())[None, None].to(device)  # as packed for training
        with torch.no_grad():
            pixels = resize(stored, size)
            chosen = torch.tensor([findings.index(options.look_at)], device=device) if options.look_at else None
            logits, cam = model(pixels, chosen, cam=True)
            assert cam is not None
            cam = normalize_cam(cam, size)
            probability = torch.softmax(logits[0].float(), 0).tolist()
            box, found = segmenter.boxes(stored.float() / 255, size) if segmenter is not None else (None, None)
        predicted = findings[int(np.argmax(probability))]
        shown = options.look_at or predicted
        lungs = box if found else None
        region = finding_regions(lungs, [shown], size, rules)[0].cpu() if lungs is not None else torch.zeros(size, size, dtype=torch.bool)
        line: dict[str, Any] = {"image": str(path), "predicted": predicted}
        line["probability"] = {name: round(p, 6) for name, p in zip(findings, probability, strict=True)}
        line["cam_of"] = shown
        lost = segmenter is not None and lungs is None
        if segmenter is not None:
            # In pixels of the file, so that it can be drawn on the original.
            scale = [image.shape[1] / size, image.shape[0] / size] * 2
            line["lung_box"] = [round(v * s) for v, s in zip(lungs[0].tolist(), scale, strict=True)] if lungs is not None else None
            if shown in rules:
                share = float((cam[0].cpu() * region).sum()) / max(float(cam.sum()), 1e-12)
                line["energy_in_region"] = round(share, 6) if placed(region[None]) else None
        if lost:
            print(f"warning: no lungs were found in {path}: is it a frontal chest radiograph? Its figures mean little", file=sys.stderr)
        name = clean_key(path.stem)
        while name in taken:
            name += "_"
        taken.add(name)
        overlay = out / f"{name}.png"
        title = f"{path.name}\n{predicted} {max(probability):.2f}, CAM of {shown}{', no lungs found' if lost else ''}"
        tile = report.Tile(
            title,
            pixels[0, 0].cpu().numpy(),
            cam[0].float().cpu().numpy(),
            region.numpy(),
            np.zeros((size, size), bool),
            lungs[0].tolist() if lungs is not None else None,
        )
        report.panel([tile], cam_of=shown).savefig(overlay, dpi=150)
        line["overlay"] = str(overlay)
        print(json.dumps(line), flush=True)
    if bad:
        raise InputError(f"{len(bad)} of {len(images)} images could not be used: {'; '.join(bad)}")


if __name__ == "__main__":
    run(main)
