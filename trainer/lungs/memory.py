"""The lungs of a split's images, found once a run and remembered.

Legend: images uint8 [B,1,H,W]; boxes, outlines: see `trainer.lungs.box`.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from shards.coarse import BYTES, GRID, LEVELS, packed
from trainer.augment import unpacked
from trainer.lungs.box import Lungs
from trainer.lungs.segmenter import LungSegmenter
from trainer.upload import upload

IN_MEMORY = 2**30  # bytes: a larger memory is a mapped file


class LungMemory:
    """Lungs of one split in un-augmented images, by position, so that an image is segmented once per run.

    A row is a box of four 16-bit numbers, whether the image is unknown (0), without lungs (1) or with (2), and the
    packed outline: 141 bytes.

    Args:
        count: samples of the split.
        key: hash of all that a row depends on: segmenter, shards, size, grid.
        folder: where the table is a mapped file, if it is larger than `IN_MEMORY`; None: the system's folder for such
            files.
    """

    ROW = 8 + 1 + BYTES

    def __init__(self, count: int, key: str, folder: Path | None = None) -> None:
        self.key = f"{key}-{GRID[0]}x{GRID[1]}"
        self.table: np.ndarray
        if count * self.ROW > IN_MEMORY:
            with tempfile.TemporaryFile(dir=folder) as file:  # it has no name any more, and goes with the process
                self.table = np.memmap(file, np.uint8, "w+", shape=(count, self.ROW))
        else:
            self.table = np.zeros((count, self.ROW), np.uint8)
        self.news: list[np.ndarray] = []  # positions that this process has added since the last `take_news`
        self.saved = True  # whether a checkpoint has all that is here

    def unknown(self, index: torch.Tensor) -> np.ndarray:
        """Places in the batch of those images int64 [B] that are not known: int64 [n]."""
        return np.flatnonzero(self.table[index.numpy(), 8] == 0)

    def write(self, index: torch.Tensor, lungs: Lungs) -> None:
        """Remember the lungs of images int64 [B]."""
        at = index.numpy()
        rows = np.empty((len(at), self.ROW), np.uint8)
        rows[:, :8] = np.ascontiguousarray(lungs.boxes.cpu().numpy().astype("<i2")).view(np.uint8)
        rows[:, 8] = 1 + lungs.found.cpu().numpy()
        rows[:, 9:] = packed((lungs.outlines.cpu() * (LEVELS - 1)).round().numpy().astype(np.uint8))
        self.put(at, rows)
        self.news.append(at)

    def put(self, at: np.ndarray, rows: np.ndarray) -> None:
        """Set rows uint8 [n,ROW] at positions int64 [n]."""
        self.table[at] = rows
        self.saved = False

    def read(self, index: torch.Tensor, device: torch.device) -> Lungs:
        """The lungs of known images int64 [B], on the device; what is copied there is the packed row."""
        rows = torch.from_numpy(self.table[index.numpy()])
        found = rows[:, 8] > 1
        cells = upload(rows[:, 9:], device)
        boxes = upload(torch.from_numpy(np.ascontiguousarray(rows[:, :8].numpy()).view("<i2").astype(np.int64)), device)
        return Lungs(boxes, unpacked(cells), found)

    def take_news(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions int64 [n] and rows of what this process has added since the last time."""
        at = np.unique(np.concatenate([np.empty(0, np.int64), *self.news]))
        self.news = []
        return at, self.table[at]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"key": self.key, "table": torch.from_numpy(self.table)}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Take remembered lungs; False, and nothing taken, if they belong to another segmenter or other shards."""
        if state.get("key") != self.key or state["table"].shape != self.table.shape:
            return False
        self.table[:] = state["table"].numpy()
        self.saved = True
        return True

    def not_found(self) -> torch.Tensor:
        """Positions of images in which no lungs were found."""
        return torch.from_numpy(np.flatnonzero(self.table[:, 8] == 1))


class LungFinder:
    """Lungs for the batches of one split: segments images not met before, remembers all.

    Args:
        segmenter: on the device, in eval mode.
        size: of the classifier's input; boxes are in its pixels.
        count: samples of the split.
        shards: fingerprint of the split.
        key: ``segmenter.fingerprint()``, where it is known already.
        folder: see `LungMemory`.
    """

    def __init__(
        self,
        segmenter: LungSegmenter,
        size: int,
        count: int,
        shards: str,
        key: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.segmenter, self.size = segmenter, size
        self.memory = LungMemory(count, f"{key or segmenter.fingerprint()}-{shards}-{size}", folder)

    def __call__(self, images: torch.Tensor, index: torch.Tensor) -> Lungs:
        """images uint8 [B,1,H,W] on the device, index int64 [B] on the CPU -> their lungs on the device, but for
        `found`, which is on the CPU.
        """
        new = torch.from_numpy(self.memory.unknown(index))
        if len(new):
            some = images if len(new) == len(images) else images[upload(new, images.device)]
            self.memory.write(index[new], self.segmenter.find(some.float() / 255, self.size))
        return self.memory.read(index, images.device)

    def share(self, accelerator: Accelerator) -> None:
        """What one process has segmented, all know afterwards. Only what is new travels."""
        own = self.memory.take_news()
        if accelerator.num_processes > 1:
            news = [torch.from_numpy(part).to(accelerator.device) for part in own]
            at, rows = (
                accelerator.gather(accelerator.pad_across_processes(part, pad_index=pad))
                for part, pad in zip(news, (-1, 0), strict=True)
            )
            real = (at >= 0).cpu().numpy()
            if real.any():
                self.memory.put(at.cpu().numpy()[real], rows.cpu().numpy()[real])
