"""Tells the flat areas of a mask image, which are objects, from the soft edges between them.

Works on arrays of grey values or colours; `encoding` decides which object each of them is.
"""

import itertools
from typing import NamedTuple

import cv2
import numpy as np

# None of these thresholds follows from theory. After a change run tests/test_masks.py, which reads
# disks, balls, thin lines and dots, one or several, saved as PNG, quantised PNG and JPEG.

# Share of a value's differing neighbours that must be brighter, and share that must be darker, for
# it to be a step of a ramp. In an ideal ramp each is 0.5; for an object on its background one is 0.
RAMP_SHARE = 0.25
RAMP_LEVELS = 16  # from this number of values on, steps of a ramp may be wide enough to look flat
OBJECT_SHARE = 0.2  # a value that covers more than this of the foreground is an object, not a step
# Least contrast to the background, of 255, of a soft edge. Values below it are numbered objects
# (1, 2, 3 ...); taken for an edge they would be merged and lose their ids.
MIN_CONTRAST = 32
# Least difference of two objects with soft edges; below 64, the distance of the colours of DAVIS.
MIN_DISTANCE = 56
# Largest distance of a blend from the line between the two colours that it blends, where JPEG
# moves it.
BLEND_TOLERANCE = 40
# Quantile of the brighter half that stands for an object without a flat area. Below 1, because the
# maximum may be an outlier.
TOP_QUANTILE = 0.95
MAX_SOFT_OBJECTS = 12  # with more objects than this, a file with soft edges is taken for a picture
PICTURE_VALUES = 32  # with more values than this and hardly a flat area, a file is a picture


class FlatValues(NamedTuple):
    """Result of `find_flat_values`.

    Args:
        indices: of the values that are flat areas, without the background.
        soft: whether there are soft edges between them.
    """

    indices: np.ndarray
    soft: bool


def is_picture(codes: np.ndarray, where: np.ndarray) -> bool:
    """Whether values vary from pixel to pixel, as in a photo.

    Args:
        codes: (H, W) int, the index of each pixel's value.
        where: (H, W) bool, the pixels to look at.
    """
    inside = where[:-1, :-1] & where[1:, :-1] & where[:-1, 1:]
    same = (codes[:-1, :-1] == codes[1:, :-1]) & (codes[:-1, :-1] == codes[:-1, 1:])
    return len(np.unique(codes[where])) > PICTURE_VALUES and same[inside].mean() < 0.5


