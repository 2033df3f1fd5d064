"""DICOM radiographs -> 8-bit images that look as a reader would see them, and nothing else of the patient.

Needs the extra ``dicom`` (pydicom). Order of the standard (PS3.3 C.11): modality LUT or rescale, then VOI LUT or
window, then the photometric interpretation.
"""

import hashlib
import hmac
import io
import math
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import InputError, first_line
from shards.gray import SLACK, Extent, kind_of, one_channel, refuse_large, scale_of, to_gray

UNREADABLE = "a DICOM file whose header cannot be read"
MISNAMED = "is named .dcm, but its content is that of a"
REMEDY = "DICOM needs pydicom: pip install '.[dicom]' in the checkout"


@dataclass
class Header:
    """What is read of a file's header; ``patient``, ``study`` and ``uid`` only to be hashed."""

    patient: str
    study: str
    uid: str
    view: str
    size: tuple[int, int]  # width and height


def pseudonym(identity: str, salt: bytes) -> str:
    """16 hex digits of HMAC-SHA256 (RFC 2104): the same for the same salt, and not to be guessed without it."""
    return hmac.new(salt, identity.strip().encode(), hashlib.sha256).hexdigest()[:16]


def read_header(path: Path) -> Header | str:
    """The header of a DICOM image, or why it is none."""
    pydicom = _pydicom()
    try:
        with path.open("rb") as file:
            preamble = file.read(144)
            named = path.suffix.lower() == ".dcm"
            if preamble[128:132] != b"DICM" and (kind := kind_of(preamble)):
                return f"{MISNAMED} {kind}" if named else "not a DICOM file"
            if preamble[128:132] != b"DICM" and not named:
                return "not a DICOM file"
            deflated = _syntax(pydicom, preamble + file.read(2**16)) == DEFLATED
            file.seek(0)
            whole = file.read() if deflated else b""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd values in elements that are not used
            data = (
                _head(pydicom, whole)
                if deflated
                else pydicom.dcmread(path, stop_before_pixels=True, force=preamble[128:132] != b"DICM")
            )
            if "Rows" not in data or "Columns" not in data:
                kind = data.get("SOPClassUID") or getattr(data, "file_meta", {}).get("MediaStorageSOPClassUID") or ""
                # Reports, presentation states and directories have no image; of other files the image is missing.
                rest = kind and "SOPInstanceUID" in data and "Image Storage" not in pydicom.uid.UID(kind).name
                directory = "Directory" in pydicom.uid.UID(kind or "1").name
                return (
                    "a DICOM file without an image"
                    if rest or directory
                    else f"{UNREADABLE}: it is cut, or has no Rows and Columns"
                )
            if int(data.get("NumberOfFrames", 1) or 1) > 1:
                return "a DICOM file of several frames"
            uid = str(data.get("SOPInstanceUID", "") or path.name)
            patient, study, view = (
                str(data.get(name, "") or "") for name in ("PatientID", "StudyInstanceUID", "ViewPosition")
            )
            return Header(patient, study, uid, view, (int(data.Columns), int(data.Rows)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        return f"{UNREADABLE}: {first_line(error)}"


def decode_dicom(data: bytes, where: str) -> np.ndarray:
    """One frame as uint8 [H, W], bone bright: rescaled, shown by the file's own LUT or window, inverted where it says
    so; padding is black.

    Without a LUT or window the values that occur go from black to white; where they nearly fill a bit depth, that
    depth's range does.

    Raises:
        InputError: not a DICOM image, several frames, a compression that no installed decoder reads, more than
            `MAX_PIXELS` pixels.
    """
    pydicom = _pydicom()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _gray(_stored(pydicom, data, where))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{where}: cannot be decoded as a DICOM image ({first_line(error)}); replace or remove it"
        ) from error


SPECKS = 0.001  # share of the pixels, such as a burnt-in mark, that do not count for the largest value
FILLED = 0.8  # share of a depth's range above which the values of an image are taken to have that depth


@dataclass
class _Stored:
    """Pixels as the file has them: values int [H, W], or colour [H, W, 3]; real: bool [H, W], not padding."""

    dataset: Any
    values: np.ndarray
    real: np.ndarray
    bits: int

    @property
    def colour(self) -> bool:
        return self.values.ndim == 3


def _stored(pydicom: Any, data: bytes, where: str) -> _Stored:
    """Decode, and keep of each value the bits that are the image's (PS3.5 8.1.1): the others may hold overlays or
    nothing.
    """
    header = _head(pydicom, data)
    if "Rows" not in header:
        raise InputError(f"{where}: a DICOM file without an image; remove it")
    refuse_large(int(header.Columns), int(header.Rows), where)
    if int(header.get("NumberOfFrames", 1) or 1) > 1:
        raise InputError(f"{where}: has {header.NumberOfFrames} frames, a radiograph has one; remove it")
    if _syntax(pydicom, data) == DEFLATED:
        room = (
            int(header.Rows)
            * int(header.Columns)
            * int(header.get("SamplesPerPixel", 1))
            * int(header.get("BitsAllocated", 16))
            // 8
        )
        dataset = _inflated(pydicom, data, room + HEAD, whole=True)
    else:
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    if "PixelData" not in dataset:
        raise InputError(f"{where}: a DICOM file without an image; remove it")
    if "TransferSyntaxUID" not in getattr(dataset, "file_meta", {}):
        dataset.file_meta = getattr(dataset, "file_meta", None) or pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    # Which is done below, wherever the high bit is
    pixels = pydicom.pixels.pixel_array(dataset, correct_unused_bits=False)
    if dataset.get("PhotometricInterpretation", "") == "PALETTE COLOR":
        pixels = pydicom.pixels.processing.apply_color_lut(pixels, dataset)
    bits = int(dataset.BitsStored)
    if pixels.ndim == 3:
        return _Stored(dataset, pixels, np.ones(pixels.shape[:2], bool), bits)
    if pixels.dtype.kind in "iu" and bits < 8 * pixels.dtype.itemsize:
        signed, syntax = pixels.dtype.kind == "i", dataset.file_meta.TransferSyntaxUID
        # JPEG and its kin give values from bit 0 on
        aligned = not syntax.is_encapsulated or syntax == pydicom.uid.RLELossless
        shift = max(int(dataset.get("HighBit", bits - 1)) + 1 - bits, 0) if aligned else 0
        raw = (np.ascontiguousarray(pixels).view(f"u{pixels.dtype.itemsize}") >> shift) & (2**bits - 1)
        pixels = ((raw ^ 2 ** (bits - 1)).astype(np.int32) - 2 ** (bits - 1)) if signed else raw
    return _Stored(dataset, pixels, _real(dataset, pixels), bits)


DEFLATED = "1.2.840.10008.1.2.1.99"
HEAD = 2**24  # bytes of a deflated file that are inflated to see how large its image is


def _syntax(pydicom: Any, data: bytes) -> str:
    """The transfer syntax that the file's meta information names; nothing where there is none."""
    end = _end_of_meta(data)
    if not end:
        return ""
    meta = pydicom.filereader.read_dataset(io.BytesIO(data[132:end]), False, True)
    return str(meta.get("TransferSyntaxUID", ""))


def _end_of_meta(data: bytes) -> int:
    """Where the meta information ends, as its first element, the group length, says; 0 where there is none."""
    return 144 + int.from_bytes(data[140:144], "little") if data[128:136] == b"DICM\x02\0\0\0" else 0


def _head(pydicom: Any, data: bytes) -> Any:
    """All but the pixels. A deflated file is inflated as far as its header may reach."""
    if _syntax(pydicom, data) == DEFLATED:
        return _inflated(pydicom, data, HEAD, whole=False)
    return pydicom.dcmread(io.BytesIO(data), force=True, stop_before_pixels=True)


def _inflated(pydicom: Any, data: bytes, limit: int, *, whole: bool) -> Any:
    """A deflated file (PS3.5 A.5), of whose content at most ``limit`` bytes are inflated. ValueError: there is more,
    and ``whole`` is wanted.
    """
    end = _end_of_meta(data)
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflate.decompress(data[end:], limit)
    if whole and inflate.unconsumed_tail:
        raise ValueError("its pixels are more than its header says")
    return pydicom.dcmread(io.BytesIO(_EXPLICIT + content), force=True, stop_before_pixels=not whole)


# Preamble and meta information of a file that is not compressed: group length, then the transfer syntax Explicit VR
# Little Endian.
_EXPLICIT = b"\0" * 128 + b"DICM\x02\0\0\0UL\x04\0\x1c\0\0\0" + b"\x02\0\x10\0UI\x14\x001.2.840.10008.1.2.1\0"


def _gray(stored: _Stored) -> np.ndarray:
    dataset, values = stored.dataset, stored.values
    if stored.colour:
        return _luminance(values, stored.bits)
    shown = _shown(dataset) or _unsaid(stored)
    inverted = (
        dataset.get("PhotometricInterpretation", "") == "MONOCHROME1"
        or dataset.get("PresentationLUTShape", "") == "INVERSE"
    )

    def gray(some: np.ndarray) -> np.ndarray:
        share = np.clip(shown(_rescaled(dataset, some)), 0, 1)
        return np.rint((1 - share if inverted else share) * 255).astype(np.uint8)

    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if high - low < 2**17:  # every value once, then a look into that table
        whole = gray(np.arange(low, high + 1))[np.subtract(values, low, dtype=np.int64) if low else values]
    else:
        whole = np.concatenate([gray(row) for row in np.array_split(values, max(1, len(values) // 256))])
    return np.where(stored.real, whole, 0).astype(np.uint8)


def _rescaled(dataset: Any, values: np.ndarray) -> np.ndarray:
    """Stored values to the modality's (PS3.3 C.11.1): by its LUT, or slope and intercept. float64."""
    if dataset.get("ModalityLUTSequence"):
        table = _table(
            dataset.ModalityLUTSequence[0],
            values.dtype.kind == "i" or int(dataset.get("PixelRepresentation", 0) or 0) == 1,
        )
        return table.of(values)
    return values.astype(np.float64) * float(dataset.get("RescaleSlope", 1) or 1) + float(
        dataset.get("RescaleIntercept", 0) or 0
    )


@dataclass
class _Table:
    """A LUT: entries float64 [N], the first of them for the value ``first``; values beyond take the nearest."""

    entries: np.ndarray
    first: int
    top: float  # what its output can hold

    def of(self, values: np.ndarray) -> np.ndarray:
        return self.entries[np.clip(np.rint(values).astype(np.int64) - self.first, 0, len(self.entries) - 1)]


def _table(item: Any, signed: bool) -> _Table:
    """PS3.3 C.11.1.1: entries (0 for 65,536), first value (signed where the values are), bits of an entry."""
    count, first, bits = (int(v) for v in item.LUTDescriptor)
    count = (count % 2**16) or 2**16
    first = first - 2**16 if signed and first >= 2**15 else first
    data = item.LUTData
    if isinstance(data, bytes):
        entries = np.frombuffer(data, np.uint8 if len(data) < 2 * count else "<u2").astype(np.float64)
    else:
        entries = np.asarray(data, np.float64).ravel()
        entries = np.where(entries < 0, entries + 2**16, entries)
    entries = entries[:count]
    # Some devices say 16 bits and give 12 (Agfa CR): a table that uses less than a quarter of its range has the depth
    # that holds its entries.
    used = max(8, 2 * math.ceil(math.log2(entries.max(initial=1) + 1) / 2))
    return _Table(entries, first, 2.0 ** (used if used < bits - 1 else bits) - 1)


def _shown(dataset: Any) -> Callable[[np.ndarray], np.ndarray] | None:
    """How the file's own VOI LUT, or else its first window, maps values to shares of white (PS3.3 C.11.2); None where
    it has neither.
    """
    if dataset.get("VOILUTSequence"):
        table = _table(
            dataset.VOILUTSequence[0],
            int(dataset.get("PixelRepresentation", 0) or 0) == 1 or float(dataset.get("RescaleIntercept", 0) or 0) < 0,
        )
        return lambda values: table.of(values) / table.top

    def first(name: str) -> float | None:
        value = dataset.get(name)
        if value is None or value == "":
            return None
        return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)

    center, width = first("WindowCenter"), first("WindowWidth")
    function = str(dataset.get("VOILUTFunction", "") or "LINEAR").upper()
    # Of which the standard asks for a width above 0, of LINEAR for 1 and more
    exact = function in (
        "SIGMOID",
        "LINEAR_EXACT",
    )
    if center is None or width is None or not (width > 0 if exact else width >= 1):
        return None
    if function == "SIGMOID":
        return lambda values: 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return lambda values: (values - center) / width + 0.5
    if width == 1:
        return lambda values: (values > center - 0.5).astype(np.float64)
    return lambda values: (values - (center - 0.5)) / (width - 1) + 0.5


def _unsaid(stored: _Stored) -> Callable[[np.ndarray], np.ndarray]:
    """Black and white of a file without LUT and window."""
    dataset, values = stored.dataset, stored.values[stored.real]
    if not values.size:
        return lambda some: np.zeros(some.shape)
    most, top = (int(v) for v in (np.quantile(values, 1 - SPECKS, method="higher"), values.max()))
    if top > SLACK * most > 0:
        top = most
    ends = [int(values.min()), top]
    depth = min(stored.bits, Extent(0, top).depth) if top > 0 else stored.bits
    if ends[0] >= 0 and top - ends[0] >= FILLED * (2**depth - 1):
        ends = [0, 2**depth - 1]
    low, high = sorted(_rescaled(dataset, np.array(ends)).tolist())
    return lambda some: (some - low) / max(high - low, 1e-9)


def _real(dataset: Any, pixels: np.ndarray) -> np.ndarray:
    """Pixels that are not padding (PS3.3 C.7.5.1.1.2): bool [H, W]. A padding value may be written without the sign
    that the pixels have.
    """
    if dataset.get("PixelPaddingValue") in (None, ""):
        return np.ones(pixels.shape, bool)

    def signed(value: Any) -> int:
        value = int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)
        return (
            value - 2**16
            if pixels.dtype.kind == "i" and value >= 2**15
            else value % 2**16
            if pixels.dtype.kind == "u"
            else value
        )

    limit = dataset.get("PixelPaddingRangeLimit")
    ends = sorted(
        (signed(dataset.PixelPaddingValue), signed(dataset.PixelPaddingValue if limit in (None, "") else limit))
    )
    return (pixels < ends[0]) | (pixels > ends[1])


def _luminance(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Colour [H, W, 3] to gray. Entries of a palette have a depth of their own."""
    gray = one_channel(pixels)
    if pixels.dtype == np.uint8:
        return gray
    said = bits < 8 * pixels.dtype.itemsize and pixels.max(initial=0) < 2**bits
    return to_gray(gray, (0.0, 2.0**bits - 1) if said else scale_of(Extent.of(gray), ()))


def _pydicom() -> Any:
    try:
        import pydicom
    except ModuleNotFoundError as error:
        raise InputError(REMEDY) from error
    return pydicom
