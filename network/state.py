"""The state of one video under `--method memory`: a record of arrays, and nothing else.

Because it holds nothing but arrays, copying it is an assignment, saving it is `torch.save`, and an
exported graph takes it as inputs and returns it as outputs. Nothing in it is changed in place. The
arrays are PyTorch's or numpy's; this module imports neither.

Shapes depend on the frame size, the number of objects and the number of reference frames, never on
values. So sets that vary in size lie in a fixed number of rows, each valid or not, and rows are
stored (members, groups): a search looks at the best member of each group only (see
`search.nearest`). Consecutive locations go to different groups, because neighbours are alike and a
group returns only one of its members; a set that has no more rows than groups is searched exactly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

Array = Any

MEM_EVERY = 5  # frames from one long-term memory frame to the next; more follow faster changes
MEM_FRAMES = 4  # long-term memory frames; each costs 1/6 of the search's time
SHORT_TERM = 2  # last frames, which are read near each location only
MEMBERS = 16  # of a group, at most; more search faster and miss more
LEAST_GROUPS = 64  # so many where a frame has enough locations; below, K of them are too few


class Features(NamedTuple):
    """B frames as the network sees them, or closer views of one.

    Under other methods than "memory" there is only `matched`.
    """

    matched: Array  # (B, C, h, w), as the encoder gives them
    unit: Array | None = None  # (B, h*w, C), of length 1
    key: Array | None = None  # (B, h*w, KEY) unit vectors
    near: Array | None = None  # (B, h, w, NEAR) unit vectors
    shared: Array | None = None  # (B, WIDTH, h, w), from which values are made
    levels: tuple[Array, ...] = ()  # (B, C, ., .) of the backbone, finest first

    def frame(self, i: int) -> "Features":
        """The i-th alone."""
        parts = {name: x[i:i + 1] for name, x in self._asdict().items()
                 if name != "levels" and x is not None}
        return Features(**parts, levels=tuple(level[i:i + 1] for level in self.levels))


class State(NamedTuple):
    """What is known of a video. N objects are followed as M: where N > 1, their union is one more.

    F reference frames, T long-term and 2 short-term memory frames; h, w locations of the feature
    map, C channels of its features, VALUE of the values.
    """

    # of the reference frames: (F, m, G) rows, the background's members first, then each object's
    reference_keys: Array  # (F, m, G, KEY) unit vectors
    reference_valid: Array  # (F, m, G) 1, or 0 where a row holds nothing
    reference_values: Array  # (F, m, G, M, VALUE + 1), the last one the object's share
    reference_absent: Array  # (F, m, G, VALUE + 1), those of an object that isn't in the frame
    # of the long-term memory, a ring: frame t lies in slot t % T
    memory_keys: Array  # (T, s, G, KEY)
    memory_valid: Array  # (T, s, G)
    memory_values: Array  # (T, s, G, M, VALUE + 1)
    memory_absent: Array  # (T, s, G, VALUE + 1)
    # of the short-term memory, oldest first
    recent_keys: Array  # (2, h, w, NEAR)
    recent_valid: Array  # (2,)
    recent_values: Array  # (2, h*w, M, VALUE + 1)
    previous: Array  # (N+1, h*side, w*side) probabilities of the last frame
    # Sums over frames. Of the linear labels: features times features, and features times labels.
    # Of object tokens: features summed over masks. Of zero width where there are none.
    reference_squares: Array  # (C, C), summed over the reference frames
    reference_labels: Array  # (C, N+1)
    reference_tokens: Array  # (N+1, TOKENS * (WIDTH + 1)), see `ObjectTokens.sums`
    memory_squares: Array  # (C, C), averaged over long-term memory frames, the newest most
    memory_labels: Array  # (C, N+1)
    memory_tokens: Array  # (N+1, ...)
    linear: Array  # (C, N+1), which makes labels of features
    tokens: Array  # (N+1, ...), of which object tokens are made
    frames: Array  # () int64, how many were seen
    memories: Array  # () int64, how many of them went into the long-term memory

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return tuple(self.recent_keys.shape[1:3])

    @property
    def objects(self) -> int:
        """N."""
        return self.previous.shape[0] - 1


KEYS = "reference_keys", "memory_keys", "recent_keys"  # in the precision of the network
COUNTS = "frames", "memories"


class Widths(NamedTuple):
    """Channels of a network's records."""

    features: int
    key: int
    near: int
    value: int
    side: int  # pixels of `previous` on each side of a location
    tokens: int  # numbers of each object that object tokens are made of


