"""python -m trainer.predict --run RUN IMAGE...: a JSON line and an overlay for each image file."""

if __name__ == "__main__":  # what is wrong with the flags is said before torch is imported, which takes seconds
    from pathlib import Path as _Path

    from shards.errors import run as _run
    from trainer.command import parse as _parse
    from trainer.command import positionals as _positionals
    from trainer.command import run_at as _run_at
    from trainer.options import PredictConfig as _Config

    def _check() -> None:
        run = _Path(_parse(_Config, _positionals(None)[0], prog="trainer.predict").run)
        if not (run / "export.json").is_file():
            _run_at(run)

    _run(_check)

import contextlib
import glob
import io
import itertools
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from shards import atomic
from shards.dataset import Split
from shards.errors import InputError, listed, nearest, run
from shards.files import walk
from shards.pixels import IMAGE_SUFFIXES, encode_image, is_dicom
from shards.sample import clean_key
from shards.store import open_store
from trainer import load
from trainer.command import parse, positionals
from trainer.drawing import overlay
from trainer.launching import set_threads
from trainer.options import PredictConfig
from trainer.predictor import Prediction, Reader
from trainer.report.words import file_name

DIGITS = 6  # of probabilities


@dataclass(frozen=True)
class Source:
    """An image, before it is read: its name, and what gives its pixels, uint8 [H,W]."""

    name: str
    read: Callable[[Reader], np.ndarray]
    split: str = ""  # of shards


@dataclass(frozen=True)
class Ready:
    """An image that has been read: its pixels, if they are drawn on, and the square that the model sees."""

    source: Source
    shape: tuple[int, int]
    pixels: np.ndarray | None
    square: np.ndarray


def main(argv: list[str] | None = None) -> None:
    """One JSON line on standard output for each image, in order; messages go to standard error.

    ``predicted`` are of several findings an image those from their thresholds on, which val chose, of one the most
    probable class; ``positive`` says of each finding that has a threshold whether it is reached, which may be where
    another class is more probable: how many such images there are is said at the end. ``cam_of`` is whose maps are told
    of and drawn: those that are positive, else those that are predicted (of several findings the most probable one
    where there is none). ``energy_in_region`` is by finding where there are several.

    ``lung_box`` is x0 y0 x1 y1 in pixels of the image file, ends exclusive; it and ``energy_in_region`` are null where
    no lungs were found, the energy also where the CAM is zero everywhere.
    """
    flags, names = positionals(argv)
    options = parse(PredictConfig, flags, prog="trainer.predict")
    if not names:
        raise InputError("no images named: python -m trainer.predict --run RUN IMAGE...")
    set_threads()
    cxr = load(options.run)
    if cxr.unfinished:
        print(
            f"{options.run} has not finished: its best model so far is used, of epoch {cxr.epoch + 1}",
            file=sys.stderr,
        )
    if options.look_at and options.look_at not in cxr.findings:
        raise InputError(
            f"--look_at {options.look_at}: is no finding of the run; {nearest(options.look_at, cxr.findings)}"
        )
    sources = named_images(names)
    if cxr.task.several and not cxr.threshold:
        print(
            f"{options.run} has no thresholds yet, which its report chooses: nothing is called present", file=sys.stderr
        )
    out = Path(options.out) if options.out else Path(options.run) / "predictions"
    new = not out.exists()
    if options.overlay or options.cam:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error

    bad: list[str] = []
    apart = 0
    files = Files(out, options, cxr.task.several, frozenset(os.path.realpath(one.name) for one in sources))
    progress = tqdm(total=len(sources), unit="img", smoothing=0.05, file=sys.stderr, disable=None)
    with ThreadPoolExecutor(max(1, options.workers)) as pool, progress:
        for ready in batches(cxr, sources, options, pool, bad):
            squares = torch.from_numpy(np.stack([one.square for one in ready]))
            lines = []
            for one, seen in zip(ready, cxr.look(squares, [one.shape for one in ready]), strict=True):
                positive = [name for name, reached in seen.positive.items() if reached]
                if not cxr.task.several:
                    apart += any((name in seen.predicted) != reached for name, reached in seen.positive.items())
                shown = [options.look_at] if options.look_at else positive or seen.predicted or [_likeliest(seen)]
                lines.append(line_of(one.source, seen, shown, cxr))
                tell(one.source.name, seen, shown, cxr)
                files.write(lines[-1], one, seen, shown, pool)
            files.wait()
            with tqdm.external_write_mode(file=sys.stdout):
                for line in lines:
                    print(json.dumps(line), flush=True)
            progress.update(len(ready))
    if apart:
        print(
            f"in {apart} of {len(sources)} images `predicted`, the most probable class, and `positive`, by the "
            "threshold that val chose, disagree; the map is that of the finding that is positive, if one is",
            file=sys.stderr,
        )
    if new:
        with contextlib.suppress(OSError):
            out.rmdir()  # if no image could be used
    if bad:
        more = f" and {len(bad) - MOST_BAD} more, each told above" if len(bad) > MOST_BAD else ""
        raise InputError(f"{len(bad)} of {len(sources)} images could not be used: {'; '.join(bad[:MOST_BAD])}{more}")


