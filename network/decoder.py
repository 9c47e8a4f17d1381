"""Learned refinement: from what the matching says, and the frame's finer features, to a mask."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = (32, 48, 96, 96)  # channels of the decoder, finest level first
SURVEY = 64  # channels of one level more, half as fine as the coarsest features
GROUPS = 8  # of GroupNorm, since a batch is too small for BatchNorm


class Block(nn.Module):
    """Two convolutions over what is known of a frame and of its objects.

    Args:
        shared: channels that all objects of a frame have in common; projected once.
        own: channels of each object.
        width: channels of the result.
    """

    def __init__(self, shared: int, own: int, width: int):
        super().__init__()
        self.project = nn.Conv2d(shared + own, width, 1)
        self.layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(GROUPS, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def project_shared(self, shared: torch.Tensor) -> torch.Tensor:
        """(B, S, h, w) -> (B, width, h, w), what `forward` takes."""
        return F.conv2d(shared, self.project.weight[:, :shared.shape[1]], self.project.bias)

    def forward(self, projected: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """(B, width, h, w) and (B, E, h, w) of one object in each frame -> (B, width, h, w)."""
        x = projected + F.conv2d(own, self.project.weight[:, -own.shape[1]:])
        return x + self.layers(x)


class Decoder(nn.Module):
    """From the coarsest features to the finest, the evidence beside them at every level.

    It begins at half the resolution of the coarsest: an object that fills the frame has parts that
    resemble nothing known, and only what lies around them tells that they belong to it.

    Args:
        evidence: channels of what is known of an object at a position.
        channels: of the features, finest first; as many levels as `WIDTHS` has, or fewer.
    """

    def __init__(self, evidence: int, channels: tuple[int, ...]):
        super().__init__()
        widths = (*WIDTHS[:len(channels)], SURVEY)
        channels = (*channels, channels[-1])
        below = (*widths[1:], 0)
        self.blocks = nn.ModuleList(Block(c, evidence + b, w)
                                    for c, b, w in zip(channels, below, widths))
        self.score = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, evidence: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        """Logits of N objects in each of B frames, at the finest level.

        Args:
            evidence: (B, N, E, H, W).
            features: (B, C, h, w) of each level.

        Returns:
            (B, N, h, w).
        """
        features = [*features, F.avg_pool2d(features[-1], 2, ceil_mode=True)]
        projected = [block.project_shared(level) for block, level in zip(self.blocks, features)]
        # one by one: five at once take eight times as long as one, since caches are small
        return torch.stack([self._decode(own, projected) for own in evidence.unbind(1)], 1)

    def _decode(self, evidence: torch.Tensor, projected: list[torch.Tensor]) -> torch.Tensor:
        """(B, E, H, W) of one object in each frame -> (B, h, w) logits."""
        x = None
        for block, level in zip(reversed(self.blocks), reversed(projected)):
            known = [evidence] if x is None else [evidence, x]
            x = block(level, torch.cat([_resize(part, level.shape[-2:]) for part in known], 1))
        return self.score(F.relu(x))[:, 0]


def _resize(x: torch.Tensor, size) -> torch.Tensor:
    if x.shape[-2] >= size[0]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
