"""Other objects put into an image beside one, and doubles of it: a click means one of them."""

import cv2
import numpy as np

from training.warps import Cutout, cut_out

COUNT = (1, 6)  # objects are added, at least, and fewer than
HEIGHT = (0.3, 1.5)  # of them, as a share of the object's
SQUARE = 1.3  # by so much their sides may be stretched
IN_FRONT = 0.25  # of them are, where that leaves enough of the object, the others behind it
LEFT = 0.7  # of the object is enough
EDGE = 0.7  # pixels, standard deviation of the blur of their edges


def add_distractors(image: np.ndarray, mask: np.ndarray, others: list[Cutout],
          rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image with other objects, most of them behind the one that is meant.

    Args:
        image, mask: (H, W, 3) uint8 RGB, and (H, W) bool of that one.
        others: to choose from.

    Returns:
        The same of the new image, of which the mask may be smaller.
    """
    image, mask = image.copy(), mask.copy()
    whole, tall = np.count_nonzero(mask), np.ptp(np.flatnonzero(mask.any(1))) + 1
    for _ in range(rng.integers(*COUNT)):
        other = others[rng.integers(len(others))]
        picture, inside = resize_cutout(other, tall * rng.uniform(*HEIGHT), rng)
        place = [int(rng.integers(-(a // 2), max(b - a // 2, 1 - a // 2)))
                 for a, b in zip(inside.shape, mask.shape)]
        there, cut = _shared(place, inside.shape, mask.shape)
        if there is None:
            continue
        alpha = cv2.GaussianBlur(inside, (0, 0), EDGE)[cut]
        hidden = mask[there] & (alpha > 0.5)
        left = np.count_nonzero(mask) - np.count_nonzero(hidden)
        if rng.random() < IN_FRONT and left >= LEFT * whole:
            mask[there] &= ~hidden
        else:
            alpha = np.where(mask[there], 0, alpha)
        image[there] = (image[there] * (1 - alpha[..., None]) + picture[cut] * alpha[..., None]
                        ).round().astype(np.uint8)
    return image, mask


def resize_cutout(cutout: Cutout, height: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """A cut-out about so high, maybe mirrored: (h, w, 3) uint8, and (h, w) float32 0 or 1."""
    high, wide = cutout.ids.shape
    scale, stretch = height / high, SQUARE ** rng.uniform(-0.5, 0.5)
    size = [max(2, round(side * scale * by)) for side, by in ((wide, stretch), (high, 1 / stretch))]
    picture = cv2.resize(cutout.image, size, interpolation=cv2.INTER_AREA)
    inside = cv2.resize((cutout.ids > 0).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    if rng.random() < 0.5:
        picture, inside = picture[:, ::-1], inside[:, ::-1]
    return picture, np.ascontiguousarray(inside, np.float32)


def _shared(place: list[int], size: tuple[int, int], shape: tuple[int, int]):
    """Where a picture whose first pixel is at `place` lies in an image, and that part of it."""
    there = tuple(slice(max(0, p), min(side, p + length))
                  for p, length, side in zip(place, size, shape))
    if any(part.start >= part.stop for part in there):
        return None, None
    return there, tuple(slice(part.start - p, part.stop - p) for part, p in zip(there, place))


def distractor_cutouts(image: np.ndarray, mask: np.ndarray,
                       more: list[tuple[np.ndarray, np.ndarray]]) -> list[Cutout]:
    """The cut-outs of an object and, each as often, of others: (H, W, 3) and (H, W) bool each."""
    found = [cut_out(picture, inside.astype(np.uint8))
             for picture, inside in ((image, mask), *more)]
    return [cutout for cutout in found if cutout is not None]
