"""The U-Net family.

Legend: images float [B,1,H,W] in [0,1].
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

PUBLISHED_CHANNELS, PUBLISHED_SIZE = (64, 128, 256, 512, 1024), 512


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
    """The published lung U-Net (31.04 M parameters) and lighter ones of its kind. Names of the state dict are the
    published ones.

    forward: [B,inputs,H,W], H and W multiples of 16 * patch -> logits [B,1,H,W].

    Args:
        channels: of the five levels.
        inputs: planes of the input.
        patch: each patch x patch pixels are the planes of one position of the first level, and come back so from its
            logits. The first level is where nearly all the time goes; with patch 2 it has a quarter of the positions.
    """

    def __init__(self, channels: Sequence[int] = PUBLISHED_CHANNELS, *, inputs: int = 3, patch: int = 1) -> None:
        super().__init__()
        a, b, c, d, e = channels
        self.patch = patch
        self.e1, self.e2, self.e3, self.e4 = (
            _Encoder(inputs * patch**2, a),
            _Encoder(a, b),
            _Encoder(b, c),
            _Encoder(c, d),
        )
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