MOST_BAD = 20


def batches(
    cxr: Reader, sources: Sequence[Source], options: PredictConfig, pool: ThreadPoolExecutor, bad: list[str]
) -> Iterator[list[Ready]]:
    """Batches of images in their order, read ahead by no more than two; what cannot be read goes to ``bad``."""

    def read(source: Source) -> Ready:
        pixels = source.read(cxr)
        shape = (pixels.shape[0], pixels.shape[1])
        return Ready(source, shape, pixels if options.overlay else None, cxr.packed(pixels))

    left, ahead = iter(sources), deque[Future[Ready]]()
    while True:
        ahead.extend(pool.submit(read, source) for source in itertools.islice(left, 3 * options.batch - len(ahead)))
        if not ahead:
            return
        ready = []
        for _ in range(min(options.batch, len(ahead))):
            try:
                ready.append(ahead.popleft().result())
            except InputError as error:  # the others get their line all the same
                bad.append(str(error))
                if len(bad) > MOST_BAD:
                    print(f"warning: {error}", file=sys.stderr)
        if ready:
            yield ready


def line_of(source: Source, seen: Prediction, shown: list[str], cxr: Reader) -> dict[str, Any]:
    """What is printed of an image."""
    several = cxr.task.several
    line: dict[str, Any] = {"image": source.name} | ({"split": source.split} if source.split else {})
    line |= {"predicted": seen.predicted if several else seen.predicted[0]}
    line["probability"] = {finding: round(p, DIGITS) for finding, p in seen.probability.items()}
    line["calibrated"] = {finding: round(p, DIGITS) for finding, p in seen.calibrated.items()}
    line["threshold"] = {finding: None if at is None else round(at, DIGITS) for finding, at in seen.threshold.items()}
    line["positive"] = seen.positive
    line["cam_of"] = (shown if several else shown[0]) if seen.cam else None
    if cxr.looks_for_lungs:
        line["lung_box"] = list(seen.lung_box) if seen.lung_box is not None else None
        energies = {one: seen.energy_in_region.get(one) for one in shown if one in cxr.rules}
        if several:
            line["energy_in_region"] = energies
        elif energies:
            line["energy_in_region"] = energies[shown[0]]
    return line


def tell(name: str, seen: Prediction, shown: list[str], cxr: Reader) -> None:
    """Say what a reader of an image's figures must know."""
    if cxr.looks_for_lungs and seen.lung_box is None:
        print(
            f"warning: no lungs were found in {name}: is it a frontal chest radiograph? Its figures mean little",
            file=sys.stderr,
        )
    for one in shown:
        if seen.cam and not seen.cam.of[one].any():
            print(f"warning: the CAM of {one} is zero everywhere in {name}: it lies nowhere", file=sys.stderr)


def _likeliest(seen: Prediction) -> str:
    return max(seen.probability, key=lambda name: seen.probability[name])


