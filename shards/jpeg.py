"""Decoding stored radiographs quickly."""

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
    if decode_jpeg is not None and any(gray_jpeg_shape(data)):
        with suppress(RuntimeError):
            image: np.ndarray = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.GRAY)[0].numpy()
            return image
    return decode_image(data, name(), scales)


def decode_on(device: torch.device, encoded: Sequence[torch.Tensor]) -> torch.Tensor:
    """Gray JPEGs of one size, each uint8 [bytes] on the CPU -> uint8 [B,1,H,W] on the device. A GPU decodes by nvJPEG,
    while this thread waits, a CPU as `decode` does.

    Raises:
        RuntimeError: one of them cannot be decoded there, or torchvision has no decoder any more.
    """
    if decode_jpeg is None:
        raise RuntimeError("this torchvision has no JPEG decoder")
    if device.type != "cuda":
        return torch.stack(decode_jpeg(list(encoded), ImageReadMode.GRAY))
    reading, own = torch.cuda.current_stream(device), _stream(device)
    with torch.cuda.stream(own):
        # nvJPEG's engine writes before what is queued on a stream has read (github.com/pytorch/vision/pull/9606):
        # memory that it is given belongs to this stream, on which nothing is left to be done
        own.synchronize()
        images = torch.stack(decode_jpeg(list(encoded), ImageReadMode.GRAY, device))
        own.synchronize()  # so that any other stream may read them
    images.record_stream(reading)
    return images


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def gray_jpeg_shape(data: bytes | bytearray) -> tuple[int, int]:
    """Height and width of a JPEG of one component of 8 bits, coded by Huffman's DCT, as the frame header says (ITU-T
    T.81, B.2.2); 0, 0 of anything else, of one that is too large, and where there is EXIF data that may turn it.
    """
    if data[:2] != b"\xff\xd8":
        return 0, 0
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xE1 and data[at + 4 : at + 8] == b"Exif":
            return 0, 0
        if marker in (0xC0, 0xC1, 0xC2) and data[at + 4] == 8 and data[at + 9] == 1:
            height, width = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
            return (height, width) if 0 < height * width <= MAX_PIXELS else (0, 0)
        at += 2 + length
    return 0, 0
