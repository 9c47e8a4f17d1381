"""From what a video left behind to evidence for each object: what `--method memory` has learned.

A frame's cells, the positions of the encoder's coarse grid, are told apart by keys of few
channels, which are compared; what was found in a cell is kept as its values, which are read where
keys are alike (Oh et al.: Video object segmentation using space-time memory networks, ICCV 2019).
It has weights and nothing of a video.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from network.bank import Bank, Cells, Entry
from network.search import nearest, windows
from network.views import sets_of

KEY, NEAR = 64, 32  # channels that are compared everywhere, and near a cell
VALUE = 24  # channels that say of a cell what it is to an object, beside the object's share of it
WIDTH, GROUPS = 32, 8  # channels and groups of what makes values
K = 16  # cells that a cell reads of all that are kept
K_SET = 5  # cells of a set whose mean similarity is its score
K_NEAR, RADIUS = 8, 6  # cells that a cell reads of the last frames, so many cells away at most
TEMPERATURE = 0.07  # at first, of the softmax that weighs values; it is learned
RIDGE = 0.003  # at first, of the linear labels; it is learned
SCALARS = 15
EVIDENCE = SCALARS + 2 * VALUE  # channels of what is known of an object at a cell
GIVEN = 0.6  # weight of the reference frames in the linear labels, later ones have the rest
LEAST = 0.02  # share of a frame below which an object weighs less there


class View(NamedTuple):
    """A frame whose mask is known, or a part of it seen from nearer.

    Args:
        mask: (H, W) object ids, of any size.
        chosen: (h, w) bool, the cells that are kept; None keeps all.
    """

    cells: Cells
    mask: torch.Tensor
    chosen: torch.Tensor | None = None


class Reader(nn.Module):
    """Keys, values, and what is read.

    Args:
        channels: of a cell's features, all layers that are matched.
        finest: the first of them, of the layer that knows best where things are.
        side: masks are seen with so many pixels on each side of a cell.
    """

    def __init__(self, channels: int, finest: int, side: int):
        super().__init__()
        self.finest, self.side = finest, side
        self.key = nn.Linear(channels, KEY, bias=False)
        self.near = nn.Linear(finest, NEAR, bias=False)
        self.log_temperatures = nn.Parameter(torch.tensor([TEMPERATURE, TEMPERATURE]).log())
        self.log_ridge = nn.Parameter(torch.tensor(RIDGE).log())
        self.shared = nn.Conv2d(channels, WIDTH, 1)
        self.own = nn.Conv2d(side * side + 2, WIDTH, 1, bias=False)
        self.layers = nn.Sequential(
            nn.GroupNorm(GROUPS, WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.GroupNorm(GROUPS, WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))
        self.value = nn.Conv2d(WIDTH, VALUE, 1)

    def comparing(self) -> list[nn.Parameter]:
        """What decides which cells are alike."""
        return [self.key.weight, self.near.weight, self.log_temperatures, self.log_ridge]

    @torch.no_grad()
    def start(self, features: torch.Tensor) -> None:
        """Begin with keys that keep most of (n, C) features: their principal directions."""
        unit = F.normalize(features.double(), dim=1)
        for layer, kept in ((self.key, unit), (self.near, unit[:, :self.finest])):
            directions = torch.linalg.eigh(kept.T @ kept).eigenvectors
            layer.weight.copy_(directions[:, -len(layer.weight):].T)

    def look(self, features: torch.Tensor, precision: torch.dtype = torch.float32) -> Cells:
        """(C, h, w) features of a frame -> its cells.

        Args:
            precision: of the keys.
        """
        unit = F.normalize(features.flatten(1).T.float(), dim=1)
        near = F.normalize(self.near(unit[:, :self.finest]), dim=1)
        return Cells(unit, F.normalize(self.key(unit), dim=1).to(precision),
                     near.to(precision).unflatten(0, features.shape[1:]))

    def remember(self, bank: Bank, cells: Cells, found: torch.Tensor) -> None:
        """Keep a frame.

        Args:
            found: (N+1, H, W) probabilities, of any size.
        """
        found = self._pixels(found, cells)
        if bank.add(self._entry(cells, found)):
            bank.sum_up(self._sums(cells, found))
            self._fit(bank)

    def refer(self, bank: Bank, views: list[View], object_ids: list[int]) -> None:
        """Keep a frame whose mask is known, as it is, and maybe as it looks from nearer."""
        bank.change(self._caught_up)
        kept = []
        for cells, mask, chosen in views:
            found = torch.stack([mask == i for i in (0, *object_ids)]).float()
            sets = sets_of(mask, cells.shape, object_ids)
            if chosen is not None:
                sets = torch.where(chosen, sets, -1)
            kept.append((self._entry(cells, self._pixels(found, cells)), sets.flatten()))
        bank.refer(kept, self._sums(views[0].cells, kept[0][0].found))
        self._fit(bank)

    def _pixels(self, found: torch.Tensor, cells: Cells) -> torch.Tensor:
        """(N+1, H, W) of any size -> `side` pixels on each side of a cell."""
        size = tuple(self.side * side for side in cells.shape)
        if found.shape[1:] == size:
            return found
        return F.interpolate(found[None], size=size, mode="bilinear", align_corners=False,
                             antialias=True)[0]

    def _entry(self, cells: Cells, found: torch.Tensor) -> Entry:
        shared = self.shared(cells.unit.T.unflatten(1, cells.shape)[None])
        return Entry(cells.key, cells.near, shared, found, self._values(shared, found))

    def _values(self, shared: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """(h*w, N * (VALUE + 1)): of each object values, and its share of the cell."""
        own = F.pixel_unshuffle(found[1:, None], self.side)  # (N, side * side, h, w)
        share = own.mean(1, keepdim=True)
        own = 2 * torch.cat([own, share, best_other(share)], 1) - 1
        values = []
        for part in own.split(1):  # one by one, as in the decoder
            x = shared + self.own(part)
            values.append(self.value(F.relu(x + self.layers(x))))
        values = torch.cat([torch.cat(values), share], 1).flatten(2).flatten(0, 1).T
        return values.contiguous()

    def _caught_up(self, entry: Entry) -> Entry:
        """With values of the objects, too, that nobody looked for when the frame was kept."""
        if entry.values.shape[1] == (len(entry.found) - 1) * (VALUE + 1):
            return entry
        return replace(entry, values=self._values(entry.shared, entry.found))

    def _sums(self, cells: Cells, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(C, C) and (C, N+1): features times features, and times labels; objects weigh alike."""
        labels = F.avg_pool2d(found[None], self.side)[0].flatten(1).T  # (h*w, N+1)
        weights = (labels / (labels.mean(0) + LEAST)).sum(1, keepdim=True)
        weighted = cells.unit * (weights / weights.sum())
        return cells.unit.T @ weighted, weighted.T @ labels

    def _fit(self, bank: Bank) -> None:
        """Labels that are linear in the features, by ridge regression in closed form."""
        sums = [sum(parts) / len(parts) for parts in zip(*bank.given_sums)]
        if bank.later_sums:
            sums = [torch.lerp(later, given, GIVEN)
                    for given, later in zip(sums, bank.later_sums)]
        ridge = self.log_ridge.exp() * torch.eye(len(sums[0]), device=sums[0].device)
        bank.linear = torch.linalg.solve(sums[0] + ridge, sums[1])

    def read(self, bank: Bank, cells: Cells) -> tuple[torch.Tensor, torch.Tensor]:
        """What speaks for each object in a frame, and against it.

        Returns:
            (N, EVIDENCE, h, w), and (N+1, h, w) the mean similarity to the best cells of each set
            of the reference frames (Hu, Huang, Schwing, section 3.1, by keys); 0 of an empty one.
        """
        everywhere, near = self.log_temperatures.exp()
        scores, far, similarity = self._far(bank, cells, everywhere)
        recent = list(bank.recent)
        best, positions = windows(cells.near, [e.near for e in recent], K_NEAR, RADIUS)
        close = _weighed(torch.cat([e.values for e in recent]), best, positions, near)
        linear = (cells.unit @ bank.linear).T  # (N+1, h*w)
        before = F.avg_pool2d(recent[-1].found[None, 1:], self.side)[0].flatten(1)
        parts = [scores, linear, before, similarity, best.amax(1), *_by_object(far),
                 *_by_object(close)]
        return _evidence(*parts).unflatten(2, cells.shape), scores.unflatten(1, cells.shape)

    def _far(self, bank: Bank, cells: Cells, temperature):
        """(N+1, h*w) scores of sets, (h*w, ...) values read, (h*w,) the largest similarity."""
        scores, found, values, start = [], [], [], 0
        for number, (keys, kept) in enumerate([*bank.sets, *((e.key, e.values)
                                                            for e in bank.later)]):
            best, positions = nearest(cells.key, keys, K)
            if number < len(bank.sets):
                mean = best.topk(min(K_SET, best.shape[1]), dim=1).values.mean(1)
                scores.append(mean if len(keys) else torch.zeros_like(cells.unit[:, 0]))
            found.append((best, positions + start))
            values.append(kept)
            start += len(keys)
        best, positions = (torch.cat(parts, 1) for parts in zip(*found))
        best, chosen = best.topk(min(K, best.shape[1]), dim=1, sorted=False)
        read = _weighed(torch.cat(values), best, positions.gather(1, chosen), temperature)
        return torch.stack(scores), read, best.amax(1)


