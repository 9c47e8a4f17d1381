"""Draws masks over frames and cuts objects out of them."""

import cv2
import numpy as np


def _davis_palette() -> np.ndarray:
    """The PASCAL VOC colour map, (256, 3) uint8, which DAVIS uses for object ids.

    Bits 0, 1, 2 of an id become bit 7 of red, green and blue, bits 3, 4, 5 bit 6, and so on.
    """
    ids = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for shift in range(8):
        for channel in range(3):
            bit = (ids >> (3 * shift + channel)) & 1
            palette[:, channel] |= (bit << (7 - shift)).astype(np.uint8)
    return palette


PALETTE = _davis_palette()
# Standard deviation in pixels of the blur at an edge for which there are no probabilities: enough
# to hide the stairs of a mask, too little to show background.
SOFT = 0.8
# Range of probability from transparent to opaque, around the threshold. A smaller one gives hard
# edges; a larger one lets uncertain areas inside an object turn translucent.
RAMP = 0.6
EDGE = 5  # pixels; an edge reaches half as far outside the mask, so that stray pixels stay out


def overlay(image: np.ndarray, mask: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Tint each object in its palette colour and draw a white outline around it.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8 object ids, 0 background.
        opacity: of the tint, from 0 to 1.

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
    """Number of pixels of each id in an (H, W) uint8 mask, (256,); faster than `np.bincount`."""
    return cv2.calcHist([ids], [0], None, [256], [0, 256]).ravel().astype(int)


def soft(mask: np.ndarray, probability: np.ndarray | None = None,
         threshold: float = 0.5) -> np.ndarray:
    """Compute the alpha channel of a cut-out with soft edges.

    Args:
        mask: (H, W), above 0 on the objects.
        probability: (H, W) float, of all objects together; None blurs the mask's edge slightly.
        threshold: the probability at the edge of the mask.

    Returns:
        (H, W) uint8 alpha: at least 128 inside the mask, less outside, 0 away from it.
    """
    inside = (mask > 0).astype(np.uint8)
    if probability is None:
        alpha = cv2.GaussianBlur(255 * inside, (0, 0), SOFT)
    else:
        alpha = np.clip((probability - threshold) / RAMP + 0.5, 0, 1)
        alpha = (255 * alpha * cv2.dilate(inside, np.ones((EDGE, EDGE), np.uint8))).round()
    # the mask decides which side of the edge a pixel is on, so that both agree at half opacity
    return np.where(inside, np.maximum(alpha, 128), np.minimum(alpha, 127)).astype(np.uint8)


def transparent(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Join (H, W, 3) uint8 RGB and (H, W) uint8 alpha to RGBA, black where alpha is 0.

    Otherwise the background would still be in the file, for anybody who drops the alpha channel.
    """
    return np.dstack([image * (alpha[..., None] > 0), alpha])


def replace_background(image: np.ndarray, mask: np.ndarray, background: str) -> np.ndarray:
    """Put the objects on a plain colour or on the blurred frame.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, above 0 on the objects.
        background: "blur" or "#rrggbb".

    Returns:
        (H, W, 3) uint8 RGB.
    """
    alpha = soft(mask)[..., None] / np.float32(255)
    if background == "blur":
        size = max(image.shape) // 16 | 1  # relative, so that faces blur alike at any resolution
        behind = cv2.GaussianBlur(image, (size, size), 0)
    else:
        behind = np.full_like(image, [int(background[i:i + 2], 16) for i in (1, 3, 5)])
    return (image * alpha + behind * (1 - alpha)).round().astype(np.uint8)
