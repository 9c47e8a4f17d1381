"""Turn the prompts of an object (boxes, clicks, a mask) into input maps of the prompt decoder.

NumPy only, as `lite.py` computes the same maps without PyTorch.
"""

import numpy as np

from media.prompts import Prompts
from network.views import bilinear

# Channels of each kind of prompt: weights depend on their number and order, see `prompt_maps`
BOX, CLICKS, MASK = 4, 4, 2
# Widths in pixels of a click's two maps, a narrow Gaussian and a wide exponential: the first says
# which small part was clicked, the second reaches the rest of the object. Part of what the decoder
# was trained on: other values need new training.
NEAR, FAR = 8.0, 64.0


def prompt_maps(prompts: Prompts, size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Describe the prompts at each location; independent of the image's content.

    Args:
        prompts: in pixels of the image.
        size: (H, W) of the image.
        shape: (h, w) of the feature map.

    Returns:
        (BOX + CLICKS + MASK, h, w) float32. Boxes: 1 if there is any, 1 inside of one, depth in
        the box along x and along y (in box sides: 0 at the border, 0.5 in the middle, negative
        outside, at least -1). Clicks, for positive and then for negative points: proximity to
        the nearest one in [0, 1], narrow and wide. Mask: 1 if there is a previous mask, and the
        fraction of the location that it covers.
    """
    y, x = ((np.arange(locations, dtype=np.float32) + 0.5) * (side / locations)
            for side, locations in zip(size, shape))
    maps = np.zeros((BOX + CLICKS + MASK, *shape), np.float32)
    if prompts.boxes:
        maps[0] = 1
        maps[2:BOX] = _depths(prompts.boxes, x, y)
        maps[1] = maps[2:BOX].min(0) >= 0
    for i, points in enumerate((prompts.points, prompts.negative_points)):
        distance = _distance(points, x, y)
        maps[BOX + 2 * i] = np.exp(-0.5 * (distance / NEAR) ** 2)
        maps[BOX + 2 * i + 1] = np.exp(-distance / FAR)
    if prompts.mask is not None:
        rows, columns = (bilinear(*sides) for sides in zip(prompts.mask.shape, shape))
        maps[-2], maps[-1] = 1, rows @ prompts.mask.astype(np.float32) @ columns.T
    return maps


def _depths(boxes, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(2, h, w) depth along x and y of each location, in the box that it is deepest in."""
    depths = np.empty((len(boxes), 2, len(y), len(x)), np.float32)
    for depth, (left, top, width, height) in zip(depths, boxes):
        # a box of no width would divide by 0
        depth[0] = np.minimum(x - left, left + width - x) / max(width, 1.0)
        depth[1] = np.minimum(y - top, top + height - y)[:, None] / max(height, 1.0)
    which = depths.min(1).argmax(0)
    return np.take_along_axis(depths, which[None, None], 0)[0].clip(min=-1)


def _distance(points, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(h, w) distance in pixels from each location's centre to the nearest point; inf if none."""
    distance = np.full((len(y), len(x)), np.inf, np.float32)
    for u, v in points:
        distance = np.minimum(distance, np.hypot(x - (u + 0.5), (y - (v + 0.5))[:, None]))
    return distance


def clicked_locations(points, size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """(p,) int64 flat indices of the locations, in a feature map (h, w), that contain the points.

    Points outside of the image, of `size` (H, W), are clamped to its border.
    """
    height, width = shape
    return np.array([min(max(int((y + 0.5) * height / size[0]), 0), height - 1) * width
                     + min(max(int((x + 0.5) * width / size[1]), 0), width - 1)
                     for x, y in points], np.int64)
