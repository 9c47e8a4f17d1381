"""Images and masks as files: what they mean, read and written.

It knows of arrays only: no tensor, no network, no data set.
"""

import logging
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from media.drawing import PALETTE
from media.files import whole

log = logging.getLogger(__name__)

VOID = 255  # "not labelled" in DAVIS masks that hold object ids
MASK_MODES = ("1", "L", "LA", "P")  # what Pillow calls grey, grey + alpha and palette


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB.

    Raises:
        OSError: no such file, or not a whole image; the message names it.
    """
    return np.array(open_image(path, "an image").convert("RGB"))


def read_mask(path: str | Path, single_object: bool = False) -> np.ndarray:
    """Read a mask file as (H, W) uint8: 0 background, else the object's id.

    Masks come as 0/1, as 0/255 grey (also with an alpha channel, which is dropped) and as
    palette or grey with object ids. 255 is the object where it is the only value, else void,
    which counts as background.

    Args:
        single_object: every non-zero value is object 1, as DAVIS-2016 has it.

    Raises:
        OSError: no such file, or not a whole image.
        ValueError: an image that is not a mask, such as RGB or 16 bit.
    """
    image = open_image(path, "a mask")
    if image.mode not in MASK_MODES:
        raise ValueError(f"{path}: expected a grey or palette mask of 8 bits, "
                         f"found an image of mode {image.mode}")
    if image.mode == "LA":
        image = image.getchannel("L")
    mask = np.array(image, dtype=np.uint8)
    if single_object:
        return (mask > 0).view(np.uint8)
    return _object_ids(mask)


def read_own_mask(path: str | Path) -> np.ndarray:
    """Read a mask that somebody painted, as `read_mask` does, and what paint programs make of it.

    Grey stored as RGB, and soft edges: where only one value other than 0 covers a square of 3x3
    pixels anywhere, the others are the edge of that object, and half its value is the limit.
    The log says so.

    Raises:
        OSError, ValueError: as for `read_mask`; also for a coloured image, for soft edges
            around several objects, and for an object of 255 beside others.
    """
    image = open_image(path, "a mask")
    if image.mode in ("RGB", "RGBA"):
        channels = np.array(image.convert("RGB"))
        if (channels != channels[..., :1]).any():
            raise ValueError(f"{path}: expected a grey or palette mask, found colours: save it as "
                             "a palette PNG with a number for each object")
        values = channels[..., 0]
    elif image.mode in ("L", "LA"):
        values = np.array(image.getchannel(0))
    else:
        return read_mask(path)
    levels = [int(v) for v in np.unique(values) if v]
    solid = [v for v in levels if _has_interior(values == v)]
    if VOID in solid and len(solid) > 1:
        raise ValueError(f"{path}: {VOID} beside {solid[0]} would mean \"not labelled\", expected "
                         "another value for that object, or 0 where there is none")
    soft = [v for v in levels if v not in solid]
    if not soft or not solid:
        return _object_ids(values)
    if len(solid) > 1:
        raise ValueError(f"{path}: {len(soft)} values of soft edges around {len(solid)} objects, "
                         "expected one value for each object and 0 elsewhere")
    log.info("%s: soft edges, so what is at least half as bright as the object (%d) belongs to it",
             path, solid[0])
    return (2 * values.astype(int) >= solid[0]).astype(np.uint8)


def _has_interior(mask: np.ndarray) -> bool:
    return cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).any()


def _object_ids(mask: np.ndarray) -> np.ndarray:
    """(H, W) uint8 values of a file -> object ids; 255 where it is the only value, else void."""
    if mask.max() == VOID:
        void = mask == VOID
        if np.count_nonzero(void) == np.count_nonzero(mask):
            return void.view(np.uint8)
        mask[void] = 0
    return mask


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB in the format that the file's name says."""
    with whole(path) as beside:
        Image.fromarray(image).save(beside, quality=90)


def write_mask(path: str | Path, mask: np.ndarray) -> None:
    """Write a (H, W) uint8 mask as PNG with the DAVIS palette."""
    image = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    image.putpalette(PALETTE.tobytes())  # which makes a grey image a palette one
    with whole(path) as beside:
        image.save(beside, format="PNG")


def image_shape(path: str | Path, what: str) -> tuple[int, int]:
    """(H, W) of an image file, from its header; raises as `read_image` does."""
    with _naming(path, what), Image.open(path) as image:
        return image.height, image.width


def check_same_shape(expected_path, expected: tuple[int, ...], path, shape: tuple[int, ...],
                     what: str = "a mask") -> None:
    """Raise a ValueError that names `path` unless its (H, W, ...) is that of `expected_path`."""
    if expected[:2] != shape[:2]:
        raise ValueError(f"{path}: {what} of {shape[1]}x{shape[0]} pixels, expected "
                         f"{expected[1]}x{expected[0]} as in {expected_path}")


def open_image(path: str | Path, what: str) -> Image.Image:
    """An image file, read by Pillow; raises as `read_image` does."""
    with _naming(path, what):
        image = Image.open(path)
        image.load()
        return image


@contextmanager
def _naming(path: str | Path, what: str):
    """Turn whatever Pillow raises into an OSError that names the file and what was expected."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, expected {what}") from None
    except Exception as error:
        raise OSError(f"{path}: expected {what}, but it can't be read ({error})") from error


def resize_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 mask to another (H, W), by nearest neighbour."""
    if mask.shape == tuple(shape):
        return mask
    return cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def working_shape(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """(H, W) of a frame for the network: the short side at most `size`, unless that is 0."""
    scale = size / min(shape) if size else 1.0
    return shape if scale >= 1 else (round(shape[0] * scale), round(shape[1] * scale))


def reduced(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB at its `working_shape`."""
    shape = working_shape(image.shape[:2], size)
    if shape == image.shape[:2]:
        return image
    return cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA)
