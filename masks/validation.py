"""Checks the dtype, dimensions and range of images and masks that library users pass.

Without these checks a wrong array often gives a wrong mask instead of an error: as uint8, an id of
257 becomes 1, and a probability of 0.9 becomes 0. Every message begins with the argument's name.
"""

from typing import Any

import numpy as np

from masks.encoding import VOID

# ImageNet-normalised values lie in [-2.2, 2.7]; values beyond this limit are raw pixel values.
NORMALIZED = 10.0


def id_mask(mask: Any, name: str = "mask", void: bool = False) -> np.ndarray:
    """Return a mask of object ids as (H, W) uint8.

    Args:
        mask: (H, W) bool or integers from 0 to 255, an array or a tensor.
        name: what error messages call it.
        void: accept 255 next to other ids, which means "not labelled" in a ground-truth mask.

    Raises:
        ValueError: other dimensions, another dtype (a float mask holds probabilities, not ids), ids
            out of range, or 255 next to other ids.
    """
    mask = _array(mask, name)
    if mask.dtype == bool:
        return mask.view(np.uint8)
    least, most = int(mask.min()), int(mask.max())
    if least < 0 or most > 255:
        raise ValueError(f"{name}: expected object ids from 0 to 254 as uint8, found "
                         f"{least if least < 0 else most}")
    mask = mask.astype(np.uint8, copy=False)
    if most == VOID and not void and ((mask > 0) & (mask < VOID)).any():
        raise ValueError(f"{name}: {VOID} next to other ids means \"not labelled\"; expected 0 in "
                         "these pixels, or another id if they are an object")
    return mask


def binary_mask(mask: Any, name: str) -> np.ndarray:
    """Return a mask of one object as (H, W) uint8 of 0 and 1.

    Raises:
        ValueError: other dimensions, a float dtype, or values other than 0 and 1.
    """
    mask = _array(mask, name)
    if mask.dtype == bool:
        return mask.view(np.uint8)
    for value in (int(mask.min()), int(mask.max())):
        if value not in (0, 1):
            raise ValueError(f"{name}: expected a mask of one object, bool or 0 and 1, found "
                             f"{value}")
    return mask.astype(np.uint8, copy=False)


def check_same_size(one: np.ndarray, name: str, other: np.ndarray, other_name: str) -> None:
    """Raise a ValueError that names both masks unless they have the same (H, W)."""
    if one.shape != other.shape:
        raise ValueError(f"{name}, {other_name}: expected masks of one size, got "
                         f"{_shape(one)} and {_shape(other)}")


def check_frame(image: Any) -> None:
    """Check an image as read from a file: (H, W, 3) uint8 RGB.

    Raises:
        ValueError: other dimensions or another dtype.
    """
    image = np.asanyarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image: expected (H, W, 3) RGB, got shape {_shape(image)}")
    if image.dtype != np.uint8:
        raise ValueError(f"image: expected uint8 from 0 to 255, got {image.dtype}")


def check_normalized(image: Any, dimensions: int = 3) -> None:
    """Check an image for the network: (3, H, W) float32, ImageNet-normalised.

    Args:
        image: an array or a tensor, on any device.
        dimensions: 4 for a batch, (B, 3, H, W).

    Raises:
        ValueError: other dimensions, another dtype, or values that no normalised image has.
    """
    shape = "(3, H, W)" if dimensions == 3 else "(B, 3, H, W)"
    advice = "as preprocess.to_tensor makes it"
    if not hasattr(image, "shape") or len(image.shape) != dimensions or image.shape[-3] != 3 \
            or 0 in tuple(image.shape):
        raise ValueError(f"image: expected {shape}, {advice}, got "
                         f"{_shape(image) if hasattr(image, 'shape') else type(image).__name__}")
    if not str(image.dtype).endswith("float32"):
        raise ValueError(f"image: expected float32, ImageNet-normalised, {advice}, got "
                         f"{image.dtype}")
    least, most = float(image.min()), float(image.max())
    if not -NORMALIZED < least <= most < NORMALIZED:  # also if a value is NaN
        raise ValueError(f"image: expected ImageNet-normalised values, {advice}, found "
                         f"{least if not least > -NORMALIZED else most:g}")


def _check_whole_numbers(mask: Any, name: str, dimensions: int) -> None:
    """Check dimensions and dtype of an array or tensor, which stays on its device."""
    if mask.ndim != dimensions or 0 in tuple(mask.shape):
        expected = "(H, W)" if dimensions == 2 else "(B, H, W)"
        raise ValueError(f"{name}: expected {expected}, got shape {_shape(mask)}")
    dtype = str(mask.dtype).removeprefix("torch.")
    if dtype != "bool" and not dtype.startswith(("int", "uint")):
        raise ValueError(f"{name}: expected object ids as integers (uint8), or bool, got {dtype}; "
                         f"threshold probabilities first, such as {name} > 0.5")


def _array(mask: Any, name: str) -> np.ndarray:
    """A mask, array or tensor, as a checked (H, W) array."""
    array = mask.detach().cpu().numpy() if hasattr(mask, "detach") else np.asarray(mask)
    _check_whole_numbers(array, name, 2)
    return array


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.shape)
