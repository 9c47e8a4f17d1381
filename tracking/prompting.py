"""One frame: from what a person shows of objects to their masks.

What is shown tells which part of the frame to look at, and that part is encoded enlarged: an
object that is small in the frame isn't small to the network. It imports no PyTorch: `VideoMatch`
looks, or an export of it. How the person is asked, and what becomes of the mask, is not known here.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from typing import Any

import cv2
import numpy as np

from masks.validation import check_frame
from media.shown import Prompts

AREA = 320 * 480  # pixels that the network sees, about
STEP = 32  # pixels, which the sides of what it sees are multiples of
MARGIN = 0.4  # seen on each side of what is shown, as a share of its longer side
LOOKS = 3  # at most, each at another part
BESIDE = 0.1  # of a box's sides: what lies farther outside isn't of its object
SAME = 0.6  # intersection over union from which two parts are as good as the same
LEAST = 0.2  # of the frame's shorter side is seen at least
NARROWEST = 0.6  # the shorter side of what is seen is so much of the longer one, if the frame's is

Prompter = Callable[[np.ndarray, Prompts], np.ndarray]


def prompter(model: Any) -> Prompter:
    """(H, W, 3) uint8 RGB and `Prompts` of one object -> (H, W) bool, its mask; see `prompt`."""
    return partial(prompt, model)


def prompt(model: Any, image: np.ndarray, prompts: Prompts) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) bool, the object that the prompts show; see `logits`."""
    return logits(model, image, prompts) > 0


def logits(model: Any, image: np.ndarray, prompts: Prompts) -> np.ndarray:
    """How sure it is that each pixel is of the object that the prompts show.

    Clicks alone don't tell how large the object is, and a mask so far may be far too small. So
    where what is found would have been looked for in quite another part of the frame, it is looked
    for again, there.

    Args:
        model: the network, as `VideoMatch` is one.

    Returns:
        (H, W) float32, above 0 on the object; minus infinity in parts that weren't looked at.

    Raises:
        ValueError: nothing is shown, or it doesn't lie in the frame; the image or a mask is of
            another type; or the model was not trained for it.
    """
    check_frame(image)
    check(prompts, image.shape[:2])
    shown, part = prompts, around(prompts, image.shape[:2])
    for _ in range(LOOKS):
        found = _look(model, image, shown, part)
        mask = meant(found > 0, prompts)
        shown = Prompts(prompts.boxes, prompts.points, prompts.not_points, mask)
        before, part = part, around(shown, image.shape[:2])
        if not mask.any() or overlap(before, part) > SAME:
            break
    return np.where(mask | (found <= 0), found, -np.inf)


def meant(found: np.ndarray, prompts: Prompts) -> np.ndarray:
    """What a person can have meant of an (H, W) bool mask that answers prompts.

    Nothing far beside their boxes; and if they clicked on the object, of the parts that don't hang
    together only those with a click or with most of it in the mask so far. So a person who
    wants one part more clicks on it, and look-alikes elsewhere need no click each.
    """
    if prompts.boxes:
        inside = np.zeros_like(found)
        for x, y, w, h in prompts.boxes:
            left, top = max(0, math.floor(x - BESIDE * w)), max(0, math.floor(y - BESIDE * h))
            inside[top:max(0, math.ceil(y + h + BESIDE * h)),
                   left:max(0, math.ceil(x + w + BESIDE * w))] = True
        found = found & inside
    if not prompts.points:
        return found
    count, labels = cv2.connectedComponents(found.astype(np.uint8))
    kept = np.zeros(count, bool)
    if prompts.mask is not None:
        before = np.bincount(labels[prompts.mask], minlength=count)
        kept = before > 0.5 * np.bincount(labels.ravel(), minlength=count)
    height, width = found.shape
    for x, y in prompts.points:
        kept[labels[min(max(round(y), 0), height - 1), min(max(round(x), 0), width - 1)]] = True
    kept[0] = False
    return kept[labels] if kept.any() else found


def overlap(one: tuple[slice, slice], other: tuple[slice, slice]) -> float:
    """Intersection over union of two parts of a frame."""
    shared = math.prod(max(0, min(a.stop, b.stop) - max(a.start, b.start))
                       for a, b in zip(one, other))
    areas = [math.prod(side.stop - side.start for side in part) for part in (one, other)]
    return shared / (sum(areas) - shared)


