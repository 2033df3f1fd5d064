"""Image files -> gray pixels as a viewer shows them, and gray pixels -> the square that is stored.

Legend: gray images uint8 [H, W]; deep values: see `shards.gray`.
"""

import io
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from shards.dicom import decode_dicom
from shards.errors import InputError, first_line
from shards.gray import MAX_PIXELS, Extent, Scale, kind_of, one_channel, refuse_large, scale_of, to_gray

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".j2k", ".pgm", ".ppm")
FORMATS = ("jpg", "png", "webp")
# Pillow's EPS reader, for one, runs another program
OPENED = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "TIFF",
    "GIF",
    "PPM",
    "JPEG2000",
)
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow would warn below our limit; above it `decode_image` refuses
JPEG_QUALITY = 95
ASPECTS = ("stretch", "pad")
ORIENTATION = 0x0112  # EXIF and TIFF tag
TEXT_CHUNKS = (b"iCCP", b"zTXt", b"iTXt", b"tEXt")  # of a PNG: nothing that the pixels need
CHANNELS = 4  # colour and alpha


def decode_image(data: bytes | bytearray, where: str, scales: Sequence[Scale] = ()) -> np.ndarray:
    """Decode any image file to grayscale uint8 ``[H, W]``, upright as its EXIF says.

    Colour becomes luminance and an alpha channel is dropped, at any depth. Values of more than 8 bits are brightened by
    the one of ``scales`` that holds them; without one, by the smallest even bit depth that holds the image's largest
    value.

    Raises:
        InputError: not an image, truncated, or more than ``MAX_PIXELS`` pixels. ``where`` names it.
    """
    return np.asarray(decode_gray(data, where, scales))


def decode_gray(data: bytes | bytearray, where: str, scales: Sequence[Scale] = ()) -> Image.Image:
    """As `decode_image`, where it can be not copied out of Pillow's memory: mode L."""
    opened = _guarded(data, where, lambda: _open(data, where))
    if isinstance(opened, Image.Image):
        return opened
    return Image.fromarray(_guarded(data, where, lambda: opened.gray(scales)))


def extent(path: Path | str) -> Extent | None:
    """The extent of a file's values, for `choose_scales`; None for 8 bits, for DICOM, and for what cannot be read,
    which packing tells.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(132)
            return extent_of(head + file.read(), str(path)) if _may_be_deep(head) else None
    except OSError:
        return None


def extent_of(data: bytes, where: str) -> Extent | None:
    """As `extent`, of a file's bytes."""
    if not _may_be_deep(data) or _is_dicom(data, where):
        return None  # a DICOM file's header says how it is shown
    try:
        opened = _guarded(data, where, lambda: _open(data, where))
        return None if isinstance(opened, Image.Image) else _guarded(data, where, lambda: Extent.of(opened.values))
    except InputError:
        return None


def _may_be_deep(head: bytes) -> bool:
    """Whether a file that begins so may have more than 8 bits a pixel."""
    if head.startswith(b"\x89PNG"):
        return len(head) > 24 and head[24] > 8
    return not head.startswith((b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF"))


def image_size(path: Path | str) -> tuple[int, int]:
    """Width and height of an image file as it is shown, from its header where that says it.
    InputError as `open_gray`.
    """
    data = _read(path)
    if _is_dicom(data, str(path)) or data[:4] in (b"II*\0", b"MM\0*"):
        return open_gray(path).size

    def size() -> tuple[int, int]:
        image = Image.open(io.BytesIO(_plain_png(data)), formats=OPENED)
        return image.size if _orientation(image, data) < 5 else (image.height, image.width)

    return _guarded(data, str(path), size)


def _guarded(data: bytes | bytearray, where: str, decode: Callable[[], Any]) -> Any:
    """Call ``decode``; whatever the libraries raise for a broken file becomes one line."""
    try:
        return decode()
    except InputError:
        raise
    except Exception as error:  # Pillow, tifffile and imagecodecs raise many kinds for damaged files
        why = "no known image format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise InputError(
            f"{where}: cannot be decoded as an image ({len(data)} bytes; {why}); replace or remove it"
        ) from error


@dataclass
class _Deep:
    """Values [H, W] of more than 8 bits."""

    values: np.ndarray
    inverted: bool = False  # white for zero
    orientation: int = 1

    def gray(self, scales: Sequence[Scale]) -> np.ndarray:
        gray = to_gray(self.values, scale_of(Extent.of(self.values), scales))
        return upright(255 - gray if self.inverted else gray, self.orientation)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W] turned and mirrored as an EXIF orientation from 1 to 8 says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.T
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _orientation(image: Image.Image, data: bytes) -> int:
    if data[:4] == b"\x89PNG" and b"eXIf" not in data:
        return 1  # Pillow would decode the pixels to look behind them
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a broken EXIF block is no broken image
        return 1


