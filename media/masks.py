"""Masks as files: read, and what their values mean decided once, for a file or a whole sequence.

It knows no frame number but the caller's, no data set and no network. How flat values are told
from soft edges: media/flat.py.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from media import flat, images
from media.drawing import PALETTE

log = logging.getLogger(__name__)

VOID = 255  # "not labelled" in masks that hold object ids
OPAQUE = 128  # alpha from which a pixel is there
SAME = 10  # levels by which a colour may be off DAVIS' own, where edges are soft
MANY = 32  # objects
NAMED = 8  # at most, in a line of the log


@dataclass(frozen=True, eq=False)
class Coding:
    """What the values of a mask file, or of all files of a sequence, mean.

    Args:
        kind: what of a file counts: "numbers" (grey, palette indices), "colours" or "alpha".
        numbers: (256,) or (65536,) uint8, the object's id for each number; None: by `values`.
        values: (M, C) the background's value and that of each object, C 1 or 3.
        ids: (M,) uint8, their ids, 0 for the background.
        soft: between these values lie soft edges; a pixel belongs to the nearer one.
    """

    kind: str
    numbers: np.ndarray | None = None
    values: np.ndarray | None = None
    ids: np.ndarray | None = None
    soft: bool = False

    @classmethod
    def of(cls, paths: Sequence[Path | str], single_object: bool = False, own: bool = False,
           known: dict[tuple, int] | None = None) -> "Coding":
        """Decide by the first files that tell; the log says in one line what was guessed.

        Numbers are ids, 255 is the object where no file holds another number, else void, which
        counts as background. Soft edges are told from ids; flat colours are ids, those of DAVIS
        their own, others in the order in which they are met.

        Args:
            paths: mask files of one sequence, at least one.
            single_object: whatever isn't background is object 1, as DAVIS-2016 has it.
            own: a person painted them: 255 beside other numbers is an error rather than void,
                and where no pixel is 0 what lies along the border is the background.
            known: ids of colours, those met in other files; what is met here is added.

        Raises:
            OSError: a file can't be read.
            ValueError: a picture, not a mask, or an object of 255 beside others.
        """
        coding = _decide([Path(path) for path in paths], own, {} if known is None else known)
        if not single_object:
            return coding
        if coding.numbers is not None:
            return cls(coding.kind, (np.arange(len(coding.numbers)) > 0).astype(np.uint8))
        return cls(coding.kind, None, coding.values, np.minimum(coding.ids, 1), coding.soft)

    def read(self, path: str | Path) -> np.ndarray:
        """Read a mask file as (H, W) uint8: 0 background, else the object's id.

        Raises:
            OSError: no such file, or not a whole image.
            ValueError: not coded as those files that the decision was made by.
        """
        pixels = _layer(path, images.open_image(path, "a mask"), self.kind)
        if self.numbers is not None and pixels.ndim == 2:
            if pixels.max(initial=0) >= len(self.numbers):
                raise ValueError(f"{path}: holds the number {pixels.max()}, expected at most "
                                 f"{len(self.numbers) - 1} as in the masks before")
            return self.numbers[pixels]
        values, ids = self.values, self.ids
        if pixels.ndim == 3 and (values is None or values.shape[1] == 1):  # colours among numbers
            values, ids = PALETTE.astype(int), np.arange(256, dtype=np.uint8)
            ids = ids if self.numbers is None else self.numbers[ids]
        if self.soft:
            return flat.nearest(pixels.reshape(*pixels.shape[:2], -1), values, ids)
        mask, strange = flat.exact(pixels, values, ids)
        if strange is not None:
            raise ValueError(f"{path}: holds the colour {strange}, which no other mask of the "
                             "sequence has, expected an id or a flat colour for each object")
        return mask


def read_mask(path: str | Path, single_object: bool = False, own: bool = False) -> np.ndarray:
    """Read a mask file by itself as (H, W) uint8; see `Coding.of` for arguments and errors."""
    return Coding.of([path], single_object, own).read(path)


def read_masks(paths: dict[int, list[Path]], shape: tuple[int, int] | None = None,
               clip: str | Path = "the clip") -> dict[int, np.ndarray]:
    """Read a person's own masks, all before anything is done with any.

    Several files of one frame are joined: ids that are free are kept, an id that another file of
    the frame has already becomes the next one that is free.

    Args:
        paths: the mask files of each frame, by its number.
        shape: (H, W) of the frames of `clip`, None if unknown.

    Returns:
        (H, W) uint8 for each frame, the first with an object; an empty later mask says that no
        object is visible.

    Raises:
        OSError, ValueError: as `Coding.of` and `Coding.read` do; also for a mask of another size
            and a first mask without an object. They name the file.
    """
    known: dict[tuple, int] = {}
    found, white = {}, []
    like, shape_of = (clip, shape) if shape else (None, None)
    for frame in sorted(paths):
        parts = []
        for path in paths[frame]:
            coding = Coding.of([path], own=True, known=known)
            mask = coding.read(path)
            if shape_of is None:
                like, shape_of = path, mask.shape
            images.check_same_shape(like, shape_of, path, mask.shape)
            if (mask > 0).mean() > 0.5 and (_border(mask) > 0).mean() > 0.9:
                log.warning("%s: objects cover the border of the frame; if object and background "
                            "are swapped, invert the mask", path)
            if coding.numbers is not None and coding.numbers[VOID] == 1 and mask.any():
                white.append((frame, path))
            parts.append((path, mask))
        found[frame] = _join(frame, parts)
        if frame == min(paths) and not found[frame].any():
            raise ValueError(f"{paths[frame][0]}: the mask holds no object, expected one in the "
                             f"first mask (frame {frame})")
    frames = dict.fromkeys(frame for frame, _ in white)
    if len(frames) > 1 and all(len(paths[frame]) == 1 for frame in frames):
        log.info("%s: white is object 1 in each of them, the same object; another object needs "
                 "another number (such as 2)", ", ".join(Path(path).name for _, path in white))
    return found


def _join(frame: int, parts: list[tuple[Path, np.ndarray]]) -> np.ndarray:
    """The masks of one frame in one; where they overlap the later file's object is in front."""
    joined = np.zeros_like(parts[0][1])
    if len(parts) == 1:
        return parts[0][1]
    told = []
    for path, mask in parts:
        taken = set(np.unique(joined).tolist())
        fresh = joined.copy()
        for object_id in np.unique(mask[mask > 0]).tolist():
            new = object_id
            if new in taken:
                new = next((i for i in range(1, VOID) if i not in taken), None)
                if new is None:
                    raise ValueError(f"{path}: more than {VOID - 1} objects in frame {frame}")
            taken.add(new)
            fresh[mask == object_id] = new
            told.append(f"{Path(path).name} {new}")
        overlap = np.count_nonzero((joined > 0) & (mask > 0))
        if overlap:
            log.warning("%s: overlaps the other masks of frame %d in %d pixels, which go to it",
                        path, frame, overlap)
        joined = fresh
    log.info("frame %d: objects %s", frame, ", ".join(told))
    return joined


