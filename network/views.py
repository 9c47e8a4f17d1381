"""Reference masks on the feature map, and which parts of a reference frame are seen from closer.

numpy alone, so that it serves PyTorch and onnxruntime alike: masks arrive as arrays.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

CLOSER = (2.0, 4.0)  # an object that comes closer is found by views at these scales
MARGIN = 2  # locations around an object that are kept with it


def reference(model: Any, image: Any, mask: np.ndarray,
              object_ids: Sequence[int]) -> tuple[Any, np.ndarray, np.ndarray]:
    """What `start` takes of a reference frame.

    Args:
        model: which encodes, with PyTorch or with onnxruntime.
        image: (1, 3, H, W), the model's array.
        mask: (H, W) object ids, of any size.

    Returns:
        Features of the frame and of closer views of its objects; (V, N+1, h*side, w*side) masks
        and (V, h, w) labels of them.
    """
    features = model.encode(image)
    grid = tuple(features.near.shape[1:3])
    pixels = tuple(model.side * side for side in grid)
    views, masks = [features], [shares_of(mask, pixels, object_ids)]
    labels = [labels_of(mask, grid, object_ids)]
    for view in closer(mask, tuple(image.shape[2:]), grid, object_ids):
        views.append(model.encode(image[:, :, view.rows, view.columns], grid))
        masks.append(shares_of(view.mask, pixels, object_ids))
        labels.append(view.labels)
    # as many views whatever is in the mask: an object that isn't has empty ones
    for _ in range(1 + len(CLOSER) * len(object_ids) - len(views)):
        views.append(features)
        masks.append(0 * masks[0])
        labels.append(0 * labels[0] - 1)
    # nothing else is asked of the views
    parts = {name: model.concatenate([getattr(view, name) for view in views])
             for name in ("key", "shared")}
    return features._replace(**parts), np.stack(masks), np.stack(labels)


class View(NamedTuple):
    """A part of a reference frame, which is encoded as large as the whole frame.

    Args:
        rows, columns: which part.
        mask: (H, W) object ids there.
        labels: (h, w) as `labels_of`, -1 also where a location isn't kept.
    """

    rows: slice
    columns: slice
    mask: np.ndarray
    labels: np.ndarray


def labels_of(mask: np.ndarray, grid: tuple[int, int], object_ids: Sequence[int]) -> np.ndarray:
    """(H, W) object ids -> (h, w) int64: 0 background, i the i-th of `object_ids`, -1 another.

    By nearest neighbour. An object too small to be met by the middle of any location gets the
    location that holds most of it.
    """
    rows, columns = (_middles(side, cells) for side, cells in zip(mask.shape, grid))
    ids = mask[rows][:, columns].astype(np.int64)
    for object_id in set(np.unique(mask).tolist()) - set(np.unique(ids).tolist()) - {0}:
        ids.flat[_pooled((mask == object_id).astype(np.float32), grid).argmax()] = object_id
    labels = np.full(grid, -1)
    for i, object_id in enumerate((0, *object_ids)):
        labels[ids == object_id] = i
    return labels


def _middles(side: int, cells: int) -> np.ndarray:
    """The pixel in which the middle of each location lies, as PyTorch rounds ("nearest-exact")."""
    where = (np.arange(cells, dtype=np.float32) + np.float32(0.5)) * np.float32(side / cells)
    return np.minimum(where.astype(np.int64), side - 1)


def _pooled(x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) -> (h, w): adaptive average pooling."""
    for side, cells in zip(x.shape, shape):  # rows, then columns
        bounds = [(i * side // cells, -(-(i + 1) * side // cells)) for i in range(cells)]
        x = np.stack([x[first:end].mean(0) for first, end in bounds]).T
    return x


def shares_of(mask: np.ndarray, shape: tuple[int, int], object_ids: Sequence[int]) -> np.ndarray:
    """(H, W) object ids -> (N+1, *shape) float32: the share of background and of each object."""
    shares = np.stack([mask == i for i in (0, *object_ids)]).astype(np.float32)
    if mask.shape == tuple(shape):
        return shares
    rows, columns = (bilinear(side, after) for side, after in zip(mask.shape, shape))
    return rows @ shares @ columns.T


def bilinear(before: int, after: int) -> np.ndarray:
    """(after, before) float32: resizing along one side, without aliasing where it reduces."""
    step = before / after
    middles = (np.arange(after)[:, None] + 0.5) * step
    away = abs(np.arange(before) + 0.5 - middles) / max(1.0, step)
    weights = (1 - away).clip(min=0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def closer(mask: np.ndarray, shape: tuple[int, int], grid: tuple[int, int],
           object_ids: Sequence[int]) -> Iterator[View]:
    """How each object and its surroundings look from closer.

    Those of all objects together are no more locations than a frame has.

    Args:
        mask: (H, W) object ids, of any size.
        shape: (H, W) of the frame.
        grid: (h, w) of the feature map.
    """
    mask = cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    most = grid[0] * grid[1] // max(1, len(CLOSER) * len(object_ids))
    for object_id in object_ids:
        where = mask == object_id
        for scale in CLOSER if where.any() else ():
            rows, columns = around(where, scale)
            part = mask[rows, columns]
            kept = thinned(near(labels_of(part, grid, [object_id]) == 1), most)
            yield View(rows, columns, part, np.where(kept, labels_of(part, grid, object_ids), -1))


def around(mask: np.ndarray, scale: float) -> tuple[slice, slice]:
    """Rows and columns of the part of a frame that shows an object `scale` times as large.

    Args:
        mask: (H, W) bool, somewhere true: the object, whose middle is that of the part, or as
            close to it as the frame's edges allow.
    """
    part = []
    for found, side in zip(np.nonzero(mask), mask.shape):
        length = max(1, round(side / scale))
        middle = (int(found.min()) + int(found.max()) + 1) / 2
        first = min(max(0, round(middle - length / 2)), side - length)
        part.append(slice(first, first + length))
    return part[0], part[1]


def near(where: np.ndarray) -> np.ndarray:
    """(h, w) bool: at most `MARGIN` locations away along both sides."""
    side = 2 * MARGIN + 1
    return cv2.dilate(where.astype(np.uint8), np.ones((side, side), np.uint8)) > 0


def thinned(chosen: np.ndarray, most: int) -> np.ndarray:
    """(h, w) bool: at most so many of them, evenly spread."""
    places = np.flatnonzero(chosen)
    if len(places) > most:
        places = places[np.arange(most) * (len(places) - 1) // max(1, most - 1)]
    kept = np.zeros(chosen.size, bool)
    kept[places] = True
    return kept.reshape(chosen.shape)
