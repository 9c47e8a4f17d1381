"""Flat values in an image and what lies between them: numbers and colours told from soft edges.

It knows of arrays only: no file, no object, no id of one but those that are handed in.
"""

import itertools
from typing import NamedTuple

import cv2
import numpy as np

BETWEEN = 0.25  # share of a value's neighbours above it and below it, in a gradient
LEVELS = 16  # values from which slow gradients, with flat steps of their own, are expected
LARGE = 0.2  # share of all that isn't background which no step of a gradient covers
BRIGHT = 32  # levels that some value of an edge is away from the background; others are ids
NEAR = 56  # levels between two flat colours (those of DAVIS are 64 apart), where edges are soft
STRAIGHT = 40  # levels by which a blend of two colours may be off
TOP = 0.95  # share of the brighter half that is no brighter than what stands for it
DITHERED = 4  # colours that stand for one, at least
SOFT = 12  # flat values, at most, with edges between them
PICTURE = 32  # values that a mask may have with hardly a flat area


class Found(NamedTuple):
    classes: np.ndarray  # indices of the values that are flat areas, but for the background
    soft: bool  # whether others lie between them


def is_picture(codes: np.ndarray, where: np.ndarray) -> bool:
    """Whether (H, W) values vary from pixel to pixel within a part, (H, W) bool, of an image."""
    inside = where[:-1, :-1] & where[1:, :-1] & where[:-1, 1:]
    same = (codes[:-1, :-1] == codes[1:, :-1]) & (codes[:-1, :-1] == codes[:-1, 1:])
    return len(np.unique(codes[where])) > PICTURE and same[inside].mean() < 0.5


