"""A U-Net with what it needs to be used on any radiograph.

Legend: images float [B,1,H,W] in [0,1]; masks bool [B,H,W].
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from shards.errors import InputError, listed
from trainer.checkpoint import save_weights
from trainer.lungs.box import Lungs, lung_boxes, outlines
from trainer.lungs.cleanup import clean
from trainer.lungs.unet import UNet

CERTAIN = 4.0  # logit of what clean-up decided


class LungSegmenter(nn.Module):
    """A U-Net with what it needs to be used on any radiograph.

    Args:
        channels: of the U-Net's five levels.
        size: working size, a multiple of 16 x patch; images are resampled to size x size.
        patch, inputs: see UNet; the gray image is given ``inputs`` times.
        standardise: give the net each image with mean 0 and deviation 1 (ours) or as it is (the published weights).
        clean_up: at most two lungs without specks and holes, a missing one mirrored, nothing where no believable pair
            is found (`trainer.lungs.cleanup`); without it every foreground pixel counts, as published.
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
                f"a U-Net of channels {listed(list(map(str, channels)))} and patch {patch} at {size} px cannot be "
                "built; "
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
        """images float [B,1,H,W] in [0,1] -> the lungs, boxes in pixels of a size x size image, as `lung_boxes`, all on
        the images' device.

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
            # What clean-up added or removed is certain, so that the outline keeps its place between the pixels
            # everywhere else.
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