def _open(data: bytes | bytearray, where: str) -> "Image.Image | _Deep":
    data = bytes(data)
    if data[:4] == b"\x89PNG":
        data = _plain_png(data)
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        deep = _deep_tiff(data, where)
        if deep is not None:
            return deep
    image = Image.open(io.BytesIO(data), formats=OPENED)
    refuse_large(image.width, image.height, where)
    if data[:4] == b"\x89PNG" and data[24] == 16 and data[25] in (2, 4, 6):  # Pillow would keep the upper 8 bits
        return _Deep(one_channel(imagecodecs.png_decode(data)), orientation=_orientation(image, data))
    if image.format == "JPEG2000":
        values = imagecodecs.jpeg2k_decode(data)
        if values.dtype != np.uint8:
            return _Deep(one_channel(values), orientation=_orientation(image, data))
    if image.mode.startswith(("I", "F")):
        return _Deep(np.asarray(image), orientation=_orientation(image, data))
    gray = image if image.mode == "L" else image.convert("L")
    gray.load()
    turn = _orientation(image, data)
    return gray if turn == 1 else Image.fromarray(upright(np.asarray(gray), turn))


def _plain_png(data: bytes) -> bytes:
    """A PNG without its text and colour profile, which Pillow refuses where they are large."""
    if data[:4] != b"\x89PNG":
        return data
    kept, at, dropped = [data[:8]], 8, False
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in TEXT_CHUNKS:
            dropped = True
        else:
            kept.append(data[at : at + 12 + length])
        at += 12 + length
        if kind == b"IEND":
            break
    return b"".join(kept) if dropped else data


