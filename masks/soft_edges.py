"""Tells the flat areas of a mask image, which are objects, from the soft edges between them.

Works on arrays of values or colours; which of them is which object is decided in `encoding`.
"""

import itertools
from typing import NamedTuple

import cv2
import numpy as np

# Whoever changes a threshold below: tests/test_masks.py tries disks, balls, thin lines and dots,
# one or several, saved as PNG, quantised PNG and JPEG.

# Least share of a value's differing neighbours that lie on either side of it for it to be a step
# of a gradient: it would be half in an ideal ramp, and 0 for an object on its background.
BETWEEN = 0.25
LEVELS = 16  # from this many values on, gradients are slow enough for their steps to be flat
LARGE = 0.2  # share of the foreground above which a value is an object, not a step of a gradient
# Difference from the background, of 255, below which no edge is looked for: values that small are
# numbered objects (1, 2, 3 ...), and blending them would lose ids.
BRIGHT = 32
NEAR = 56  # least difference of two objects with soft edges; DAVIS colours are 64 apart
STRAIGHT = 40  # distance from the line between two colours; JPEG moves a blend by up to so much
TOP = 0.95  # quantile of the brighter half that stands for an object: the maximum may be an outlier
SOFT = 12  # most objects with soft edges in a mask; more values than that are a picture
PICTURE = 32  # number of values from which an image with hardly a flat area is a picture


class Found(NamedTuple):
    classes: np.ndarray  # indices of the values that are flat areas, without the background
    soft: bool  # whether there are soft edges between them


def is_picture(codes: np.ndarray, where: np.ndarray) -> bool:
    """Whether values vary from pixel to pixel, as in a photo.

    Args:
        codes: (H, W) int, the value of each pixel.
        where: (H, W) bool, the part of the image that counts.
    """
    inside = where[:-1, :-1] & where[1:, :-1] & where[:-1, 1:]
    same = (codes[:-1, :-1] == codes[1:, :-1]) & (codes[:-1, :-1] == codes[:-1, 1:])
    return len(np.unique(codes[where])) > PICTURE and same[inside].mean() < 0.5


