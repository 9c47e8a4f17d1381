"""Learned refinement: from what the matching says, and the frame's finer features, to a mask."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = (32, 48, 96)  # channels of the decoder, finest level first
GROUPS = 8  # of GroupNorm, since a batch is too small for BatchNorm


class Block(nn.Module):
    """Two convolutions over features and evidence, after a projection to `width` channels."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.project = nn.Conv2d(channels, width, 1)
        self.layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(GROUPS, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.project(x)
        return x + self.layers(x)


class Decoder(nn.Module):
    """From the coarsest features to the finest, the evidence beside them at every level.

    Args:
        evidence: channels of what is known of an object at a position.
        channels: of the features, finest first; as many levels as `WIDTHS` has, or fewer.
    """

    def __init__(self, evidence: int, channels: tuple[int, ...]):
        super().__init__()
        widths = WIDTHS[:len(channels)]
        below = (*widths[1:], 0)
        self.blocks = nn.ModuleList(Block(c + evidence + b, w)
                                    for c, b, w in zip(channels, below, widths))
        self.score = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, evidence: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        """(N, E, H, W) and (N, C, h, w) of each level -> (N, h, w) logits at the finest."""
        x = None
        for block, level in zip(reversed(self.blocks), reversed(features)):
            size = level.shape[-2:]
            inputs = [level, _resize(evidence, size)]
            if x is not None:
                inputs.append(_resize(x, size))
            x = block(torch.cat(inputs, 1))
        return self.score(F.relu(x))[:, 0]


def _resize(x: torch.Tensor, size) -> torch.Tensor:
    if x.shape[-2] >= size[0]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
