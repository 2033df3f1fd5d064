"""Where the lungs are: the U-Net family, the segmenter built on it, lung boxes and outlines, and the memory that keeps them.

Legend: images float [B,1,H,W] in [0,1]; masks bool [B,H,W]; boxes int64 [B,4] x0 y0 x1 y1, ends exclusive, pixels of a
size x size image; outlines float [B,22,24] in {0, 1/3, 2/3, 1}: how much of each cell of a grid over the lung box is lung.

An outline is what of a mask is kept: at most 150 bytes an image with its box, so that the memory of ten million images is 1.4 GB. Two bits a
cell of a grid over the box give the mask back with an IoU of 0.964 on 1,000 real radiographs (the worst 0.938); of the same length, one bit of a 32 x 32
grid over the box gives 0.942, over the image 0.913, and 64 columns' first and last rows 0.949 (the worst 0.856). Feature maps have 7 to 16 cells a side.
"""

import contextlib
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from shards.errors import InputError, listed, read_json, run
from trainer.checkpoint import save_weights
from trainer.cleanup import clean, ends

PUBLISHED_CHANNELS, PUBLISHED_SIZE = (64, 128, 256, 512, 1024), 512
CERTAIN = 4.0  # logit of what clean-up decided
SHIPPED = Path(__file__).parent / "weights" / "lung_unet.safetensors"
GRID, LEVELS = (22, 24), 4  # rows and columns of an outline, and how many values a cell has: two bits
IN_MEMORY = 2**30  # bytes: a larger memory is a mapped file


class Lungs(NamedTuple):
    """The lungs of a batch. boxes, outlines: see the module; found bool [B]: where there are none, the box is the whole image and the outline empty."""

    boxes: torch.Tensor
    outlines: torch.Tensor
    found: torch.Tensor


class _Convs(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outside)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class _Encoder(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = _Convs(inside, outside)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.conv(x)
        return x, F.max_pool2d(x, 2)


class _Decoder(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inside, outside, 2, stride=2)
        self.conv = _Convs(2 * outside, outside)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat([self.up(x), skip], 1))


