"""What a loader's process does: the samples of a share -> a batch.

Legend: B images of a process and batch; positions are those of a `Split`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from shards.errors import InputError, first_line
from shards.joined import Samples
from shards.jpeg import decode_on, gray_jpeg_shape
from shards.plan import Share

SHM_REMEDY = "use fewer --workers (0: none) or a smaller --batch, or give the container more (docker run --shm-size 1g)"
END = b"\xff\xd9"  # of a JPEG
LARGE = ("image", "mask", "jpegs")  # of a batch


@dataclass
class Batch:
    """What one process gets. A process whose share is empty gets others' images with weight 0.

    image: uint8 [B,1,H,W]; target: int8 [B,K] (`shards.targets`); index: int64 [B], position in the split; weight:
    float32 [B], 1 or 0;
    times: int64 [B], how often each came before in the epoch;
    mask: bool [B,H,W] or None (only a Split opened with ``masks=True``); total: images of the global batch, of all
    processes.
    jpegs: uint8, the radiographs as stored, one after the other, which `decoded` turns into ``image`` (empty until
    then), or None; lengths: int64 [B], the bytes of each.
    """

    image: torch.Tensor
    target: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor
    times: torch.Tensor
    mask: torch.Tensor | None = None
    total: int = 0
    jpegs: torch.Tensor | None = None
    lengths: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """From a loader's process to its parent: what is small by value. A tensor goes by a file of its own, which the
        parent has to ask for, one by one, while the step waits.
        """
        return {n: v.numpy() if isinstance(v, torch.Tensor) and n not in LARGE else v for n, v in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in state.items()})

    def pin_memory(self) -> "Batch":
        """For the loader: in page-locked memory, from which copies to a GPU do not wait."""
        pinned = replace(self)
        for name, tensor in self.tensors().items():
            setattr(pinned, name, tensor.pin_memory())
        return pinned

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


class Reader(Dataset["Batch | InputError"]):
    """Share -> batch, in the loader's processes."""

    def __init__(self, samples: Samples, *, encoded: bool = False) -> None:
        self.samples, self.encoded, self.buffers = samples, encoded, _Buffers()

    def __getitem__(self, share: Share) -> "Batch | InputError":
        try:
            batch = self._batch(share)
            if get_worker_info() is not None:
                for name, tensor in batch.tensors().items():
                    # Here, where a full /dev/shm is an error: the queue's thread would lose the batch.
                    if name in LARGE:
                        tensor.share_memory_()
            return batch
        except InputError as error:
            return error  # raised by `Loader.batches`: a process of the loader would wrap it in its traceback
        except RuntimeError as error:
            if "shared memory" not in str(error) and "/torch_" not in str(error):
                raise
            return InputError(f"the loader's processes have no room left in /dev/shm; {SHM_REMEDY}")

    def _batch(self, share: Share) -> Batch:
        positions = share.positions.tolist()
        jpegs = self._jpegs(positions) if self.encoded else []
        images = self._images(positions) if not jpegs else np.empty((len(positions), 0, 0), np.uint8)
        masks = None
        if self.samples.masks:
            known = [self.samples.mask(p) for p in share.positions]
            # All are there: checked when opened
            masks = torch.from_numpy(np.stack([m for m in known if m is not None]))
        return Batch(
            image=torch.from_numpy(images)[:, None],
            target=torch.from_numpy(self.samples.targets(share.positions)),
            index=torch.from_numpy(share.positions),
            weight=torch.full((len(images),), float(share.counts)),
            times=torch.from_numpy(share.times),
            mask=masks,
            total=share.total,
            jpegs=torch.frombuffer(bytearray().join(jpegs), dtype=torch.uint8) if jpegs else None,
            lengths=torch.tensor([len(jpeg) for jpeg in jpegs]) if jpegs else None,
        )

    def _images(self, positions: list[int]) -> np.ndarray:
        """uint8 [B,H,W]."""
        images = np.empty((0, 0, 0), np.uint8)
        for i, position in enumerate(positions):
            image = self.samples.image(position)
            if not i:
                images = self.buffers.get((len(positions), *image.shape))
            self._same(images.shape[1:], image.shape)
            images[i] = image
        return images

    def _jpegs(self, positions: list[int]) -> list[bytes]:
        """As stored; none if among them is one that is no whole gray JPEG, which this process alone can decode."""
        jpegs = [self.samples.image_bytes(p) for p in positions]
        shapes = [gray_jpeg_shape(jpeg) for jpeg in jpegs]
        if not all(any(shape) and jpeg.endswith(END) for shape, jpeg in zip(shapes, jpegs, strict=True)):
            return []
        for shape in shapes:
            self._same(shapes[0], shape)
        return jpegs

    def _same(self, first: tuple[int, ...], other: tuple[int, ...]) -> None:
        if first != other:
            sizes = " and ".join(f"{width}x{height}" for height, width in (first, other))
            raise InputError(
                f"{self.samples.where}: images of different sizes in one batch ({sizes}); pack them to one --size"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"buffers": _Buffers()}


def decoded(batch: Batch, samples: Samples, device: torch.device) -> Batch:
    """A batch of ``samples`` with its image: on the device where it brought JPEGs. InputError: see `decoded_by`."""
    if batch.jpegs is None or batch.lengths is None:
        return batch
    image = decoded_by(device, samples, batch.index.tolist(), batch.jpegs.split(batch.lengths.tolist()))
    return replace(batch, image=image, jpegs=None, lengths=None)


def decoded_by(
    device: torch.device, samples: Samples, positions: Sequence[int], jpegs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Images of ``samples`` at those positions, as stored -> uint8 [B,1,H,W] on the device.

    Raises:
        InputError: one of them is damaged, or the device does not decode them.
    """
    try:
        return decode_on(device, jpegs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        for position in positions:
            samples.image(position)  # one that is damaged is named
        raise InputError(
            f"--decode device: the {device.type} does not decode images of {samples.where} ({first_line(error)}); "
            "train with --decode loader"
        ) from error


class _Buffers:
    """Memory of batches that nobody holds any more: asking the system for new pages costs as much as a tenth of
    decoding.
    """

    def __init__(self) -> None:
        self.known: list[np.ndarray] = []
        self.idle = self._idle([np.empty(1, np.uint8)])

    @staticmethod
    def _idle(known: list[np.ndarray]) -> int:
        """References that Python counts for an array that only the list holds, asked as `get` asks: 3, from Python 3.14
        on 2.
        """
        for array in known:
            if array.shape == (1,) and (count := sys.getrefcount(array)):
                return count
        raise AssertionError

    def get(self, shape: tuple[int, ...]) -> np.ndarray:
        """An uninitialised uint8 array. It is handed out again when the tensors made from it are gone: they hold a
        reference to it.
        """
        for array in self.known:
            if array.shape == shape and sys.getrefcount(array) == self.idle:
                return array
        array = np.empty(shape, np.uint8)
        self.known = [*self.known[-3:], array]
        return array
