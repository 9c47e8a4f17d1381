"""How a reference frame is looked at: masks on feature cells, and parts of it from nearer.

It knows neither the encoder nor what becomes of what is seen.
"""

import torch
import torch.nn.functional as F

CLOSER = (2.0, 4.0)  # how many times nearer the reference frame is looked at too
MARGIN = 2  # cells around an object that are looked at with it


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
    labels = cell_labels(mask[None], shape)[0]
    sets = torch.full_like(labels, -1)
    for i, object_id in enumerate((0, *object_ids)):
        sets[labels == object_id] = i
    return sets


def near(cells: torch.Tensor) -> torch.Tensor:
    """(h, w) bool: those that are at most `MARGIN` cells from one of `cells`."""
    return F.max_pool2d(cells[None].float(), 2 * MARGIN + 1, 1, MARGIN)[0] > 0


def thinned(chosen: torch.Tensor, most: int) -> torch.Tensor:
    """(h, w) bool: at most so many of them, evenly spread."""
    places = chosen.flatten().nonzero()[:, 0]
    if len(places) > most:
        places = places[torch.linspace(0, len(places) - 1, most, device=places.device).long()]
    kept = torch.zeros_like(chosen)
    kept.view(-1)[places] = True
    return kept


def around(mask: torch.Tensor, scale: float) -> tuple[slice, slice]:
    """Rows and columns of the part of a frame that shows an object `scale` times as near.

    Args:
        mask: (H, W) bool, somewhere true: the object, whose middle is that of the part, or as
            close to it as the frame's edges allow.
    """
    part = []
    for found, side in zip(mask.nonzero(as_tuple=True), mask.shape):
        length = max(1, round(side / scale))
        middle = (int(found.min()) + int(found.max()) + 1) / 2
        first = min(max(0, round(middle - length / 2)), side - length)
        part.append(slice(first, first + length))
    return part[0], part[1]
