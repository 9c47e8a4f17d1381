"""Paste distractors and duplicates into an image, so that a click has to select one instance.

Without them a click on a dancer selected the people around her too: J for one click fell to 0.57,
and rose to 0.71 with them (docs/log/2026-11-25-keys-and-values.md).
"""

import cv2
import numpy as np

from training.warps import Cutout, cut_out

COUNT = (1, 6)  # number of pasted objects: at least, and below
# Height relative to the target's. Much smaller distractors are easy; larger ones hide the image.
HEIGHT = (0.3, 1.5)
MAX_STRETCH = 1.3  # largest change of the aspect ratio
# Chance that a distractor occludes the target. Most lie behind it, because an occluded target is
# smaller, and targets that are hardly visible teach nothing.
IN_FRONT = 0.25
MIN_VISIBLE = 0.7  # share of the target that stays visible at least
# Longer side of a tiny object, as a share of the frame's shorter side: from a ball 16 pixels wide
# in a frame of 720 rows up to a size that is common in ordinary samples.
TINY_SIDE = (0.015, 0.12)
EDGE_BLUR = 0.7  # pixels; standard deviation, so that no hard edge gives pasted objects away


def add_distractors(image: np.ndarray, mask: np.ndarray, others: list[Cutout],
                    rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paste other objects into an image, most of them behind the target.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) bool, the target.
        others: at least one cut-out to choose from.

    Returns:
        The new image and the target's new mask, which may be smaller.
    """
    image, mask = image.copy(), mask.copy()
    whole, height = np.count_nonzero(mask), np.ptp(np.flatnonzero(mask.any(1))) + 1
    for _ in range(rng.integers(*COUNT)):
        other = others[rng.integers(len(others))]
        picture, inside = resize_cutout(other, height * rng.uniform(*HEIGHT), rng)
        corner = [int(rng.integers(-(a // 2), max(b - a // 2, 1 - a // 2)))
                  for a, b in zip(inside.shape, mask.shape)]
        region, part = _overlap(corner, inside.shape, mask.shape)
        if region is None:
            continue
        alpha = cv2.GaussianBlur(inside, (0, 0), EDGE_BLUR)[part]
        hidden = mask[region] & (alpha > 0.5)
        left = np.count_nonzero(mask) - np.count_nonzero(hidden)
        if rng.random() < IN_FRONT and left >= MIN_VISIBLE * whole:
            mask[region] &= ~hidden
        else:
            alpha = np.where(mask[region], 0, alpha)
        _blend(image, region, picture[part], alpha)
    return image, mask


def paste_tiny(background: np.ndarray, cutout: Cutout,
               rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paste an object into another image, so small that a click may mean its surroundings.

    Few masks in data sets are of tiny objects. Without them a click on a table-tennis ball selects
    the player behind it.

    Args:
        background: (H, W, 3) uint8 RGB.
        cutout: the object.

    Returns:
        The new image and the object's (H, W) bool mask, of at least one pixel.
    """
    low, high = np.log(TINY_SIDE)
    longer = np.exp(rng.uniform(low, high)) * min(background.shape[:2])
    height = longer * min(1, cutout.ids.shape[0] / cutout.ids.shape[1])
    picture, inside = resize_cutout(cutout, height, rng)
    corner = [int(rng.integers(max(1, b - a + 1)))
              for a, b in zip(inside.shape, background.shape)]
    region, part = _overlap(corner, inside.shape, background.shape[:2])
    image, mask = background.copy(), np.zeros(background.shape[:2], bool)
    alpha = cv2.GaussianBlur(inside, (0, 0), EDGE_BLUR)[part]
    mask[region] = alpha >= min(0.5, alpha.max())
    _blend(image, region, picture[part], alpha)
    return image, mask


def _blend(image: np.ndarray, region: tuple[slice, slice], picture: np.ndarray,
           alpha: np.ndarray) -> None:
    """Blend a picture into a region of an image, in place; (h, w) alpha in [0, 1]."""
    alpha = alpha[..., None]
    image[region] = (image[region] * (1 - alpha) + picture * alpha).round().astype(np.uint8)


def resize_cutout(cutout: Cutout, height: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """Resize a cut-out to about this height, stretch it a little, and maybe mirror it.

    Returns:
        (h, w, 3) uint8 image and (h, w) float32 mask of 0 and 1.
    """
    high, wide = cutout.ids.shape
    scale, stretch = height / high, MAX_STRETCH ** rng.uniform(-0.5, 0.5)
    size = [max(2, round(side * scale * by)) for side, by in ((wide, stretch), (high, 1 / stretch))]
    picture = cv2.resize(cutout.image, size, interpolation=cv2.INTER_AREA)
    inside = cv2.resize((cutout.ids > 0).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    if rng.random() < 0.5:
        picture, inside = picture[:, ::-1], inside[:, ::-1]
    return picture, np.ascontiguousarray(inside, np.float32)


def _overlap(corner: list[int], size: tuple[int, int], shape: tuple[int, int]):
    """Return the slices of an image and of a picture pasted at `corner` that coincide, or Nones.

    Args:
        corner: row and column of the picture's first pixel in the image; may be negative.
        size, shape: (H, W) of the picture and of the image.
    """
    region = tuple(slice(max(0, p), min(side, p + length))
                   for p, length, side in zip(corner, size, shape))
    if any(part.start >= part.stop for part in region):
        return None, None
    return region, tuple(slice(part.start - p, part.stop - p) for part, p in zip(region, corner))


def distractor_cutouts(image: np.ndarray, mask: np.ndarray,
                       more: list[tuple[np.ndarray, np.ndarray]]) -> list[Cutout]:
    """Cut out the target, for duplicates, and other objects, for distractors.

    Args:
        image, mask: (H, W, 3) uint8 RGB and (H, W) bool of the target.
        more: images and masks of other objects.
    """
    cutouts = [cut_out(picture, inside.astype(np.uint8))
               for picture, inside in ((image, mask), *more)]
    return [cutout for cutout in cutouts if cutout is not None]