class Files:
    """The overlays and maps of images, written by threads."""

    def __init__(self, out: Path, options: PredictConfig, several: bool, sources: frozenset[str]) -> None:
        self.out, self.options, self.several = out, options, several
        self.taken: Counter[str] = Counter()
        self.sources = sources
        self.pending: list[Future[None]] = []

    def write(
        self, line: dict[str, Any], one: Ready, seen: Prediction, shown: list[str], pool: ThreadPoolExecutor
    ) -> None:
        """Begin to write the files of an image, and name them in its line: by finding where there are several."""
        stem = file_name(clean_key(Path(one.source.name).stem), ".npy").removesuffix(".npy")
        self.taken[stem] += 1
        if self.taken[stem] > 1:  # another file of that name: a.png, a_2.png, ...
            while (numbered := f"{stem}_{self.taken[stem]}") in self.taken:
                self.taken[stem] += 1
            stem = numbered
            self.taken[stem] += 1
        wanted = [("overlay", "png", _overlay)] if self.options.overlay else []
        wanted += (
            [("cam", self.options.cam, _array if self.options.cam == "npy" else _gray)] if self.options.cam else []
        )
        for kind, suffix, make in wanted:
            if kind == "cam" and not seen.cam:
                line[kind] = None
                continue
            names = {}
            for finding in shown:
                end = f".{finding}" if self.several else ""
                end += ".cam" if kind == "cam" else ""
                path = self.out / file_name(f"{stem}{end}", f".{suffix}")
                if os.path.realpath(path) in self.sources:
                    raise InputError(f"--out {self.out}: would overwrite {path}; name another folder")
                names[finding] = str(path)
                self.pending.append(pool.submit(_write, path, make, one, seen, finding))
            line[kind] = names if self.several else names[shown[0]]

    def wait(self) -> None:
        """Until all of them are there."""
        for future in self.pending:
            future.result()
        self.pending.clear()


def _write(
    path: Path, make: Callable[[Ready, Prediction, str], bytes], one: Ready, seen: Prediction, finding: str
) -> None:
    try:
        atomic.write(path, make(one, seen, finding))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def _overlay(one: Ready, seen: Prediction, finding: str) -> bytes:
    """The image at its own size with the CAM, the outlines of the lungs and of the region."""
    assert one.pixels is not None
    cam = seen.cam[finding] if seen.cam else np.zeros(one.shape, np.float32)
    region = seen.region.get(finding)
    return encode_image(overlay(one.pixels, cam, lungs=seen.lungs, region=region), "png", level=1)


def _array(one: Ready, seen: Prediction, finding: str) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, seen.cam[finding])
    return buffer.getvalue()


def _gray(one: Ready, seen: Prediction, finding: str) -> bytes:
    return encode_image((seen.cam[finding] * 255).round().astype(np.uint8), "png")


def named_images(names: Sequence[str]) -> list[Source]:
    """Images by the name of a file, of a folder (all images in it, sorted), of a folder of shards (their images), of a
    list (@FILE, a name a line), and by pattern. InputError: there are none.
    """
    images: list[Source] = []
    missing = []
    for name in names:
        path = Path(name)
        if name.startswith("@") and not path.exists():
            inner = _listed(Path(name[1:]))
            images += named_images([one for one in inner if not Path(one).name.startswith("@")])
            continue
        if (path / "index.json").is_file():
            images += _of_shards(path)
            continue
        if path.is_dir():
            inside = list(walk(path))
            found = [p for p in inside if p.suffix.lower() in (*IMAGE_SUFFIXES, ".dcm") or is_dicom(p)]
            if others := sorted(set(inside) - set(found)):
                print(f"{path}: left out, as no image: {listed(p.relative_to(path) for p in others)}", file=sys.stderr)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
        if not found:
            missing.append(f"{path} (a folder without images)" if path.is_dir() else name)
        images += [Source(str(p), lambda cxr, p=p: cxr.read(p)) for p in found]  # type: ignore[misc]
    if missing:
        raise InputError(f"no such image file: {listed(missing)}")
    return images


def _listed(path: Path) -> list[str]:
    """Names of a list, relative ones from its folder."""
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "") or "it is no text"
        raise InputError(f"@{path}: cannot be read as a list of image files, a name a line ({why})") from error
    if not names:
        raise InputError(f"@{path}: names no image")
    return [str(path.parent / name) for name in names]


def _of_shards(folder: Path) -> list[Source]:
    store = open_store(str(folder))
    splits = [Split(store, name) for name in store.index()["splits"]]
    return [
        Source(split.key(i), lambda cxr, split=split, i=i: split.image(i), split.split)  # type: ignore[misc]
        for split in splits
        for i in range(len(split))
    ]


if __name__ == "__main__":
    run(main)
