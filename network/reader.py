"""Memory read and write of `--method memory`: keys, values, and what is kept of which frame.

A frame's locations, those of the encoder's coarse feature map, are compared by keys of few
channels; what was found at a location is kept as its values, which are read where keys are alike
(Oh et al.: Video object segmentation using space-time memory networks, ICCV 2019). The module has
weights only; what is known of a video is a `State`, which these functions map to the next one.

They branch on no value and, but for speed, on no shape, so that they are exported as they stand.
"""

import torch
import torch.nn.functional as F
from torch import nn

from network.decoder import antialiased
from network.search import LOWEST, nearest, windows
from network.state import MASKS, TOKENS, Features, State, Widths, extra

KEY, NEAR = 64, 32  # channels that are compared everywhere, and near a location
VALUE = 24  # channels of an object's value, beside its share of the location
WIDTH, GROUPS = 32, 8  # channels and groups of what makes values
TEMPERATURE = 0.07  # at first, of the softmax that weighs values; it is learned
RIDGE = 0.003  # at first, of the linear labels; it is learned
K = 16  # locations that a location reads of all that are kept
K_SET = 5  # locations of a set whose mean similarity is its score
K_NEAR, RADIUS = 8, 6  # locations that are read of the last frames, so far away at most
GIVEN = 0.6  # weight of reference frames in the linear labels, later ones have the rest
LATER = 0.3  # weight of the newest frame among the later ones
LEAST = 0.02  # share of a frame below which an object weighs less there
STEPS = 50  # of conjugate gradients, where there is no direct solver (see `solved`)
SCALARS = 15
EVIDENCE = SCALARS + 2 * VALUE  # channels of the readout of an object at a location


