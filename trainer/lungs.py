"""Where the lungs are: the U-Net family, the segmenter built on it, lung boxes, and the memory that keeps them.

Legend: images float [B,1,H,W] in [0,1]; masks bool [B,H,W]; boxes int64 [B,4] x0 y0 x1 y1, ends exclusive, pixels of a
size x size image.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from kornia.contrib import connected_components_union_find
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from shards.errors import InputError, listed
from trainer.checkpoint import readable

PUBLISHED_WIDTH, PUBLISHED_SIZE = 64, 512


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
    """The published lung U-Net, 3-w-2w-4w-8w-16w; w = 64 is the published one (31.04 M parameters).

    forward: [B,3,H,W], H and W multiples of 16 -> logits [B,1,H,W]. Names of the state dict are the published ones.
    """

    def __init__(self, width: int = PUBLISHED_WIDTH) -> None:
        super().__init__()
        w = width
        self.e1, self.e2, self.e3, self.e4 = _Encoder(3, w), _Encoder(w, 2 * w), _Encoder(2 * w, 4 * w), _Encoder(4 * w, 8 * w)
        self.b = _Convs(8 * w, 16 * w)
        self.d1, self.d2 = _Decoder(16 * w, 8 * w), _Decoder(8 * w, 4 * w)
        self.d3, self.d4 = _Decoder(4 * w, 2 * w), _Decoder(2 * w, w)
        self.outputs = nn.Conv2d(w, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        s1, x = self.e1(x)
        s2, x = self.e2(x)
        s3, x = self.e3(x)
        s4, x = self.e4(x)
        x = self.d1(self.b(x), s4)
        x = self.d4(self.d3(self.d2(x, s3), s2), s1)
        return self.outputs(x)


class LungSegmenter(nn.Module):
    """A U-Net with what it needs to be used on any radiograph.

    Args:
        width: of the U-Net.
        size: working size, a multiple of 16; images are resampled to size x size.
        standardise: give the net each image with mean 0 and deviation 1 (ours) or as it is (the published weights).
        clean_up: keep the two largest connected components; without it, every foreground pixel counts (published).
        threshold: of the sigmoid.
    """

    def __init__(self, width: int, size: int, *, standardise: bool = True, clean_up: bool = True, threshold: float = 0.5) -> None:
        super().__init__()
        if width < 1 or size < 16 or size % 16:
            raise InputError(f"a U-Net of width {width} at {size} px cannot be built; width is at least 1, size a multiple of 16")
        self.unet = UNet(width)
        self.settings: dict[str, Any] = {
            "width": width,
            "size": size,
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
        return self.unet(images.expand(-1, 3, -1, -1))[:, 0]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images float [B,1,H,W] in [0,1], any H and W -> lung masks bool [B,H,W]."""
        probability = torch.sigmoid(self.logits(images).float())
        masks = probability > self.settings["threshold"]
        if self.settings["clean_up"]:
            masks = two_largest(masks)
        if masks.shape[-2:] != images.shape[-2:]:
            masks = F.interpolate(masks[:, None].float(), images.shape[-2:], mode="bilinear")[:, 0] >= 0.5
        return masks

    def fingerprint(self) -> str:
        """A hash of weights and settings: boxes are remembered under it."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for name, tensor in self.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write a safetensors file that `load_segmenter` reads."""
        partial = path.with_name(f".{path.name}.partial")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.unet.state_dict().items()}
        save_file(tensors, partial, metadata={"lung_unet": json.dumps(self.settings)})
        readable(partial)
        partial.replace(path)


def load_segmenter(path: str | Path | None = None) -> LungSegmenter:
    """The lung segmenter of a file that `trainer.train_lungs` wrote, in eval mode, frozen.

    Returns:
        A module: images float [B,1,H,W] in [0,1], any H and W -> masks bool [B,H,W].

    Raises:
        InputError: no file named (no weights ship with the package yet), no such file, or not a segmenter.
    """
    if path is None:
        raise InputError(
            "no lung segmenter: name one with --lungs.weights FILE, or train one with "
            "`python -m shards masks --images DIR --masks DIR --out SHARDS` and "
            "`accelerate launch -m trainer.train_lungs --shards SHARDS --out RUN`"
        )
    path = Path(path)
    if path.is_dir() and (path / "lung_unet.safetensors").is_file():
        path = path / "lung_unet.safetensors"
    if path.is_dir():
        raise InputError(f"--lungs.weights {path}: has no lung_unet.safetensors; name a run folder of trainer.train_lungs, or a file")
    if not path.is_file():
        raise InputError(f"--lungs.weights {path}: no such file; trainer.train_lungs writes RUN/lung_unet.safetensors")
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["lung_unet"])
            segmenter = LungSegmenter(settings.pop("width"), settings.pop("size"), **settings)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        why = "it has no settings of one" if isinstance(error, KeyError) else error
        raise InputError(f"--lungs.weights {path}: not a lung segmenter of trainer.train_lungs ({why})") from error
    _check_tensors(segmenter.unet, tensors, path)
    segmenter.unet.load_state_dict(tensors)
    return segmenter.eval().requires_grad_(False)


