"""The paper's sets of features: of reference frames, and confident ones of later frames.

A record, of which nothing is changed in place, so that copying it is an assignment.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch

from network.matching import Grid, Reference

View = tuple[Grid, torch.Tensor]  # features, and the set of each position


@dataclass(frozen=True)
class Sets:
    """The sets of features to match with, and their update online (Hu, Huang, Schwing, 2018).

    Args:
        sets: how many there are.
        given: of the reference frames, each a grid and (H, W) integers, the set of each position;
            -1 is in none.
        later: likewise of later frames.
        frames: of at most this many later frames features are kept; those of the oldest leave
            first, those of reference frames never.
    """

    sets: int
    given: tuple[View, ...] = ()
    later: tuple[View, ...] = ()
    frames: int = 5

    @cached_property
    def reference(self) -> Reference:
        """What is matched with."""
        grids, labels = zip(*self.given, *self.later)
        return Reference(list(grids), labels, self.sets)

    def refer(self, grid: Grid, labels: torch.Tensor, sets: int) -> Self:
        """With another reference frame; there may be more sets now than before."""
        return replace(self, sets=sets, given=(*self.given, (grid, labels)))

    def update(self, grid: Grid, labels: torch.Tensor) -> Self:
        """With features of a later frame; `labels` as above, -1 for what nobody is sure of."""
        if not (labels >= 0).any():
            return self
        return replace(self, later=(*self.later, (grid, labels))[-self.frames:])

    def without(self, channel: int) -> Self:
        """Without one object, whose features are in no set then; channels behind it move up."""
        def fewer(views):
            return tuple((grid, torch.where(labels == channel, -1, labels - (labels > channel) * 1))
                         for grid, labels in views)

        return replace(self, sets=self.sets - 1, given=fewer(self.given), later=fewer(self.later))

    def plain(self) -> dict:
        """As numbers, lists and tensors, for `from_plain`: a file of them can run no code."""
        given, later = ([(grid.features, grid.factor, labels) for grid, labels in views]
                        for views in (self.given, self.later))
        return {"sets": self.sets, "given": given, "later": later}

    @classmethod
    def from_plain(cls, kept: dict) -> Self:
        """The inverse of `plain`; raises a KeyError, TypeError or ValueError of anything else."""
        given, later = (tuple((Grid(features, factor), labels) for features, factor, labels in
                              kept[name]) for name in ("given", "later"))
        return cls(kept["sets"], given, later)
