"""Decoding stored radiographs quickly."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache

import numpy as np
import torch

from shards.gray import MAX_PIXELS, Scale
from shards.pixels import decode_image

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 announces that it will go; Pillow gives the same grays, more slowly
    decode_jpeg = None


def decode(data: bytearray, name: Callable[[], str], scales: Sequence[Scale] = ()) -> np.ndarray:
    """uint8 [H, W]. A gray JPEG by torchvision, which is faster and gives the same grays; the rest, and what fails, by
    Pillow.
    """
    if is_gray_jpeg(data):
        with suppress(RuntimeError):
            image: np.ndarray = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.GRAY)[0].numpy()
            return image
    return decode_image(data, name(), scales)


def decode_on(device: torch.device, encoded: Sequence[torch.Tensor]) -> torch.Tensor:
    """Gray JPEGs of one size, each uint8 [bytes] on the CPU -> uint8 [B,1,H,W] on the device. A GPU decodes by nvJPEG,
    while this thread waits, a CPU as `decode` does.

    Raises:
        RuntimeError: one of them cannot be decoded there, or they differ in size.
    """
    if device.type != "cuda":
        return torch.stack(decode_jpeg(list(encoded), ImageReadMode.GRAY))
    stream = _stream(device)
    with torch.cuda.stream(stream):
        # nvJPEG's engine writes before what is queued on a stream has read (github.com/pytorch/vision/pull/9606):
        # memory that it is given belongs to this stream, on which nothing is left to be done
        stream.synchronize()
        images = torch.stack(decode_jpeg(list(encoded), ImageReadMode.GRAY, device))
        stream.synchronize()  # so that any other stream may read them
    return images


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def is_gray_jpeg(data: bytes | bytearray) -> bool:
    """Whether it is a JPEG of one component that `decode_on` takes."""
    return data[:2] == b"\xff\xd8" and 0 < math.prod(gray_jpeg_shape(data)) <= MAX_PIXELS and decode_jpeg is not None


def gray_jpeg_shape(data: bytes | bytearray) -> tuple[int, int]:
    """Height and width as the frame header says (ITU-T T.81, B.2.2); 0, 0 where there is none, more than one component,
    or EXIF data that may turn it.
    """
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xE1 and data[at + 4 : at + 8] == b"Exif":
            return 0, 0
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            gray = data[at + 9] == 1
            return int.from_bytes(data[at + 5 : at + 7]) * gray, int.from_bytes(data[at + 7 : at + 9]) * gray
        at += 2 + length
    return 0, 0
