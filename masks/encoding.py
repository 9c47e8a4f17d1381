"""Detect which object each number or colour in mask files stands for, and read such files.

It is detected once for all files of a sequence. `soft_edges` separates flat values, which are
objects, from the soft edges between them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from masks import channels, soft_edges
from media import images
from media.drawing import PALETTE

log = logging.getLogger(__name__)

VOID = 255  # "not labelled" in masks that hold object ids
# File types that may be compressed with loss, which changes values a little
LOSSY = (".jpg", ".jpeg", ".webp", ".avif")
# Largest difference, per channel, between a colour in a file with soft edges and the DAVIS colour
# that it stands for: lossy compression changes colours a little. DAVIS colours are 64 apart.
COLOUR_TOLERANCE = 10
# Number of DAVIS colours that are recognised in files with soft edges, background included. With
# all 256 of them, the blend of two objects would often match a third one.
SOFT_PALETTE = 22
MAX_LOGGED = 8  # ids in one log line


@dataclass(frozen=True, eq=False)
class MaskEncoding:
    """The object that each value stands for, in a mask file or in all files of a sequence.

    Either `id_table` or `values` and `ids` are set.

    Args:
        kind: the channel that holds the mask: "numbers" (grey values, palette indices), "colours"
            or "alpha".
        id_table: (256,) or (65536,) uint8, the object id of each number; `VOID` for the number
            that means "not labelled".
        values: (M, C) int, grey values (C = 1) or colours (C = 3), the background's first.
        ids: (M,) uint8, their ids: 0 for the background, `VOID` for "not labelled".
        soft: there are soft edges between these values; a pixel belongs to the nearest one.
    """

    kind: str
    id_table: np.ndarray | None = None
    values: np.ndarray | None = None
    ids: np.ndarray | None = None
    soft: bool = False

    @classmethod
    def detect(cls, paths: Sequence[Path | str], single_object: bool = False,
               user_drawn: bool = False,
               assigned: dict[tuple, int] | None = None) -> "MaskEncoding":
        """Detect the encoding of mask files; a guess is logged in one line.

        Numbers are ids. 255 is the object if no file holds another number; otherwise it is void:
        not labelled, and not scored in a ground-truth mask. Flat colours are objects: those of
        DAVIS have the ids of DAVIS, others are numbered in order of appearance.

        Args:
            paths: mask files of one sequence, at least one.
            single_object: everything but the background is object 1, and there is no void, as in
                DAVIS-2016.
            user_drawn: a user drew them: 255 next to other numbers is an error rather than void,
                and if no pixel is 0, the most common value along the border is the background.
            assigned: ids of colours in the user's other files; the colours of these files are
                added.

        Raises:
            OSError: a file can't be read.
            ValueError: a file is a picture rather than a mask, or holds too many objects, or an
                object has the value 255 next to others.
        """
        encoding = _detect([Path(path) for path in paths], single_object, user_drawn,
                           {} if assigned is None else assigned)
        if not single_object:
            return encoding
        if encoding.id_table is not None:
            return cls(encoding.kind, (np.arange(len(encoding.id_table)) > 0).astype(np.uint8))
        ids = np.where(encoding.ids == VOID, VOID, np.minimum(encoding.ids, 1))
        return cls(encoding.kind, None, encoding.values, ids, encoding.soft)

    def read(self, path: str | Path, keep_void: bool = False) -> np.ndarray:
        """Read a mask file as (H, W) uint8: 0 background, else the object's id.

        Args:
            keep_void: return `VOID` where a pixel is not labelled, as needed for scoring; by
                default such pixels are background.

        Raises:
            OSError: the file is missing, or not a complete image.
            ValueError: its values are not those of this encoding.
        """
        mask = self._ids(path)
        return mask if keep_void else np.where(mask == VOID, 0, mask)

    def _ids(self, path: str | Path) -> np.ndarray:
        """Read a mask file as (H, W) uint8 ids, with `VOID` where a pixel is not labelled."""
        pixels = channels.read(path, self.kind)
        if self.id_table is not None and pixels.ndim == 2:
            if pixels.max(initial=0) >= len(self.id_table):
                raise ValueError(f"{path}: holds the number {pixels.max()}, expected at most "
                                 f"{len(self.id_table) - 1} as in the other masks")
            return self.id_table[pixels]
        values, ids = self.values, self.ids
        if pixels.ndim == 3 and (values is None or values.shape[1] == 1):
            # a colour image among grey ones: its colours are those of DAVIS
            values, ids = PALETTE.astype(int), np.arange(256, dtype=np.uint8)
            ids = ids if self.id_table is None else self.id_table[ids]
        if self.soft:
            return soft_edges.nearest(pixels.reshape(*pixels.shape[:2], -1), values, ids)
        mask, unknown = soft_edges.look_up(pixels, values, ids)
        if unknown is not None:
            raise ValueError(f"{path}: holds the colour {unknown}, which no other mask of the "
                             "sequence has, expected an id or a flat colour for each object")
        return mask


def _detect(paths: list[Path], single_object: bool, user_drawn: bool,
            assigned: dict[tuple, int]) -> MaskEncoding:
    """Detect the encoding; keeps several objects apart even if `single_object` is set.

    Among masks of numbers, the first one that holds more than 0 and 255 decides.
    """
    where = paths[0] if len(paths) == 1 else paths[0].parent
    kind, has_255 = None, False
    for path in paths:
        image = images.open_image(path, "a mask")
        image_kind = kind or channels.kind_of(image, user_drawn)
        pixels = channels.pixels_of(path, image, image_kind)
        if not pixels.any() or kind and pixels.ndim == 3:
            continue  # empty, or a colour image among grey ones, which says nothing about numbers
        if kind is None:
            kind = image_kind
            if kind == "numbers" and image.mode == "P" and not channels.same_palettes(paths):
                log.info("%s: the palettes differ, so objects are told apart by colour", where)
                kind = "colours"
            if kind == "alpha":
                log.info("%s: the mask is in the alpha channel", where)
            if kind == "colours":
                return _from_colours(paths, where, assigned)
        if not np.isin(pixels, (0, VOID)).all():
            indices = image.mode == "P" and kind == "numbers"
            return _from_numbers(paths, where, path, pixels, kind, user_drawn, indices)
        has_255 = True
        if single_object:
            break
    return MaskEncoding(kind or "numbers", id_table=_identity_table(1 if has_255 else VOID))


def _identity_table(id_of_255: int = VOID) -> np.ndarray:
    """Return an `id_table` in which each number except 255 is its own id."""
    table = np.arange(256, dtype=np.uint8)
    table[VOID] = id_of_255
    return table


def _from_numbers(paths: list[Path], where: Path, path: Path, pixels: np.ndarray, kind: str,
                  user_drawn: bool, indices: bool) -> MaskEncoding:
    """Return the encoding of masks of numbers.

    Args:
        where: the file or folder to name in messages.
        path, pixels: the first mask that holds more than 0 and 255, (H, W).
        indices: the numbers are palette indices, which have no soft edges.
    """
    levels, codes = np.unique(pixels, return_inverse=True)
    codes, background = codes.reshape(pixels.shape), 0
    if levels[0] and user_drawn and len(levels) > 1:
        background = int(np.bincount(channels.border(codes)).argmax())
        log.info("%s: no pixel is 0, so %d, along the border, is the background", where,
                 levels[background])
    elif levels[0]:
        levels, codes = np.concatenate([[0], levels]), codes + 1
    if not indices:
        flat = _find_flat_values(path, codes, levels[:, None], background)
        if flat.soft:
            return _from_soft_numbers(where, levels, flat, background, kind)
    if levels.max() > VOID:
        return _from_16_bits(paths, where, int(levels[background]), kind)
    table = _identity_table()
    table[levels[background]] = 0
    if VOID in levels and len(levels) == 2:
        table[VOID] = 0 if levels[background] == VOID else 1
    elif VOID in levels and not background:
        if user_drawn and not indices and soft_edges.fills_square(codes, len(levels))[-1]:
            raise ValueError(f"{where}: {VOID} next to {levels[levels > 0][0]} would mean \"not "
                             "labelled\", expected another value for that object, or 0 where "
                             "there is none")
        log.info("%s: %d next to other numbers means \"not labelled\": background, and ignored in "
                 "scoring", where, VOID)
    return MaskEncoding(kind, table)


def _from_16_bits(paths: list[Path], where: Path, background: int, kind: str) -> MaskEncoding:
    """Return the encoding of 16-bit masks; reads all files, as later ones may add objects."""
    levels = {level for path in paths for level in np.unique(channels.read(path, kind)).tolist()}
    ids = sorted(levels - {0, background})
    if len(ids) > VOID - 1:
        raise ValueError(f"{where}: {len(ids)} numbers, expected at most {VOID - 1} objects")
    table = np.zeros(65536, np.uint8)
    table[ids] = np.arange(1, len(ids) + 1)
    log.info("%s: has numbers above 255, so objects are numbered in ascending order: %s", where,
             _format_ids((number, i + 1) for i, number in enumerate(ids)))
    return MaskEncoding(kind, table)


def _from_soft_numbers(where: Path, levels: np.ndarray, flat: soft_edges.FlatValues,
                       background: int, kind: str) -> MaskEncoding:
    """Return the encoding of masks of numbers with soft edges.

    Args:
        levels: all numbers in the mask; `background` is the index of the background's.
        flat: those that are objects.
    """
    values = np.concatenate([[levels[background]], np.sort(levels[flat.indices])])[:, None]
    if len(values) == 2:
        log.info("%s: soft edges, so pixels at least half as bright as the object (%d) belong to "
                 "it", where, values[1, 0])
    else:
        log.info("%s: soft edges around %d objects: %s", where, len(values) - 1,
                 _format_ids((value, i) for i, value in enumerate(values[1:, 0].tolist(), start=1)))
    ids = np.arange(len(values), dtype=np.uint8)
    return MaskEncoding(kind, None, values.astype(int), ids, True)


def _from_colours(paths: list[Path], where: Path, assigned: dict[tuple, int]) -> MaskEncoding:
    """Return the encoding of colour masks; reads all files, as later ones may add objects."""
    background, soft, colours = None, False, {}
    for path in paths:
        pixels = channels.read(path, "colours")
        if (background is not None and not soft
                and not soft_edges.has_other_colours(pixels, [background, *colours])):
            continue
        table, codes = soft_edges.unique_colours(pixels)
        if background is None:
            background = _background(where, table, codes)
        match = np.flatnonzero((table == background).all(1))
        if not len(match):
            table, codes = np.concatenate([[background], table]), codes + 1
        flat = _find_flat_values(path, codes, table, int(match[0]) if len(match) else 0)
        soft |= flat.soft
        for index in sorted(flat.indices, key=lambda i: (codes == i).argmax()):
            colour = tuple(table[index].tolist())
            if not soft or all(np.abs(np.subtract(colour, c)).max() >= soft_edges.MIN_DISTANCE
                               for c in colours):
                colours[colour] = None
    ids = {colour: _davis_id(colour, soft) for colour in colours}
    for colour in colours:
        in_other_files = assigned.get(colour)
        taken = {*ids.values(), *assigned.values()}
        if ids[colour] is None:
            ids[colour] = in_other_files or next(
                (i for i in range(1, VOID) if i not in taken), VOID)
    if VOID in {i for c, i in ids.items() if _davis_id(c, soft) is None}:
        raise ValueError(f"{where}: {len(ids)} colours, expected at most {VOID - 1} objects")
    assigned |= ids
    log.info("%s: colours are objects%s: %s", where, ", with soft edges" if soft else "",
             _format_ids((colour, 0 if i == VOID else i) for colour, i in ids.items()) or "none")
    return MaskEncoding("colours", None, np.array([background, *ids]),
                        np.array([0, *ids.values()], np.uint8), soft)


def _background(where: Path, table: np.ndarray, codes: np.ndarray) -> tuple:
    """Return the background's colour: black if any pixel is, else the most common on the border.

    Args:
        table: (M, 3) the colours of a mask.
        codes: (H, W) the index of each pixel's colour in `table`.
    """
    if not table.any(1).all():
        return (0, 0, 0)
    colour = tuple(table[np.bincount(channels.border(codes)).argmax()].tolist())
    log.info("%s: no pixel is black, so the colour along the border, %s, is the background", where,
             colour)
    return colour


def _davis_id(colour: tuple, soft: bool) -> int | None:
    """Return the id of a colour in the palette of DAVIS; None if it is not one of its colours."""
    difference = np.abs(PALETTE.astype(int) - colour).max(1)
    if soft:
        difference[SOFT_PALETTE:] = 255
    closest = int(difference.argmin())
    return closest if difference[closest] <= (COLOUR_TOLERANCE if soft else 0) else None


def _find_flat_values(path: Path, codes: np.ndarray, table: np.ndarray,
                      background: int) -> soft_edges.FlatValues:
    """Like `soft_edges.find_flat_values`, but errors name the file."""
    try:
        return soft_edges.find_flat_values(codes, table, background, path.suffix.lower() in LOSSY)
    except ValueError as error:
        raise ValueError(f"{path}: expected a mask, with a number or a flat colour for each "
                         f"object, found {error}") from error


def _format_ids(pairs) -> str:
    """Format (value, id) pairs for the log."""
    pairs = list(pairs)
    return (", ".join(f"{value} is {i}" for value, i in pairs[:MAX_LOGGED])
            + (", ..." if len(pairs) > MAX_LOGGED else ""))
