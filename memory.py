"""What a video leaves behind for its next frames, none of it growing with the video.

`Sets` are the paper's: features of the reference frame, and confident ones of later frames.
`Recent` are the last frames and what was found in them, matched near each position.
"""

from collections import deque

import torch
import torch.nn.functional as F

from matching import Grid, Reference, similarities, top_k_near


class Sets:
    """The sets of features to match with, and their update online (Hu, Huang, Schwing, 2018).

    Args:
        grid: the reference frame.
        labels: (H, W) integers, the set of each position; -1 is in none.
        sets: how many there are.
        frames: features of at most this many later frames are kept; those of the oldest leave
            first, those of reference frames never.
    """

    def __init__(self, grid: Grid, labels: torch.Tensor, sets: int, frames: int = 5):
        self.given: list[tuple[Grid, torch.Tensor]] = []
        self.later: deque[tuple[Grid, torch.Tensor]] = deque(maxlen=frames)
        self.add(grid, labels, sets)

    def add(self, grid: Grid, labels: torch.Tensor, sets: int) -> None:
        """Another reference frame; there may be more sets now than before."""
        self.sets = sets
        self.given.append((grid, labels))
        self._gather()

    def update(self, grid: Grid, labels: torch.Tensor) -> None:
        """Add features of a later frame; `labels` as above, -1 for what nobody is sure of."""
        if (labels >= 0).any():
            self.later.append((grid, labels))
            self._gather()

    def _gather(self) -> None:
        grids, labels = zip(*self.given, *self.later)
        self.reference = Reference(list(grids), torch.stack(labels), self.sets)


class Recent:
    """The last frames of a video and what was found in them.

    Args:
        frames: how many are kept, so that memory doesn't grow with the video.
        k: how many of the most similar positions in all of them count.
        radius: a position is compared with those at most this many feature cells away.
        temperature: divides similarities before their softmax.
    """

    def __init__(self, frames: int = 3, k: int = 5, radius: int = 6, temperature: float = 0.07):
        self.k, self.radius, self.temperature = k, radius, temperature
        self.grids: deque[Grid] = deque(maxlen=frames)
        self.labels: deque[torch.Tensor] = deque(maxlen=frames)

    def add(self, grid: Grid, labels: torch.Tensor) -> None:
        """Remember a frame: its features, and (S, H, W) probabilities on its enlarged grid."""
        self.grids.append(grid)
        self.labels.append(labels)

    def widen(self, sets: int) -> None:
        """There are more objects now, which no frame so far knows of."""
        self.labels = deque((F.pad(label, (0, 0, 0, 0, 0, sets - len(label)))
                             for label in self.labels), maxlen=self.labels.maxlen)

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
        weights = (values / self.temperature).softmax(1)  # (H*W, K)
        labels = torch.stack(list(self.labels), 1).flatten(1)  # (S, T*H*W)
        soft = (labels[:, positions] * weights).sum(2)
        return soft.view(-1, *query.shape), values.amax(1).view(query.shape)
