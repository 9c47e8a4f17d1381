"""What a video leaves behind for its next frames, none of it growing with the video.

`Sets` are the paper's: features of the reference frame, and confident ones of later frames. A
`Memory` has them, or the `Bank` of keys and values that `--method memory` reads. What they hold is
never changed in place, so that copies share it. They don't know where frames come from, nor what
becomes of the masks.
"""

import copy
from collections import deque

import torch

from network.bank import Bank
from network.matching import Grid, Reference

View = tuple[Grid, torch.Tensor]  # features, and the set of each position


class Sets:
    """The sets of features to match with, and their update online (Hu, Huang, Schwing, 2018).

    Args:
        views: of the reference frame, each a grid and (H, W) integers, the set of each position;
            -1 is in none.
        sets: how many there are.
        frames: features of at most this many later frames are kept; those of the oldest leave
            first, those of reference frames never.
    """

    def __init__(self, views: list[View], sets: int, frames: int = 5):
        self.given: list[View] = []
        self.later: deque[View] = deque(maxlen=frames)
        self.add(views, sets)

    def add(self, views: list[View], sets: int) -> None:
        """Another reference frame; there may be more sets now than before."""
        self.sets = sets
        self.given += views
        self.gather()

    def update(self, grid: Grid, labels: torch.Tensor) -> None:
        """Add features of a later frame; `labels` as above, -1 for what nobody is sure of."""
        if (labels >= 0).any():
            self.later.append((grid, labels))
            self.gather()

    def copy(self) -> "Sets":
        """Others of the same features, which go their own way from here."""
        other = copy.copy(self)
        other.given, other.later = copy.copy(self.given), copy.copy(self.later)
        return other

    def gather(self) -> None:
        """Make `reference`, what is matched with, of the frames that are kept."""
        grids, labels = zip(*self.given, *self.later)
        self.reference = Reference(list(grids), labels, self.sets)


class Memory:
    """All that the network keeps of one video.

    Args:
        object_ids: the objects to look for, in the order of the channels behind the background.
        every: so many frames from one that the `Bank` keeps for long to the next.
    """

    def __init__(self, object_ids: list[int], every: int = 5):
        self.object_ids = list(object_ids)
        self.sets: Sets | None = None  # None before the first reference frame
        self.bank = Bank(every)

    def refer(self, views: list[View]) -> None:
        """Add a reference frame's features to the sets."""
        if self.sets is None:
            self.sets = Sets(views, len(self.object_ids) + 1)
        else:
            self.sets.add(views, len(self.object_ids) + 1)

    def widen(self, object_ids: list[int]) -> None:
        """More objects to look for, which no frame so far shows."""
        self.object_ids = self.object_ids + object_ids
        self.bank.widen(len(self.object_ids))

    def copy(self) -> "Memory":
        """Another memory of the same past, which goes its own way from here."""
        other = copy.copy(self)
        other.sets, other.bank = self.sets and self.sets.copy(), self.bank.copy()
        return other
