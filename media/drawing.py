"""Masks drawn over frames, and objects cut out of them: arrays in, arrays out."""

import cv2
import numpy as np


def _davis_palette() -> np.ndarray:
    """(256, 3) uint8: the colour map of PASCAL VOC, which DAVIS uses for object ids.

    Bits 0, 1, 2 of the id, then 3, 4, 5 and so on, become bits 7, 6, ... of red, green, blue.
    """
    ids = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for shift in range(8):
        for channel in range(3):
            bit = (ids >> (3 * shift + channel)) & 1
            palette[:, channel] |= (bit << (7 - shift)).astype(np.uint8)
    return palette


PALETTE = _davis_palette()
SOFT = 0.8  # pixels, standard deviation of an edge of which only the mask is known
RAMP = 0.6  # difference of probability from clear to opaque
EDGE = 5  # pixels: an edge is at most half as wide on each side of the mask's


def overlay(image: np.ndarray, mask: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Colour each object and draw its outline.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, 0 background, else the object's id.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    colours = cv2.LUT(cv2.merge([mask] * 3), PALETTE[:, None])  # (H, W, 3)
    blended = cv2.addWeighted(image, 1 - opacity, colours, opacity, 0)
    result = cv2.copyTo(blended, mask, image.copy())
    for object_id in np.flatnonzero(areas(mask)[1:]) + 1:
        contours, _ = cv2.findContours((mask == object_id).astype(np.uint8), cv2.RETR_CCOMP,
                                       cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(result, contours, -1, (255, 255, 255), 1)
    return result


def areas(ids: np.ndarray) -> np.ndarray:
    """(256,) how many pixels of a mask (H, W) have which id; much quicker than `np.bincount`."""
    return cv2.calcHist([ids], [0], None, [256], [0, 256]).ravel().astype(int)


def soft(mask: np.ndarray, probability: np.ndarray | None = None,
         threshold: float = 0.5) -> np.ndarray:
    """How much of each pixel is of an object, soft at the edges.

    Args:
        mask: (H, W), above 0 on the objects.
        probability: (H, W) float of all objects together; without it edges are blurred a little.
        threshold: the probability that an edge lies at.

    Returns:
        (H, W) uint8 alpha, at least 128 in the mask, below it elsewhere, 0 far from it.
    """
    inside = (mask > 0).astype(np.uint8)
    if probability is None:
        alpha = cv2.GaussianBlur(255 * inside, (0, 0), SOFT)
    else:
        alpha = np.clip((probability - threshold) / RAMP + 0.5, 0, 1)
        alpha = (255 * alpha * cv2.dilate(inside, np.ones((EDGE, EDGE), np.uint8))).round()
    # what is on which side of the edge the mask says
    return np.where(inside, np.maximum(alpha, 128), np.minimum(alpha, 127)).astype(np.uint8)


def transparent(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB and (H, W) uint8 -> (H, W, 4) RGBA, black where it can't be seen."""
    return np.dstack([image * (alpha[..., None] > 0), alpha])


def replace_background(image: np.ndarray, mask: np.ndarray, background: str) -> np.ndarray:
    """Objects on a colour, or in front of the frame's blurred background.

    Args:
        image, mask: (H, W, 3) uint8 RGB and (H, W) uint8.
        background: "blur" or "#rrggbb".
    """
    alpha = soft(mask)[..., None] / np.float32(255)
    if background == "blur":
        size = max(image.shape) // 16 | 1
        behind = cv2.GaussianBlur(image, (size, size), 0)
    else:
        behind = np.full_like(image, [int(background[i:i + 2], 16) for i in (1, 3, 5)])
    return (image * alpha + behind * (1 - alpha)).round().astype(np.uint8)
