"""Reference masks on the feature map, and zoomed crops of reference frames.

Uses NumPy and OpenCV only, so that PyTorch and onnxruntime share it and get identical masks.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

# Scales of the zoomed crops around each object, which let it be recognised when it comes closer to
# the camera. Each scale and object costs one run of the encoder per reference frame, and all crops
# together at most as many keys as one frame. With an earlier network J&F was 0.849 without crops,
# 0.856 with them; they gained most in `motocross-bumps` (0.763 to 0.852) and cost in `rhino` (0.845
# to 0.810), see docs/log/2026-11-24-ablations.md.
CLOSER = (2.0, 4.0)
# Locations of background around an object that are taken from a crop as well, so that the boundary
# is matched against both sides. Further background is in the uncropped frame anyway.
MARGIN = 2


def reference(model: Any, image: Any, mask: np.ndarray,
              object_ids: Sequence[int]) -> tuple[Any, np.ndarray, np.ndarray]:
    """Encode a reference frame and its zoomed crops: the arguments of `start`.

    Args:
        model: encodes images, with PyTorch or with onnxruntime.
        image: (1, 3, H, W) ImageNet-normalised array of the model's library.
        mask: (H, W) object ids; the size may differ from the image's.
        object_ids: ids of the N objects, in the order of the state's channels.

    Returns:
        Features of V = 1 + N * len(CLOSER) views, the frame first; (V, N+1, h*side, w*side) float32
        shares of background and objects; (V, h, w) int64 labels (see `labels_of`).
    """
    features = model.encode(image)
    grid = tuple(features.local_key.shape[1:3])
    pixels = tuple(model.side * side for side in grid)
    views, masks = [features], [shares_of(mask, pixels, object_ids)]
    labels = [labels_of(mask, grid, object_ids)]
    for view in closer(mask, tuple(image.shape[2:]), grid, object_ids):
        views.append(model.encode(image[:, :, view.rows, view.columns], grid))
        masks.append(shares_of(view.mask, pixels, object_ids))
        labels.append(view.labels)
    # objects that are not in the mask get empty views: shapes must not depend on values
    for _ in range(1 + len(CLOSER) * len(object_ids) - len(views)):
        views.append(features)
        masks.append(0 * masks[0])
        labels.append(0 * labels[0] - 1)
    # of the crops, only keys and values enter the memory; other features are the frame's alone
    parts = {name: model.concatenate([getattr(view, name) for view in views])
             for name in ("key", "shared")}
    return features._replace(**parts), np.stack(masks), np.stack(labels)


class View(NamedTuple):
    """A zoomed crop of a reference frame, encoded on a feature map as large as the frame's.

    Args:
        rows, columns: the crop, in pixels of the frame.
        mask: object ids within the crop, one per pixel.
        labels: (h, w) as `labels_of` returns them, and -1 for locations left out of the memory.
    """

    rows: slice
    columns: slice
    mask: np.ndarray
    labels: np.ndarray


def labels_of(mask: np.ndarray, grid: tuple[int, int], object_ids: Sequence[int]) -> np.ndarray:
    """Assign each location of the feature map to a set, by nearest neighbour.

    An object that contains no centre of a location gets the location that it covers most, or, if
    that is another object's only one, the nearest free one. So no object has an empty set, which
    could not be matched.

    Args:
        mask: (H, W) object ids.
        grid: size (h, w) of the feature map.
        object_ids: ids of the N objects, in the order of their sets.

    Returns:
        (h, w) int64: 0 background, i in 1..N for `object_ids[i - 1]`, -1 for ids not listed.
    """
    rows, columns = (_centres(side, count) for side, count in zip(mask.shape, grid))
    ids = mask[rows][:, columns].astype(np.int64)
    for object_id in sorted(set(np.unique(mask).tolist()) - set(np.unique(ids).tolist()) - {0}):
        inside = mask == object_id
        y, x = ((places.mean() + 0.5) * count / side
                for places, count, side in zip(np.nonzero(inside), grid, mask.shape))
        distance = np.hypot(np.arange(grid[0])[:, None] + 0.5 - y, np.arange(grid[1]) + 0.5 - x)
        share = _pooled(inside.astype(np.float32), grid)
        preference = np.where(share > 0, share, -distance)
        only = (ids > 0) & (np.bincount(ids.ravel(), minlength=256)[ids] == 1)
        ids.flat[np.where(only, -np.inf, preference).argmax()] = object_id
    labels = np.full(grid, -1)
    for i, object_id in enumerate((0, *object_ids)):
        labels[ids == object_id] = i
    return labels


def _centres(side: int, count: int) -> np.ndarray:
    """Return the pixel that contains the centre of each of `count` locations along a side.

    In float32, so that it rounds like PyTorch's "nearest-exact" interpolation.
    """
    centre = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * np.float32(side / count)
    return np.minimum(centre.astype(np.int64), side - 1)


def _pooled(x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Adaptive average pooling of (H, W) to (h, w)."""
    for side, count in zip(x.shape, shape):  # rows, then columns
        bounds = [(i * side // count, -(-(i + 1) * side // count)) for i in range(count)]
        x = np.stack([x[first:end].mean(0) for first, end in bounds]).T
    return x


def shares_of(mask: np.ndarray, shape: tuple[int, int], object_ids: Sequence[int]) -> np.ndarray:
    """Resize (H, W) object ids to (N+1, *shape) float32 shares of background and objects.

    Shares are in [0, 1], the fraction of the pixel's area. They sum to 1 unless the mask contains
    ids that are not in `object_ids`.
    """
    shares = np.stack([mask == i for i in (0, *object_ids)]).astype(np.float32)
    if mask.shape == tuple(shape):
        return shares
    rows, columns = (bilinear(before, after) for before, after in zip(mask.shape, shape))
    return rows @ shares @ columns.T


def bilinear(before: int, after: int) -> np.ndarray:
    """Return the (after, before) float32 matrix of antialiased bilinear resizing along one side."""
    step = before / after
    centres = (np.arange(after)[:, None] + 0.5) * step
    distance = abs(np.arange(before) + 0.5 - centres) / max(1.0, step)
    weights = (1 - distance).clip(min=0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def closer(mask: np.ndarray, shape: tuple[int, int], grid: tuple[int, int],
           object_ids: Sequence[int]) -> Iterator[View]:
    """Yield zoomed crops of each object that is in the mask, one for each scale in `CLOSER`.

    All crops together add at most as many locations to the memory as one frame has, which bounds
    the time of the search for any number of objects.

    Args:
        mask: (H, W) object ids; resized to the frame by nearest neighbour.
        shape: size (H, W) of the frame in pixels.
        grid: size (h, w) of the feature map.
        object_ids: ids of the objects.
    """
    mask = cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    most = grid[0] * grid[1] // max(1, len(CLOSER) * len(object_ids))
    for object_id in object_ids:
        where = mask == object_id
        for scale in CLOSER if where.any() else ():
            rows, columns = around(where, scale)
            part = mask[rows, columns]
            chosen = thinned(dilated(labels_of(part, grid, [object_id]) == 1), most)
            yield View(rows, columns, part,
                       np.where(chosen, labels_of(part, grid, object_ids), -1))


def around(mask: np.ndarray, scale: float) -> tuple[slice, slice]:
    """Return rows and columns of the crop that shows an object `scale` times as large.

    The crop has the frame's aspect ratio. It is centred on the object's bounding box, and shifted
    where it would extend beyond the frame.

    Args:
        mask: (H, W) bool, true on the object, which must have at least one pixel.
        scale: zoom factor, >= 1.
    """
    crop = []
    for indices, side in zip(np.nonzero(mask), mask.shape):
        length = max(1, round(side / scale))
        centre = (int(indices.min()) + int(indices.max()) + 1) / 2
        first = min(max(0, round(centre - length / 2)), side - length)
        crop.append(slice(first, first + length))
    return crop[0], crop[1]


def dilated(where: np.ndarray) -> np.ndarray:
    """Dilate an (h, w) bool mask by `MARGIN` locations, with a square."""
    side = 2 * MARGIN + 1
    return cv2.dilate(where.astype(np.uint8), np.ones((side, side), np.uint8)) > 0


def thinned(chosen: np.ndarray, most: int) -> np.ndarray:
    """Subsample the true elements of an (h, w) bool mask evenly, to at most `most`."""
    indices = np.flatnonzero(chosen)
    if len(indices) > most:
        indices = indices[np.arange(most) * (len(indices) - 1) // max(1, most - 1)]
    sampled = np.zeros(chosen.size, bool)
    sampled[indices] = True
    return sampled.reshape(chosen.shape)
