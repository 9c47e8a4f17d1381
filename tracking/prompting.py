"""Turns boxes and points in one frame into masks.

The prompt decoder sees a crop around the prompts, enlarged, so that an object that is small in the
frame is not small for the network. Imports no PyTorch: the model may be a `VideoMatch` or an
exported network.
"""

import math
from itertools import zip_longest
from typing import Any

import cv2
import numpy as np

from masks.validation import check_frame
from media.prompts import Prompts

# Pixels of a resized crop, about. The decoder was trained at this size; 1.4 and 1.8 times as many
# gained nothing (docs/log/2026-11-25-keys-and-values.md).
CROP_AREA = 320 * 480
CROP_MULTIPLE = 32  # the sides of a crop are multiples of this: two locations of stride 16
# Context on each side of the prompts, as a share of their longer side. More of it shows the decoder
# more background, at fewer pixels for the object.
CROP_MARGIN = 0.4
MIN_CROP = 0.2  # shortest side of a crop, as a share of the frame's shorter side
MIN_ASPECT = 0.6  # shorter over longer side of a crop, unless the frame itself is narrower
# Predictions for one prompt at most, each with another crop; every further one costs another pass
# through the encoder.
MAX_CROPS = 3
SAME_CROP = 0.6  # stop when the next crop would overlap the current one by this IoU
# A mask may extend beyond a box by this share of the box's sides: people draw boxes a little tight.
BOX_TOLERANCE = 0.1


