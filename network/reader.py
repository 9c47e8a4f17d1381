"""Memory write and readout of `--method memory`.

Each location of the encoder's coarse feature map has a key of few channels, by which locations are
compared, and one value per object, which is read where keys are similar (Oh et al.: Video object
segmentation using space-time memory networks, ICCV 2019). The module holds weights only. The
memory of a video is a `State`; the methods here take one and return the next.

Nothing branches on values, and on shapes only for speed, so that the same code is exported to ONNX.
"""

import torch
import torch.nn.functional as F
from torch import nn

from network.decoder import antialiased
from network.search import LOWEST, largest, nearest, windows
from network.state import PER_LABEL, Features, State, Widths, extra

# KEY, LOCAL_KEY, VALUE and WIDTH fix shapes of weights: others need a newly trained checkpoint.
# Channels of global keys (compared with all memory frames) and of local keys (short-term memory
# only). 64 instead of the 256 of the features took the product and the top-k from 107 to 41 ms per
# frame in float32 (docs/log/2026-11-25-keys-and-values.md).
KEY, LOCAL_KEY = 64, 32
# Channels of a value, besides the object's area share. Memory and readout time grow with VALUE
# times the number of objects.
VALUE = 24
WIDTH, GROUPS = 32, 8  # hidden channels of the value network, and groups of its GroupNorm
# Initial temperature of the softmax over similarities, learned from there. 0.07 is a common choice
# in label propagation; lower comes closer to copying the most similar location.
TEMPERATURE = 0.07
# Initial strength of the ridge regression, learned from there. Relative to features whose squares
# have trace 1; lower fits the memory frames more closely and generalises less.
RIDGE = 0.003
# Top-k memory locations read per query location. More smooth the readout and cost time in the
# selection; `state.blank` provides at least this many groups.
K = 16
K_SET = 5  # K of the paper: the score of a set is the mean similarity of its 5 best locations
# Top-k in the short-term memory, and radius of the window in locations of stride 16. A larger
# radius follows faster motion, admits more look-alikes, and costs time with its square.
K_LOCAL, RADIUS = 8, 6
# Weight of the reference frames in the ridge regression and the object memory. Long-term memory has
# the rest: a higher weight drifts less, a lower one adapts more to changes of appearance.
REFERENCE_WEIGHT = 0.6
# Weight of the newest frame in the moving average over long-term memory frames.
UPDATE_RATE = 0.3
# In the ridge regression, background and objects have equal total weights. Those that cover less
# than about this share of a frame have less: a few locations would otherwise decide the fit.
LEAST = 0.02
# Conjugate gradient steps in exported graphs, which have no direct solver. 40 reach the accuracy of
# float32 (see `conjugate_gradients`); the rest is a margin.
STEPS = 50
SCALARS = 15  # channels of the memory readout other than values, see `_assemble`
READOUT = SCALARS + 2 * VALUE  # channels of the memory readout per object and location