def codes(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The (M, 3) distinct colours of an (H, W, 3) uint8 image, and (H, W) indices into them."""
    packed, found = np.unique(_pack(pixels), return_inverse=True)
    table = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1).astype(int)
    return table, found.reshape(pixels.shape[:2])


def _pack(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def unknown(pixels: np.ndarray, colours: list[tuple]) -> bool:
    """Whether an (H, W, 3) uint8 image has a colour that is not in the list."""
    packed = _pack(pixels)
    return not np.isin(packed, _pack(np.array(colours))).all()


def exact(pixels: np.ndarray, values: np.ndarray, ids: np.ndarray):
    """Look up the id of each pixel's colour.

    Args:
        pixels: (H, W, 3) uint8.
        values: (M, 3) the known colours.
        ids: (M,) uint8, their ids.

    Returns:
        (H, W) uint8 ids, and the first colour that is not among `values`, or None.
    """
    packed, order = _pack(pixels), np.argsort(_pack(values))
    table = _pack(values)[order]
    place = np.searchsorted(table, packed).clip(0, len(table) - 1)
    strange = table[place] != packed
    found = tuple(pixels[strange][0].tolist()) if strange.any() else None
    return ids[order][place], found


def solid(codes: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` values fill a 3x3 square somewhere: (count,) bool, from (H, W) indices."""
    planes = codes.astype(np.float32)
    same = cv2.erode(planes, _SQUARE) == cv2.dilate(planes, _SQUARE)
    return np.bincount(codes[same], minlength=count) > 0


_SQUARE = np.ones((3, 3), np.uint8)


def classes(codes: np.ndarray, table: np.ndarray, background: int, lossy: bool = False) -> Found:
    """Tell flat areas from soft edges.

    The values of an edge lie between those on either side of it and fill no 3x3 square. With
    `LEVELS` values or more they may fill one, as steps of a slow gradient.

    Args:
        codes: (H, W) int, the index of each pixel's value.
        table: (M, C) the values.
        background: index of the background's value.
        lossy: the file format changes values a little (JPEG), so similar ones are the same.

    Raises:
        ValueError: the image is a picture, with hardly a flat area.
    """
    table = table.astype(int)
    areas = np.bincount(codes.ravel(), minlength=len(table))
    others = np.flatnonzero(areas * (np.arange(len(table)) != background))
    if is_picture(codes, np.ones(codes.shape, bool)):
        raise ValueError(f"a picture of {len(others) + 1} colours")
    above = np.abs(table - table[background]).max(1)
    if not len(others):
        return Found(others, False)
    filled = solid(codes, len(table))
    edge = _crossed(codes, table) & ~filled
    steps = len(others) >= LEVELS
    if steps:
        edge |= _between(codes, above) & ~(filled & (areas > LARGE * areas[others].sum()))
    lossy &= above[others].max() >= BRIGHT
    if above[others[edge[others]]].max(initial=0) < BRIGHT and not lossy:
        return Found(others, False)
    usual = np.median([0, *areas[others[edge[others]]]])
    firm = others[~edge[others] & (above[others] >= (NEAR if steps or lossy else 1))]
    firm = firm[filled[firm] | (areas[firm] >= 5 * usual) | (not steps)]
    if not len(firm):
        firm = _top(others, areas, above)
    firm = _apart(firm, areas, table, background)
    strange = others[~_blends(table[others], table[[background, *firm]])]
    strange_area = areas[strange].sum() * (len(others) > PICTURE)
    if len(firm) > SOFT or strange_area > 0.3 * areas[others].sum():
        raise ValueError(f"a picture of {len(others) + 1} colours")
    return Found(firm, True)


def _top(others: np.ndarray, areas: np.ndarray, above: np.ndarray) -> np.ndarray:
    """The index of the value that stands for an object without a flat area, as an array (1,).

    It is nearly the brightest one, by area, of its brighter half.
    """
    bright = others[2 * above[others] >= above[others].max()]
    bright = bright[above[bright].argsort()]
    covered = areas[bright].cumsum()
    return bright[[np.searchsorted(covered, TOP * covered[-1])]]


def _crossed(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Which values, (M,) bool, mostly lie between two opposite neighbours of their pixels.

    Only pixels that differ from a neighbour are looked at, and so only they cost time.
    """
    padded = np.pad(codes, 1, mode="edge")
    differs = np.zeros(codes.shape, bool)
    for axis in (0, 1):
        step = np.diff(codes, axis=axis) != 0
        for part in (slice(1, None), slice(None, -1)):
            differs[(part, slice(None)) if axis == 0 else (slice(None), part)] |= step
    y, x = np.nonzero(differs)
    own, crossed = table[codes[y, x]], np.zeros(len(y), bool)
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        one, other = (table[padded[y + 1 + sign * dy, x + 1 + sign * dx]] for sign in (1, -1))
        along = other - one
        share = ((own - one) * along).sum(1) / (along ** 2).sum(1).clip(1)
        off = np.abs(one + share[:, None] * along - own).max(1)
        crossed |= (share > 0) & (share < 1) & (off <= STRAIGHT)
    found = np.bincount(codes[y, x][crossed], minlength=len(table))
    return 2 * found >= np.bincount(codes.ravel(), minlength=len(table)).clip(1)


def _between(codes: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Which values, (M,) bool, have brighter and darker neighbours, as steps of a gradient do."""
    up, down = np.zeros(len(above)), np.zeros(len(above))
    for one, other in ((codes[:, :-1], codes[:, 1:]), (codes[:-1], codes[1:])):
        differ = above[one] != above[other]
        one, other = one[differ], other[differ]
        low = np.where(above[one] < above[other], one, other)
        up += np.bincount(low, minlength=len(above))
        down += np.bincount(one + other - low, minlength=len(above))
    return (np.minimum(up, down) >= BETWEEN * (up + down)) & (up + down > 0)


def _blends(colours: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which of (K, C) colours lie on a line between two of (M, C) others, as (K,) bool."""
    found = np.zeros(len(colours), bool)
    for one, other in itertools.combinations(ends, 2):
        along = other - one
        share = ((colours - one) @ along / max(1, along @ along)).clip(0, 1)
        found |= np.abs(one + share[:, None] * along - colours).max(1) <= STRAIGHT
    return found


def _apart(firm: np.ndarray, areas: np.ndarray, table: np.ndarray, background: int) -> np.ndarray:
    """Keep the largest of values that are nearly the same, as JPEG makes them.

    A value of less than a tenth of the smallest area kept so far that blends others is an edge.
    """
    kept: list[int] = []
    for index in sorted(firm.tolist(), key=lambda i: -areas[i]):
        ends = table[[background, *kept]]
        blurred = (10 * areas[index] < areas[kept].min(initial=areas.max())
                   and _blends(table[[index]], ends).all())
        if not blurred and (np.abs(table[index] - ends).max(1) >= NEAR).all():
            kept.append(index)
    return np.array(sorted(kept) or [firm[areas[firm].argmax()]])


def nearest(pixels: np.ndarray, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Give each pixel of a mask with soft edges the id of the nearest value.

    With several objects only the two whose flat areas are closest to a pixel compete, because the
    edge of a bright object passes through the values of darker ones.

    Args:
        pixels: (H, W, C).
        values: (M, C), the background's first.
        ids: (M,) uint8.

    Returns:
        (H, W) uint8; a pixel half way between background and object belongs to the object.
    """
    pixels = pixels.astype(np.int32)
    off = np.stack([((pixels - value) ** 2).sum(2) for value in values])  # (M, H, W)
    if len(values) > 2:
        far = np.stack([_distance(np.abs(pixels - value).max(2) < NEAR // 2) for value in values])
        off = np.where(far > np.partition(far, 1, axis=0)[1], np.iinfo(np.int32).max, off)
    # argmin takes the first of equals: reversed, so that the object wins over the background
    return ids[len(values) - 1 - off[::-1].argmin(0)]


def _distance(where: np.ndarray) -> np.ndarray:
    """Distance in pixels to the nearest flat area of an (H, W) bool mask; inf where it is empty."""
    where = where.astype(np.uint8)
    area = cv2.morphologyEx(where, cv2.MORPH_OPEN, _SQUARE)
    area = area if area.any() else where
    if not area.any():
        return np.full(where.shape, np.inf, np.float32)
    return cv2.distanceTransform(1 - area, cv2.DIST_L2, 3)