def is_empty(path: str | Path) -> bool:
    """Whether all of a mask file is black, 0, or transparent; raises OSError as `read_mask`."""
    image = images.open_image(path, "a mask")
    if _transparent(image):
        return False
    return not np.any(image.convert("RGB").getextrema() if "A" in image.mode
                      else image.getextrema())


def concern(mask: np.ndarray, cell: float) -> str | None:
    """What is to be said of a first mask before the work, with the flag that helps; or None.

    Args:
        mask: (H, W) uint8.
        cell: side of a feature cell, in pixels of the mask.
    """
    ids, areas = np.unique(mask[mask > 0], return_counts=True)
    small, said = ids[areas < cell ** 2].tolist(), []
    if len(ids) > MANY:
        said.append(f"{len(ids)} objects take time and memory for each: fewer at a time, or a "
                    "smaller -p, if it is too much")
    if small:
        word = "object" if len(small) == 1 else f"{len(small)} objects,"
        names = ", ".join(map(str, small[:NAMED])) + (" ..." if len(small) > NAMED else "")
        said.append(f"{word} {names}: smaller than a feature cell ({cell:.3g} pixels wide), which "
                    "a higher --upsample_factor makes smaller")
    return "; ".join(said) or None


def _decide(paths: list[Path], own: bool, known: dict[tuple, int]) -> Coding:
    """The coding of some files, whatever the number of objects."""
    where = paths[0] if len(paths) == 1 else paths[0].parent
    kind, white = None, False
    for path in paths:
        image = images.open_image(path, "a mask")
        if kind is None:
            kind = _kind(image, own)
            if kind == "numbers" and image.mode == "P" and not _same_palettes(paths):
                log.info("%s: each mask has a palette of its own, so colours count", where)
                kind = "colours"
            if kind == "alpha":
                log.info("%s: the mask is in the alpha channel", where)
        if kind == "colours":
            return _by_colours(paths, where, known)
        pixels = _layer(path, image, kind)
        if pixels.ndim == 3:  # among numbers, in DAVIS' colours
            continue
        levels = np.unique(pixels)
        white |= VOID in levels
        if not np.isin(levels, (0, VOID)).all():
            indices = image.mode == "P" and kind == "numbers"
            return _by_numbers(paths, where, pixels, kind, own, indices)
    return Coding(kind, numbers=_identity(1 if white else 0))