class Reader(nn.Module):
    """Keys, values, and what is read.

    Args:
        channels: of a location's features, all layers that are matched.
        finest: the first of them, of the layer that knows best where things are.
        side: masks are seen with so many pixels on each side of a location.
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

    @property
    def widths(self) -> Widths:
        tokens = 0 if self.tokens is None else self.tokens.kept
        return Widths(self.key.in_features, KEY, NEAR, VALUE, WIDTH, self.side, tokens)

    def comparing(self) -> list[nn.Parameter]:
        """What decides which locations are alike."""
        return [self.key.weight, self.near.weight, self.log_temperatures, self.log_ridge]

    @torch.no_grad()
    def begin(self, features: torch.Tensor) -> None:
        """Begin with keys that keep most of (n, C) features: their principal directions."""
        unit = F.normalize(features.double(), dim=1)
        for layer, kept in ((self.key, unit), (self.near, unit[:, :self.finest])):
            directions = torch.linalg.eigh(kept.T @ kept).eigenvectors
            layer.weight.copy_(directions[:, -len(layer.weight):].T)

    def describe(self, matched: torch.Tensor, levels=(),
                 precision: torch.dtype = torch.float32) -> Features:
        """(B, C, h, w) features, and those of all levels -> what is kept and compared of them.

        Args:
            precision: of the keys.
        """
        grid = matched.shape[2:]
        unit = F.normalize(matched.flatten(2).transpose(1, 2).float(), dim=2)
        near = F.normalize(self.near(unit[..., :self.finest]), dim=2).to(precision)
        key = F.normalize(self.key(unit), dim=2).to(precision)
        shared = self.shared(unit.transpose(1, 2).reshape(unit.shape[0], -1, *grid))
        return Features(matched, unit, key, near.reshape(near.shape[0], *grid, NEAR), shared,
                        tuple(levels))

    # writing

    def start(self, state: State, features: Features, masks: torch.Tensor,
              labels: torch.Tensor) -> State:
        """Add a reference frame.

        It may hold more objects than the state follows: earlier frames then count as lacking them.

        Args:
            features: of the frame and, after it, of closer views of its objects.
            masks: (V, N+1, h*side, w*side) what is where in each of these views, as shares.
            labels: (V, h, w) integers, the set that each location belongs to: 0 background, 1 to
                N; -1 none.
        """
        new = masks.shape[1] - state.recent_masks.shape[1]
        if torch.onnx.is_in_onnx_export() or new:  # without a branch, where it costs time only
            state = self.revalued(widened(state, new))
        values = self._values(features.shared, masks)
        index, valid = _rows(labels.flatten(1), state, masks.shape[1] - 1)
        views, cells = state.reference_shared.shape[0], features.key.shape[1]
        reference = {"keys": features.key.flatten(0, 1)[index][None], "valid": valid.float()[None],
                     "values": values.flatten(0, 1)[index][None],
                     "rows": index[None] + views * cells, "shared": features.shared,
                     "masks": masks}
        sums = {f"reference_{name}": getattr(state, f"reference_{name}") + new
                for name, new in self._sums(features.unit[0], masks[0]).items()}
        state = state._replace(
            **sums, **{f"reference_{name}": torch.cat([getattr(state, f"reference_{name}"), new])
                       for name, new in reference.items()})
        return self._fitted(_seen(state, features, values[0], masks[0]))

    def remember(self, state: State, features: Features, probabilities: torch.Tensor,
                 long: bool) -> State:
        """Add a frame to the short-term memory.

        Args:
            probabilities: (N+1, H, W), of any size.
            long: to the long-term memory as well, in place of its oldest frame.
        """
        found = self.pixels(probabilities, state.grid)
        values = self._values(features.shared, found[None])
        state = _seen(state, features, values[0], found)
        if not long:
            return state
        slots = state.memory_valid.shape[0]
        index, valid = _every_location(state)
        new = {"keys": features.key[0][index], "values": values[0][index], "valid": valid,
               "shared": features.shared[0], "masks": found}
        slot = torch.arange(slots, device=found.device) == state.memories % slots
        rate = LATER + (1 - LATER) * (state.memories == 0).float()
        sums = {}
        for name, now in self._sums(features.unit[0], found).items():
            old = getattr(state, f"memory_{name}")
            sums[f"memory_{name}"] = old + (now - old) * rate
        return self._fitted(state._replace(
            memories=state.memories + 1, **sums,
            **{f"memory_{name}": torch.where(slot.reshape(-1, *[1] * x.dim()), x,
                                             getattr(state, f"memory_{name}"))
               for name, x in new.items()}))

    def pixels(self, found: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(N+1, H, W) of any size -> as many pixels on each side of a location as values need."""
        size = tuple(self.side * side for side in grid)
        if torch.onnx.is_in_onnx_export():  # which can't reduce without aliasing
            rows, columns = (antialiased(a, b) for a, b in zip(found.shape[1:], size))
            return rows @ found @ columns.T
        if found.shape[1:] == size:
            return found
        return F.interpolate(found[None], size=size, mode="bilinear", align_corners=False,
                             antialias=True)[0]

    def revalued(self, state: State) -> State:
        """With values of all that is kept, made again after the set of objects changed."""
        views, slots = state.reference_shared.shape[0], state.memory_shared.shape[0]
        shared, masks = (torch.cat([getattr(state, f"{part}_{name}")
                                    for part in ("reference", "memory", "recent")])
                         for name in ("shared", "masks"))
        values = self._values(shared, masks)
        index, _ = _every_location(state)
        return state._replace(reference_values=values.flatten(0, 1)[state.reference_rows],
                              memory_values=values[views:views + slots][:, index],
                              recent_values=values[views + slots:])

    def _values(self, shared: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """(V, WIDTH, h, w) and (V, N+1, h*side, w*side) -> (V, h*w, M, VALUE + 1)."""
        return self.values(shared, self._own(masks))

    def _own(self, masks: torch.Tensor) -> torch.Tensor:
        """(M, V, side * side + 2, h, w) what values are made of, beside the features."""
        views, objects = masks.shape[0], masks.shape[1] - 1
        pixels = F.pixel_unshuffle(masks[:, 1:].flatten(0, 1)[:, None], self.side)
        pixels = pixels.reshape(views, objects, *pixels.shape[1:]).transpose(0, 1)
        own, shares = with_union(pixels), pixels.mean(2, keepdim=True)
        return torch.cat([own, own.mean(2, keepdim=True), rivals(shares)], 2)

    def values(self, shared: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """(V, h*w, P, VALUE + 1): of each object its values, and its share of the location.

        Args:
            shared: (V, WIDTH, h, w), of the frame.
            own: (P, V, side * side + 2, h, w), of each object, the share last but one.
        """
        objects, views = own.shape[:2]
        own = own.flatten(0, 1)
        if torch.onnx.is_in_onnx_export():
            parts = [(shared.repeat(objects, 1, 1, 1), own)]
        else:  # one by one: five at once take longer, since caches are small
            parts = [(shared[i % views][None], part) for i, part in enumerate(own.split(1))]
        found = []
        for common, part in parts:
            x = common + self.own(2 * part - 1)
            found.append(torch.cat([self.value(F.relu(x + self.layers(x))), part[:, -2:-1]], 1))
        found = torch.cat(found).flatten(2).reshape(objects, views, VALUE + 1, -1)
        return found.permute(1, 3, 0, 2).contiguous()

    def _sums(self, unit: torch.Tensor, found: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is summed over frames, by name.

        squares, labels: (C, C) and (C, N+1), features times features, and times labels; objects
            weigh alike.
        tokens: (N+1, ...), of which object tokens are made, if there are some.
        """
        shares = self.shares(found)
        labels = shares.T  # (h*w, N+1)
        weights = (labels / (labels.mean(0) + LEAST)).sum(1)
        weighted = unit * (weights / weights.sum())[:, None]
        sums = {"squares": unit.T @ weighted, "labels": weighted.T @ labels}
        return sums if self.tokens is None else sums | {"tokens": self.tokens.sums(unit, shares)}

    def shares(self, found: torch.Tensor) -> torch.Tensor:
        """(n, h*side, w*side) -> (n, h*w), the mean at each location."""
        return F.avg_pool2d(found[None], self.side)[0].flatten(1)

    def _fitted(self, state: State) -> State:
        """With what the sums over frames are for.

        That is labels that are linear in the features, by ridge regression in closed form, and
        object tokens.
        """
        references = state.reference_keys.shape[0]
        weight = 1 - (1 - GIVEN) * (state.memories > 0).float()

        def mean(name):
            later = getattr(state, f"memory_{name}")
            return later + (getattr(state, f"reference_{name}") / references - later) * weight

        linear = solved(mean("squares"), mean("labels"), self.log_ridge.exp())
        tokens = {} if self.tokens is None else {"tokens": mean("tokens")}
        return state._replace(linear=linear, **tokens)

    # reading

    def read(self, state: State, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """The memory readout: what speaks for each object in a frame, and against it.

        Returns:
            (M, EVIDENCE, h, w) of N objects and, where N > 1, their union (see `with_union`); and
            (N+1, h, w) the mean similarity to the best locations of each set of the reference
            frames (Hu, Huang, Schwing, section 3.1, by keys); 0 of an empty one.
        """
        everywhere, near = self.log_temperatures.exp()
        scores, values, best, rows = self._far(state, features.key[0])
        best, chosen = best.topk(K, dim=1, sorted=False)
        read = _weighed(values, best, rows.gather(1, chosen), everywhere)
        close = windows(features.near[0], state.recent_keys, state.recent_valid, K_NEAR, RADIUS)
        recent = _weighed(state.recent_values.flatten(0, 1), *close, near)
        before = self.shares(state.previous[1:])
        linear = (features.unit[0] @ state.linear).T
        parts = [scores, linear, before, best.amax(1), close[0].amax(1),
                 *_by_object(read), *_by_object(recent)]
        evidence = _evidence(*parts)
        grid = features.near.shape[1:3]
        return (evidence.reshape(*evidence.shape[:2], *grid),
                scores[:before.shape[0] + 1].reshape(-1, *grid))

    def _far(self, state: State, key: torch.Tensor):
        """Candidates among reference frames and long-term memory.

        Returns:
            (M+1, h*w) scores of the sets, and of all objects' sets together where there are
            several; (rows, M, VALUE + 1) values; (h*w, n) similarities and (h*w, n) rows, among
            which are the K best.
        """
        rest = extra(state.memory_valid.shape[1])
        background = state.memory_valid.shape[1] + rest
        objects = state.recent_masks.shape[1] - 1

        def sets(name):
            x = getattr(state, f"reference_{name}")
            own = x[:, background:]
            return (x[:, :background].unsqueeze(1),
                    own.reshape(own.shape[0], objects, rest, *own.shape[2:]))

        keys, valid = [*sets("keys"), state.memory_keys.unsqueeze(1)], [
            *sets("valid"), state.memory_valid.unsqueeze(1)]
        found, start = [], 0
        for part, there in zip(keys, valid):
            best, rows = nearest(key, part, there, K)
            found.append((best, rows + start))
            frames, several, members, groups = there.shape  # of which a trace knows the product
            start = start + frames * several * members * groups
        (behind, _), (own, _), _ = found
        scores = [best_mean(behind).T, best_mean(own).T]
        if torch.onnx.is_in_onnx_export() or objects > 1:  # of the union; one object has none
            scores.append(best_mean(own.flatten(1)[:, None]).T + 0 * scores[1][1:2])
        values = torch.cat([x.reshape(-1, *x.shape[-2:])
                            for x in (*sets("values"), state.memory_values)])
        best, rows = (torch.cat([x.flatten(1) for x in parts], 1) for parts in zip(*found))
        return torch.cat(scores), values, best, rows


def _seen(state: State, features: Features, values: torch.Tensor, found: torch.Tensor) -> State:
    """With one more frame in the short-term memory."""
    return state._replace(
        recent_keys=torch.cat([state.recent_keys[1:], features.near[:1]]),
        recent_values=torch.cat([state.recent_values[1:], values[None]]),
        recent_valid=torch.cat([state.recent_valid[1:], torch.ones_like(state.recent_valid[:1])]),
        recent_shared=torch.cat([state.recent_shared[1:], features.shared[:1]]),
        recent_masks=torch.cat([state.recent_masks[1:], found[None]]), frames=state.frames + 1)


def _every_location(state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a long-term memory frame: (s, G) locations, and 1 where there is one, else 0."""
    (h, w), shape = state.recent_keys.shape[1:3], state.memory_valid.shape[1:]
    row = torch.arange(shape[0] * shape[1], device=state.recent_keys.device)
    return row.clamp(max=h * w - 1).reshape(shape), (row < h * w).float().reshape(shape)


def _rows(labels: torch.Tensor, state: State, objects: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which locations of a reference frame's views go into which row.

    Args:
        labels: (V, h*w), the set of each location.

    Returns:
        (m, G) locations, counted through the views, and (m, G) bool, whether there is one.
    """
    rest, groups = extra(state.memory_valid.shape[1]), state.memory_valid.shape[2]
    sets = torch.arange(objects + 1, device=labels.device)[:, None, None]
    chosen = labels == sets  # (N+1, V, h*w)
    parts = [filled(chosen[:1], (state.memory_valid.shape[1] + rest) * groups),
             filled(chosen[1:], rest * groups)]
    return tuple(torch.cat([x.reshape(-1, groups) for x in found]) for found in zip(*parts))


def filled(chosen: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose locations for the rows of sets: the frame's own first, then those of closer views.

    Of more than there is place for some are left out, evenly spread.

    Args:
        chosen: (S, V, n) bool, the members of S sets in a frame and V - 1 views.

    Returns:
        (S, rows) locations, counted through frame and views, and (S, rows) bool, whether there
        is one.
    """
    sets, views, count = chosen.shape
    location = torch.arange(views * count, device=chosen.device)
    used, places = chosen.new_zeros(sets, 1, dtype=torch.long), []
    for part in (chosen[:, 0], chosen[:, 1:].flatten(1)):
        rank = part.long().cumsum(1)  # from 1
        there = part.long().sum(1, keepdim=True)
        kept = torch.minimum(there, rows - used)
        # of `there` members `kept`: those where the place, rounded down, rises
        place, before = (torch.div(x * kept, there.clamp(min=1), rounding_mode="floor")
                         for x in (rank, rank - 1))
        places.append(torch.where(part & (place > before), used + place - 1, rows))
        used = used + kept
    # one row more, for all that are left out
    index = torch.zeros(sets, rows + 1, dtype=torch.long, device=chosen.device)
    index = index.scatter(1, torch.cat(places, 1), location.expand(sets, -1))
    return index[:, :rows], torch.arange(rows, device=chosen.device) < used


def widened(state: State, new: int) -> State:
    """With so many more objects, which no frame so far holds; but for values (see `revalued`)."""
    def longer(x, axis, count):
        size = list(x.shape)
        size[axis] = count
        return torch.cat([x, x.new_zeros(size)], axis)

    found = {name: longer(getattr(state, name), 1, new)
             for name in (*MASKS, "reference_labels", "memory_labels", "linear")}
    found |= {name: longer(getattr(state, name), 0, new) for name in TOKENS}
    rows = new * extra(state.memory_valid.shape[1])
    found |= {name: longer(getattr(state, name), 1, rows)
              for name in ("reference_keys", "reference_valid", "reference_rows")}
    return state._replace(**found)


def with_union(x: torch.Tensor) -> torch.Tensor:
    """(N, ...) masks or shares of objects -> (M, ...), followed by those of their union.

    The union of several objects is decoded as one more object, so M = N + 1. A single object is
    its own union, which would only cost time: M = N = 1. Both without a branch, for an export:
    `x[1:2]` has a row only where there are several objects.
    """
    return torch.cat([x, x.sum(0, keepdim=True) + 0 * x[1:2]])


def rivals(x: torch.Tensor) -> torch.Tensor:
    """(N, ...) of each object -> (M, ...) the largest of the others'; the union's, which has no
    others, are 0."""
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


def _weighed(values: torch.Tensor, similarity: torch.Tensor, rows: torch.Tensor,
             temperature: torch.Tensor) -> torch.Tensor:
    """(m, M, D) values -> (n, M * D), those of (n, K) rows, weighed by softmax of similarities."""
    weights, values = (similarity / temperature).softmax(1), values.flatten(1)
    if torch.onnx.is_in_onnx_export():  # which has no bags
        return (weights[:, None] @ values[rows])[:, 0]
    return F.embedding_bag(rows, values, mode="sum", per_sample_weights=weights)


def _by_object(read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, M * (VALUE + 1)) -> (M, VALUE, n) values and (M, n) labels."""
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


def best_mean(best: torch.Tensor) -> torch.Tensor:
    """(n, S, K) similarities to sets -> (n, S) the mean of the `K_SET` best; 0 of an empty set."""
    best = best.topk(K_SET, dim=2).values
    there = (best > LOWEST).float()
    return (best * there).sum(2) / there.sum(2).clamp(min=1)


def solved(matrix: torch.Tensor, right: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """(n, n) symmetric, without negative eigenvalues, and (n, m) -> (n, m).

    x with (matrix + ridge) @ x = right. ONNX has no solver, so there by conjugate gradients.
    """
    if torch.onnx.is_in_onnx_export():
        return conjugate_gradients(matrix, right, ridge)
    return torch.linalg.solve(matrix + torch.diag(ridge.expand(len(matrix))), right)


def conjugate_gradients(matrix: torch.Tensor, right: torch.Tensor, ridge: torch.Tensor,
                        steps: int = STEPS) -> torch.Tensor:
    """As `solved`, each of the m columns by itself.

    The trace of the squares of unit features is 1, so the ridge keeps the condition number at a
    few hundred at most, and 40 steps are as exact as float32 is.
    """
    x, rest = torch.zeros_like(right), right
    direction, square = rest, rest.square().sum(0)
    for _ in range(steps):
        product = matrix @ direction + ridge * direction
        # a column that is solved has nothing left to divide by
        length = square / (direction * product).sum(0).clamp(min=1e-30)
        x, rest = x + length * direction, rest - length * product
        before, square = square, rest.square().sum(0)
        direction = rest + square / before.clamp(min=1e-30) * direction
    return x
