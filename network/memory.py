"""What a video leaves behind for its next frames, none of it growing with the video.

`Sets` are the paper's: features of the reference frame, and confident ones of later frames.
`Recent` are the last frames and what was found in them, matched near each position. `Past` are
the reference frames and some of those since, matched everywhere. A `Memory` has the three of one
video. What they hold is never changed in place, so that copies share it. They don't know where
frames come from, nor what becomes of the masks.
"""

import copy
from collections import deque

import torch
import torch.nn.functional as F

from network.matching import Grid, Reference, similarities, top_k_near

View = tuple[Grid, torch.Tensor]  # features, and the set of each position

TEMPERATURE = 0.07  # divides similarities before the softmax that weighs labels


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

    def gather(self) -> None:
        """Make `reference`, what is matched with, of the frames that are kept."""
        grids, labels = zip(*self.given, *self.later)
        self.reference = Reference(list(grids), labels, self.sets)


class Recent:
    """The last frames of a video and what was found in them.

    Args:
        frames: how many are kept, so that memory doesn't grow with the video.
        k: how many of the most similar positions in all of them count.
        radius: a position is compared with those at most this many feature cells away.
    """

    def __init__(self, frames: int = 3, k: int = 5, radius: int = 6):
        self.k, self.radius = k, radius
        self.grids: deque[Grid] = deque(maxlen=frames)
        self.labels: deque[torch.Tensor] = deque(maxlen=frames)

    def add(self, grid: Grid, labels: torch.Tensor) -> None:
        """Remember a frame: its features, and (S, H, W) probabilities on its enlarged grid."""
        self.grids.append(grid)
        self.labels.append(labels)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(H, W) of the frames' enlarged grids; None before the first."""
        return self.grids[0].shape if self.grids else None

    def widen(self, sets: int) -> None:
        """There are more objects now, which no frame so far knows of."""
        self.labels = deque((_widened(labels, sets) for labels in self.labels),
                            maxlen=self.labels.maxlen)

    def propagate(self, query: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """Soft labels of a frame: those of the most similar positions near, weighed by softmax.

        Returns:
            (S, H, W) labels, and (H, W) the largest similarity. Differentiable.
        """
        grids = list(self.grids)
        radius = round(self.radius * query.factor)
        values, positions = top_k_near(query, grids, self.k, radius)
        if torch.is_grad_enabled():
            values = similarities(query, grids, positions)
        labels = torch.stack(list(self.labels), 1).flatten(1)  # (S, T*H*W)
        soft = _propagated(values, labels[:, positions])
        return soft.view(-1, *query.shape), values.amax(1).view(query.shape)


class Past:
    """Every fifth frame or so and what was found in it, on the grid of the encoder.

    Args:
        frames: at most this many are kept besides the reference frames; the oldest leaves first.
        every: so many frames from one that is kept to the next.
        k: how many of the most similar positions in all of them count.
    """

    def __init__(self, frames: int = 5, every: int = 5, k: int = 20):
        self.every, self.k, self.count = every, k, 0
        self.given: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.later: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=frames)

    def add(self, features: torch.Tensor, labels: torch.Tensor, given: bool = False) -> None:
        """Remember a frame: (C, h, w) features, and (S, H, W) probabilities.

        Args:
            given: it is a reference frame, whose mask is known.
        """
        self.count += 1
        if given or self.count % self.every == 0:
            labels = F.adaptive_avg_pool2d(labels, features.shape[1:]).flatten(1)
            entry = F.normalize(features.float().flatten(1), dim=0), labels
            (self.given if given else self.later).append(entry)

    def widen(self, sets: int) -> None:
        """There are more objects now, which no frame so far knows of."""
        self.given = [(x, _widened(labels, sets)) for x, labels in self.given]
        self.later = deque(((x, _widened(labels, sets)) for x, labels in self.later),
                           maxlen=self.later.maxlen)

    def propagate(self, features: torch.Tensor) -> torch.Tensor:
        """(C, h, w) features of a frame -> (S, h, w) soft labels. Differentiable."""
        keys, labels = (torch.cat(parts, 1) for parts in zip(*self.given, *self.later))
        queries = F.normalize(features.float().flatten(1), dim=0)
        values, positions = (queries.T @ keys).topk(min(self.k, keys.shape[1]), sorted=False)
        return _propagated(values, labels[:, positions]).view(-1, *features.shape[1:])


class Memory:
    """All that the network keeps of one video.

    Args:
        object_ids: the objects to look for, in the order of the channels behind the background.
        recent: how many of the last frames are matched as well.
        every: so many frames from one of the `Past` to the next.
    """

    def __init__(self, object_ids: list[int], recent: int, every: int = 5):
        self.object_ids = list(object_ids)
        self.sets: Sets | None = None  # None before the first reference frame
        self.recent, self.past = Recent(recent), Past(every=every)

    def refer(self, views: list[View]) -> None:
        """Add a reference frame, as it is and as it looks from nearer."""
        if self.sets is None:
            self.sets = Sets(views, len(self.object_ids) + 1)
        else:
            self.sets.add(views, len(self.object_ids) + 1)

    def widen(self, object_ids: list[int]) -> None:
        """More objects to look for, which no frame so far shows."""
        self.object_ids = self.object_ids + object_ids
        self.recent.widen(len(self.object_ids) + 1)
        self.past.widen(len(self.object_ids) + 1)

    def copy(self) -> "Memory":
        """Another memory of the same past, which goes its own way from here."""
        other = copy.copy(self)
        other.sets, other.recent, other.past = (
            _copied(part) for part in (self.sets, self.recent, self.past))
        return other


def _copied(part):
    """An object with lists and deques of its own, and the same tensors in them."""
    part = copy.copy(part)
    for name, value in vars(part).items() if part is not None else ():
        if isinstance(value, list | deque):
            setattr(part, name, copy.copy(value))
    return part


def _propagated(similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(n, K) and (S, n, K) labels of the most similar positions -> (S, n): softmax weighs them."""
    return (labels * (similarity / TEMPERATURE).softmax(1)).sum(2)


def _widened(labels: torch.Tensor, sets: int) -> torch.Tensor:
    """(S, ...) labels with channels of zeros behind, `sets` in all."""
    return torch.cat([labels, labels.new_zeros(sets - len(labels), *labels.shape[1:])])
