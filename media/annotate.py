"""A mask from what a person shows, by colour alone: OpenCV's GrabCut. It knows no network."""

from dataclasses import dataclass, field

import cv2
import numpy as np

ITERATIONS = 5  # of GrabCut
SIDE = 320  # pixels: longer sides make nobody wait
DOT = 0.02  # radius of what a click surely shows, as a share of the frame's height


@dataclass
class Prompts:
    """What a person showed of one object in one frame, in pixels.

    Args:
        boxes: around it, each x, y of the upper left corner, width, height.
        points, not_points: x, y on the object, and not on it.
        mask: (H, W) bool, the mask so far.
    """

    boxes: list[tuple[int, int, int, int]] = field(default_factory=list)
    points: list[tuple[int, int]] = field(default_factory=list)
    not_points: list[tuple[int, int]] = field(default_factory=list)
    mask: np.ndarray | None = None


def mask_from_box(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The object in a box, by OpenCV's GrabCut: what differs in colour from all around the box.

    Args:
        image: (H, W, 3) uint8 RGB.
        box: x, y of its upper left corner, width, height, in pixels; some of the frame must be
            left around it.

    Returns:
        (H, W) uint8, 1 on the object.

    Raises:
        ValueError: the box isn't in the frame, or GrabCut found nothing in it.
    """
    height, width = image.shape[:2]
    x, y, w, h = box
    if not (0 <= x < x + w <= width and 0 <= y < y + h <= height and w * h < width * height):
        raise ValueError(f"--box {x} {y} {w} {h}: expected a part of the frame of {width}x{height} "
                         "pixels, as x y width height")
    labels = np.zeros((height, width), np.uint8)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    cv2.grabCut(image[..., ::-1].copy(), labels, box, *models, ITERATIONS, cv2.GC_INIT_WITH_RECT)
    mask = ((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)).astype(np.uint8)
    if not mask.any():
        raise ValueError(f"--box {x} {y} {w} {h}: nothing in it differs from what is around it; "
                         "paint the mask with --page, or bring one with --mask")
    return mask


def mask_from_prompts(image: np.ndarray, prompts: Prompts) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) bool, the object that the prompts show."""
    height, width = image.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(2, round(width * scale)), max(2, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    labels = _labels(size, scale, prompts)
    sure = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    if sure.any() and not sure.all():
        models = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.setRNGSeed(0)
        cv2.grabCut(small[..., ::-1].copy(), labels, None, *models, ITERATIONS,
                    cv2.GC_INIT_WITH_MASK)
    found = ((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)).astype(np.float32)
    return cv2.resize(found, (width, height), interpolation=cv2.INTER_LINEAR) >= 0.5


def _labels(size: tuple[int, int], scale: float, prompts: Prompts) -> np.ndarray:
    """What GrabCut starts from, on the small frame of (width, height) pixels."""
    labels = np.full(size[::-1], cv2.GC_PR_BGD, np.uint8)
    dot = max(1, round(DOT * size[1]))
    if prompts.boxes:
        labels[:] = cv2.GC_BGD
    for x, y, w, h in prompts.boxes:
        left, top = round(x * scale), round(y * scale)
        labels[top:top + max(1, round(h * scale)),
               left:left + max(1, round(w * scale))] = cv2.GC_PR_FGD
    if prompts.mask is not None and prompts.mask.any():
        mask = cv2.resize(prompts.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        labels[:] = np.where(mask > 0, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    for value, around, points in ((cv2.GC_FGD, cv2.GC_PR_FGD, prompts.points),
                                  (cv2.GC_BGD, cv2.GC_PR_BGD, prompts.not_points)):
        for x, y in points:
            middle = round(x * scale), round(y * scale)
            cv2.circle(labels, middle, 5 * dot, around, cv2.FILLED)
            cv2.circle(labels, middle, dot, value, cv2.FILLED)
    return labels