def unique_colours(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the distinct colours of an image.

    Args:
        pixels: (H, W, 3) uint8.

    Returns:
        (M, 3) int colours, and for each pixel its index into them, (H, W) int.
    """
    packed, indices = np.unique(_pack(pixels), return_inverse=True)
    table = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1).astype(int)
    return table, indices.reshape(pixels.shape[:2])


def _pack(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def has_other_colours(pixels: np.ndarray, colours: list[tuple]) -> bool:
    """Whether an (H, W, 3) uint8 image has a colour that is not in `colours`."""
    packed = _pack(pixels)
    return not np.isin(packed, _pack(np.array(colours))).all()


def look_up(pixels: np.ndarray, values: np.ndarray, ids: np.ndarray):
    """Look up the id of each pixel's colour.

    Args:
        pixels: (H, W, 3) uint8.
        values: (M, 3) the colours of the background and of the objects.
        ids: (M,) uint8, their ids.

    Returns:
        (H, W) uint8 ids, and the first colour that is not in `values`, or None.
    """
    packed, order = _pack(pixels), np.argsort(_pack(values))
    table = _pack(values)[order]
    place = np.searchsorted(table, packed).clip(0, len(table) - 1)
    other = table[place] != packed
    first_other = tuple(pixels[other][0].tolist()) if other.any() else None
    return ids[order][place], first_other


def fills_square(codes: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` values fill a 3x3 square somewhere: (count,) bool, from (H, W) indices."""
    planes = codes.astype(np.float32)
    same = cv2.erode(planes, _SQUARE) == cv2.dilate(planes, _SQUARE)
    return np.bincount(codes[same], minlength=count) > 0


_SQUARE = np.ones((3, 3), np.uint8)


def find_flat_values(codes: np.ndarray, table: np.ndarray, background: int,
                     lossy: bool = False) -> FlatValues:
    """Find the values of flat areas, as opposed to those of soft edges.

    The values of an edge lie between those on either side of it and fill no 3x3 square. With
    `RAMP_LEVELS` values or more they may fill one, as steps of a slow ramp.

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
    contrast = np.abs(table - table[background]).max(1)
    if not len(others):
        return FlatValues(others, False)
    filled = fills_square(codes, len(table))
    edge = _lie_on_edges(codes, table) & ~filled
    ramps = len(others) >= RAMP_LEVELS
    if ramps:
        edge |= _are_ramp_steps(codes, contrast) & ~(
            filled & (areas > OBJECT_SHARE * areas[others].sum()))
    lossy &= contrast[others].max() >= MIN_CONTRAST
    if contrast[others[edge[others]]].max(initial=0) < MIN_CONTRAST and not lossy:
        return FlatValues(others, False)
    typical = np.median([0, *areas[others[edge[others]]]])
    flat = others[~edge[others] & (contrast[others] >= (MIN_DISTANCE if ramps or lossy else 1))]
    # an object that is too thin to fill a square is still larger than the values of an edge
    flat = flat[filled[flat] | (areas[flat] >= 5 * typical) | (not ramps)]
    if not len(flat):
        flat = _brightest(others, areas, contrast)
    flat = _merge_similar(flat, areas, table, background)
    unexplained = others[~_are_blends(table[others], table[[background, *flat]])]
    unexplained_area = areas[unexplained].sum() * (len(others) > PICTURE_VALUES)
    if len(flat) > MAX_SOFT_OBJECTS or unexplained_area > 0.3 * areas[others].sum():
        raise ValueError(f"a picture of {len(others) + 1} colours")
    return FlatValues(flat, True)


def _brightest(others: np.ndarray, areas: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """The value that stands for an object without a flat area, as an array (1,) of its index.

    That is the `TOP_QUANTILE` by area of the values with at least half the largest contrast.
    """
    bright = others[2 * contrast[others] >= contrast[others].max()]
    bright = bright[contrast[bright].argsort()]
    covered = areas[bright].cumsum()
    return bright[[np.searchsorted(covered, TOP_QUANTILE * covered[-1])]]


def _lie_on_edges(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Which values, (M,) bool, mostly lie between the values of two opposite neighbours.

    Only pixels that differ from a neighbour are examined, so flat areas cost no time.
    """
    padded = np.pad(codes, 1, mode="edge")
    differs = np.zeros(codes.shape, bool)
    for axis in (0, 1):
        step = np.diff(codes, axis=axis) != 0
        for part in (slice(1, None), slice(None, -1)):
            differs[(part, slice(None)) if axis == 0 else (slice(None), part)] |= step
    y, x = np.nonzero(differs)
    own, on_edge = table[codes[y, x]], np.zeros(len(y), bool)
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        one, other = (table[padded[y + 1 + sign * dy, x + 1 + sign * dx]] for sign in (1, -1))
        along = other - one
        share = ((own - one) * along).sum(1) / (along ** 2).sum(1).clip(1)
        off = np.abs(one + share[:, None] * along - own).max(1)
        on_edge |= (share > 0) & (share < 1) & (off <= BLEND_TOLERANCE)
    counts = np.bincount(codes[y, x][on_edge], minlength=len(table))
    return 2 * counts >= np.bincount(codes.ravel(), minlength=len(table)).clip(1)


def _are_ramp_steps(codes: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Which values, (M,) bool, have both brighter and darker neighbours, as steps of a ramp do."""
    up, down = np.zeros(len(contrast)), np.zeros(len(contrast))
    for one, other in ((codes[:, :-1], codes[:, 1:]), (codes[:-1], codes[1:])):
        differ = contrast[one] != contrast[other]
        one, other = one[differ], other[differ]
        low = np.where(contrast[one] < contrast[other], one, other)
        up += np.bincount(low, minlength=len(contrast))
        down += np.bincount(one + other - low, minlength=len(contrast))
    return (np.minimum(up, down) >= RAMP_SHARE * (up + down)) & (up + down > 0)


def _are_blends(colours: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which of (K, C) colours, as (K,) bool, lie on a line between two of the (M, C) `ends`."""
    blends = np.zeros(len(colours), bool)
    for one, other in itertools.combinations(ends, 2):
        along = other - one
        share = ((colours - one) @ along / max(1, along @ along)).clip(0, 1)
        blends |= np.abs(one + share[:, None] * along - colours).max(1) <= BLEND_TOLERANCE
    return blends


def _merge_similar(flat: np.ndarray, areas: np.ndarray, table: np.ndarray,
                   background: int) -> np.ndarray:
    """Merge values that are nearly the same, as in JPEG files; the one with the largest area stays.

    A blend with less than a tenth of the smallest area that stays is dropped as an edge.
    """
    kept: list[int] = []
    for index in sorted(flat.tolist(), key=lambda i: -areas[i]):
        ends = table[[background, *kept]]
        blurred = (10 * areas[index] < areas[kept].min(initial=areas.max())
                   and _are_blends(table[[index]], ends).all())
        if not blurred and (np.abs(table[index] - ends).max(1) >= MIN_DISTANCE).all():
            kept.append(index)
    return np.array(sorted(kept) or [flat[areas[flat].argmax()]])


def nearest(pixels: np.ndarray, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Give each pixel of a mask with soft edges the id of the nearest value.

    With several objects, only the two with the closest flat areas compete for a pixel: the edge of
    a bright object passes through the values of darker ones.

    Args:
        pixels: (H, W, C).
        values: (M, C), the background's value first.
        ids: (M,) uint8.

    Returns:
        (H, W) uint8; a pixel half way between background and object belongs to the object.
    """
    pixels = pixels.astype(np.int32)
    off = np.stack([((pixels - value) ** 2).sum(2) for value in values])  # (M, H, W)
    if len(values) > 2:
        far = np.stack([_distance_to_flat_area(np.abs(pixels - value).max(2) < MIN_DISTANCE // 2)
                        for value in values])
        off = np.where(far > np.partition(far, 1, axis=0)[1], np.iinfo(np.int32).max, off)
    # argmin takes the first of equals: reversed, so that the object wins over the background
    return ids[len(values) - 1 - off[::-1].argmin(0)]


def _distance_to_flat_area(where: np.ndarray) -> np.ndarray:
    """Distance in pixels to the nearest 3x3 square of an (H, W) bool mask, as (H, W) float32.

    If the mask contains no such square, it is the distance to the mask; inf if that is empty.
    """
    where = where.astype(np.uint8)
    area = cv2.morphologyEx(where, cv2.MORPH_OPEN, _SQUARE)
    area = area if area.any() else where
    if not area.any():
        return np.full(where.shape, np.inf, np.float32)
    return cv2.distanceTransform(1 - area, cv2.DIST_L2, 3)