def codes(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 -> (M, 3) colours in it and (H, W) which of them a pixel has."""
    packed, found = np.unique(_pack(pixels), return_inverse=True)
    table = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1).astype(int)
    return table, found.reshape(pixels.shape[:2])


def _pack(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def unknown(pixels: np.ndarray, colours: list[tuple]) -> bool:
    """Whether an (H, W, 3) image holds any colour beside these."""
    packed = _pack(pixels)
    return not np.isin(packed, _pack(np.array(colours))).all()


def exact(pixels: np.ndarray, values: np.ndarray, ids: np.ndarray):
    """(H, W, 3) in flat colours -> (H, W) uint8 of their ids, and a colour that is none, or None.

    Args:
        values, ids: (M, 3) and (M,).
    """
    packed, order = _pack(pixels), np.argsort(_pack(values))
    table = _pack(values)[order]
    place = np.searchsorted(table, packed).clip(0, len(table) - 1)
    strange = table[place] != packed
    found = tuple(pixels[strange][0].tolist()) if strange.any() else None
    return ids[order][place], found


def solid(codes: np.ndarray, count: int) -> np.ndarray:
    """(count,) bool: which values fill a square of 3x3 pixels somewhere in (H, W)."""
    planes = codes.astype(np.float32)
    same = cv2.erode(planes, _SQUARE) == cv2.dilate(planes, _SQUARE)
    return np.bincount(codes[same], minlength=count) > 0


_SQUARE = np.ones((3, 3), np.uint8)


def classes(codes: np.ndarray, table: np.ndarray, background: int, lossy: bool = False) -> Found:
    """Tell flat areas from soft edges.

    The values of an edge lie between those on both sides of it and fill no square of 3x3 pixels,
    except where there are so many that they can be steps of a slow gradient.

    Args:
        codes: (H, W) int, which value each pixel has.
        table: (M, C) these values.
        background: which one is the background.
        lossy: the format changes values a little, so that nearly the same ones are one.

    Raises:
        ValueError: a picture, with hardly a flat area.
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
    speckled = table.shape[1] > 1 and not filled[others].any() and _is_speckled(codes, background)
    lossy &= above[others].max() >= BRIGHT
    if above[others[edge[others]]].max(initial=0) < BRIGHT and not speckled and not lossy:
        return Found(others, False)
    firm = np.empty(0, int)
    if not speckled:
        usual = np.median([0, *areas[others[edge[others]]]])
        firm = others[~edge[others] & (above[others] >= (NEAR if steps or lossy else 1))]
        firm = firm[filled[firm] | (areas[firm] >= 5 * usual) | (not steps)]
    if not len(firm):
        firm = _top(others, areas, table, above, speckled)
    firm = _apart(firm, areas, table, background)
    strange = others[~_blends(table[others], table[[background, *firm]])]
    strange_area = areas[strange].sum() * (len(others) > PICTURE)
    if len(firm) > SOFT or strange_area > 0.3 * areas[others].sum():
        raise ValueError(f"a picture of {len(others) + 1} colours")
    return Found(firm, True)


def _top(others: np.ndarray, areas: np.ndarray, table: np.ndarray, above: np.ndarray,
         speckled: bool) -> np.ndarray:
    """(1,) the value that stands for an object without a flat area, by the brighter half of it."""
    bright = others[2 * above[others] >= above[others].max()]
    if speckled:  # in the mean
        mean = np.average(table[bright], 0, areas[bright])
        return bright[[np.abs(table[bright] - mean).max(1).argmin()]]
    bright = bright[above[bright].argsort()]
    covered = areas[bright].cumsum()
    return bright[[np.searchsorted(covered, TOP * covered[-1])]]


def _is_speckled(codes: np.ndarray, background: int) -> bool:
    """Whether neighbours in front of the background mostly differ: colours that were dithered."""
    inside = (codes[:, :-1] != background) & (codes[:, 1:] != background)
    differ = codes[:, :-1] != codes[:, 1:]
    return len(np.unique(codes)) > DITHERED and inside.any() and differ[inside].mean() > 0.5


def _crossed(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """(M,) bool: values most of whose pixels blend two neighbours that face each other."""
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
    """(M,) bool: values with neighbours enough that differ more from the background, and less."""
    up, down = np.zeros(len(above)), np.zeros(len(above))
    for one, other in ((codes[:, :-1], codes[:, 1:]), (codes[:-1], codes[1:])):
        differ = above[one] != above[other]
        one, other = one[differ], other[differ]
        low = np.where(above[one] < above[other], one, other)
        up += np.bincount(low, minlength=len(above))
        down += np.bincount(one + other - low, minlength=len(above))
    return (np.minimum(up, down) >= BETWEEN * (up + down)) & (up + down > 0)


def _blends(colours: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(K, C) -> (K,) bool: which colours lie on the line between two of (M, C) others."""
    found = np.zeros(len(colours), bool)
    for one, other in itertools.combinations(ends, 2):
        along = other - one
        share = ((colours - one) @ along / max(1, along @ along)).clip(0, 1)
        found |= np.abs(one + share[:, None] * along - colours).max(1) <= STRAIGHT
    return found


def _apart(firm: np.ndarray, areas: np.ndarray, table: np.ndarray, background: int) -> np.ndarray:
    """Of flat values that are nearly the same, as in a JPEG, the one with the largest area.

    And none that is small and a blend of others.
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
    """(H, W, C) with soft edges -> (H, W) uint8: the id of the nearer value.

    Of several objects only the two whose areas lie nearest to a pixel come into question, since
    the edge of a bright one passes through the value of a darker one.

    Args:
        values, ids: (M, C) and (M,), the background's first.
    """
    pixels = pixels.astype(np.int32)
    off = np.stack([((pixels - value) ** 2).sum(2) for value in values])  # (M, H, W)
    if len(values) > 2:
        far = np.stack([_distance(np.abs(pixels - value).max(2) < NEAR // 2) for value in values])
        off = np.where(far > np.partition(far, 1, axis=0)[1], np.iinfo(np.int32).max, off)
    # in the middle it belongs to the object
    return ids[len(values) - 1 - off[::-1].argmin(0)]


def _distance(where: np.ndarray) -> np.ndarray:
    """(H, W) bool -> pixels to the nearest flat area there."""
    where = where.astype(np.uint8)
    area = cv2.morphologyEx(where, cv2.MORPH_OPEN, _SQUARE)
    area = area if area.any() else where
    if not area.any():
        return np.full(where.shape, np.inf, np.float32)
    return cv2.distanceTransform(1 - area, cv2.DIST_L2, 3)
