"""Decoding stored radiographs quickly."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from shards.gray import MAX_PIXELS, Scale
from shards.pixels import decode_image


def decode(data: bytearray, name: Callable[[], str], scales: Sequence[Scale] = ()) -> np.ndarray:
    """uint8 [H, W]. A gray JPEG by torchvision, which is faster and gives the same grays; the rest, and what fails, by
    Pillow.
    """
    if data[:2] == b"\xff\xd8" and 0 < _gray_jpeg_pixels(data) <= MAX_PIXELS:
        with suppress(RuntimeError):
            image: np.ndarray = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.GRAY)[0].numpy()
            return image
    return decode_image(data, name(), scales)


def _gray_jpeg_pixels(data: bytearray) -> int:
    """Width times height as the frame header says (ITU-T T.81, B.2.2); 0 where there is none, more than one component,
    or EXIF data that may turn it.
    """
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xE1 and data[at + 4 : at + 8] == b"Exif":
            return 0
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 5 : at + 7]) * int.from_bytes(data[at + 7 : at + 9]) * (data[at + 9] == 1)
        at += 2 + length
    return 0
