"""Extracts the mask channel of an image: index or grey value, colour, or alpha."""

from pathlib import Path

import numpy as np
from PIL import Image

from masks import soft_edges
from media import images
from media.drawing import PALETTE

OPAQUE = 128  # a pixel belongs to the object from this alpha on: half, as in the cut-outs we write


def kind_of(image: Image.Image, user_drawn: bool) -> str:
    """Decide which channel of an image is the mask: "numbers", "colours" or "alpha".

    Args:
        user_drawn: a user drew it, so its palette may be in any order.
    """
    if is_transparent(image):
        coloured, alpha = _split(image)
        inside = alpha >= OPAQUE
        opaque = coloured[inside]
        table, codes = soft_edges.unique_colours(_over_black(coloured, alpha))
        if (opaque == opaque[:1]).all() or soft_edges.is_picture(codes, inside):  # a cut-out
            return "alpha"
        return "numbers" if (table == table[:, :1]).all() else "colours"
    if image.mode == "P":
        return "numbers" if _holds_ids(image, user_drawn) else "colours"
    if image.mode in ("1", "L", "LA") or image.mode.startswith(("I", "F")):
        return "numbers"
    rgb = np.asarray(image.convert("RGB"))
    return "numbers" if (rgb == rgb[..., :1]).all() else "colours"


def is_transparent(image: Image.Image) -> bool:
    """Whether alpha varies, beyond the transparent first entry of a palette."""
    if not image.has_transparency_data:
        return False
    if image.mode == "P":
        transparency = image.info["transparency"]  # alpha per entry, or the transparent entry
        alphas = (list(transparency) if isinstance(transparency, bytes)
                  else [255] * transparency + [0])
        if min(alphas[1:], default=255) == 255:
            return False
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    return alpha.min() != alpha.max()


def _split(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Split into (H, W, 3) RGB and (H, W) alpha, both uint8, with alpha scaled to reach 255."""
    rgba = np.asarray(image.convert("RGBA"))
    alpha = rgba[..., 3].astype(int)
    return rgba[..., :3], (alpha * 255 // max(1, alpha.max())).astype(np.uint8)


def _over_black(coloured: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite over black, the usual background of masks."""
    return (coloured * (alpha[..., None] / 255)).round().astype(np.uint8)


def _holds_ids(image: Image.Image, user_drawn: bool) -> bool:
    """Whether palette indices are object ids.

    They are if the palette is DAVIS', or if index 0 is the background and no index is that of a
    soft edge. Otherwise the colours of the palette tell the objects apart.
    """
    codes = np.asarray(image)
    used, table = np.unique(codes), _palette(image)
    if len(used) == 1 or (table[used] == PALETTE[used]).all():
        return True
    if table[0].any() or user_drawn and 0 not in used:
        background = np.bincount(border(codes), minlength=256).argmax()
        areas = np.bincount(codes.ravel(), minlength=256)
        if background and areas[background] == areas.max() or 0 not in used:
            return False
    try:
        return not soft_edges.find_flat_values(codes.astype(int), table, 0).soft
    except ValueError:
        return False


def _palette(image: Image.Image) -> np.ndarray:
    """The palette as (256, 3) int RGB; missing entries are black."""
    table = np.zeros((256, 3), int)
    entries = np.array(image.getpalette("RGB")).reshape(-1, 3)
    table[:len(entries)] = entries
    return table


def same_palettes(paths: list[Path]) -> bool:
    """Whether the files' palettes agree, as far as the shorter one of each pair goes."""
    longest: list[int] = []
    for path in paths:
        with Image.open(path) as image:  # its header
            palette = image.getpalette("RGB") if image.mode == "P" else None
        if palette and palette[:len(longest)] != longest[:len(palette)]:
            return False
        longest = max(longest, palette or [], key=len)
    return True


def pixels_of(path: str | Path, image: Image.Image, kind: str) -> np.ndarray:
    """The mask channel of an image as (H, W) numbers or alpha, or (H, W, 3) colours.

    Colours are also returned for "numbers" if the image turns out not to be grey.

    Raises:
        ValueError: `kind` is "alpha" and the image has no alpha channel; it names `path`.
    """
    if kind == "alpha":
        if not image.has_transparency_data:
            raise ValueError(f"{path}: expected the mask in the alpha channel, as in the other "
                             "masks, found an image without one")
        return _split(image)[1]
    if kind == "numbers" and image.mode in ("1", "L", "P") and not (
            image.mode == "L" and image.has_transparency_data):
        return np.array(image, dtype=np.uint8)
    if image.mode.startswith("F"):
        values = np.asarray(image)
        return (values * (255 if values.max(initial=0) <= 1 else 1)).clip(0, 65535).astype(int)
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535).astype(int)
        whole = (values % 257 == 0).all()  # 8 bits scaled to 16, as some programs write them
        return values // 257 if whole else values
    rgb = _over_black(*_split(image)) if is_transparent(image) else np.asarray(image.convert("RGB"))
    return rgb[..., 0] if kind == "numbers" and (rgb == rgb[..., :1]).all() else rgb


def border(values: np.ndarray) -> np.ndarray:
    """The outermost pixels of an (H, W) array, as one row; corners twice."""
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def read(path: str | Path, kind: str) -> np.ndarray:
    """Read a file and return its `pixels_of`; raises OSError as `images.open_image` does."""
    return pixels_of(path, images.open_image(path, "a mask"), kind)
