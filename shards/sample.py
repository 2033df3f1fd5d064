"""THE contract: what a sample is, on disk and in memory.

A sample is one WebDataset record, members that share a key:

    <key>.jpg | .png | .webp   the radiograph, 8 bit, one channel
    <key>.json         {"findings": ["Effusion"], "boxes": [{"finding": "Effusion", "xyxy": [x0, y0, x1, y1]}], ...}
    <key>.mask.png     the lungs, 0 or 255, same size as the radiograph (only where they are known)

Lesion boxes are pixels of the stored radiograph, ends exclusive. Other entries of the JSON are kept and ignored.
"""

import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from shards.errors import InputError

NO_FINDING = "No Finding"
EFFUSION = "Effusion"
PNEUMOTHORAX = "Pneumothorax"
SUBCUTANEOUS_EMPHYSEMA = "Subcutaneous Emphysema"
CARDIOMEGALY = "Cardiomegaly"
FINDINGS = (NO_FINDING, EFFUSION, PNEUMOTHORAX, SUBCUTANEOUS_EMPHYSEMA)

# The published tasks; class 0 first.
TASKS: dict[str, tuple[str, ...]] = {
    "ne": (NO_FINDING, EFFUSION),
    "np": (NO_FINDING, PNEUMOTHORAX),
    "ns": (NO_FINDING, SUBCUTANEOUS_EMPHYSEMA),
    "nc": (NO_FINDING, CARDIOMEGALY),
    "nep": (NO_FINDING, EFFUSION, PNEUMOTHORAX),
    "neps": (NO_FINDING, EFFUSION, PNEUMOTHORAX, SUBCUTANEOUS_EMPHYSEMA),
}

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("jpg", "png", "webp")
OPENED = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")  # Pillow's EPS reader, for one, runs another program
MAX_PIXELS = 2**27  # 134 million: beyond any detector, far below what exhausts a machine
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow would warn below our limit; above it `decode_image` refuses
JPEG_QUALITY = 95
ASPECTS = ("stretch", "pad")
PHOTOMETRIC = 262  # TIFF tag: 0 is white for zero


@dataclass
class LesionBox:
    """A lesion: its finding and its box in pixels of the stored image, ``x0 y0 x1 y1``, ends exclusive."""

    finding: str
    xyxy: tuple[float, float, float, float]


@dataclass
class Sample:
    """One radiograph. ``image`` and ``mask`` are uint8 ``[H, W]``; ``mask`` is 0 or 255, or None where unknown."""

    key: str
    image: np.ndarray
    findings: tuple[str, ...] = ()
    mask: np.ndarray | None = None
    boxes: list[LesionBox] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def check_key(key: str, where: str) -> str:
    """Return ``key``; refuse one that could leave a folder or that WebDataset would cut differently."""
    if not key or key.startswith("/") or ".." in key.split("/") or "\\" in key or "\0" in key:
        raise InputError(f"{where}: the sample key {key!r} is not a plain relative name; rename the file")
    return key


def clean_key(name: str) -> str:
    """A file name as a key: WebDataset ends a key at the first dot, so only letters, digits, ``_`` and ``-`` stay."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "image"


def decode_image(data: bytes | bytearray, where: str) -> np.ndarray:
    """Decode any image file to grayscale uint8 ``[H, W]``.

    Colour becomes luminance, an alpha channel is dropped, and more than 8 bits are scaled down from the smallest even
    bit depth that holds the image's maximum (12-bit data in a 16-bit file does not come out black); floats up to 1 are shares of white.

    Raises:
        InputError: not an image, truncated, or more than ``MAX_PIXELS`` pixels. ``where`` names it.
    """
    return np.asarray(_decode(data, where))


def _decode(data: bytes | bytearray, where: str) -> Image.Image:
    """As `decode_image`, decoded but not copied out of Pillow's memory: mode L."""
    try:
        image = Image.open(io.BytesIO(data), formats=OPENED)
        if image.width * image.height > MAX_PIXELS:
            raise InputError(f"{where}: {image.width} x {image.height} pixels is beyond the limit of {MAX_PIXELS} pixels")
        if image.mode.startswith(("I", "F")):
            gray = _to_8_bit(np.asarray(image))
            negative = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0  # Pillow inverts 8 bits only
            return Image.fromarray(255 - gray if negative else gray)
        if image.mode != "L":
            return image.convert("L")
        image.load()
        return image
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, OverflowError, NotImplementedError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        why = "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InputError(f"{where}: cannot be decoded as an image ({len(data)} bytes; {why}); replace or remove it") from error


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    fractions = values.dtype.kind == "f" and values.max(initial=0) <= 1
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("pixels that are not numbers")
    if fractions:
        return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
    top = values.max(initial=0.0)
    depth = max(8, 2 * int(np.ceil(np.log2(top + 1) / 2)))
    return np.clip(np.rint(values * (255.0 / (2.0**depth - 1))), 0, 255).astype(np.uint8)


