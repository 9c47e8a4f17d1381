"""What is kept of a frame, when, and what is looked for in it: the rules of `--method memory`.

The same for PyTorch and for numpy. How keys and values are made and compared, which takes weights,
a reader adds: `network.reader` with PyTorch, `network.lite` without.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from network.arrays import Array, library
from network.bank import Bank, Cells, Entry
from network.parts import CLOSER, around, near, thinned

VALUE = 24  # channels that say of a cell what it is to an object, beside the object's share of it
K = 16  # cells that a cell reads of all that are kept
K_SET = 5  # cells of a set whose mean similarity is its score
K_NEAR, RADIUS = 8, 6  # cells that a cell reads of the last frames, so many cells away at most
GIVEN = 0.6  # weight of the reference frames in the linear labels, later ones have the rest
LEAST = 0.02  # share of a frame below which an object weighs less there


class View(NamedTuple):
    """A frame whose mask is known, or a part of it seen from nearer.

    Args:
        mask: (H, W) object ids, of any size.
        chosen: (h, w) bool, the cells that are kept; None keeps all.
    """

    cells: Cells
    mask: Array
    chosen: Array | None = None


class Rules:
    """What a reader does with a bank, whatever library's arrays they hold.

    A reader adds to it:
        pixels: (N+1, H, W) of any size, and (h, w) -> as many pixels on each side of a cell as
            values are made with.
        shares: such pixels -> (N+1, h*w), of each cell the mean.
        shared_of: cells -> (1, WIDTH, h, w), what their values have in common.
        values_of: that and such pixels -> (h*w, M * (VALUE + 1)), of N objects and, where N > 1,
            of their union.
        sets_of: (H, W) object ids, (h, w) and the ids -> (h, w) the set of each cell.
        nearest: as `search.nearest`.
        best_mean: (n, K) similarities of such -> (n,) the mean of the K_SET best.
        ridge: of the linear labels.
        token_sums: cells and shares -> their part in the sums of object tokens, or nothing.
    """

    pixels: Callable
    shares: Callable
    shared_of: Callable
    values_of: Callable
    sets_of: Callable
    nearest: Callable
    best_mean: Callable
    ridge: Callable
    token_sums: Callable

    def remember(self, bank: Bank, cells: Cells, found: Array) -> None:
        """Keep a frame.

        Args:
            found: (N+1, H, W) probabilities, of any size.
        """
        found = self.pixels(found, cells.shape)
        if bank.add(self._entry(cells, found)):
            bank.sum_up(self._sums(cells, found))
            self._fit(bank)

    def refer(self, bank: Bank, views: list[View], object_ids: list[int]) -> None:
        """Keep a frame whose mask is known, as it is, and maybe as it looks from nearer."""
        bank.change(self._caught_up)
        kept = []
        for cells, mask, chosen in views:
            xp = library(mask)
            found = xp.asarray(xp.stack([mask == i for i in (0, *object_ids)]), dtype=xp.float32)
            sets = self.sets_of(mask, cells.shape, object_ids)
            if chosen is not None:
                sets = xp.where(chosen, sets, -1)
            kept.append((self._entry(cells, self.pixels(found, cells.shape)), sets.reshape(-1)))
        bank.refer(kept, self._sums(views[0].cells, kept[0][0].found))
        self._fit(bank)

    def closer(self, look: Callable, image: Array, mask: Array,
               object_ids: list[int]) -> Iterator[View]:
        """How each object and what is around it would look from nearer.

        An object that comes closer is found by these. Those of all objects together are no more
        cells than a frame has.

        Args:
            look: (3, H, W) of a part of the frame, and a scale -> cells of the part, enlarged.
            image: (3, H, W).
            mask: (H, W) object ids.
        """
        for object_id in object_ids:
            where = mask == object_id
            for scale in CLOSER if where.any() else ():
                rows, columns = around(where, scale)
                cells = look(image[:, rows, columns], scale)
                part, (h, w) = mask[rows, columns], cells.shape
                kept = near(self.sets_of(part, (h, w), [object_id]) == 1)
                yield View(cells, part, thinned(kept, h * w // (len(CLOSER) * len(object_ids))))

    def _entry(self, cells: Cells, found: Array) -> Entry:
        shared = self.shared_of(cells)
        return Entry(cells.key, cells.near, shared, found, self.values_of(shared, found))

    def catch_up(self, bank: Bank) -> None:
        """Make the values anew after an object was removed: those of the union held it, too."""
        bank.change(self._caught_up)
        bank.gather()

    def _caught_up(self, entry: Entry) -> Entry:
        """With values of the objects, too, that nobody looked for when the frame was kept."""
        objects = len(entry.found) - 1
        if entry.values.shape[1] == (objects + (objects > 1)) * (VALUE + 1):
            return entry
        return replace(entry, values=self.values_of(entry.shared, entry.found))

    def _sums(self, cells: Cells, found: Array) -> tuple[Array, ...]:
        """(C, C) and (C, N+1): features times features, and times labels; objects weigh alike.

        Where there are object tokens, what is kept for them as well: (N+1, ...).
        """
        shares = self.shares(found)
        labels = shares.T  # (h*w, N+1)
        weights = (labels / (labels.mean(0) + LEAST)).sum(1)
        weighted = cells.unit * (weights / weights.sum())[:, None]
        return cells.unit.T @ weighted, weighted.T @ labels, *self.token_sums(cells, shares)

    def _fit(self, bank: Bank) -> None:
        """Labels that are linear in the features, by ridge regression in closed form."""
        sums = [sum(parts) / len(parts) for parts in zip(*bank.given_sums)]
        if bank.later_sums:
            sums = [later + (given - later) * GIVEN for given, later in zip(sums, bank.later_sums)]
        squares, labels, *tokens = sums
        bank.tokens = tokens[0] if tokens else None
        xp = library(squares)
        ridge = xp.diag(self.ridge() + 0 * squares[0])
        bank.linear = xp.linalg.solve(squares + ridge, labels)

    def _far(self, bank: Bank, cells: Cells) -> tuple[Array, Array, Array, Array]:
        """What may be read of reference and earlier frames.

        Returns:
            (M+1, h*w) the mean similarity to the best cells of each set of the reference frames,
            and of all objects' sets together where there are several;
            (m, ...) values; (h*w, F) similarities and (h*w, F) which values, among which are the
            K best.
        """
        scores, found, values, start = [], [], [], 0
        for number, (keys, kept) in enumerate([*bank.sets, *((e.key, e.values)
                                                             for e in bank.later)]):
            best, positions = self.nearest(cells.key, keys, K)
            if number < len(bank.sets):
                scores.append(self.best_mean(best) if len(keys) else 0 * cells.unit[:, 0])
            found.append((best, positions + start))
            values.append(kept)
            start += len(keys)
        xp = library(cells.unit)
        objects = [best for best, _ in found[1:len(bank.sets)] if best.shape[1]]
        if len(bank.sets) > 2:
            scores.append(self.best_mean(xp.concatenate(objects, 1)) if objects else scores[1])
        best, positions = (xp.concatenate(parts, 1) for parts in zip(*found))
        return xp.stack(scores), xp.concatenate(values), best, positions
