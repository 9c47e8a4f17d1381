"""What a video leaves behind for its next frames, none of it growing with the video.

A `Memory` has the paper's `Sets` of features, or the `Bank` of keys and values that `--method
memory` reads. What they hold is never changed in place, so that copies share it. It doesn't know
where frames come from, nor what becomes of the masks, nor whose arrays are held.
"""

import copy
from typing import Any

from network.bank import Bank


class Memory:
    """All that the network keeps of one video.

    Args:
        object_ids: the objects to look for, in the order of the channels behind the background.
        every: so many frames from one that the `Bank` keeps for long to the next.
    """

    def __init__(self, object_ids: list[int], every: int = 5):
        self.object_ids = list(object_ids)
        self.sets: Any = None  # `Sets`; None before the first reference frame
        self.bank = Bank(every)

    def widen(self, object_ids: list[int]) -> None:
        """More objects to look for, which no frame so far shows."""
        self.object_ids = self.object_ids + object_ids
        self.bank.widen(len(self.object_ids))

    def remove(self, object_id: int) -> None:
        """Stop looking for an object, and forget what was seen of it."""
        channel = self.object_ids.index(object_id) + 1
        self.object_ids = [i for i in self.object_ids if i != object_id]
        if self.sets:
            self.sets.remove(channel)
        if self.bank.given:
            self.bank.remove(channel)

    def copy(self) -> "Memory":
        """Another memory of the same past, which goes its own way from here."""
        other = copy.copy(self)
        other.sets, other.bank = self.sets and self.sets.copy(), self.bank.copy()
        return other