def _identity(white: int = 0) -> np.ndarray:
    """Ids as they are; `white` is what 255 means."""
    numbers = np.arange(256, dtype=np.uint8)
    numbers[VOID] = white
    return numbers


def _by_numbers(paths: list[Path], where: Path, pixels: np.ndarray, kind: str, own: bool,
                indices: bool) -> Coding:
    """The coding of masks of numbers, from (H, W) of the first that holds more than 0 and 255."""
    levels, codes = np.unique(pixels, return_inverse=True)
    codes, background = codes.reshape(pixels.shape), 0
    if levels[0] and own and len(levels) > 1:
        background = int(np.bincount(_border(codes)).argmax())
        log.info("%s: no pixel is 0, so %d, along the border, is the background", where,
                 levels[background])
    elif levels[0]:
        levels, codes = np.concatenate([[0], levels]), codes + 1
    if not indices:
        found = _classes(where, codes, levels[:, None], background)
        if found.soft:
            return _soft_numbers(where, levels, found, background, kind)
    if levels.max() > VOID:  # of 16 bits: there may be more of them in other files
        levels = np.unique(np.concatenate([np.unique(_layer(p, images.open_image(p, "a mask"), kind))
                                           for p in paths])) if len(paths) > 1 else levels
        ids = [level for level in levels.tolist() if level not in (0, levels[background])]
        if len(ids) > VOID - 1:
            raise ValueError(f"{where}: {len(ids)} numbers, expected at most {VOID - 1} objects")
        numbers = np.zeros(65536, np.uint8)
        numbers[ids] = np.arange(1, len(ids) + 1)
        log.info("%s: numbers above 255 are objects in their order: %s", where,
                 _named((number, i + 1) for i, number in enumerate(ids)))
        return Coding(kind, numbers)
    numbers = _identity()
    if levels[0] and own:
        numbers[levels[background]] = 0
    if VOID in levels and len(levels) > 2 and background == 0:
        void = flat.solid(codes, len(levels))[-1]
        if own and void and not indices:
            raise ValueError(f"{where}: {VOID} beside {levels[levels > 0][0]} would mean \"not "
                             "labelled\", expected another value for that object, or 0 where "
                             "there is none")
        log.info("%s: 255 beside other numbers is \"not labelled\", so background", where)
    elif VOID in levels:
        numbers[VOID] = 0 if levels[background] == VOID else 1
    return Coding(kind, numbers)


