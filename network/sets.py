"""The paper's sets of features: of reference frames, and confident ones of later frames.

They don't know where frames come from, nor what becomes of the masks. What they hold is never
changed in place, so that copies share it.
"""

import copy
from collections import deque

import torch

from network.bank import fewer
from network.matching import Grid, Reference
from network.memory import Memory

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

    def remove(self, channel: int) -> None:
        """Forget one object, whose features are in no set then; channels behind it move up."""
        self.given, later = ([(grid, fewer(labels, channel)) for grid, labels in views]
                             for views in (self.given, self.later))
        self.later = deque(later, self.later.maxlen)
        self.sets -= 1
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


def refer(memory: Memory, views: list[View]) -> None:
    """Add a reference frame's features to the sets of a video's memory."""
    sets = len(memory.object_ids) + 1
    if memory.sets is None:
        memory.sets = Sets(views, sets)
    else:
        memory.sets.add(views, sets)