def _check_tensors(unet: UNet, tensors: dict[str, torch.Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    wrong = [name for name in expected if name not in tensors or tuple(tensors[name].shape) != expected[name]]
    wrong += [name for name in tensors if name not in expected]
    if wrong:
        name = wrong[0]
        got = tuple(tensors[name].shape) if name in tensors else "nothing"
        raise InputError(f"{path}: {len(wrong)} tensors do not fit ({listed(wrong)}); {name}: expected {expected.get(name)}, got {got}")


def two_largest(masks: torch.Tensor) -> torch.Tensor:
    """Keep the two largest 8-connected components of each mask: bool [B,H,W] -> bool [B,H,W]."""
    labels = connected_components_union_find(masks[:, None].float())[:, 0]
    # Labels are 1-based numbers of 2x2 blocks, counted through the images: each image has its own range of them.
    batch, blocks = len(masks), -(-masks.shape[1] // 2) * -(-masks.shape[2] // 2)
    area = torch.bincount(labels.flatten(), minlength=batch * blocks + 1)[1:].view(batch, blocks)
    keep = torch.zeros_like(area, dtype=torch.bool).scatter_(1, area.topk(2, dim=1).indices, True)
    return torch.cat([keep.new_zeros(1), keep.flatten()])[labels] & masks


def lung_boxes(masks: torch.Tensor, size: int) -> torch.Tensor:
    """The rectangle around all foreground, as published: masks [B,H,W] bool or 0/1 -> boxes int64 [B,4].

    Masks are resampled to size x size (bilinear, half a pixel's weight or more is foreground); boxes are x0 y0 x1 y1 with
    exclusive ends, in pixels of that image. A mask without foreground gives the whole image, 0 0 size size.
    """
    masks = masks.float()
    if masks.shape[-2:] != (size, size):
        masks = F.interpolate(masks[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
    foreground = masks >= 0.5
    sides = []
    for along in (1, 2):  # columns, then rows
        hit = foreground.any(along).int()
        first = hit.argmax(1)
        last = size - hit.flip(1).argmax(1)
        sides.append((first, last))
    (x0, x1), (y0, y1) = sides
    boxes = torch.stack([x0, y0, x1, y1], 1)
    whole = torch.tensor([0, 0, size, size], device=boxes.device)
    return torch.where(foreground.flatten(1).any(1)[:, None], boxes, whole)


class BoxMemory:
    """Boxes of one split in un-augmented pixels, by position, so that an image is segmented once per run.

    Args:
        count: samples of the split.
        key: hash of all that a box depends on: segmenter, shards, size.
    """

    def __init__(self, count: int, key: str) -> None:
        self.key = key
        self.table = torch.full((count, 5), -1, dtype=torch.int32)  # x0 y0 x1 y1 and whether lungs were found

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"key": self.key, "table": self.table}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Take remembered boxes; False, and nothing taken, if they belong to another segmenter or other shards."""
        if state["key"] != self.key or state["table"].shape != self.table.shape:
            return False
        self.table = state["table"].clone()
        return True

    def not_found(self) -> torch.Tensor:
        """Positions of images in which no lungs were found."""
        return torch.nonzero(self.table[:, 4] == 0)[:, 0]


class LungBoxes:
    """Boxes for the batches of one split: segments images not met before, remembers all.

    Args:
        segmenter: on the device, in eval mode.
        size: of the classifier's input; boxes are in its pixels.
        count: samples of the split.
        shards: fingerprint of the split.
        key: ``segmenter.fingerprint()``, where it is known already.
    """

    def __init__(self, segmenter: LungSegmenter, size: int, count: int, shards: str, key: str | None = None) -> None:
        self.segmenter, self.size = segmenter, size
        self.memory = BoxMemory(count, f"{key or segmenter.fingerprint()}-{shards}-{size}")

    def __call__(self, images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """images uint8 [B,1,H,W] on the device, index int64 [B] on the CPU -> boxes int64 [B,4] on the device."""
        known = self.memory.table[index]
        new = torch.nonzero(known[:, 4] < 0)[:, 0]
        if len(new):
            some = images if len(new) == len(images) else images[new.to(images.device)]
            masks = self.segmenter(some.float() / 255)
            boxes = lung_boxes(masks, self.size)
            found = masks.flatten(1).any(1)
            known[new] = torch.cat([boxes, found[:, None]], 1).int().cpu()
            self.memory.table[index] = known
        return known[:, :4].long().to(images.device, non_blocking=True)
