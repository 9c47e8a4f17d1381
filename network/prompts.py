"""From what a person shows of one object in a frame, and the frame's features, to its mask.

A second decoder on the features of the same encoder. What a person showed becomes evidence, as the
matching's scores are for the first: where the boxes are, how near the clicks are, and how alike
every cell is to those that were clicked, which is soft matching (section 3.1) with the clicks as
sets. It knows neither files nor which part of a frame it sees.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from media.shown import Prompts
from network.decoder import Block

WIDTHS = (32, 48, 96, 96)  # channels, finest level first
SURVEY = 64  # of one level more, half as fine as the coarsest features
STEM, FINE = 8, 16  # channels at half the image's resolution, for what is thin
NEAR, FAR = 8.0, 64.0  # pixels within which a click counts, and beyond which it says little
BOX, CLICKS, MASK, ALIKE = 4, 4, 2, 4  # channels of evidence
EVIDENCE = BOX + CLICKS + MASK + ALIKE


def evidence(prompts: Prompts, size: tuple[int, int], shape: tuple[int, int],
             device: torch.device | str = "cpu") -> torch.Tensor:
    """What prompts say of each cell, without a look at the image.

    Args:
        size: (H, W) of the image that the prompts are in pixels of.
        shape: (h, w) of the cells.

    Returns:
        (BOX + CLICKS + MASK, h, w) float32: whether there is a box, whether the cell is in one,
        its depth in that along x and along y (0 at the sides, 0.5 in the middle, below 0 outside,
        as shares of its sides, at least -1); the nearest point's and not-point's nearness, close
        by and from afar, in [0, 1]; whether there is a mask so far, its share of the cell.
    """
    y, x = ((torch.arange(cells, device=device) + 0.5) * (side / cells)
            for side, cells in zip(size, shape))
    maps = [*_depths(prompts.boxes, x, y)]
    for points in (prompts.points, prompts.not_points):
        distance = _distance(points, x, y)
        maps += [torch.exp(-0.5 * (distance / NEAR) ** 2), torch.exp(-distance / FAR)]
    if prompts.mask is None:
        maps += [torch.zeros(shape, device=device)] * 2
    else:
        mask = torch.from_numpy(prompts.mask.astype(np.float32)).to(device)[None, None]
        mask = F.interpolate(mask, size=shape, mode="bilinear", align_corners=False,
                             antialias=True)
        maps += [torch.ones(shape, device=device), mask[0, 0]]
    return torch.stack(maps)


def _depths(boxes, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Of each cell in the box that it is deepest in."""
    shape = len(y), len(x)
    if not boxes:
        return [x.new_zeros(shape)] * BOX
    across, down = [], []
    for left, top, width, height in boxes:
        # a box of no width would divide by 0
        across.append(torch.minimum(x - left, left + width - x) / max(width, 1.0))
        down.append(torch.minimum(y - top, top + height - y) / max(height, 1.0))
    depths = torch.stack([torch.stack([a.expand(shape), d[:, None].expand(shape)])
                          for a, d in zip(across, down)])  # (boxes, 2, h, w)
    least, which = depths.amin(1).max(0)
    chosen = depths.gather(0, which.expand(1, 2, *shape))[0].clamp(min=-1)
    return [x.new_ones(shape), (least >= 0).float(), *chosen]


def _distance(points, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(h, w) pixels from each cell's middle to the nearest point's; infinite where none is."""
    distance = x.new_full((len(y), len(x)), torch.inf)
    for u, v in points:
        distance = torch.minimum(distance, torch.hypot(x - (u + 0.5), (y - (v + 0.5))[:, None]))
    return distance


@dataclass
class Seen:
    """An image as the decoder sees it, whatever is shown of it.

    Args:
        image: (1, 3, H, W) ImageNet-normalised.
        alike: (1, C, h, w) features of cells that are compared, of length 1, coarse and fine.
        levels: (1, C, h, w) features, finest first.
    """

    image: torch.Tensor
    alike: list[torch.Tensor]
    levels: list[torch.Tensor]


class PromptDecoder(nn.Module):
    """From prompts to a mask, on features that it leaves as they are.

    Args:
        channels: of the features, finest first; as many levels as `WIDTHS` has, or fewer.
    """

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        widths = (*WIDTHS[:len(channels)], SURVEY)
        channels = (*channels, channels[-1])
        below = (*widths[1:], 0)
        self.blocks = nn.ModuleList(Block(c, EVIDENCE + b, w)
                                    for c, b, w in zip(channels, below, widths))
        self.stem = nn.Conv2d(3, STEM, 3, stride=2, padding=1)
        self.narrow = nn.Conv2d(widths[0], FINE, 1)
        self.fine = nn.Conv2d(STEM + FINE, FINE, 3, padding=1)
        self.score = nn.Conv2d(FINE, 1, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # NHWC, as the encoder

    @staticmethod
    def look(image: torch.Tensor, features: torch.Tensor, levels: list[torch.Tensor]) -> Seen:
        """What doesn't depend on prompts.

        Args:
            image: (1, 3, H, W) ImageNet-normalised.
            features, levels: as `Encoder.pyramid` gives them.
        """
        features, levels = features.float(), [level.float() for level in levels]
        return Seen(image, [F.normalize(x, dim=1) for x in (features, levels[0])], levels)

    def forward(self, seen: Seen, prompts: Prompts) -> torch.Tensor:
        """(H/2, W/2) logits of the object; `prompts` are in pixels of the image seen."""
        known = self._evidence(seen, prompts)
        levels = [*seen.levels, F.avg_pool2d(seen.levels[-1], 2, ceil_mode=True)]
        x = None
        for block, level in zip(reversed(self.blocks), reversed(levels)):
            own = [known] if x is None else [known, x]
            own = torch.cat([_resized(part, level.shape[-2:]) for part in own], 1)
            x = block(block.project_shared(level), own)
        fine = self.stem(seen.image)
        x = _resized(self.narrow(F.relu(x)), fine.shape[-2:])
        return self.score(F.relu(self.fine(F.relu(torch.cat([fine, x], 1)))))[0, 0]

    def _evidence(self, seen: Seen, prompts: Prompts) -> torch.Tensor:
        """(1, EVIDENCE, h, w) at the finest level."""
        size, shape = seen.image.shape[-2:], seen.levels[0].shape[-2:]
        maps = [evidence(prompts, size, shape, seen.image.device)[None]]
        for cells in seen.alike:
            for points in (prompts.points, prompts.not_points):
                maps.append(_resized(likeness(cells, points, size), shape))
        return torch.cat(maps, 1)


def likeness(cells: torch.Tensor, points, size: tuple[int, int]) -> torch.Tensor:
    """(1, C, h, w) of length 1 -> (1, 1, h, w) cosine with the most alike of the clicked cells.

    0 where nothing was clicked. `points` are x, y in an image of `size`; those beside it count as
    its nearest pixels.
    """
    height, width = cells.shape[-2:]
    if not points:
        return cells.new_zeros(1, 1, height, width)
    columns = [min(max(int((x + 0.5) * width / size[1]), 0), width - 1) for x, _ in points]
    rows = [min(max(int((y + 0.5) * height / size[0]), 0), height - 1) for _, y in points]
    clicked = cells[0, :, rows, columns]  # (C, points)
    return F.conv2d(cells, clicked.T[:, :, None, None]).amax(1, keepdim=True)


def _resized(x: torch.Tensor, size) -> torch.Tensor:
    if x.shape[-2] > size[0]:
        return F.adaptive_avg_pool2d(x, size)
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
