"""Masks on feature cells.

It knows neither the encoder nor what becomes of the cells.
"""

import torch
import torch.nn.functional as F

from network.parts import sets_of_labels


def cell_labels(mask: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """(B, H, W) object ids -> (B, h, w) object ids of the feature cells, by nearest neighbour.

    An object too small to be met by any cell's centre gets the cell that holds most of it.
    """
    cells = F.interpolate(mask[:, None].float(), size=shape, mode="nearest-exact")[:, 0].long()
    for frame, grid in zip(mask, cells):
        for object_id in set(frame.unique().tolist()) - set(grid.unique().tolist()) - {0}:
            share = F.adaptive_avg_pool2d((frame == object_id)[None].float(), shape)[0]
            grid.view(-1)[share.argmax()] = object_id
    return cells


def sets_of(mask: torch.Tensor, shape: tuple[int, int], object_ids) -> torch.Tensor:
    """(H, W) object ids -> (h, w) the set of each feature cell, -1 for none."""
    return sets_of_labels(cell_labels(mask[None], shape)[0], object_ids)
