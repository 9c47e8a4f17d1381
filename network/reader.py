"""From what a video left behind to evidence for each object: what `--method memory` has learned.

A frame's cells, the positions of the encoder's coarse grid, are told apart by keys of few
channels, which are compared; what was found in a cell is kept as its values, which are read where
keys are alike (Oh et al.: Video object segmentation using space-time memory networks, ICCV 2019).
It has weights and nothing of a video.
"""

import torch
import torch.nn.functional as F
from torch import nn

from network.bank import Bank, Cells
from network.rules import K_NEAR, K_SET, RADIUS, VALUE, K, Rules
from network.search import nearest, windows
from network.views import sets_of

KEY, NEAR = 64, 32  # channels that are compared everywhere, and near a cell
WIDTH, GROUPS = 32, 8  # channels and groups of what makes values
TEMPERATURE = 0.07  # at first, of the softmax that weighs values; it is learned
RIDGE = 0.003  # at first, of the linear labels; it is learned
SCALARS = 15
EVIDENCE = SCALARS + 2 * VALUE  # channels of what is known of an object at a cell


class Reader(nn.Module, Rules):
    """Keys, values, and what is read; when anything is kept, the `Rules` say.

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
        self.tokens: nn.Module | None = None  # `ObjectTokens`

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
                     near.to(precision).reshape(*features.shape[1:], NEAR))

    sets_of, nearest = staticmethod(sets_of), staticmethod(nearest)

    def ridge(self) -> torch.Tensor:
        return self.log_ridge.exp()

    @staticmethod
    def best_mean(best: torch.Tensor) -> torch.Tensor:
        return best.topk(min(K_SET, best.shape[1]), dim=1).values.mean(1)

    def pixels(self, found: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        size = tuple(self.side * side for side in shape)
        if found.shape[1:] == size:
            return found
        return F.interpolate(found[None], size=size, mode="bilinear", align_corners=False,
                             antialias=True)[0]

    def shares(self, found: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(found[None], self.side)[0].flatten(1)

    def shared_of(self, cells: Cells) -> torch.Tensor:
        return self.shared(cells.unit.T.reshape(1, -1, *cells.shape))

    def values_of(self, shared: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        # one by one, as in the decoder
        return self.values(shared, self.own_of(found).split(1))

    def own_of(self, found: torch.Tensor) -> torch.Tensor:
        """(N+1, H, W) -> (M, side * side + 2, h, w), of each object what its values are made of."""
        objects = F.pixel_unshuffle(found[1:, None], self.side)  # (N, side * side, h, w)
        own = with_union(objects)
        return torch.cat([own, own.mean(1, keepdim=True),
                          rivals(objects.mean(1, keepdim=True))], 1)

    def values(self, shared: torch.Tensor, parts) -> torch.Tensor:
        """(h*w, M * (VALUE + 1)): of each object values, and its share of the cell.

        Args:
            parts: of `own_of`, together all objects.
        """
        values = []
        for part in parts:
            x = shared + self.own(2 * part - 1)
            values.append(torch.cat([self.value(F.relu(x + self.layers(x))), part[:, -2:-1]], 1))
        return torch.cat(values).flatten(2).flatten(0, 1).T.contiguous()

    def token_sums(self, cells: Cells, shares: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return () if self.tokens is None else (self.tokens.sums(cells.unit, shares),)

    def read(self, bank: Bank, cells: Cells) -> tuple[torch.Tensor, torch.Tensor]:
        """What speaks for each object in a frame, and against it.

        Returns:
            (M, EVIDENCE, h, w) of N objects, and their union where N > 1 (see `with_union`); and
            (N+1, h, w) the mean similarity to the best cells of each set of the reference frames
            (Hu, Huang, Schwing, section 3.1, by keys); 0 of an empty one.
        """
        scores, *far = self._far(bank, cells)
        recent = list(bank.recent)
        close = windows(cells.near, [e.near for e in recent], K_NEAR, RADIUS)
        evidence = self.evidence(cells, bank.linear, recent[-1].found, scores, far,
                                 (torch.cat([e.values for e in recent]), *close))
        return evidence, scores[:len(recent[-1].found)].unflatten(1, cells.shape)

    def evidence(self, cells: Cells, linear: torch.Tensor, found: torch.Tensor,
                 scores: torch.Tensor, far, close) -> torch.Tensor:
        """(M, EVIDENCE, h, w) of what was looked for.

        Args:
            linear: (C, N+1) that makes labels of features.
            found: (N+1, H, W) of the frame before.
            scores: (M+1, h*w).
            far, close: (m, ...) values, (h*w, F) similarities and which values.
        """
        everywhere, near = self.log_temperatures.exp()
        values, best, positions = far
        best, chosen = best.topk(min(K, best.shape[1]), dim=1, sorted=False)
        read = _weighed(values, best, positions.gather(1, chosen), everywhere)
        before = self.shares(found[1:])
        parts = [scores, (cells.unit @ linear).T, before, best.amax(1), close[1].amax(1),
                 *_by_object(read), *_by_object(_weighed(close[0], close[1], close[2], near))]
        found = _evidence(*parts)
        return found.reshape(*found.shape[:2], *cells.shape)


def with_union(x: torch.Tensor) -> torch.Tensor:
    """(N, ...) masks or shares of objects -> (M, ...), followed by those of their union.

    The union of several objects is decoded as one more object, so M = N + 1. A single object is
    its own union, which would only cost time: M = N = 1. Both without a branch, for an export:
    `x[1:2]` has a row only where there are several objects.
    """
    return torch.cat([x, x.sum(0, keepdim=True) + 0 * x[1:2]])


def rivals(x: torch.Tensor) -> torch.Tensor:
    """(N, ...) of each object -> (M, ...) the largest of the others'; 0 for the union."""
    return torch.cat([best_other(x), 0 * x[1:2]])


