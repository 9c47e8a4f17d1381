"""Reads and writes image files, and writes masks; `masks.read` decides what a mask file means."""

import logging
import re
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps

from media.drawing import PALETTE
from media.files import atomic_path

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
# A decimal number in a file name, unless it is part of a date or an address (2024.11.14).
DECIMAL = r"(?<![0-9.])[0-9]+\.[0-9]+(?!\.?[0-9])"
MOVING = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")  # formats whose pictures may be frames
ORIENTATION = 0x0112  # EXIF tag
_several: set[tuple[Path, str | None]] = set()  # folders and formats that `open_image` has logged
# Largest factor by which small frames are enlarged for the network, so that small objects cover
# feature locations of their own; a larger one adds cost, but no detail.
ENLARGED = 2


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB, turned by its EXIF orientation.

    16-bit grey is scaled by the whole range of 16 bits, not by the values in the file: otherwise
    the brightness of a clip would flicker from frame to frame.

    Raises:
        OSError: the file is missing, no image, or truncated; the message names it.
    """
    return rgb(open_image(path, "an image"))


def rgb(image: Image.Image) -> np.ndarray:
    """Convert an image of any mode to (H, W, 3) uint8 RGB; see `read_image` for 16 bits."""
    if image.mode.startswith(("I", "F")):
        return np.repeat(_eight_bits(np.asarray(image))[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scale (H, W) values of 16 or 32 bits to uint8; floats up to 1 are fractions of white."""
    if np.issubdtype(values.dtype, np.floating):
        whole_range = 1.0 if values.max(initial=0) <= 1 else 255.0
    else:
        # two bytes are uint16 in either byte order, even if no value is large
        whole_range = 255 if values.dtype.itemsize != 2 and values.max(initial=0) <= 255 else 65535
    return (values.clip(0, whole_range) * (255 / whole_range)).round().astype(np.uint8)


def write_image(path: str | Path, image: np.ndarray, quality: int = 90) -> None:
    """Write (H, W, 3) uint8 RGB in the format of the path's suffix.

    Args:
        quality: of lossy formats, up to 100.
    """
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, quality=quality)


def write_mask(path: str | Path, mask: np.ndarray) -> None:
    """Write a (H, W) uint8 mask as PNG with the DAVIS palette."""
    image = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    image.putpalette(PALETTE.tobytes())  # turns a grey image into a palette image
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def image_shape(path: str | Path | BinaryIO, what: str) -> tuple[int, int]:
    """Read the size (H, W) of an image from its header alone; raises as `read_image` does.

    Args:
        what: what the file should be, for the error message ("a frame").
    """
    with _naming(path, what), Image.open(path) as image:
        # a PNG may have its EXIF block at the end, which would mean decoding all of it; Pillow has
        # already turned a TIFF
        tells = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        if tells and image.getexif().get(ORIENTATION, 1) >= 5:  # turned by 90 degrees
            return image.width, image.height
        return image.height, image.width


