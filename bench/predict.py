"""python bench/predict.py [--files N] [--backbones pvt,resnet,vgg]: what trainer.predict costs beside bare inference.

Rate: image files through `trainer.predict --no-overlay` and with overlays (decoding, packing, lungs, the CAM of each
finding, JSON lines), from the end of the first batch to that of the last, beside the forward of the classifier alone on
as many images in memory, by turns, medians with quartiles; batches of 16, 224 px, files of 512 px. Memory: N files,
JPEG and DICOM, in a process of its own, whose resident memory is read along the way. Writes bench/predict.md.
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from step import processor

import trainer
from shards.pack import pack
from shards.phantom import Phantoms
from trainer import predict

HERE = Path(__file__).parent
BATCH, IMAGES, TURNS = 16, 112, 5
FINDINGS = ("No Finding", "Effusion")


def run_of(backbone: str, root: Path) -> Path:
    """A finished run, however bad."""
    out = root / backbone
    if not (root / "shards").exists():
        pack(Phantoms(20, 0, size=512, findings=FINDINGS), root / "shards", dataset="phantom")
    flags = ["--shards", str(root / "shards"), "--out", str(out), "--task", "ne", "--backbone", backbone]
    flags += ["--pretrained", "false", "--epochs", "1", "--batch", "4", "--workers", "0", "--tracker", "none"]
    log = subprocess.run([sys.executable, "-m", "trainer.train", *flags], capture_output=True, text=True, check=False)
    if log.returncode:
        sys.exit(log.stderr)
    return out


def files_of(root: Path, count: int, dicom: bool) -> Path:
    """A folder of radiographs: JPEG, and every fifth one DICOM."""
    folder = root / f"files_{count}"
    folder.mkdir()
    source = Phantoms(40, 1, size=512, findings=FINDINGS)
    made: list[Path] = []
    for k, item in enumerate(source.items):
        image = source.load(item).image
        path = folder / f"{k:06}.jpg"
        Image.fromarray(image).save(path, quality=95)
        if dicom and k % 5 == 4:
            path.unlink()
            path = folder / f"{k:06}.dcm"
            write_dicom(path, image)
        made.append(path)
    for k in range(len(made), count):
        os.link(made[k % len(made)], folder / f"{k:06}{made[k % len(made)].suffix}")
    for path in made[count:]:
        path.unlink()
    return folder


def write_dicom(path: Path, image: np.ndarray) -> None:
    """Twelve bits, not compressed."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.Modality, data.PatientID, data.PhotometricInterpretation = "DX", "1", "MONOCHROME2"
    data.Rows, data.Columns, data.SamplesPerPixel = *image.shape, 1
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelData = (image.astype(np.uint16) * 16).tobytes()
    data.save_as(path, enforce_file_format=True)


class Stamps(io.StringIO):
    """When each line was written."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, text: str) -> int:
        """As of a file."""
        self.times += [time.perf_counter()] * text.count("\n")
        return len(text)


def rates(run: Path, folder: Path) -> dict[str, list[float]]:
    """Images a second of each way, by turns."""
    cxr = trainer.load(run)
    names = sorted(map(str, folder.iterdir()))
    images = torch.rand(len(names), 1, 224, 224)

    def bare() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            for part in images.split(BATCH):
                cxr.model(part)
        return len(names) / (time.perf_counter() - began)

    def files(*flags: str) -> float:
        lines = Stamps()
        with contextlib.redirect_stdout(lines), contextlib.redirect_stderr(io.StringIO()):
            predict.main(["--run", str(run), "--batch", str(BATCH), *flags, *names])
        assert len(lines.times) == len(names)
        return (len(names) - BATCH) / (lines.times[-1] - lines.times[BATCH - 1])

    ways = {
        "bare": bare,
        "predict --no-overlay": lambda: files("--no-overlay"),
        "predict": files,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, way in ways.items():
            rate = way()
            if turn:  # the first one warms up
                found[name].append(rate)
    return found


def memory(run: Path, folder: Path) -> tuple[float, list[tuple[int, float]]]:
    """Images a second, and resident memory in MB after so many of them."""
    command = [sys.executable, "-m", "trainer.predict", "--run", str(run), "--no-overlay", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    seen: list[tuple[int, float]] = []
    began = count = 0
    start = time.perf_counter()
    for count, _ in enumerate(process.stdout, 1):
        if count == BATCH:
            start, began = time.perf_counter(), count
        if count % 500 == 0:
            status = Path(f"/proc/{process.pid}/status").read_text()
            seen.append((count, int(status.split("VmRSS:")[1].split()[0]) / 1024))
    process.wait()
    return (count - began) / (time.perf_counter() - start), seen


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--backbones", default="pvt,resnet,vgg")
    a = parser.parse_args()
    text = f"# Predicting\n\n{(__doc__ or '').partition(chr(10) * 2)[2].strip()}\n\n{processor()}, "
    text += f"{torch.get_num_threads()} threads, {date.today()}.\n\n"
    text += "| backbone | bare, images/s | predict --no-overlay / bare | predict / bare |\n|---|---|---|---|\n"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = files_of(root, IMAGES, dicom=False)
        for backbone in a.backbones.split(","):
            found = rates(run_of(backbone, root), folder)
            cells = []
            for way in ("predict --no-overlay", "predict"):
                share = np.array(found[way]) / np.array(found["bare"])
                low, middle, high = np.percentile(share, [25, 50, 75])
                cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
            text += f"| {backbone} | {np.median(found['bare']):.1f} | {' | '.join(cells)} |\n"
            print(text.splitlines()[-1], flush=True)
        rate, seen = memory(run_of("resnet18", root), files_of(root, a.files, dicom=True))
        text += f"\n{a.files} files with resnet18, every fifth one DICOM: {rate:.1f} images/s. Resident memory in MB: "
        text += ", ".join(f"{mb:.0f} after {count}" for count, mb in seen) + ".\n"
    (HERE / "predict.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