def _deep_tiff(data: bytes, where: str) -> _Deep | None:
    """A TIFF with more than 8 bits, or None: Pillow reads the others."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page: Any = file.pages[0]
            refuse_large(page.imagewidth, page.imagelength, where)
            if page.dtype is None or page.dtype.itemsize == 1:
                return None
            if page.samplesperpixel > CHANNELS or page.imagedepth > 1:
                raise InputError(
                    f"{where}: has {page.samplesperpixel} values a pixel, an image has {CHANNELS} at most; replace or "
                    "remove it"
                )
            values = page.asarray()
            if page.axes == "SYX":
                values = np.moveaxis(values, 0, 2)
            turn = page.tags.valueof(ORIENTATION, 1)
            return _Deep(one_channel(values), int(page.photometric) == 0, int(turn) if turn in range(1, 9) else 1)
    except tifffile.TiffFileError:
        return None  # Pillow says what is wrong


def load_image(path: Path | str, scales: Sequence[Scale] = ()) -> np.ndarray:
    """Read an image file, DICOM included, as grayscale uint8 ``[H, W]``; InputError names the file."""
    return np.asarray(open_gray(path, scales))


def open_gray(path: Path | str, scales: Sequence[Scale] = ()) -> Image.Image:
    """As `load_image`, as a Pillow image of mode L."""
    data = _read(path)
    if _is_dicom(data, str(path)):
        return Image.fromarray(decode_dicom(data, str(path)))
    return decode_gray(data, str(path), scales)


def open_mask(path: Path | str) -> np.ndarray:
    """As `load_image`, but of an image that is one colour with a shape in its alpha channel, that shape."""
    data = _read(path)
    gray = np.asarray(decode_gray(data, str(path)))
    if gray.size and gray.min() == gray.max() and data[:4] == b"\x89PNG" and data[25] in (4, 6):
        alpha = np.asarray(Image.open(io.BytesIO(_plain_png(data)), formats=OPENED).convert("RGBA").getchannel("A"))
        return alpha if alpha.min() != alpha.max() else gray
    return gray


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its content, as exports without suffixes are."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _is_dicom(data: bytes, name: str) -> bool:
    return data[128:132] == b"DICM" or (name.lower().endswith(".dcm") and not kind_of(data))


def _read(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


# -- the stored square ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """Where an image of any size lies in a square: ``width`` x ``height`` pixels at (``left``, ``top``)."""

    width: int
    height: int
    left: int = 0
    top: int = 0

    @staticmethod
    def of(shape: tuple[int, ...], size: int, aspect: str = "stretch") -> "Frame":
        """``stretch`` to the square, as published, or ``pad``: the aspect is kept, the rest is black, the image in the
        middle.
        """
        if aspect == "stretch":
            return Frame(size, size)
        height, width = (max(1, round(side * size / max(shape))) for side in shape)
        return Frame(width, height, (size - width) // 2, (size - height) // 2)

    def box(self, share: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """A box in shares of the image's sides -> pixels of the square."""
        x0, y0, x1, y1 = share
        return (
            self.left + x0 * self.width,
            self.top + y0 * self.height,
            self.left + x1 * self.width,
            self.top + y1 * self.height,
        )

    def share(self, box: Iterable[float]) -> tuple[float, float, float, float]:
        """A box in pixels of the square -> shares of the image's sides, cut at the image."""
        x0, y0, x1, y1 = box
        across, down = (
            ((v - self.left) / self.width for v in (x0, x1)),
            ((v - self.top) / self.height for v in (y0, y1)),
        )
        (x0, x1), (y0, y1) = (tuple(min(max(v, 0.0), 1.0) for v in pair) for pair in (across, down))
        return x0, y0, x1, y1


def fit(image: np.ndarray | Image.Image, size: int, aspect: str = "stretch", *, mask: bool = False) -> np.ndarray:
    """Resize to ``size`` x ``size`` by area (a mask: by area, then half or more is lung); see Frame for ``aspect``."""
    source = image if isinstance(image, Image.Image) else Image.fromarray(image)
    frame = Frame.of((source.height, source.width), size, aspect)
    if source.size == (frame.width, frame.height):
        fitted = np.asarray(source)
    else:
        shrinks = source.width >= frame.width and source.height >= frame.height
        fitted = np.asarray(
            source.resize((frame.width, frame.height), Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR)
        )
        fitted = np.where(fitted >= 128, 255, 0).astype(np.uint8) if mask else fitted
    if fitted.shape == (size, size):
        return fitted
    square = np.zeros((size, size), np.uint8)
    square[frame.top : frame.top + frame.height, frame.left : frame.left + frame.width] = fitted
    return square


def encode_image(image: np.ndarray, form: str, *, level: int = 3) -> bytes:
    """uint8 ``[H, W]``, of a PNG also ``[H, W, 3 or 4]``, to the bytes of a JPEG (quality 95),
    a PNG (``level`` of compression, 0 to 9) or a lossless WebP (lossy WebP has only 220 grays).
    """
    buffer = io.BytesIO()
    if form == "jpg":
        Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    elif form == "webp":
        Image.fromarray(image).save(buffer, "WEBP", lossless=True, method=2)
    else:
        Image.fromarray(image).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()