class Reader(nn.Module):
    """Computes keys and values, writes them to the memory and reads it.

    Args:
        channels: feature channels of a location, all matched encoder layers concatenated.
        finest: how many of them, at the start, are of the finest layer, which localises best; local
            keys use these only.
        side: mask pixels along each side of a location.
    """

    def __init__(self, channels: int, finest: int, side: int):
        super().__init__()
        self.finest, self.side = finest, side
        self.key = nn.Linear(channels, KEY, bias=False)
        self.local_key = nn.Linear(finest, LOCAL_KEY, bias=False)
        self.log_temperatures = nn.Parameter(torch.tensor([TEMPERATURE, TEMPERATURE]).log())
        self.log_ridge = nn.Parameter(torch.tensor(RIDGE).log())
        self.shared = nn.Conv2d(channels, WIDTH, 1)
        self.own = nn.Conv2d(side * side + 2, WIDTH, 1, bias=False)
        self.layers = nn.Sequential(
            nn.GroupNorm(GROUPS, WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.GroupNorm(GROUPS, WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))
        self.value = nn.Conv2d(WIDTH, VALUE, 1)

    @property
    def widths(self) -> Widths:
        """Numbers of channels, which determine the shapes of the state."""
        return Widths(self.key.in_features, KEY, LOCAL_KEY, VALUE, WIDTH, self.side)

    def matching_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that determine similarities; training gives them their own rate."""
        return [self.key.weight, self.local_key.weight, self.log_temperatures, self.log_ridge]

    @torch.no_grad()
    def initialise_keys(self, features: torch.Tensor) -> None:
        """Initialise the keys with the principal directions of (n, C) features.

        Untrained keys then match about as well as the features do.
        """
        unit = F.normalize(features.double(), dim=1)
        for layer, samples in ((self.key, unit), (self.local_key, unit[:, :self.finest])):
            directions = torch.linalg.eigh(samples.T @ samples).eigenvectors
            layer.weight.copy_(directions[:, -len(layer.weight):].T)

    def describe(self, matched: torch.Tensor, levels=(),
                 precision: torch.dtype = torch.float32) -> Features:
        """Compute keys and the objects' shared part of values.

        Args:
            matched: (B, C, h, w) encoder features.
            levels: feature maps for the decoder, passed through.
            precision: data type of the keys. Half precision makes the search faster; everything
                else is float32.
        """
        grid = matched.shape[2:]
        unit = F.normalize(matched.flatten(2).transpose(1, 2).float(), dim=2)
        local_key = F.normalize(self.local_key(unit[..., :self.finest]), dim=2).to(precision)
        local_key = local_key.reshape(local_key.shape[0], *grid, LOCAL_KEY)
        key = F.normalize(self.key(unit), dim=2).to(precision)
        shared = self.shared(unit.transpose(1, 2).reshape(unit.shape[0], -1, *grid))
        return Features(matched, unit, key, local_key, shared, tuple(levels))

    # writing

    def start(self, state: State, features: Features, masks: torch.Tensor,
              labels: torch.Tensor) -> State:
        """Add a reference frame to the memory, permanently.

        It may have more objects than the state; earlier frames are then taken not to contain them.

        Args:
            features: features of V views: the frame, then zoomed crops of its objects.
            masks: (V, N+1, h*side, w*side) shares of background and objects in each view.
            labels: (V, h, w) integers, the set of each location: 0 background, 1..N objects, -1
                none.
        """
        new = masks.shape[1] - state.recent_masks.shape[1]
        # recomputing values without new objects changes nothing but costs time; an exported graph
        # can't branch and does it always
        if torch.onnx.is_in_onnx_export() or new:
            state = self.revalued(widened(state, new))
        values = self._values(features.shared, masks)
        index, valid = _reference_rows(labels.flatten(1), state, masks.shape[1] - 1)
        views, locations = state.reference_shared.shape[0], features.key.shape[1]
        reference = {"keys": features.key.flatten(0, 1)[index][None], "valid": valid.float()[None],
                     "values": values.flatten(0, 1)[index][None],
                     "rows": index[None] + views * locations, "shared": features.shared,
                     "masks": masks}
        sums = {f"reference_{name}": getattr(state, f"reference_{name}") + new
                for name, new in self._sums(features.unit[0], masks[0]).items()}
        state = state._replace(
            **sums, **{f"reference_{name}": torch.cat([getattr(state, f"reference_{name}"), new])
                       for name, new in reference.items()})
        return self._fit(_add_short_term(state, features, values[0], masks[0]))

    def remember(self, state: State, features: Features, probabilities: torch.Tensor,
                 long: bool) -> State:
        """Add a predicted frame to the short-term memory, in place of its oldest frame.

        Args:
            probabilities: (N+1, H, W) background and objects, of any size.
            long: also add it to the long-term memory, in place of its oldest frame.
        """
        masks = self.pixels(probabilities, state.grid)
        values = self._values(features.shared, masks[None])
        state = _add_short_term(state, features, values[0], masks)
        if not long:
            return state
        slots = state.memory_valid.shape[0]
        index, valid = _every_location(state)
        new = {"keys": features.key[0][index], "values": values[0][index], "valid": valid,
               "shared": features.shared[0], "masks": masks}
        slot = torch.arange(slots, device=masks.device) == state.memories % slots
        rate = UPDATE_RATE + (1 - UPDATE_RATE) * (state.memories == 0).float()  # 1 at first
        sums = {}
        for name, now in self._sums(features.unit[0], masks).items():
            old = getattr(state, f"memory_{name}")
            sums[f"memory_{name}"] = old + (now - old) * rate
        return self._fit(state._replace(
            memories=state.memories + 1, **sums,
            **{f"memory_{name}": torch.where(slot.reshape(-1, *[1] * x.dim()), x,
                                             getattr(state, f"memory_{name}"))
               for name, x in new.items()}))

    def pixels(self, masks: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Resize (N+1, H, W) masks of any size to (N+1, h*side, w*side), antialiased.

        Args:
            grid: size (h, w) of the feature map.
        """
        size = tuple(self.side * side for side in grid)
        if torch.onnx.is_in_onnx_export():  # the exporter doesn't support antialiased resizing
            rows, columns = (antialiased(a, b) for a, b in zip(masks.shape[1:], size))
            return rows @ masks @ columns.T
        if masks.shape[1:] == size:
            return masks
        return F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False,
                             antialias=True)[0]

    def revalued(self, state: State) -> State:
        """Recompute all values in the memory, after objects were added or removed.

        The values of every object depend on its rivals and, for the union, on all objects.
        """
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
        """Compute the (V, h*w, M, VALUE + 1) values of V views.

        Args:
            shared: (V, WIDTH, h, w) the part that depends on features.
            masks: (V, N+1, h*side, w*side) shares of background and objects.
        """
        return self.values(shared, self._mask_channels(masks))

    def _mask_channels(self, masks: torch.Tensor) -> torch.Tensor:
        """Return the inputs of the value network that depend on masks, (M, V, side^2 + 2, h, w).

        For each object (and the union): the mask pixels within a location, their mean, and the
        mean of the strongest rival.
        """
        views, objects = masks.shape[0], masks.shape[1] - 1
        pixels = F.pixel_unshuffle(masks[:, 1:].flatten(0, 1)[:, None], self.side)
        pixels = pixels.reshape(views, objects, *pixels.shape[1:]).transpose(0, 1)
        own, shares = with_union(pixels), pixels.mean(2, keepdim=True)
        return torch.cat([own, own.mean(2, keepdim=True), rivals(shares)], 2)

    def values(self, shared: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Compute each object's value and area share at each location.

        Args:
            shared: (V, WIDTH, h, w) the part that depends on features.
            own: (P, V, side^2 + 2, h, w) the part that depends on the masks of P objects, as
                `_mask_channels` returns it.

        Returns:
            (V, h*w, P, VALUE + 1), the last channel the object's area share in [0, 1].
        """
        objects, views = own.shape[:2]
        own = own.flatten(0, 1)
        if torch.onnx.is_in_onnx_export():
            parts = [(shared.repeat(objects, 1, 1, 1), own)]
        else:  # one at a time: five at once take longer, as they exceed the CPU's cache
            parts = [(shared[i % views][None], part) for i, part in enumerate(own.split(1))]
        values = []
        for common, part in parts:
            x = common + self.own(2 * part - 1)
            values.append(torch.cat([self.value(F.relu(x + self.layers(x))), part[:, -2:-1]], 1))
        values = torch.cat(values).flatten(2).reshape(objects, views, VALUE + 1, -1)
        return values.permute(1, 3, 0, 2).contiguous()

    def _sums(self, unit: torch.Tensor, masks: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute what one frame adds to the sums of the state.

        Args:
            unit: (h*w, C) features of unit length.
            masks: (N+1, h*side, w*side) shares of background and objects.

        Returns:
            squares: (C, C) features times features, weighted so that objects count equally,
            labels: (C, N+1) features times area shares, with the same weights.
        """
        labels = self.shares(masks).T  # (h*w, N+1)
        weights = (labels / (labels.mean(0) + LEAST)).sum(1)
        weighted = unit * (weights / weights.sum())[:, None]
        return {"squares": unit.T @ weighted, "labels": weighted.T @ labels}

    def shares(self, masks: torch.Tensor) -> torch.Tensor:
        """Average (n, h*side, w*side) masks over each location, to (n, h*w) area shares."""
        return F.avg_pool2d(masks[None], self.side)[0].flatten(1)

    def _fit(self, state: State) -> State:
        """Fit the ridge regression to the sums.

        It predicts a location's label from its features and is solved in closed form.
        """
        references = state.reference_keys.shape[0]
        # the reference frames alone, until there is a long-term memory frame
        weight = 1 - (1 - REFERENCE_WEIGHT) * (state.memories > 0).float()

        def mean(name):
            later = getattr(state, f"memory_{name}")
            return later + (getattr(state, f"reference_{name}") / references - later) * weight

        return state._replace(
            linear=solved(mean("squares"), mean("labels"), self.log_ridge.exp()))

    # reading

    def read(self, state: State, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the memory for one frame.

        Returns:
            (M, READOUT, h, w) memory readout of N objects and, where N > 1, of their union (see
            `with_union`); and (N+1, h, w) scores of soft matching with the reference sets (Hu,
            Huang, Schwing, section 3.1, on keys instead of features), cosines, 0 for an empty set.
        """
        global_temperature, local_temperature = self.log_temperatures.exp()
        scores, values, best, rows = self._global_candidates(state, features.key[0])
        best, chosen = largest(best, K, features.key)
        global_read = _weighted_sum(values, best, rows.gather(1, chosen), global_temperature)
        local_best, local_rows = windows(features.local_key[0], state.recent_keys,
                                         state.recent_valid, K_LOCAL, RADIUS)
        local_read = _weighted_sum(state.recent_values.flatten(0, 1), local_best, local_rows,
                                   local_temperature)
        before = self.shares(state.previous[1:])
        linear = (features.unit[0] @ state.linear).T
        readout = _assemble(scores, linear, before, best.amax(1), local_best.amax(1),
                            *_by_object(global_read), *_by_object(local_read))
        grid = features.local_key.shape[1:3]
        return (readout.reshape(*readout.shape[:2], *grid),
                scores[:before.shape[0] + 1].reshape(-1, *grid))

    def _global_candidates(self, state: State, key: torch.Tensor):
        """Search reference frames and long-term memory.

        Sets are searched one by one, as soft matching needs the best locations of each. The top-k
        of all of them is among these candidates.

        Returns:
            (M+1, h*w) scores of background, objects and, where N > 1, the union of the objects;
            (rows, M, VALUE + 1) values of all rows; (h*w, n) similarities of n candidates per query
            location, and (h*w, n) their indices into the rows.
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
        candidates, start = [], 0
        for part, part_valid in zip(keys, valid):
            best, rows = nearest(key, part, part_valid, K)
            candidates.append((best, rows + start))
            # multiplied out so that an exported graph computes it instead of storing a constant
            frames, count, members, groups = part_valid.shape
            start = start + frames * count * members * groups
        (background_best, _), (own, _), _ = candidates
        scores = [best_mean(background_best).T, best_mean(own).T]
        if torch.onnx.is_in_onnx_export() or objects > 1:  # a single object has no union
            scores.append(best_mean(own.flatten(1)[:, None]).T + 0 * scores[1][1:2])
        values = torch.cat([x.reshape(-1, *x.shape[-2:])
                            for x in (*sets("values"), state.memory_values)])
        best, rows = (torch.cat([x.flatten(1) for x in parts], 1) for parts in zip(*candidates))
        return torch.cat(scores), values, best, rows


def _add_short_term(state: State, features: Features, values: torch.Tensor,
                    masks: torch.Tensor) -> State:
    """Append a frame to the short-term memory and drop its oldest one."""
    return state._replace(
        recent_keys=torch.cat([state.recent_keys[1:], features.local_key[:1]]),
        recent_values=torch.cat([state.recent_values[1:], values[None]]),
        recent_valid=torch.cat([state.recent_valid[1:], torch.ones_like(state.recent_valid[:1])]),
        recent_shared=torch.cat([state.recent_shared[1:], features.shared[:1]]),
        recent_masks=torch.cat([state.recent_masks[1:], masks[None]]), frames=state.frames + 1)


def _every_location(state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (s, G) locations in the rows of a memory frame, and 1, or 0 for an empty row."""
    (h, w), shape = state.recent_keys.shape[1:3], state.memory_valid.shape[1:]
    row = torch.arange(shape[0] * shape[1], device=state.recent_keys.device)
    return row.clamp(max=h * w - 1).reshape(shape), (row < h * w).float().reshape(shape)


def _reference_rows(labels: torch.Tensor, state: State,
                    objects: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Assign locations of a reference frame's views to the rows of the memory.

    Args:
        labels: (V, h*w) integers, the set of each location, -1 for none.
        objects: number of objects N.

    Returns:
        (m, G) indices of locations, counted through all views, and (m, G) bool, False for an empty
        row.
    """
    rest, groups = extra(state.memory_valid.shape[1]), state.memory_valid.shape[2]
    sets = torch.arange(objects + 1, device=labels.device)[:, None, None]
    chosen = labels == sets  # (N+1, V, h*w)
    parts = [filled(chosen[:1], (state.memory_valid.shape[1] + rest) * groups),
             filled(chosen[1:], rest * groups)]
    return tuple(torch.cat([x.reshape(-1, groups) for x in pair]) for pair in zip(*parts))


def filled(chosen: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the locations of each set that go into its rows.

    Those of the frame come first, then those of zoomed crops. Where there are more than rows, they
    are subsampled evenly.

    Args:
        chosen: (S, V, n) bool, members of S sets in V views: the frame and V - 1 crops.
        rows: number of rows per set.

    Returns:
        (S, rows) indices of locations, counted through all views, and (S, rows) bool, False for an
        empty row.
    """
    sets, views, count = chosen.shape
    location = torch.arange(views * count, device=chosen.device)
    used, places = chosen.new_zeros(sets, 1, dtype=torch.long), []
    for part in (chosen[:, 0], chosen[:, 1:].flatten(1)):
        rank = part.long().cumsum(1)  # from 1
        total = part.long().sum(1, keepdim=True)
        quota = torch.minimum(total, rows - used)
        # take `quota` of `total` members: those at which rank * quota / total reaches an integer
        place, before = (torch.div(x * quota, total.clamp(min=1), rounding_mode="floor")
                         for x in (rank, rank - 1))
        places.append(torch.where(part & (place > before), used + place - 1, rows))
        used = used + quota
    # scatter needs a target for the locations left out: an extra row, cut off below
    index = torch.zeros(sets, rows + 1, dtype=torch.long, device=chosen.device)
    index = index.scatter(1, torch.cat(places, 1), location.expand(sets, -1))
    return index[:, :rows], torch.arange(rows, device=chosen.device) < used


def widened(state: State, new: int) -> State:
    """Add `new` objects that no memory frame contains; recompute values with `Reader.revalued`."""
    def longer(x, count):
        return torch.cat([x, x.new_zeros(x.shape[0], count, *x.shape[2:])], 1)

    fields = {name: longer(getattr(state, name), new) for name in PER_LABEL}
    rows = new * extra(state.memory_valid.shape[1])
    fields |= {name: longer(getattr(state, name), rows)
               for name in ("reference_keys", "reference_valid", "reference_rows")}
    return state._replace(**fields)


def with_union(x: torch.Tensor) -> torch.Tensor:
    """Append the union of the objects to (N, ...) masks or shares, giving (M, ...).

    The union of several objects is decoded as one more object, so M = N + 1. A single object is
    its own union, and decoding it twice would only cost time: M = N = 1. There is no branch, so
    that both can be exported: `x[1:2]` has a row only where there are several objects.
    """
    return torch.cat([x, x.sum(0, keepdim=True) + 0 * x[1:2]])


def rivals(x: torch.Tensor) -> torch.Tensor:
    """Apply `best_other` to (N, ...) and append 0 for the union, which has no rivals: (M, ...)."""
    return torch.cat([best_other(x), 0 * x[1:2]])


def foreground_first(logits: torch.Tensor, objects: int) -> torch.Tensor:
    """Combine (M, H, W) logits of N objects and their union to (N, H, W) logits of objects.

    The background's logit is 0. The union decides between foreground and background, the objects
    compete for the foreground only. So where look-alikes compete and none is confident, the pixel
    is still foreground. p(i) = sigmoid(union) * softmax(objects)[i], written as logits.
    """
    own, union = logits[:objects], logits[objects:]
    # a single object has no union: the sum over no rows is 0 and its logits stay as they are
    return own + (union - own.logsumexp(0, keepdim=True)).sum(0, keepdim=True)


def best_other(x: torch.Tensor) -> torch.Tensor:
    """Return the maximum over all other objects for each of N objects, (N, ...); 0 where N = 1."""
    if torch.onnx.is_in_onnx_export():  # the graph must work for any N, including 1
        first, second = torch.cat([x, 0 * x[:1] - 1e9]).topk(2, dim=0).values
        other = torch.where(x >= first, second, first)
        return torch.where(other > -1e9, other, 0.0)
    if len(x) == 1:
        return torch.zeros_like(x)
    first, second = x.topk(2, dim=0).values
    return torch.where(x >= first, second, first)


def _weighted_sum(values: torch.Tensor, similarity: torch.Tensor, rows: torch.Tensor,
                  temperature: torch.Tensor) -> torch.Tensor:
    """Sum the values of the top-k rows, weighted by the softmax of their similarities.

    Args:
        values: (m, M, D) values.
        similarity, rows: (n, K) the top-k of n query locations.

    Returns:
        (n, M * D).
    """
    weights, values = (similarity / temperature).softmax(1), values.flatten(1)
    if torch.onnx.is_in_onnx_export():  # ONNX lacks the embedding bag, which saves memory here
        return (weights[:, None] @ values[rows])[:, 0]
    return F.embedding_bag(rows, values, mode="sum", per_sample_weights=weights)


def _by_object(read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split (n, M * (VALUE + 1)) readouts into (M, VALUE, n) values and (M, n) area shares."""
    values, labels = read.T.reshape(-1, VALUE + 1, read.shape[0]).split([VALUE, 1], 1)
    return values, labels[:, 0]


def _assemble(scores, linear, before, global_similarity, local_similarity, global_value,
              global_label, local_value, local_label) -> torch.Tensor:
    """Assemble the (M, READOUT, n) memory readout of N objects and, where N > 1, their union.

    Args:
        scores: (M+1, n) soft matching, of the background first.
        linear: (N+1, n) ridge regression labels.
        before: (N, n) area shares in the previous frame.
        global_similarity, local_similarity: (n,) of the most similar global and local key.
        global_value, local_value: (M, VALUE, n) values read globally and locally.
        global_label, local_label: (M, n) area shares read with them.
    """
    objects, labels, count = scores[1:], with_union(linear[1:]), before.shape[0]
    other = rivals(linear[1:])
    # differences of cosines are small next to labels in [0, 1], hence the 5; it is part of what the
    # decoder was trained with
    scalars = [5 * (objects - scores[:1]), 5 * (objects - rivals(objects[:count])), objects,
               labels, labels - torch.maximum(other, linear[:1]), other,
               global_label, rivals(global_label[:count]), global_similarity.expand_as(objects),
               local_label, rivals(local_label[:count]), local_similarity.expand_as(objects),
               with_union(before), rivals(before), local_label - global_label]
    return torch.cat([torch.stack(scalars, 1), global_value, local_value], 1)


def best_mean(best: torch.Tensor) -> torch.Tensor:
    """Return the soft matching score of each set: the mean of its `K_SET` best similarities.

    The mean is over fewer where a set has fewer members, and 0 for an empty set.

    Args:
        best: (n, S, K) similarities to S sets, `search.NOTHING` for empty rows.

    Returns:
        (n, S).
    """
    best = best.topk(K_SET, dim=2, sorted=False).values
    exists = (best > LOWEST).float()
    return (best * exists).sum(2) / exists.sum(2).clamp(min=1)


def solved(matrix: torch.Tensor, right: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Solve (matrix + ridge * I) @ x = right.

    Args:
        matrix: (n, n), symmetric and positive semidefinite.
        right: (n, m).
        ridge: scalar > 0.

    Returns:
        (n, m). ONNX has no linear solver, so an exported graph uses conjugate gradients.
    """
    if torch.onnx.is_in_onnx_export():
        return conjugate_gradients(matrix, right, ridge)
    return torch.linalg.solve(matrix + torch.diag(ridge.expand(len(matrix))), right)


def conjugate_gradients(matrix: torch.Tensor, right: torch.Tensor, ridge: torch.Tensor,
                        steps: int = STEPS) -> torch.Tensor:
    """Solve like `solved`, iteratively, each of the m columns on its own.

    The squares of unit features have trace 1, so the ridge keeps the condition number at a few
    hundred at most, and 40 steps reach the accuracy of float32.
    """
    x, residual = torch.zeros_like(right), right
    direction, square = residual, residual.square().sum(0)
    for _ in range(steps):
        product = matrix @ direction + ridge * direction
        # the residual of a solved column is 0, and so is the divisor
        length = square / (direction * product).sum(0).clamp(min=1e-30)
        x, residual = x + length * direction, residual - length * product
        before, square = square, residual.square().sum(0)
        direction = residual + square / before.clamp(min=1e-30) * direction
    return x
