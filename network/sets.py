"""Feature sets of `--method matching` and `paper`: reference frames and the online update."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch

from network.matching import Grid, Reference

View = tuple[Grid, torch.Tensor]  # a frame's features and the (H, W) set index of each location


@dataclass(frozen=True)
class Sets:
    """Background and foreground feature sets of one video (Hu, Huang, Schwing, section 3.1).

    Immutable: methods return a new record that shares tensors with the old one, so a copy of a
    tracker costs nothing.

    Args:
        sets: number of sets, 1 for the background plus one per object.
        references: reference frames as pairs of a grid and (H, W) integer labels: the set of each
            location, -1 for none.
        updates: frames added by the online update, in the same form, oldest first.
        frames: maximum number of frames in `updates`, >= 1; the oldest is dropped first. Each frame
            adds to the time of matching. Reference frames are never dropped.
    """

    sets: int
    references: tuple[View, ...] = ()
    updates: tuple[View, ...] = ()
    frames: int = 5

    @cached_property
    def reference(self) -> Reference:
        """All features to match with. Cached: with `--method matching` the sets rarely change."""
        grids, labels = zip(*self.references, *self.updates)
        return Reference(list(grids), labels, self.sets)

    def add_reference(self, grid: Grid, labels: torch.Tensor, sets: int) -> Self:
        """Add a reference frame.

        Args:
            labels: (H, W) integers, the set of each location, -1 for none.
            sets: new number of sets, at least the current one.
        """
        return replace(self, sets=sets, references=(*self.references, (grid, labels)))

    def update(self, grid: Grid, labels: torch.Tensor) -> Self:
        """Add the confident features of a predicted frame (the paper's online update).

        Args:
            labels: (H, W) integers, the set of each location, -1 where the prediction is not
                confident. A frame with no confident location at all is skipped: it would only
                displace an older one.
        """
        if not (labels >= 0).any():
            return self
        return replace(self, updates=(*self.updates, (grid, labels))[-self.frames:])

    def without(self, channel: int) -> Self:
        """Remove an object; the channels after it move up by one.

        Its locations end up in no set: in the background set they would keep the object from being
        segmented if it is added again.

        Args:
            channel: index of the object's set, >= 1.
        """
        def removed(views):
            return tuple((grid, torch.where(labels == channel, -1, labels - (labels > channel) * 1))
                         for grid, labels in views)

        return replace(self, sets=self.sets - 1, references=removed(self.references),
                       updates=removed(self.updates))

    def plain(self) -> dict:
        """Convert to numbers, lists and tensors, which `torch.load(weights_only=True)` accepts."""
        references, updates = ([(grid.features, grid.factor, labels) for grid, labels in views]
                               for views in (self.references, self.updates))
        # names in files that exist
        return {"sets": self.sets, "given": references, "later": updates}

    @classmethod
    def from_plain(cls, plain: dict) -> Self:
        """Convert the output of `plain` back; KeyError, TypeError or ValueError if malformed."""
        references, updates = (tuple((Grid(features, factor), labels)
                                     for features, factor, labels in plain[name])
                               for name in ("given", "later"))
        return cls(plain["sets"], references, updates)
