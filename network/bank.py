"""What `--method memory` keeps of a video: keys and values of the cells of some of its frames.

It grows with reference frames, never with the video. What it holds is replaced, never changed in
place, so that copies share it. How keys and values are made, and read, `reader` knows; whether they
are tensors or arrays, nobody here.
"""

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from network.arrays import Array, library

LATER = 0.3  # weight of the newest frame in the sums over later frames


def fewer(labels: Array, channel: int) -> Array:
    """Labels without one object: its cells are in no set (-1), later channels move up."""
    xp = library(labels)
    labels = xp.where(labels == channel, 0 * labels - 1, labels)
    return xp.where(labels > channel, labels - 1, labels)


@dataclass
class Cells:
    """A frame's cells (h, w), row by row.

    Args:
        unit: (h*w, C) unit features.
        key: (h*w, KEY) unit vectors, to be compared with any cell's.
        near: (h, w, NEAR) unit vectors, to be compared with those of cells near by.
    """

    unit: Array
    key: Array
    near: Array

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.near.shape[:2])


@dataclass
class Frames:
    """B frames as the network sees them.

    Args:
        features: (B, C, h, w), those that are matched.
        levels: (B, C, h, w) features of each level of the backbone, finest first.
        size: (H, W) of the images.
        cells: what the reader sees of each; none where there is no reader.
    """

    features: Array
    levels: list[Array]
    size: tuple[int, int]
    cells: list[Cells]

    def __getitem__(self, part: slice) -> "Frames":
        return Frames(self.features[part], [level[part] for level in self.levels], self.size,
                      self.cells[part])


@dataclass
class Entry:
    """What is kept of a frame.

    Args:
        key: (h*w, KEY), of its cells.
        near: (h, w, NEAR), or None where it is not needed.
        shared: (1, WIDTH, h, w), what values are made of beside `found`.
        found: (N+1, H, W) probabilities.
        values: (h*w, M * (VALUE + 1)), of each object values, and its share of the cell; after
            several objects those of their union.
    """

    key: Array
    near: Array | None
    shared: Array
    found: Array
    values: Array


class Bank:
    """The cells of one video.

    Args:
        every: so many frames from one that is kept for long to the next.
        later: at most this many of those are kept; the oldest leaves first.
        recent: so many of the last frames are kept as well.
    """

    def __init__(self, every: int = 5, later: int = 4, recent: int = 2):
        self.every, self.count = every, 0
        self.given: list[Entry] = []  # of reference frames, which never leave
        self.labels: list[Array] = []  # of each of those (h*w,) the set of each cell
        # of each set the (m, KEY) keys and (m, ...) values of its cells there, maybe none
        self.sets: list[tuple[Array, Array]] = []
        self.later: deque[Entry] = deque(maxlen=later)
        self.recent: deque[Entry] = deque(maxlen=recent)
        # for linear labels: (C, C) features times features, (C, N+1) times labels; and (N+1, ...)
        # for object tokens, where there are some
        self.given_sums: list[tuple[Array, ...]] = []
        self.later_sums: tuple[Array, ...] | None = None
        self.linear: Array | None = None  # (C, N+1) that makes labels of features
        self.tokens: Array | None = None  # (N+1, ...) of which object tokens are made

    @property
    def shape(self) -> tuple[int, int] | None:
        """(h, w) of the frames; None before the first."""
        return tuple(self.recent[-1].near.shape[:2]) if self.recent else None

    def refer(self, views: list[tuple[Entry, Array]], sums) -> None:
        """Keep a reference frame, as it is and as it looks from nearer, with the sets of cells."""
        self.given += [replace(entry, near=None) for entry, _ in views]
        self.labels += [labels for _, labels in views]
        self.given_sums = [*self.given_sums, sums]
        self.recent.append(views[0][0])
        self.count += 1
        self.gather()

    def gather(self) -> None:
        """Make `sets` of the reference frames and their labels."""
        if not self.given:
            return
        xp = library(self.labels[0])
        keys, values = (xp.concatenate([getattr(entry, name) for entry in self.given])
                        for name in ("key", "values"))
        labels = xp.concatenate(self.labels)
        self.sets = [(keys[labels == i], values[labels == i])
                     for i in range(len(self.given[0].found))]

    def add(self, entry: Entry) -> bool:
        """Keep a frame among the recent ones; True where it is kept for longer, too."""
        self.count += 1
        self.recent.append(entry)
        long = self.count % self.every == 0
        if long:
            self.later.append(replace(entry, near=None))
        return long

    def sum_up(self, sums: tuple[Array, ...]) -> None:
        """Count a later frame in: the newer the more."""
        before = self.later_sums or sums
        self.later_sums = tuple(old + (new - old) * LATER for old, new in zip(before, sums))

    def widen(self, objects: int) -> None:
        """There are more objects now, which no frame so far shows; values are still to be made."""
        def wider(x, axis):
            nothing = 0 * (x[:1] if axis == 0 else x[:, :1])
            return library(x).concatenate([x, *[nothing] * (objects + 1 - x.shape[axis])], axis)

        self.change(lambda entry: replace(entry, found=wider(entry.found, 0)))
        def wider_sums(sums):
            squares, labels, *tokens = sums
            return squares, wider(labels, 1), *(wider(x, 0) for x in tokens)

        self.given_sums = [wider_sums(sums) for sums in self.given_sums]
        self.later_sums = self.later_sums and wider_sums(self.later_sums)

    def remove(self, channel: int) -> None:
        """Forget one object; channels behind it move up.

        Its cells stay, as cells of nothing: were they background, it could not be found when it
        is asked for again.
        """
        def without(x, axis):
            kept = [i for i in range(x.shape[axis]) if i != channel]
            return x[:, kept] if axis else x[kept]

        def change(entry):  # values of the union hold the object, too: `Rules.catch_up` remakes all
            return replace(entry, found=without(entry.found, 0), values=entry.values[:, :0])

        self.change(change)
        self.labels = [fewer(labels, channel) for labels in self.labels]
        self.given_sums = [(a, without(b, 1)) for a, b in self.given_sums]
        if self.later_sums:
            self.later_sums = self.later_sums[0], without(self.later_sums[1], 1)
        if self.linear is not None:  # which is linear in the labels
            self.linear = without(self.linear, 1)

    def change(self, change: Callable[[Entry], Entry]) -> None:
        """Replace every entry."""
        self.given = [change(entry) for entry in self.given]
        for frames in (self.later, self.recent):
            for i, entry in enumerate(frames):
                frames[i] = change(entry)

    def copy(self) -> "Bank":
        """Another one of the same past, which goes its own way from here."""
        other = copy.copy(self)
        for name in ("given", "labels", "later", "recent"):
            setattr(other, name, copy.copy(getattr(self, name)))
        return other
