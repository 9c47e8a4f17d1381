"""What the values of mask files mean, decided once for a file or for all files of a sequence.

How flat values are told from soft edges: masks/soft_edges.py.
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
LOSSY = (".jpg", ".jpeg", ".webp", ".avif")
SAME = 10  # levels by which a colour may be off DAVIS' own, where edges are soft
NAMED = 8  # at most, in a line of the log


@dataclass(frozen=True, eq=False)
class Coding:
    """What the values of a mask file, or of all files of a sequence, mean.

    Args:
        kind: what of a file counts: "numbers" (grey, palette indices), "colours" or "alpha".
        numbers: (256,) or (65536,) uint8, the object's id for each number; None: by `values`.
            `VOID` for the number that means "not labelled".
        values: (M, C) the background's value and that of each object, C 1 or 3.
        ids: (M,) uint8, their ids, 0 for the background, `VOID` for "not labelled".
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

        Numbers are ids, 255 is the object where no file holds another number, else void: not
        labelled, and not scored in a ground-truth mask. Soft edges are told from ids; flat colours
        are ids, those of DAVIS their own, others in the order in which they are met.

        Args:
            paths: mask files of one sequence, at least one.
            single_object: whatever isn't background is object 1, as DAVIS-2016 has it, which
                knows no void.
            own: a person painted them: 255 beside other numbers is an error rather than void,
                and where no pixel is 0 what lies along the border is the background.
            known: ids of colours, those met in other files; what is met here is added.

        Raises:
            OSError: a file can't be read.
            ValueError: a picture, not a mask, or an object of 255 beside others.
        """
        coding = _decide([Path(path) for path in paths], single_object, own,
                         {} if known is None else known)
        if not single_object:
            return coding
        if coding.numbers is not None:
            return cls(coding.kind, (np.arange(len(coding.numbers)) > 0).astype(np.uint8))
        ids = np.where(coding.ids == VOID, VOID, np.minimum(coding.ids, 1))
        return cls(coding.kind, None, coding.values, ids, coding.soft)

    def read(self, path: str | Path, keep_void: bool = False) -> np.ndarray:
        """Read a mask file as (H, W) uint8: 0 background, else the object's id.

        Args:
            keep_void: return `VOID` where a pixel is not labelled, as scoring needs it; by
                default such pixels are background.

        Raises:
            OSError: no such file, or not a whole image.
            ValueError: not coded as those files that the decision was made by.
        """
        mask = self._ids(path)
        return mask if keep_void else np.where(mask == VOID, 0, mask)

    def _ids(self, path: str | Path) -> np.ndarray:
        """(H, W) uint8 ids of a mask file, with `VOID` where a pixel is not labelled."""
        pixels = channels.read(path, self.kind)
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
            return soft_edges.nearest(pixels.reshape(*pixels.shape[:2], -1), values, ids)
        mask, strange = soft_edges.exact(pixels, values, ids)
        if strange is not None:
            raise ValueError(f"{path}: holds the colour {strange}, which no other mask of the "
                             "sequence has, expected an id or a flat colour for each object")
        return mask


def _decide(paths: list[Path], single_object: bool, own: bool,
            known: dict[tuple, int]) -> Coding:
    """The coding of some files, whatever the number of objects."""
    where = paths[0] if len(paths) == 1 else paths[0].parent
    kind, white = None, False
    for path in paths:
        image = images.open_image(path, "a mask")
        own_kind = kind or channels.kind_of(image, own)
        pixels = channels.pixels_of(path, image, own_kind)
        if not pixels.any() or kind and pixels.ndim == 3:  # empty; or in DAVIS' colours
            continue
        if kind is None:
            kind = own_kind
            if kind == "numbers" and image.mode == "P" and not channels.same_palettes(paths):
                log.info("%s: each mask has a palette of its own, so colours count", where)
                kind = "colours"
            if kind == "alpha":
                log.info("%s: the mask is in the alpha channel", where)
            if kind == "colours":
                return _by_colours(paths, where, known)
        if not np.isin(pixels, (0, VOID)).all():
            indices = image.mode == "P" and kind == "numbers"
            return _by_numbers(paths, where, path, pixels, kind, own, indices)
        white = True
        if single_object:
            break
    return Coding(kind or "numbers", numbers=_identity(1 if white else VOID))


def _identity(white: int = VOID) -> np.ndarray:
    """Ids as they are; `white` is what 255 means."""
    numbers = np.arange(256, dtype=np.uint8)
    numbers[VOID] = white
    return numbers


def _by_numbers(paths: list[Path], where: Path, path: Path, pixels: np.ndarray, kind: str,
                own: bool, indices: bool) -> Coding:
    """The coding of masks of numbers, from the (H, W) first that holds more than 0 and 255."""
    levels, codes = np.unique(pixels, return_inverse=True)
    codes, background = codes.reshape(pixels.shape), 0
    if levels[0] and own and len(levels) > 1:
        background = int(np.bincount(channels.border(codes)).argmax())
        log.info("%s: no pixel is 0, so %d, along the border, is the background", where,
                 levels[background])
    elif levels[0]:
        levels, codes = np.concatenate([[0], levels]), codes + 1
    if not indices:
        found = _classes(path, codes, levels[:, None], background)
        if found.soft:
            return _soft_numbers(where, levels, found, background, kind)
    if levels.max() > VOID:
        return _ordered(paths, where, int(levels[background]), kind)
    numbers = _identity()
    numbers[levels[background]] = 0
    if VOID in levels and len(levels) == 2:
        numbers[VOID] = 0 if levels[background] == VOID else 1
    elif VOID in levels and not background:
        if own and not indices and soft_edges.solid(codes, len(levels))[-1]:
            raise ValueError(f"{where}: {VOID} beside {levels[levels > 0][0]} would mean \"not "
                             "labelled\", expected another value for that object, or 0 where "
                             "there is none")
        log.info("%s: %d beside other numbers is \"not labelled\": background where masks are "
                 "used, left out where they are scored", where, VOID)
    return Coding(kind, numbers)


def _ordered(paths: list[Path], where: Path, background: int, kind: str) -> Coding:
    """The coding of masks of 16 bits: all of them are looked at, for objects that come later."""
    levels = {level for path in paths for level in np.unique(channels.read(path, kind)).tolist()}
    ids = sorted(levels - {0, background})
    if len(ids) > VOID - 1:
        raise ValueError(f"{where}: {len(ids)} numbers, expected at most {VOID - 1} objects")
    numbers = np.zeros(65536, np.uint8)
    numbers[ids] = np.arange(1, len(ids) + 1)
    log.info("%s: numbers above 255 are objects in their order: %s", where,
             _named((number, i + 1) for i, number in enumerate(ids)))
    return Coding(kind, numbers)


def _soft_numbers(where: Path, levels: np.ndarray, found: soft_edges.Found, background: int,
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
        pixels = channels.read(path, "colours")
        if (background is not None and not soft
                and not soft_edges.unknown(pixels, [background, *met])):
            continue
        table, codes = soft_edges.codes(pixels)
        if background is None:
            background = _background(where, table, codes)
        match = np.flatnonzero((table == background).all(1))
        if not len(match):
            table, codes = np.concatenate([[background], table]), codes + 1
        found = _classes(path, codes, table, int(match[0]) if len(match) else 0)
        soft |= found.soft
        for index in sorted(found.classes, key=lambda i: (codes == i).argmax()):
            colour = tuple(table[index].tolist())
            if not soft or all(np.abs(np.subtract(colour, c)).max() >= soft_edges.NEAR
                               for c in met):
                met[colour] = None
    ids = {colour: _own_id(colour, soft) for colour in met}
    for colour in met:
        old = known.get(colour)
        taken = {*ids.values(), *known.values()}
        if ids[colour] is None:
            ids[colour] = old or next((i for i in range(1, VOID) if i not in taken), VOID)
    if VOID in {i for c, i in ids.items() if _own_id(c, soft) is None}:
        raise ValueError(f"{where}: {len(ids)} colours, expected at most {VOID - 1} objects")
    known |= ids
    log.info("%s: colours are objects%s: %s", where, ", with soft edges" if soft else "",
             _named((colour, 0 if i == VOID else i) for colour, i in ids.items()) or "none")
    return Coding("colours", None, np.array([background, *ids]),
                  np.array([0, *ids.values()], np.uint8), soft)


def _background(where: Path, table: np.ndarray, codes: np.ndarray) -> tuple:
    """Black where there is any, else the colour along the border."""
    if not table.any(1).all():
        return (0, 0, 0)
    colour = tuple(table[np.bincount(channels.border(codes)).argmax()].tolist())
    log.info("%s: nothing is black, so the colour along the border, %s, is the background", where,
             colour)
    return colour


def _own_id(colour: tuple, soft: bool) -> int | None:
    """The id that DAVIS gives to a colour."""
    off = np.abs(PALETTE.astype(int) - colour).max(1)
    if soft:
        off[22:] = 255  # an edge may pass through one of so many
    return int(off.argmin()) if off.min() <= (SAME if soft else 0) else None


def _classes(path: Path, codes: np.ndarray, table: np.ndarray, background: int) -> soft_edges.Found:
    try:
        return soft_edges.classes(codes, table, background, path.suffix.lower() in LOSSY)
    except ValueError as error:
        raise ValueError(f"{path}: expected a mask, with a number or a flat colour for each "
                         f"object, found {error}") from error


def _named(pairs) -> str:
    pairs = list(pairs)
    return (", ".join(f"{value} is {i}" for value, i in pairs[:NAMED])
            + (", ..." if len(pairs) > NAMED else ""))