def blank(grid: tuple[int, int], objects: int, widths: Widths,
          zeros: Callable[[str, tuple[int, ...]], Array]) -> State:
    """The state of a video of which no frame was seen.

    Args:
        grid: (h, w).
        zeros: a field's name and shape -> an array of zeros.
    """
    (h, w), followed, value = grid, objects + (objects > 1), widths.value + 1
    members = min(MEMBERS, max(1, h * w // LEAST_GROUPS))
    groups = max(MEMBERS, -(-h * w // members))  # as many as are read, at least
    rows = members + (objects + 1) * extra(members), groups
    slots = MEM_FRAMES, members, groups
    features, labels, tokens = widths.features, objects + 1, (objects + 1, widths.tokens)
    shapes = {
        "reference_keys": (0, *rows, widths.key), "reference_valid": (0, *rows),
        "reference_values": (0, *rows, followed, value), "reference_absent": (0, *rows, value),
        "memory_keys": (*slots, widths.key), "memory_valid": slots,
        "memory_values": (*slots, followed, value), "memory_absent": (*slots, value),
        "recent_keys": (SHORT_TERM, h, w, widths.near), "recent_valid": (SHORT_TERM,),
        "recent_values": (SHORT_TERM, h * w, followed, value),
        "previous": (labels, h * widths.side, w * widths.side),
        "reference_squares": (features, features), "reference_labels": (features, labels),
        "reference_tokens": tokens, "memory_tokens": tokens, "tokens": tokens,
        "memory_squares": (features, features), "memory_labels": (features, labels),
        "linear": (features, labels), "frames": (), "memories": ()}
    return State(**{name: zeros(name, shape) for name, shape in shapes.items()})


def extra(members: int) -> int:
    """Members of each object's set in a reference frame, given those that a frame has.

    A quarter of a frame: of a larger object every second or third location is kept, evenly spread.
    The background's set has as many beyond a whole frame, for closer views.
    """
    return max(1, members // 4)


def without(state: State, channel: int, concatenate: Callable[[list, int], Array]) -> State:
    """The state without one object, of which everything is forgotten; those behind it move up.

    Its locations are in no set then: were they background, it could not be found when it is asked
    for again. What the union of the others would have been is blended from their values.

    Args:
        channel: of the object in `previous`, at least 1.
        concatenate: arrays along an axis.
    """
    kept = [i for i in range(state.objects) if i != channel - 1]
    labels, members = [0, *(i + 1 for i in kept)], state.memory_valid.shape[1]
    each = extra(members)
    rows = [*range(members + each),
            *(members + (i + 1) * each + row for i in kept for row in range(each))]
    found = {f"reference_{name}": getattr(state, f"reference_{name}")[:, rows]
             for name in ("keys", "valid", "values", "absent")}
    for name in ("reference_values", "memory_values", "recent_values"):
        own = found.get(name, getattr(state, name))[..., kept, :]
        found[name] = concatenate([own, _union(own, concatenate)], -2) if len(kept) > 1 else own
    for name in ("reference_labels", "memory_labels", "linear"):  # linear in the labels, too
        found[name] = getattr(state, name)[:, labels]
    for name in ("reference_tokens", "memory_tokens", "tokens", "previous"):
        found[name] = getattr(state, name)[labels]
    return state._replace(**found)


def _union(own: Array, concatenate: Callable[[list, int], Array]) -> Array:
    """(..., N, VALUE + 1) values of several objects -> (..., 1, VALUE + 1), about their union's.

    Which took the frame. Where one of them is, theirs are the object's, and elsewhere those of
    objects that aren't there, so they are weighed by shares, and by what is missing from them.
    """
    share = own[..., -1:]
    total, missing = share.sum(-2), (1 - share).sum(-2)
    nowhere = ((1 - share) * own).sum(-2) / missing  # of several objects at least one is missing
    values = (share * own).sum(-2) + (1 - total) * nowhere
    return concatenate([values[..., :-1], total], -1)[..., None, :]