def predict_mask(model: Any, image: np.ndarray, prompts: Prompts) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) bool, the mask of the prompted object; see `predict_logits`."""
    return predict_logits(model, image, prompts) > 0


def predict_logits(model: Any, image: np.ndarray, prompts: Prompts) -> np.ndarray:
    """Predict the logits of the prompted object.

    Points alone don't tell how large the object is, and the current mask may be far too small. So
    if the predicted mask calls for a different crop, prediction is repeated with that crop.

    Args:
        model: a `VideoMatch`, or another object with its method `segment_from_prompts`.
        image: (H, W, 3) uint8 RGB.

    Returns:
        (H, W) float32, above 0 on the object; minus infinity outside the last crop.

    Raises:
        ValueError: there is no box, point or mask, or one lies outside the frame; the image or the
            mask has another dtype; or the model has no prompt decoder.
    """
    check_frame(image)
    check(prompts, image.shape[:2])
    current, crop = prompts, crop_around(prompts, image.shape[:2])
    for _ in range(MAX_CROPS):
        logits = _predict_crop(model, image, current, crop)
        mask = select_components(logits > 0, prompts)
        current = Prompts(prompts.boxes, prompts.points, prompts.negative_points, mask)
        previous, crop = crop, crop_around(current, image.shape[:2])
        if not mask.any() or crop_iou(previous, crop) > SAME_CROP:
            break
    return np.where(mask | (logits <= 0), logits, -np.inf)


def select_components(mask: np.ndarray, prompts: Prompts) -> np.ndarray:
    """Remove the parts of a predicted (H, W) bool mask that the user can't have meant.

    That is what lies far outside the boxes. With positive points, only those connected components
    remain that contain a point, or that lie mostly in the current mask: so a look-alike elsewhere
    needs no negative point, and a further component of the object needs one positive point.
    """
    if prompts.boxes:
        inside = np.zeros_like(mask)
        for x, y, w, h in prompts.boxes:
            left = max(0, math.floor(x - BOX_TOLERANCE * w))
            top = max(0, math.floor(y - BOX_TOLERANCE * h))
            inside[top:max(0, math.ceil(y + h + BOX_TOLERANCE * h)),
                   left:max(0, math.ceil(x + w + BOX_TOLERANCE * w))] = True
        mask = mask & inside
    if not prompts.points:
        return mask
    count, labels = cv2.connectedComponents(mask.astype(np.uint8))
    selected = np.zeros(count, bool)
    if prompts.mask is not None:
        in_current = np.bincount(labels[prompts.mask], minlength=count)
        selected = in_current > 0.5 * np.bincount(labels.ravel(), minlength=count)
    height, width = mask.shape
    for x, y in prompts.points:
        selected[labels[min(max(round(y), 0), height - 1), min(max(round(x), 0), width - 1)]] = True
    selected[0] = False  # the background
    # if all points missed the prediction, showing it is of more use than an empty mask
    return selected[labels] if selected.any() else mask


def crop_iou(one: tuple[slice, slice], other: tuple[slice, slice]) -> float:
    """Intersection over union of two crops, as rows and columns."""
    shared = math.prod(max(0, min(a.stop, b.stop) - max(a.start, b.start))
                       for a, b in zip(one, other))
    areas = [math.prod(side.stop - side.start for side in crop) for crop in (one, other)]
    return shared / (sum(areas) - shared)


def check(prompts: Prompts, shape: tuple[int, int]) -> None:
    """Check prompts against a frame of `shape` (H, W).

    Raises:
        ValueError: there is no box, point or mask; one lies outside the frame or has the wrong
            number of values; or the mask has another dtype or size.
    """
    height, width = shape
    if not prompts.boxes and not prompts.points and prompts.mask is None:
        raise ValueError("--point, --box: expected a box or a point on the object, found none")
    for name, kind, count, entries in (("box", "x y width height", 4, prompts.boxes),
                                       ("point", "x y", 2, prompts.points),
                                       ("negative_point", "x y", 2, prompts.negative_points)):
        for entry in entries:
            if np.shape(entry) != (count,):
                raise ValueError(f"--{name}: expected {kind}, got {entry}")
    for x, y, w, h in prompts.boxes:
        if not (0 <= x < x + w <= width and 0 <= y < y + h <= height):
            raise ValueError(f"--box {x} {y} {w} {h}: expected a part of the frame of "
                             f"{width}x{height} pixels, as x y width height")
    for name, points in (("point", prompts.points), ("negative_point", prompts.negative_points)):
        for x, y in points:
            if not (0 <= x < width and 0 <= y < height):
                raise ValueError(f"--{name} {x} {y}: expected a pixel of the frame of "
                                 f"{width}x{height} pixels, as x y counted from 0")
    if prompts.mask is None:
        return
    if prompts.mask.dtype != bool:
        raise ValueError(f"Prompts.mask: expected bool, got {prompts.mask.dtype}")
    if prompts.mask.shape != (height, width):
        raise ValueError(f"expected a mask of {width}x{height} pixels, got "
                         f"{prompts.mask.shape[1]}x{prompts.mask.shape[0]}")


def _predict_crop(model: Any, image: np.ndarray, prompts: Prompts,
                  crop: tuple[slice, slice]) -> np.ndarray:
    """Logits of the object as (H, W) float32, predicted in a crop; minus infinity outside it."""
    height, width = (side.stop - side.start for side in crop)
    prediction = model.segment_from_prompts(*resize_crop(image, prompts, crop))
    logits = np.full(image.shape[:2], -np.inf, np.float32)
    logits[crop] = cv2.resize(prediction, (width, height), interpolation=cv2.INTER_LINEAR)
    return logits


def resize_crop(image: np.ndarray, prompts: Prompts,
                crop: tuple[slice, slice]) -> tuple[np.ndarray, Prompts]:
    """Crop and resize an (H, W, 3) uint8 frame for the network, and the prompts with it."""
    patch = image[crop]
    height, width = crop_size(patch.shape[:2])
    smaller = height * width < patch.shape[0] * patch.shape[1]
    patch = cv2.resize(patch, (width, height),
                       interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    return patch, prompts.cropped(crop, (height, width))


def crop_size(shape: tuple[int, int]) -> tuple[int, int]:
    """Size (H, W) that a crop of `shape` is resized to: about `CROP_AREA`, the same aspect."""
    scale = math.sqrt(CROP_AREA / (shape[0] * shape[1]))
    height, width = (max(1, round(side * scale / CROP_MULTIPLE)) * CROP_MULTIPLE for side in shape)
    return height, width


def crop_around(prompts: Prompts, shape: tuple[int, int],
                margin: float = CROP_MARGIN) -> tuple[slice, slice]:
    """Rows and columns of the crop of an (H, W) frame around prompts.

    With points alone it is the whole frame, because they don't tell how large the object is.
    """
    extents = [(x, y, x + w, y + h) for x, y, w, h in prompts.boxes]
    if prompts.mask is not None and prompts.mask.any():
        x, y, w, h = cv2.boundingRect(prompts.mask.astype(np.uint8))
        extents.append((x, y, x + w, y + h))
    if not extents:
        return slice(0, shape[0]), slice(0, shape[1])
    extents += [(x, y, x + 1, y + 1) for x, y in (*prompts.points, *prompts.negative_points)]
    left, top, right, bottom = (choose(side) for choose, side in
                                zip((min, min, max, max), zip(*extents)))
    width, height = right - left, bottom - top
    more = 2 * margin * max(width, height)
    sides = [max(height + more, MIN_CROP * min(shape)), max(width + more, MIN_CROP * min(shape))]
    sides = [max(side, MIN_ASPECT * max(sides)) for side in sides]
    return (_centred((top + bottom) / 2, sides[0], shape[0]),
            _centred((left + right) / 2, sides[1], shape[1]))


def _centred(centre: float, length: float, side: int) -> slice:
    """A slice of `length` pixels around a centre, shifted and shortened to fit in [0, side)."""
    whole = min(side, math.ceil(length))
    first = min(max(0, round(centre - whole / 2)), side - whole)
    return slice(first, first + whole)


def predict_masks(model: Any, image: np.ndarray, objects: list[Prompts]) -> np.ndarray:
    """Predict the masks of several objects in one frame.

    The positive points of an object are negative points of the others.

    Args:
        image: (H, W, 3) uint8 RGB.
        objects: prompts of each object.

    Returns:
        (H, W) uint8, i + 1 on the i-th object; a pixel claimed by several objects goes to the one
        with the highest logit.

    Raises:
        ValueError: see `predict_logits`; or the mask of an object is empty.
    """
    check_frame(image)
    for prompts in objects:
        check(prompts, image.shape[:2])
    logits = []
    for i, prompts in enumerate(objects):
        others = [point for j, other in enumerate(objects) if j != i for point in other.points]
        logits.append(predict_logits(model, image, Prompts(
            prompts.boxes, prompts.points, [*prompts.negative_points, *others], prompts.mask)))
    mask = np.stack([np.zeros_like(logits[0]), *logits]).argmax(0).astype(np.uint8)
    for i in range(1, len(objects) + 1):
        if not (mask == i).any():
            raise ValueError(f"--box, --point: nothing was found of object {i}; add a box or more "
                             "points, or pass its mask with --mask")
    return mask


def group_by_object(boxes: list, points: list, negative_points: list) -> list[Prompts]:
    """Group flags into one `Prompts` per object: the n-th of each kind belongs to the n-th object.

    Args:
        boxes: x, y, width, height each, or None.
        points, negative_points: for each object x y x y ... in one list, or None.
    """
    return [Prompts([] if box is None else [tuple(box)],
                    *(list(zip(values[::2], values[1::2])) for values in (on or [], off or [])))
            for box, on, off in zip_longest(boxes, points, negative_points)]
