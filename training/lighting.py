"""Changing light and focus of a clip, for clips made from static images."""

import cv2
import numpy as np

import preprocess
from training.warps import random_path

# Range of the change of brightness, contrast, saturation (shares) and hue (radians) of a clip, and
# the standard deviation from frame to frame. Videos differ by as much, but change slowly.
LIGHTING, LIGHTING_STEP = 0.3, 0.03
# Chance that a clip loses focus now and then, in which case its edges are blurred; and the blur's
# step from frame to frame and largest value in pixels, beyond which small objects disappear.
DEFOCUS, DEFOCUS_STEP, MAX_DEFOCUS = 0.15, 0.5, 1.5


def vary_lighting(rng, images: list[np.ndarray], jump: bool) -> list[np.ndarray]:
    """Change brightness, contrast, colour and sharpness of a clip, smoothly over time.

    Args:
        images: (H, W, 3) uint8 RGB each.
        jump: the first image changes independently of the others.
    """
    frames = len(images)
    values = random_path(rng, frames, LIGHTING_STEP, size=(4,))
    values += rng.uniform(-LIGHTING, LIGHTING, 4)
    if jump:
        values[0] = rng.uniform(-LIGHTING, LIGHTING, 4)
    blur = np.zeros(frames)
    if rng.random() < DEFOCUS:
        blur = np.abs(random_path(rng, frames, DEFOCUS_STEP))
    result = []
    for image, (brightness, contrast, saturation, hue), sigma in zip(images, values, blur):
        image = preprocess.adjust_colour(image, 1 + brightness, 1 + contrast, 1 + saturation, hue)
        if sigma > 0.3:  # a smaller one is not visible
            image = cv2.GaussianBlur(image, (0, 0), min(sigma, MAX_DEFOCUS))
        result.append(image)
    return result