class UNet(nn.Module):
    """The published lung U-Net (31.04 M parameters) and lighter ones of its kind. Names of the state dict are the published ones.

    forward: [B,inputs,H,W], H and W multiples of 16 * patch -> logits [B,1,H,W].

    Args:
        channels: of the five levels.
        inputs: planes of the input.
        patch: each patch x patch pixels are the planes of one position of the first level, and come back so from its logits.
            The first level is where nearly all the time goes; with patch 2 it has a quarter of the positions.
    """

    def __init__(self, channels: Sequence[int] = PUBLISHED_CHANNELS, *, inputs: int = 3, patch: int = 1) -> None:
        super().__init__()
        a, b, c, d, e = channels
        self.patch = patch
        self.e1, self.e2, self.e3, self.e4 = _Encoder(inputs * patch**2, a), _Encoder(a, b), _Encoder(b, c), _Encoder(c, d)
        self.b = _Convs(d, e)
        self.d1, self.d2, self.d3, self.d4 = _Decoder(e, d), _Decoder(d, c), _Decoder(c, b), _Decoder(b, a)
        self.outputs = nn.Conv2d(a, patch**2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        s1, x = self.e1(F.pixel_unshuffle(x, self.patch))
        s2, x = self.e2(x)
        s3, x = self.e3(x)
        s4, x = self.e4(x)
        x = self.d1(self.b(x), s4)
        x = self.d4(self.d3(self.d2(x, s3), s2), s1)
        return F.pixel_shuffle(self.outputs(x), self.patch)


class LungSegmenter(nn.Module):
    """A U-Net with what it needs to be used on any radiograph.

    Args:
        channels: of the U-Net's five levels.
        size: working size, a multiple of 16 x patch; images are resampled to size x size.
        patch, inputs: see UNet; the gray image is given ``inputs`` times.
        standardise: give the net each image with mean 0 and deviation 1 (ours) or as it is (the published weights).
        clean_up: at most two lungs without specks and holes, a missing one mirrored, nothing where no believable pair is found (`trainer.cleanup`);
            without it every foreground pixel counts, as published.
        threshold: of the sigmoid.
    """

    def __init__(
        self,
        channels: Sequence[int],
        size: int,
        *,
        patch: int = 1,
        inputs: int = 1,
        standardise: bool = True,
        clean_up: bool = True,
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        if len(channels) != 5 or min(channels) < 1 or patch < 1 or size < 16 * patch or size % (16 * patch):
            raise InputError(
                f"a U-Net of channels {listed(list(map(str, channels)))} and patch {patch} at {size} px cannot be built; "
                "it has five levels, and size is a multiple of 16 x patch"
            )
        self.unet = UNet(channels, inputs=inputs, patch=patch)
        self.settings: dict[str, Any] = {
            "channels": list(channels),
            "size": size,
            "patch": patch,
            "inputs": inputs,
            "standardise": standardise,
            "clean_up": clean_up,
            "threshold": threshold,
        }

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """images [B,1,H,W] in [0,1] -> logits [B,size,size], with gradient."""
        size = self.settings["size"]
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        if self.settings["standardise"]:
            deviation, mean = torch.std_mean(images, (1, 2, 3), keepdim=True, unbiased=False)
            images = (images - mean) / (deviation + 1e-3)
        return self.unet(images.expand(-1, self.settings["inputs"], -1, -1))[:, 0]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images float [B,1,H,W] in [0,1], any H and W -> lung masks bool [B,H,W]."""
        return self._masks(images, images.shape[-2:])

    @torch.no_grad()
    def find(self, images: torch.Tensor, size: int) -> Lungs:
        """images float [B,1,H,W] in [0,1] -> the lungs, boxes in pixels of a size x size image, as `lung_boxes`, all on the images' device.

        As published, from the mask at the working size: masks as large as the images would cost as much as the net.
        """
        working = self.settings["size"]
        masks = self._masks(images, torch.Size((working, working)))
        boxes = lung_boxes(masks, size)
        return Lungs(boxes, outlines(masks, boxes, size), masks.flatten(1).any(1))

    def _masks(self, images: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        logits = self.logits(images).float()
        threshold = self.settings["threshold"]
        if self.settings["clean_up"]:
            probability = torch.sigmoid(logits)
            found = probability > threshold
            wanted = clean(found, probability)
            # What clean-up added or removed is certain, so that the outline keeps its place between the pixels everywhere else.
            logits = torch.where(wanted == found, logits, torch.where(wanted, CERTAIN, -CERTAIN))
        if logits.shape[-2:] != shape:
            logits = F.interpolate(logits[:, None], shape, mode="bilinear")[:, 0]
        return logits > math.log(threshold / (1 - threshold))

    def fingerprint(self) -> str:
        """A hash of weights and settings: boxes are remembered under it."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for name, tensor in self.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path, *, half: bool = False) -> None:
        """Write a safetensors file that `load_segmenter` reads; ``half``: weights of convolutions in 16 bits."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.unet.state_dict().items()}
        if half:
            tensors = {name: tensor.half() if tensor.ndim == 4 else tensor for name, tensor in tensors.items()}
        save_weights(path, tensors, {"lung_unet": json.dumps(self.settings)})


def load_segmenter(path: str | Path | None = None) -> LungSegmenter:
    """A lung segmenter in eval mode, frozen: the one that ships with the package, or that of a file.

    Args:
        path: a file that `trainer.train_lungs` or ``python -m trainer.lungs convert`` wrote (or the run folder with it); a state dict of the
            published U-Net (.pt, .pth, .safetensors); or the published ``unet_model.pt`` itself, whose pickle is read and not executed.

    Returns:
        A module: images float [B,1,H,W] in [0,1], any H and W -> masks bool [B,H,W].

    Raises:
        InputError: no such file, not a segmenter, tensors of other shapes (which), a pickle that asks for anything but layers.
    """
    path = SHIPPED if path is None else Path(path)
    if path.is_dir() and (path / "lung_unet.safetensors").is_file():
        path = path / "lung_unet.safetensors"
    if path.is_dir():
        raise InputError(f"--lungs.weights {path}: has no lung_unet.safetensors; name a run folder of trainer.train_lungs, or a file")
    if not path.is_file():
        raise InputError(f"--lungs.weights {path}: no such file; without the flag the segmenter of the package is used")
    tensors, settings = _read(path)
    try:
        segmenter = LungSegmenter(settings.pop("channels"), settings.pop("size"), **settings)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--lungs.weights {path}: not a lung segmenter (its settings lack {error})") from error
    _check_tensors(segmenter.unet, tensors, path)
    segmenter.unet.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()})
    return segmenter.eval().requires_grad_(False)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and settings of a file of any of the known kinds."""
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped or path.suffix.lower() in (".pt", ".pth", ".bin"):
        tensors, settings = _read_pickle(path), {}
    else:
        try:
            with safe_open(path, "pt") as file:
                settings = read_json((file.metadata() or {}).get("lung_unet", "{}").encode(), f"--lungs.weights {path}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"--lungs.weights {path}: not a lung segmenter ({error})") from error
    if not settings:  # the published ones know nothing of ours: raw gray, every foreground pixel counts
        first = tensors.get("e1.conv.conv1.weight")
        if first is None:
            raise InputError(f"--lungs.weights {path}: not a lung segmenter: it has no settings of one, and no e1.conv.conv1.weight of the published U-Net")
        levels = [f"{level}.conv.conv1.weight" for level in ("e1", "e2", "e3", "e4")] + ["b.conv1.weight"]
        channels = [len(tensors[name]) if name in tensors else usual for name, usual in zip(levels, PUBLISHED_CHANNELS, strict=True)]
        inputs = first.shape[1] if first.ndim == 4 else 3
        settings = {"channels": channels, "size": PUBLISHED_SIZE, "inputs": inputs, "standardise": False, "clean_up": False}
    return tensors, settings


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """A state dict, or the state dict of a whole pickled module of the published U-Net, of which no code runs.

    Classes that the published file names stand for empty modules; torch's own reader refuses whatever is not allowed by name.
    """
    empty = [(type(name, (nn.Module,), {}), f"model.{name}") for name in ("build_unet", "encoder_block", "conv_block", "decoder_block")]
    layers = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.ConvTranspose2d]
    try:
        with torch.serialization.safe_globals([*empty, *layers]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        asked = []
        with contextlib.suppress(Exception):
            asked = [n for n in torch.serialization.get_unsafe_globals_in_checkpoint(path) if not n.startswith(("torch.nn.modules.", "model."))]
        why = f"its pickle asks for {listed(asked)}, which is not executed" if asked else f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        raise InputError(f"--lungs.weights {path}: not a lung segmenter ({why})") from error
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise InputError(f"--lungs.weights {path}: holds no state dict of a lung segmenter")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _check_tensors(unet: UNet, tensors: dict[str, torch.Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    wrong = [name for name in expected if name not in tensors or tuple(tensors[name].shape) != expected[name]]
    wrong += [name for name in tensors if name not in expected]
    if wrong:
        name = wrong[0]
        got = tuple(tensors[name].shape) if name in tensors else "nothing"
        raise InputError(f"--lungs.weights {path}: {len(wrong)} tensors do not fit ({listed(wrong)}); {name}: expected {expected.get(name)}, got {got}")


def lung_boxes(masks: torch.Tensor, size: int) -> torch.Tensor:
    """The rectangle around all foreground, as published: masks [B,H,W] bool or 0/1 -> boxes int64 [B,4].

    Masks are resampled to size x size (bilinear, half a pixel's weight or more is foreground); boxes are x0 y0 x1 y1 with
    exclusive ends, in pixels of that image. A mask without foreground gives the whole image, 0 0 size size.
    """
    masks = masks.float()
    if masks.shape[-2:] != (size, size):
        masks = F.interpolate(masks[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
    foreground = masks >= 0.5
    (x0, x1), (y0, y1) = ends(foreground.any(1)), ends(foreground.any(2))
    boxes = torch.stack([x0, y0, x1, y1], 1)
    whole = torch.tensor([0, 0, size, size], device=boxes.device)
    return torch.where(foreground.flatten(1).any(1)[:, None], boxes, whole)


def outlines(masks: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Masks bool [B,H,W] in a grid over their boxes (of a size x size image): float [B,22,24]."""
    height, width = masks.shape[-2:]
    scale = torch.tensor([width / size, height / size], device=boxes.device).repeat(2)
    image = torch.arange(len(masks), device=boxes.device, dtype=torch.float32)
    rois = torch.cat([image[:, None], boxes * scale], 1)
    samples = math.ceil(max(height, width) / min(GRID))  # a side of a cell: at least one a pixel of the mask
    with torch.autocast(masks.device.type, enabled=False):
        share = roi_align(masks[:, None].float(), rois, GRID, sampling_ratio=samples, aligned=True)[:, 0]
    return (share * (LEVELS - 1)).round() / (LEVELS - 1)


class LungMemory:
    """Lungs of one split in un-augmented images, by position, so that an image is segmented once per run.

    A row is a box of four 16-bit numbers, whether the image is unknown (0), without lungs (1) or with (2), and the packed outline: 141 bytes.

    Args:
        count: samples of the split.
        key: hash of all that a row depends on: segmenter, shards, size, grid.
        folder: where the table is a mapped file, if it is larger than `IN_MEMORY`; None: the system's folder for such files.
    """

    ROW = 8 + 1 + GRID[0] * GRID[1] // 4

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

    def known(self, index: torch.Tensor) -> torch.Tensor:
        """Which images int64 [B] are known: bool [B]."""
        return torch.from_numpy(self.table[index.numpy(), 8] > 0)

    def write(self, index: torch.Tensor, lungs: Lungs) -> None:
        """Remember the lungs of images int64 [B]."""
        at = index.numpy()
        rows = np.empty((len(at), self.ROW), np.uint8)
        rows[:, :8] = np.ascontiguousarray(lungs.boxes.cpu().numpy().astype("<i2")).view(np.uint8)
        rows[:, 8] = 1 + lungs.found.cpu().numpy()
        levels = (lungs.outlines.cpu() * (LEVELS - 1)).round().numpy().astype(np.uint8).reshape(len(at), -1, 4)
        rows[:, 9:] = levels[..., 0] | levels[..., 1] << 2 | levels[..., 2] << 4 | levels[..., 3] << 6
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
        packed = rows[:, 9:].to(device, non_blocking=True)
        boxes = torch.from_numpy(np.ascontiguousarray(rows[:, :8].numpy()).view("<i2").astype(np.int64)).to(device, non_blocking=True)
        levels = torch.stack([packed >> shift & LEVELS - 1 for shift in (0, 2, 4, 6)], 2)
        return Lungs(boxes, levels.view(-1, *GRID).float() / (LEVELS - 1), found)

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

    def __init__(self, segmenter: LungSegmenter, size: int, count: int, shards: str, key: str | None = None, folder: Path | None = None) -> None:
        self.segmenter, self.size = segmenter, size
        self.memory = LungMemory(count, f"{key or segmenter.fingerprint()}-{shards}-{size}", folder)

    def __call__(self, images: torch.Tensor, index: torch.Tensor) -> Lungs:
        """images uint8 [B,1,H,W] on the device, index int64 [B] on the CPU -> their lungs on the device, but for `found`, which is on the CPU."""
        new = torch.nonzero(~self.memory.known(index))[:, 0]
        if len(new):
            some = images if len(new) == len(images) else images[new.to(images.device)]
            self.memory.write(index[new], self.segmenter.find(some.float() / 255, self.size))
        return self.memory.read(index, images.device)

    def share(self, accelerator: Accelerator) -> None:
        """What one process has segmented, all know afterwards. Only what is new travels."""
        own = self.memory.take_news()
        if accelerator.num_processes > 1:
            news = [torch.from_numpy(part).to(accelerator.device) for part in own]
            at, rows = (accelerator.gather(accelerator.pad_across_processes(part, pad_index=pad)) for part, pad in zip(news, (-1, 0), strict=True))
            real = (at >= 0).cpu().numpy()
            if real.any():
                self.memory.put(at.cpu().numpy()[real], rows.cpu().numpy()[real])


USAGE = (
    "usage: python -m trainer.lungs convert FILE OUT.safetensors [--half]: a state dict or the published unet_model.pt becomes "
    "--lungs.weights OUT, with --half in 16 bits"
)


def main(argv: list[str] | None = None) -> None:
    """``convert FILE OUT [--half]``: weights from elsewhere, checked, as safetensors."""
    words = list(sys.argv[1:] if argv is None else argv)
    half = "--half" in words
    words = [word for word in words if word != "--half"]
    if {"--help", "-h"} & set(words):
        print(f"{USAGE}\n\n{main.__doc__}")
        return
    if len(words) != 3 or words[0] != "convert" or any(word.startswith("--") for word in words):
        raise InputError(USAGE)
    out = Path(words[2])
    if out.exists():
        raise InputError(f"{out}: is there already; name another file")
    segmenter = load_segmenter(words[1])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        segmenter.save(out, half=half)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
    count = sum(p.numel() for p in segmenter.parameters())
    print(f"wrote {out}: U-Net of {count / 1e6:.2f} M parameters at {segmenter.settings['size']} px; use it with --lungs.weights {out}")


if __name__ == "__main__":
    run(main)