def files_in(folder: Path) -> list[Path]:
    """List the images in a folder in natural order (frame_2, frame_10), without hidden files."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES
             and not file.name.startswith(".") and file.is_file()]
    return sorted(files, key=partial(natural, decimals=has_decimals(files)))


def natural(path: Path, decimals: bool = False) -> tuple:
    """Sort key that compares numbers in names by value, so that 2 comes before 10.

    Args:
        decimals: 0.25 is one number, less than 0.5; otherwise it is two, and 0.5 comes first.
    """
    parts = re.split(f"({DECIMAL}|[0-9]+)" if decimals else "([0-9]+)", path.stem)
    return [(float(part) if "." in part else int(part)) if i % 2 else part.casefold()
            for i, part in enumerate(parts)], path.name


def has_decimals(files: Iterable[Path]) -> bool:
    """Whether a dot between digits in these names is a decimal point.

    The alternative is a counter behind a version, take or scene number (v2.1 ... v2.12). Fractions
    of equal length are in the same order either way. Of those that aren't, a counter has one that
    ends in 0 (v2.10), which programs don't print behind a decimal point.
    """
    fractions = [number.partition(".")[2] for file in files
                 for number in re.findall(DECIMAL, file.stem)]
    return (len({len(fraction) for fraction in fractions}) > 1
            and not any(len(fraction) > 1 and fraction.endswith("0") for fraction in fractions))


def check_same_shape(expected_path, expected: tuple[int, ...], path, shape: tuple[int, ...],
                     what: str = "a mask") -> None:
    """Raise a ValueError that names `path` unless its (H, W) is that of `expected_path`."""
    if expected[:2] != shape[:2]:
        turned = " (turned by 90 degrees?)" if expected[:2] == shape[1::-1] else ""
        raise ValueError(f"{path}: {what} of {shape[1]}x{shape[0]} pixels, expected "
                         f"{expected[1]}x{expected[0]} as in {expected_path}{turned}")


def open_image(path: str | Path, what: str) -> Image.Image:
    """Open an image file, turned upright, at its first picture; raises as `read_image` does.

    If it holds several pictures that is logged, once per folder and format.

    Args:
        what: what the file should be, for the error message ("a mask").
    """
    with _naming(path, what):
        image = Image.open(path)
        with suppress(Exception):  # damage to later pictures doesn't matter here
            _tell_several(path, image)
        image.load()
        return upright(image)


def _tell_several(path: str | Path, image: Image.Image) -> None:
    kind = Path(path).parent, image.format
    if kind not in _several and getattr(image, "is_animated", False):
        log.info("%s: holds %d pictures (%s), only the first is used, of files like it too", path,
                 getattr(image, "n_frames", 1), image.format)
        _several.add(kind)


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture by its EXIF orientation; Pillow itself does so for a TIFF."""
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) > 1 else image


def open_pictures(path: str | Path, what: str) -> Image.Image:
    """Open an image file to `seek` through all its pictures; raises as `read_image` does."""
    with _naming(path, what):
        image = Image.open(path)
        image.load()
        return image


def pictures(image: Image.Image) -> int:
    """Count the frames of an image file; 1 if its pictures are versions of the same one.

    Those are the preview and depth map of a photo (MPO), and TIFF pages that differ in size, such
    as the levels of a pyramid or a thumbnail.
    """
    if image.format != "TIFF":
        return getattr(image, "n_frames", 1) if image.format in MOVING else 1
    sizes: list[tuple[int, int]] = []
    try:
        while True:
            image.seek(len(sizes))
            sizes.append(image.size)
    except EOFError:
        pass
    except Exception:  # a damaged page, which is counted so that reading reports it
        sizes.append(sizes[0])
    image.seek(0)
    return len(sizes) if len(set(sizes)) == 1 else 1


@contextmanager
def _naming(path: str | Path | BinaryIO, what: str):
    """Turn any exception of Pillow into an OSError that names the file and what was expected."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, expected {what}") from None
    except Exception as error:
        raise OSError(f"{path}: expected {what}, but it can't be read ({error})") from error


def resize_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize an (H, W) uint8 mask to another (H, W) by nearest neighbour."""
    if mask.shape == tuple(shape):
        return mask
    return cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def working_shape(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """The size (H, W) at which the network sees a frame.

    Args:
        shape: (H, W) of the frame.
        size: length of the short side, but at most `ENLARGED` times the frame's own; 0 keeps the
            frame's size.
    """
    scale = min(size / min(shape), ENLARGED) if size else 1.0
    return round(shape[0] * scale), round(shape[1] * scale)


def scaled(image: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 RGB to its `working_shape`."""
    shape = working_shape(image.shape[:2], size)
    if shape == image.shape[:2]:
        return image
    smaller = shape[0] < image.shape[0]
    return cv2.resize(image, shape[::-1],
                      interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
