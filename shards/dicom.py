"""DICOM radiographs -> 8-bit images that look as a reader would see them, and nothing else of the patient.

Needs the extra ``dicom`` (pydicom). Order of the standard (PS3.3 C.11): modality LUT or rescale, then VOI LUT or window,
then the photometric interpretation.
"""

import hashlib
import hmac
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import InputError

UNREADABLE = "a DICOM file whose header cannot be read"
REMEDY = "DICOM needs pydicom: pip install 'cxr-focus[dicom]'"


@dataclass
class Header:
    """What is read of a file's header; ``patient``, ``study`` and ``uid`` only to be hashed."""

    patient: str
    study: str
    uid: str
    view: str


def pseudonym(identity: str, salt: bytes) -> str:
    """16 hex digits of HMAC-SHA256 (RFC 2104): the same for the same salt, and not to be guessed without it."""
    return hmac.new(salt, identity.strip().encode(), hashlib.sha256).hexdigest()[:16]


def read_header(path: Path) -> Header | str:
    """The header of a DICOM image, or why it is none."""
    pydicom = _pydicom()
    try:
        with path.open("rb") as file:
            preamble = file.read(132)
        if preamble[128:] != b"DICM" and path.suffix.lower() != ".dcm":
            return "not a DICOM file"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd values in elements that are not used
            data = pydicom.dcmread(path, stop_before_pixels=True, force=preamble[128:] != b"DICM")
            if "Rows" not in data or "Columns" not in data:
                kind = data.get("SOPClassUID") or getattr(data, "file_meta", {}).get("MediaStorageSOPClassUID") or ""
                # Reports, presentation states and directories have no image; of other files the image is missing.
                rest = kind and "SOPInstanceUID" in data and "Image Storage" not in pydicom.uid.UID(kind).name
                directory = "Directory" in pydicom.uid.UID(kind or "1").name
                return "a DICOM file without an image" if rest or directory else f"{UNREADABLE}: it is cut, or has no Rows and Columns"
            if int(data.get("NumberOfFrames", 1) or 1) > 1:
                return "a DICOM file of several frames"
            uid = str(data.get("SOPInstanceUID", "") or path.name)
            return Header(str(data.get("PatientID", "") or ""), str(data.get("StudyInstanceUID", "") or ""), uid, str(data.get("ViewPosition", "") or ""))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        return f"{UNREADABLE}: {_first_line(error)}"


def decode_dicom(data: bytes, where: str) -> np.ndarray:
    """One frame as uint8 [H, W], bone bright: rescaled, windowed by the file's own LUT or window, MONOCHROME1 inverted.

    Without a window the range of the values becomes the range of the grays; padding is black. Raises InputError: not a DICOM image, several
    frames, a compression that no installed decoder reads, more than `MAX_PIXELS` pixels.
    """
    from shards.sample import MAX_PIXELS

    pydicom = _pydicom()
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)
            if "Rows" not in dataset or "PixelData" not in dataset:
                raise InputError(f"{where}: a DICOM file without an image; remove it")
            if dataset.Rows * dataset.Columns > MAX_PIXELS:
                raise InputError(f"{where}: {dataset.Columns} x {dataset.Rows} pixels is beyond the limit of {MAX_PIXELS} pixels")
            if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
                raise InputError(f"{where}: has {dataset.NumberOfFrames} frames, a radiograph has one; remove it")
            if "TransferSyntaxUID" not in getattr(dataset, "file_meta", {}):
                dataset.file_meta = getattr(dataset, "file_meta", None) or pydicom.dataset.FileMetaDataset()
                dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
            pixels = dataset.pixel_array
            if dataset.get("PhotometricInterpretation", "") == "PALETTE COLOR":
                pixels = apply_color_lut(pixels, dataset)
            if pixels.ndim == 3:
                return _luminance(pixels, int(dataset.BitsStored))
            real = _real(dataset, pixels)
            if not _windowed(dataset):
                for name in ("WindowCenter", "WindowWidth", "VOILUTSequence"):
                    if name in dataset:
                        del dataset[name]
            values = apply_voi_lut(apply_modality_lut(pixels, dataset), dataset).astype(np.float64)
            low, high = _range(dataset, values[real])
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{where}: cannot be decoded as a DICOM image ({_first_line(error)}); replace or remove it") from error
    gray = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    if dataset.get("PhotometricInterpretation", "") == "MONOCHROME1":
        gray = 1 - gray
    return np.rint(np.where(real, gray, 0) * 255).astype(np.uint8)


def _range(dataset: Any, values: np.ndarray) -> tuple[float, float]:
    """What is black and white. A VOI LUT and a window say it; otherwise the values that occur."""
    if not values.size:
        return 0.0, 1.0
    if "VOILUTSequence" in dataset:
        table = dataset.VOILUTSequence[0]
        return 0.0, float(2 ** int(table.LUTDescriptor[2]) - 1)
    if "WindowWidth" in dataset:
        # pydicom maps the window to the whole range that the stored bits have after rescaling.
        slope, intercept = float(dataset.get("RescaleSlope", 1) or 1), float(dataset.get("RescaleIntercept", 0) or 0)
        bits, signed = int(dataset.BitsStored), int(dataset.PixelRepresentation)
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        ends = sorted((low * slope + intercept, high * slope + intercept))
        if "ModalityLUTSequence" not in dataset:
            return ends[0], ends[1]
    return float(values.min()), float(values.max())


def _windowed(dataset: Any) -> bool:
    """Whether the file says how it is to be shown: a VOI LUT, or a window with a centre and a width of at least 1."""
    if dataset.get("VOILUTSequence"):
        return True

    def first(name: str) -> float | None:
        value = dataset.get(name)
        if value is None or value == "":
            return None
        return float(value[0] if hasattr(value, "__len__") else value)

    center, width = first("WindowCenter"), first("WindowWidth")
    return center is not None and width is not None and width >= 1


def _real(dataset: Any, pixels: np.ndarray) -> np.ndarray:
    """Pixels that are not padding (PS3.3 C.7.5.1.1.2): bool [H, W]."""
    if dataset.get("PixelPaddingValue") is None:
        return np.ones(pixels.shape, bool)
    ends = sorted((int(dataset.PixelPaddingValue), int(dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue))))
    return (pixels < ends[0]) | (pixels > ends[1])


def _luminance(pixels: np.ndarray, bits: int) -> np.ndarray:
    from PIL import Image

    bits = max(bits, 16 if pixels.max(initial=0) >= 2**bits else bits)  # entries of a palette have their own depth
    return np.asarray(Image.fromarray((pixels >> max(bits - 8, 0)).astype(np.uint8)).convert("L"))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _pydicom() -> Any:
    try:
        import pydicom
    except ModuleNotFoundError as error:
        raise InputError(REMEDY) from error
    return pydicom
