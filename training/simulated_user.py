"""What a person would show of an object whose mask is known: boxes, and one click after the other.

To train on and to measure by. Nothing of a network is known here.
"""

from collections.abc import Callable, Iterator

import cv2
import numpy as np

from media.prompts import Prompts

WELL = 0.5  # of the greatest depth: what is deeper is well inside


def distance_to_edge(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (H, W) float32, pixels to the nearest one outside, or beyond the frame."""
    padded = np.pad(mask.astype(np.uint8), 1)
    return cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]


def first_click(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """x, y of a pixel anywhere well inside an object; the mask holds at least a pixel."""
    deep = distance_to_edge(mask)
    rows, columns = np.nonzero(deep >= max(WELL * deep.max(), 1e-6))
    i = rng.integers(len(rows))
    return int(columns[i]), int(rows[i])


def next_click(found: np.ndarray, truth: np.ndarray) -> tuple[tuple[int, int], bool] | None:
    """The middle of the largest error: its pixel that is farthest from all outside it.

    Args:
        found, truth: (H, W) bool.

    Returns:
        x, y, and whether the object is there; None where there is no error.
    """
    largest, area, wanted = None, 0, False
    for missing, wrong in ((True, truth & ~found), (False, found & ~truth)):
        count, labels, stats, _ = cv2.connectedComponentsWithStats(wrong.astype(np.uint8))
        if count > 1:
            i = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
            if stats[i, cv2.CC_STAT_AREA] > area:
                largest, area, wanted = labels == i, stats[i, cv2.CC_STAT_AREA], missing
    if largest is None:
        return None
    y, x = np.unravel_index(distance_to_edge(largest).argmax(), largest.shape)
    return (int(x), int(y)), wanted


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x, y, width, height of the smallest box around what is true in an (H, W) mask."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return x, y, w, h


def jitter_box(box: tuple[int, int, int, int], share: float, shape: tuple[int, int],
             rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box whose sides are moved, each by up to a share of the box's own, within an (H, W) frame.

    It keeps at least a pixel.
    """
    x, y, w, h = box
    left, right = (rng.uniform(-share, share, 2) * w + (x, x + w)).round().astype(int)
    top, bottom = (rng.uniform(-share, share, 2) * h + (y, y + h)).round().astype(int)
    left, top = min(max(0, left), shape[1] - 1), min(max(0, top), shape[0] - 1)
    right, bottom = min(max(left + 1, right), shape[1]), min(max(top + 1, bottom), shape[0])
    return int(left), int(top), int(right - left), int(bottom - top)


def add_click(prompts: Prompts, found: np.ndarray, truth: np.ndarray,
            keep: bool = True) -> Prompts | None:
    """The prompts with a click more, in the middle of the largest error; None where there is none.

    Args:
        keep: the mask so far is shown too.
    """
    click = next_click(found, truth)
    if click is None:
        return None
    point, wanted = click
    return Prompts(prompts.boxes, [*prompts.points, *[point] * wanted],
                   [*prompts.not_points, *[point] * (not wanted)], found if keep else None)


def simulate_clicks(prompt: Callable[[np.ndarray, Prompts], np.ndarray], image: np.ndarray,
             truth: np.ndarray, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The masks after one to `count` clicks of a person who sees each before the next.

    Args:
        prompt: (H, W, 3) uint8 RGB and prompts -> (H, W) bool.
        truth: (H, W) bool.
    """
    prompts: Prompts | None = Prompts(points=[first_click(truth, rng)])
    for _ in range(count):
        if prompts is not None:
            found = prompt(image, prompts)
            prompts = add_click(prompts, found, truth)
        yield found