def check(prompts: Prompts, shape: tuple[int, int]) -> None:
    height, width = shape
    if not prompts.boxes and not prompts.points and prompts.mask is None:
        raise ValueError("--point, --box: expected something of the object itself, found none")
    for name, kind, count, entries in (("box", "x y width height", 4, prompts.boxes),
                                       ("point", "x y", 2, prompts.points),
                                       ("not_point", "x y", 2, prompts.not_points)):
        for entry in entries:
            if np.shape(entry) != (count,):
                raise ValueError(f"--{name}: expected {kind}, got {entry}")
    for x, y, w, h in prompts.boxes:
        if not (0 <= x < x + w <= width and 0 <= y < y + h <= height):
            raise ValueError(f"--box {x} {y} {w} {h}: expected a part of the frame of "
                             f"{width}x{height} pixels, as x y width height")
    for name, points in (("point", prompts.points), ("not_point", prompts.not_points)):
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


def _look(model: Any, image: np.ndarray, prompts: Prompts,
          part: tuple[slice, slice]) -> np.ndarray:
    """(H, W) float32 logits, of what is found in a part of a frame."""
    height, width = (side.stop - side.start for side in part)
    answer = model.look(*part_of(image, prompts, part))
    found = np.full(image.shape[:2], -np.inf, np.float32)
    found[part] = cv2.resize(answer, (width, height), interpolation=cv2.INTER_LINEAR)
    return found


def part_of(image: np.ndarray, prompts: Prompts,
            part: tuple[slice, slice]) -> tuple[np.ndarray, Prompts]:
    """A part of an (H, W, 3) uint8 frame as the network is to see it, and prompts in its pixels."""
    patch = image[part]
    height, width = seen_size(patch.shape[:2])
    smaller = height * width < patch.shape[0] * patch.shape[1]
    patch = cv2.resize(patch, (width, height),
                       interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    return patch, prompts.seen(part, (height, width))


def seen_size(shape: tuple[int, int]) -> tuple[int, int]:
    """The size at which the network sees a part of (H, W) pixels: alike in shape, of `AREA`."""
    scale = math.sqrt(AREA / (shape[0] * shape[1]))
    height, width = (max(1, round(side * scale / STEP)) * STEP for side in shape)
    return height, width


def around(prompts: Prompts, shape: tuple[int, int],
           margin: float = MARGIN) -> tuple[slice, slice]:
    """Rows and columns of the part of an (H, W) frame that prompts are about.

    The whole, where there is neither a box nor a mask.
    """
    extents = [(x, y, x + w, y + h) for x, y, w, h in prompts.boxes]
    if prompts.mask is not None and prompts.mask.any():
        x, y, w, h = cv2.boundingRect(prompts.mask.astype(np.uint8))
        extents.append((x, y, x + w, y + h))
    if not extents:
        return slice(0, shape[0]), slice(0, shape[1])
    extents += [(x, y, x + 1, y + 1) for x, y in (*prompts.points, *prompts.not_points)]
    left, top, right, bottom = (choose(side) for choose, side in
                                zip((min, min, max, max), zip(*extents)))
    width, height = right - left, bottom - top
    more = 2 * margin * max(width, height)
    sides = [max(height + more, LEAST * min(shape)), max(width + more, LEAST * min(shape))]
    sides = [max(side, NARROWEST * max(sides)) for side in sides]
    return (_within((top + bottom) / 2, sides[0], shape[0]),
            _within((left + right) / 2, sides[1], shape[1]))


def _within(middle: float, length: float, side: int) -> slice:
    """So many pixels about a middle, or as close to it as the frame allows."""
    whole = min(side, math.ceil(length))
    first = min(max(0, round(middle - whole / 2)), side - whole)
    return slice(first, first + whole)


def masks_of(model: Any, image: np.ndarray, objects: list[Prompts]) -> np.ndarray:
    """Several objects of one frame: what is shown of one is not any other.

    Returns:
        (H, W) uint8, i + 1 on the i-th object; where several claim a pixel, the surest.

    Raises:
        ValueError: see `logits`; or nothing was found of an object.
    """
    check_frame(image)
    for shown in objects:
        check(shown, image.shape[:2])
    found = []
    for i, shown in enumerate(objects):
        others = [point for j, other in enumerate(objects) if j != i for point in other.points]
        found.append(logits(model, image, Prompts(
            shown.boxes, shown.points, [*shown.not_points, *others], shown.mask)))
    sure = np.stack([np.zeros_like(found[0]), *found])
    mask = sure.argmax(0).astype(np.uint8)
    for i in range(1, len(sure)):
        if not (mask == i).any():
            raise ValueError(f"--box, --point: nothing was found of object {i}; show more of it, "
                             "or bring its mask with --mask")
    return mask


def in_order(boxes: list, points: list, not_points: list) -> list[Prompts]:
    """Of the n-th object the n-th box, points and not-points, each x y after x y in one list."""
    return [Prompts([] if box is None else [tuple(box)],
                    *(list(zip(values[::2], values[1::2])) for values in (on or [], off or [])))
            for box, on, off in zip_longest(boxes, points, not_points)]