def _soft_numbers(where: Path, levels: np.ndarray, found: flat.Found, background: int,
                  kind: str) -> Coding:
    values = np.concatenate([[levels[background]], np.sort(levels[found.classes])])[:, None]
    if len(values) == 2:
        log.info("%s: soft edges, so what is at least half as bright as the object (%d) belongs "
                 "to it", where, values[1, 0])
    else:
        log.info("%s: soft edges around %d objects: %s", where, len(values) - 1,
                 _named((value, i) for i, value in enumerate(values[1:, 0].tolist(), start=1)))
    return Coding(kind, None, values.astype(int), np.arange(len(values), dtype=np.uint8), True)


def _by_colours(paths: list[Path], where: Path, known: dict[tuple, int]) -> Coding:
    """The coding of coloured masks: all of them are looked at, for objects that come later."""
    background, soft, met = None, False, {}
    for path in paths:
        pixels = _layer(path, images.open_image(path, "a mask"), "colours")
        if background is not None and not soft and not flat.unknown(pixels, [background, *met]):
            continue
        table, codes = flat.codes(pixels)
        if background is None:
            background = _background(where, table, codes)
        match = np.flatnonzero((table == background).all(1))
        if not len(match):
            table, codes = np.concatenate([[background], table]), codes + 1
        found = _classes(path, codes, table, int(match[0]) if len(match) else 0)
        soft |= found.soft
        for index in sorted(found.classes, key=lambda i: (codes == i).argmax()):
            colour = tuple(table[index].tolist())
            if not soft or all(np.abs(np.subtract(colour, c)).max() >= flat.NEAR for c in met):
                met[colour] = None
    ids = {colour: _own_id(colour, soft) for colour in met}
    for colour in met:
        old = known.get(colour)
        taken = {*ids.values(), *known.values()}
        if ids[colour] is None:
            ids[colour] = old or next((i for i in range(1, VOID) if i not in taken), VOID)
    if VOID in {i for c, i in ids.items() if _own_id(c, soft) is None}:
        raise ValueError(f"{where}: {len(ids)} colours, expected at most {VOID - 1} objects")
    ids = {colour: 0 if i == VOID else i for colour, i in ids.items()}
    known |= ids
    log.info("%s: colours are objects%s: %s", where, ", with soft edges" if soft else "",
             _named(ids.items()) or "none")
    return Coding("colours", None, np.array([background, *ids]),
                  np.array([0, *ids.values()], np.uint8), soft)


def _background(where: Path, table: np.ndarray, codes: np.ndarray) -> tuple:
    """Black where there is any, else the colour along the border."""
    if not table.any(1).all():
        return (0, 0, 0)
    colour = tuple(table[np.bincount(_border(codes)).argmax()].tolist())
    log.info("%s: nothing is black, so the colour along the border, %s, is the background", where,
             colour)
    return colour


def _own_id(colour: tuple, soft: bool) -> int | None:
    """The id that DAVIS gives to a colour."""
    off = np.abs(PALETTE.astype(int) - colour).max(1)
    if soft:
        off[22:] = 255  # an edge may pass through one of so many
    return int(off.argmin()) if off.min() <= (SAME if soft else 0) else None


def _classes(where: Path, codes: np.ndarray, table: np.ndarray, background: int) -> flat.Found:
    try:
        return flat.classes(codes, table, background)
    except ValueError as error:
        raise ValueError(f"{where}: expected a mask, with a number or a flat colour for each "
                         f"object, found {error}") from error


def _named(pairs) -> str:
    pairs = list(pairs)
    return (", ".join(f"{value} is {i}" for value, i in pairs[:NAMED])
            + (", ..." if len(pairs) > NAMED else ""))


