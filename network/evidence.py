"""What a person showed of an object, as arrays for the cells of an image: numpy alone.

It knows neither the image nor what looks at it.
"""

import numpy as np

from media.prompts import Prompts
from network.views import bilinear

BOX, CLICKS, MASK = 4, 4, 2  # channels
NEAR, FAR = 8.0, 64.0  # pixels within which a click counts, and beyond which it says little


def evidence(prompts: Prompts, size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
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
    y, x = ((np.arange(cells, dtype=np.float32) + 0.5) * (side / cells)
            for side, cells in zip(size, shape))
    maps = np.zeros((BOX + CLICKS + MASK, *shape), np.float32)
    if prompts.boxes:
        maps[0] = 1
        maps[2:BOX] = _depths(prompts.boxes, x, y)
        maps[1] = maps[2:BOX].min(0) >= 0
    for i, points in enumerate((prompts.points, prompts.not_points)):
        distance = _distance(points, x, y)
        maps[BOX + 2 * i] = np.exp(-0.5 * (distance / NEAR) ** 2)
        maps[BOX + 2 * i + 1] = np.exp(-distance / FAR)
    if prompts.mask is not None:
        rows, columns = (bilinear(side, cells) for side, cells in zip(prompts.mask.shape, shape))
        maps[-2], maps[-1] = 1, rows @ prompts.mask.astype(np.float32) @ columns.T
    return maps


def _depths(boxes, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(2, h, w) of each cell in the box that it is deepest in."""
    depths = np.empty((len(boxes), 2, len(y), len(x)), np.float32)
    for depth, (left, top, width, height) in zip(depths, boxes):
        # a box of no width would divide by 0
        depth[0] = np.minimum(x - left, left + width - x) / max(width, 1.0)
        depth[1] = np.minimum(y - top, top + height - y)[:, None] / max(height, 1.0)
    which = depths.min(1).argmax(0)
    return np.take_along_axis(depths, which[None, None], 0)[0].clip(min=-1)


def _distance(points, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(h, w) pixels from each cell's middle to the nearest point's; infinite where none is."""
    distance = np.full((len(y), len(x)), np.inf, np.float32)
    for u, v in points:
        distance = np.minimum(distance, np.hypot(x - (u + 0.5), (y - (v + 0.5))[:, None]))
    return distance


def clicked(points, size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """(p,) int64, which of (h, w) cells, counted row by row, each point of an image lies in.

    Points beside an image of `size` count as its nearest pixels.
    """
    height, width = shape
    return np.array([min(max(int((y + 0.5) * height / size[0]), 0), height - 1) * width
                     + min(max(int((x + 0.5) * width / size[1]), 0), width - 1)
                     for x, y in points], np.int64)