def load_image(path: Path | str) -> np.ndarray:
    """Read an image file, DICOM included, as grayscale uint8 ``[H, W]``; InputError names the file."""
    return np.asarray(open_gray(path))


def open_gray(path: Path | str) -> Image.Image:
    """As `load_image`, as a Pillow image of mode L."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if data[128:132] == b"DICM" or str(path).lower().endswith(".dcm"):
        from shards.dicom import decode_dicom

        return Image.fromarray(decode_dicom(data, str(path)))
    return _decode(data, str(path))


@dataclass(frozen=True)
class Frame:
    """Where an image of any size lies in a square: ``width`` x ``height`` pixels at (``left``, ``top``)."""

    width: int
    height: int
    left: int = 0
    top: int = 0

    @staticmethod
    def of(shape: tuple[int, ...], size: int, aspect: str = "stretch") -> "Frame":
        """``stretch`` to the square, as published, or ``pad``: the aspect is kept, the rest is black, the image in the middle."""
        if aspect == "stretch":
            return Frame(size, size)
        height, width = (max(1, round(side * size / max(shape))) for side in shape)
        return Frame(width, height, (size - width) // 2, (size - height) // 2)

    def box(self, share: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """A box in shares of the image's sides -> pixels of the square."""
        x0, y0, x1, y1 = share
        return self.left + x0 * self.width, self.top + y0 * self.height, self.left + x1 * self.width, self.top + y1 * self.height


def fit(image: np.ndarray | Image.Image, size: int, aspect: str = "stretch", *, mask: bool = False) -> np.ndarray:
    """Resize to ``size`` x ``size`` by area (a mask: by area, then half or more is lung); see Frame for ``aspect``."""
    source = image if isinstance(image, Image.Image) else Image.fromarray(image)
    frame = Frame.of((source.height, source.width), size, aspect)
    if source.size == (frame.width, frame.height):
        fitted = np.asarray(source)
    else:
        shrinks = source.width >= frame.width and source.height >= frame.height
        fitted = np.asarray(source.resize((frame.width, frame.height), Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR))
        fitted = np.where(fitted >= 128, 255, 0).astype(np.uint8) if mask else fitted
    if fitted.shape == (size, size):
        return fitted
    square = np.zeros((size, size), np.uint8)
    square[frame.top : frame.top + frame.height, frame.left : frame.left + frame.width] = fitted
    return square


def encode(sample: Sample, form: str = "jpg") -> dict[str, Any]:
    """The members of a sample as ``webdataset.TarWriter`` takes them; ``form`` is one of `FORMATS`."""
    record: dict[str, Any] = {"__key__": check_key(sample.key, "packing"), form: encode_image(sample.image, form)}
    meta = sample.extra | {
        "findings": list(sample.findings),
        "boxes": [{"finding": box.finding, "xyxy": [float(v) for v in box.xyxy]} for box in sample.boxes],
    }
    record["json"] = json.dumps(meta, sort_keys=True).encode()
    if sample.mask is not None:
        record["mask.png"] = encode_image(sample.mask, "png")
    return record


def encode_image(image: np.ndarray, form: str) -> bytes:
    """uint8 ``[H, W]`` to the bytes of a JPEG (quality 95), a PNG or a lossless WebP (lossy WebP has only 220 grays)."""
    buffer = io.BytesIO()
    if form == "jpg":
        Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    elif form == "webp":
        Image.fromarray(image).save(buffer, "WEBP", lossless=True, method=2)
    else:
        Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def parse_meta(data: bytes, where: str) -> dict[str, Any]:
    """The JSON member, checked: ``findings`` is a list of names, ``boxes`` a list of LesionBox."""
    try:
        meta = json.loads(data)
        findings = meta.get("findings", [])
        boxes = []
        for box in meta.get("boxes", []):
            x0, y0, x1, y1 = (float(v) for v in box["xyxy"])
            boxes.append(LesionBox(str(box["finding"]), (x0, y0, x1, y1)))
        if not isinstance(findings, list) or not all(isinstance(f, str) for f in findings):
            raise ValueError("findings must be a list of names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: its JSON is not a sample's ({error}); see shards/sample.py for the contract") from error
    return meta | {"findings": findings, "boxes": boxes}