def _border(values: np.ndarray) -> np.ndarray:
    """The outermost pixels of (H, W), in one row."""
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def _kind(image: Image.Image, own: bool) -> str:
    """What of an image is the mask: "numbers", "colours" or "alpha"."""
    if _transparent(image):
        coloured, alpha = _split(image)
        inside = alpha >= OPAQUE
        opaque = coloured[inside]
        table, codes = flat.codes(_over_black(coloured, alpha))
        if (opaque == opaque[:1]).all() or flat.is_picture(codes, inside):  # a cut-out
            return "alpha"
        return "numbers" if (table == table[:, :1]).all() else "colours"
    if image.mode == "P":
        return "numbers" if _numbered(image, own) else "colours"
    if image.mode in ("1", "L", "LA") or image.mode.startswith(("I", "F")):
        return "numbers"
    rgb = np.asarray(image.convert("RGB"))
    return "numbers" if (rgb == rgb[..., :1]).all() else "colours"


def _transparent(image: Image.Image) -> bool:
    """Whether some of it is transparent, and more than a palette's background."""
    if not image.has_transparency_data:
        return False
    if image.mode == "P":
        told = image.info["transparency"]
        alphas = list(told) if isinstance(told, bytes) else [255] * told + [0]
        if min(alphas[1:], default=255) == 255:
            return False
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    return alpha.min() != alpha.max()


def _split(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) RGB and (H, W) alpha, uint8, the most opaque 255."""
    rgba = np.asarray(image.convert("RGBA"))
    alpha = rgba[..., 3].astype(int)
    return rgba[..., :3], (alpha * 255 // max(1, alpha.max())).astype(np.uint8)


def _over_black(coloured: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return (coloured * (alpha[..., None] / 255)).round().astype(np.uint8)


def _numbered(image: Image.Image, own: bool) -> bool:
    """Whether indices of a palette are ids: the background is 0, and none is a soft edge."""
    codes = np.asarray(image)
    used, table = np.unique(codes), _palette(image)
    if len(used) == 1 or (table[used] == PALETTE[used]).all():
        return True
    if table[0].any() or own and 0 not in used:
        background = np.bincount(_border(codes), minlength=256).argmax()
        areas = np.bincount(codes.ravel(), minlength=256)
        if background and areas[background] == areas.max() or 0 not in used:
            return False
    try:
        return not flat.classes(codes.astype(int), table, 0).soft
    except ValueError:
        return False


def _palette(image: Image.Image) -> np.ndarray:
    table = np.zeros((256, 3), int)
    found = np.array(image.getpalette("RGB")).reshape(-1, 3)
    table[:len(found)] = found
    return table


def _same_palettes(paths: list[Path]) -> bool:
    """Whether the palettes of some files agree as far as the shorter of each two goes."""
    longest: list[int] = []
    for path in paths:
        with Image.open(path) as image:  # its header
            palette = image.getpalette("RGB") if image.mode == "P" else None
        if palette and palette[:len(longest)] != longest[:len(palette)]:
            return False
        longest = max(longest, palette or [], key=len)
    return True


def _layer(path: str | Path, image: Image.Image, kind: str) -> np.ndarray:
    """(H, W) numbers or alpha, or (H, W, 3) colours, of a file; colours also among numbers."""
    if kind == "alpha":
        if not image.has_transparency_data:
            raise ValueError(f"{path}: expected the mask in the alpha channel, as in the masks "
                             "before, found an image without one")
        return _split(image)[1]
    if kind == "numbers" and image.mode in ("1", "L", "P") and not (
            image.mode == "L" and image.has_transparency_data):
        return np.array(image, dtype=np.uint8)
    if image.mode.startswith("F"):
        values = np.asarray(image)
        return (values * (255 if values.max(initial=0) <= 1 else 1)).clip(0, 65535).astype(int)
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535).astype(int)
        whole = (values % 257 == 0).all()  # 8 bits, written as 16
        return values // 257 if whole else values
    rgb = _over_black(*_split(image)) if _transparent(image) else np.asarray(image.convert("RGB"))
    return rgb[..., 0] if kind == "numbers" and (rgb == rgb[..., :1]).all() else rgb