def best_other(x: torch.Tensor) -> torch.Tensor:
    """(N, ...) of each object -> (N, ...) the largest of the others', 0 where there is none."""
    if len(x) == 1:
        return torch.zeros_like(x)
    first, second = x.topk(2, dim=0).values
    return torch.where(x >= first, second, first)


def _weighed(values: torch.Tensor, similarity: torch.Tensor, positions: torch.Tensor,
             temperature: torch.Tensor) -> torch.Tensor:
    """(m, D) values -> (n, D), those at (n, K) positions, weighed by softmax of similarities."""
    weights = (similarity / temperature).softmax(1)
    return F.embedding_bag(positions, values, mode="sum", per_sample_weights=weights)


def _by_object(read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, N * (VALUE + 1)) -> (N, VALUE, n) values and (N, n) labels."""
    values, labels = read.T.unflatten(0, (-1, VALUE + 1)).split([VALUE, 1], 1)
    return values, labels[:, 0]


def _evidence(scores, linear, before, far_similarity, close_similarity, far, far_label, close,
              close_label) -> torch.Tensor:
    """(N, EVIDENCE, n); scores and linear labels are (N+1, n), the other scalars (N, n) or (n,)."""
    objects, labels = scores[1:], linear[1:]
    other = best_other(labels)
    scalars = [5 * (objects - scores[:1]), 5 * (objects - best_other(objects)), objects,
               labels, labels - torch.maximum(other, linear[:1]), other,
               far_label, best_other(far_label), far_similarity.expand_as(objects),
               close_label, best_other(close_label), close_similarity.expand_as(objects),
               before, best_other(before), close_label - far_label]
    return torch.cat([torch.stack(scalars, 1), far, close], 1)
