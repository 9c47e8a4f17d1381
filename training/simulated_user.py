"""Simulate a user who prompts an object: boxes, and clicks that correct one mask after the other.

Used for training and for measuring; the object's true mask is known.
"""

from collections.abc import Callable, Iterator

import cv2
import numpy as np

from media.prompts import Prompts

# First clicks lie at least this share of the greatest distance from the object's edge, as users
# click well inside an object but not at its exact centre.
MIN_DEPTH = 0.5


def distance_to_edge(mask: np.ndarray) -> np.ndarray:
    """Return (H, W) float32, the distance of each pixel to the nearest one outside the mask.

    The frame's border counts as outside.

    Args:
        mask: (H, W) bool.
    """
    padded = np.pad(mask.astype(np.uint8), 1)
    return cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]


def first_click(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Return (x, y) of a random pixel well inside an object; the mask must not be empty."""
    distance = distance_to_edge(mask)
    rows, columns = np.nonzero(distance >= max(MIN_DEPTH * distance.max(), 1e-6))
    i = rng.integers(len(rows))
    return int(columns[i]), int(rows[i])


def next_click(predicted: np.ndarray, truth: np.ndarray) -> tuple[tuple[int, int], bool] | None:
    """Return the centre of the largest error: its pixel that is farthest from the error's edge.

    Args:
        predicted, truth: (H, W) bool.

    Returns:
        (x, y), and whether the click is positive (on the object); None without an error.
    """
    largest, area, positive = None, 0, False
    for missing, wrong in ((True, truth & ~predicted), (False, predicted & ~truth)):
        count, labels, stats, _ = cv2.connectedComponentsWithStats(wrong.astype(np.uint8))
        if count > 1:
            i = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
            if stats[i, cv2.CC_STAT_AREA] > area:
                largest, area, positive = labels == i, stats[i, cv2.CC_STAT_AREA], missing
    if largest is None:
        return None
    y, x = np.unravel_index(distance_to_edge(largest).argmax(), largest.shape)
    return (int(x), int(y)), positive


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return x, y, width, height of the smallest box around the (H, W) bool mask."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return x, y, w, h


def jitter_box(box: tuple[int, int, int, int], share: float, shape: tuple[int, int],
               rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Move each side of a box by up to a share of the box's size, within an (H, W) frame.

    The result has at least one pixel.
    """
    x, y, w, h = box
    left, right = (rng.uniform(-share, share, 2) * w + (x, x + w)).round().astype(int)
    top, bottom = (rng.uniform(-share, share, 2) * h + (y, y + h)).round().astype(int)
    left, top = min(max(0, left), shape[1] - 1), min(max(0, top), shape[0] - 1)
    right, bottom = min(max(left + 1, right), shape[1]), min(max(top + 1, bottom), shape[0])
    return int(left), int(top), int(right - left), int(bottom - top)


def scale_box(box: tuple[int, int, int, int], share: float,
              shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Move all sides of a box outwards by a share of its size (inwards if negative)."""
    x, y, w, h = box
    left, top = max(0, round(x - share * w)), max(0, round(y - share * h))
    right, bottom = (min(shape[1], round(x + w + share * w)),
                     min(shape[0], round(y + h + share * h)))
    return left, top, max(1, right - left), max(1, bottom - top)


def add_click(prompts: Prompts, predicted: np.ndarray, truth: np.ndarray,
              with_mask: bool = True) -> Prompts | None:
    """Add a click at the centre of the largest error; None if there is no error.

    Args:
        prompts: those that led to the prediction.
        predicted, truth: (H, W) bool.
        with_mask: the new prompts include the predicted mask.
    """
    click = next_click(predicted, truth)
    if click is None:
        return None
    point, positive = click
    return Prompts(prompts.boxes, [*prompts.points, *[point] * positive],
                   [*prompts.negative_points, *[point] * (not positive)],
                   predicted if with_mask else None)


def simulate_clicks(prompt: Callable[[np.ndarray, Prompts], np.ndarray], image: np.ndarray,
                    truth: np.ndarray, count: int,
                    rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the predicted masks after 1 to `count` clicks, each correcting the mask before it.

    Args:
        prompt: maps an (H, W, 3) uint8 RGB image and prompts to an (H, W) bool mask.
        truth: (H, W) bool.
    """
    prompts: Prompts | None = Prompts(points=[first_click(truth, rng)])
    for _ in range(count):
        if prompts is not None:  # None: the mask is perfect, and stays as it is
            predicted = prompt(image, prompts)
            prompts = add_click(prompts, predicted, truth)
        yield predicted