def foreground_first(logits: torch.Tensor, objects: int) -> torch.Tensor:
    """(M, H, W) logits of N objects and their union -> (N, H, W) logits beside 0 for background.

    The union decides between foreground and background, the objects among themselves whose the
    foreground is: where look-alikes compete and none is sure, it still isn't background.
    p(i) = sigmoid(union) * softmax(objects)[i], written as logits.
    """
    own, union = logits[:objects], logits[objects:]
    # no union of a single object: the sum of no rows is 0
    return own + (union - own.logsumexp(0, keepdim=True)).sum(0, keepdim=True)


def best_other(x: torch.Tensor) -> torch.Tensor:
    """(N, ...) of each object -> (N, ...) the largest of the others', 0 where there is none."""
    if torch.onnx.is_in_onnx_export():  # of any number of objects
        first, second = torch.cat([x, 0 * x[:1] - 1e9]).topk(2, dim=0).values
        other = torch.where(x >= first, second, first)
        return torch.where(other > -1e9, other, 0.0)
    if len(x) == 1:
        return torch.zeros_like(x)
    first, second = x.topk(2, dim=0).values
    return torch.where(x >= first, second, first)


def _weighed(values: torch.Tensor, similarity: torch.Tensor, positions: torch.Tensor,
             temperature: torch.Tensor) -> torch.Tensor:
    """(m, D) values -> (n, D), those at (n, K) positions, weighed by softmax of similarities."""
    weights = (similarity / temperature).softmax(1)
    if torch.onnx.is_in_onnx_export():  # which has no bags
        return (weights[:, None] @ values[positions])[:, 0]
    return F.embedding_bag(positions, values, mode="sum", per_sample_weights=weights)


def _by_object(read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, N * (VALUE + 1)) -> (N, VALUE, n) values and (N, n) labels."""
    values, labels = read.T.reshape(-1, VALUE + 1, read.shape[0]).split([VALUE, 1], 1)
    return values, labels[:, 0]


def _evidence(scores, linear, before, far_similarity, close_similarity, far, far_label, close,
              close_label) -> torch.Tensor:
    """(M, EVIDENCE, n) of N objects and maybe their union.

    Scores are (M+1, n), linear labels (N+1, n), those that were read (M, n), those of the frame
    before (N, n), similarities (n,).
    """
    objects, labels, count = scores[1:], with_union(linear[1:]), before.shape[0]
    other = rivals(linear[1:])
    scalars = [5 * (objects - scores[:1]), 5 * (objects - rivals(objects[:count])), objects,
               labels, labels - torch.maximum(other, linear[:1]), other,
               far_label, rivals(far_label[:count]), far_similarity.expand_as(objects),
               close_label, rivals(close_label[:count]), close_similarity.expand_as(objects),
               with_union(before), rivals(before), close_label - far_label]
    return torch.cat([torch.stack(scalars, 1), far, close], 1)
