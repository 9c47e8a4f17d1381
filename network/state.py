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
    reference_rows: Array  # (F, m, G) int64, which location of which view is there
    # of each view, of which values are made; again, once there are more objects or fewer
    reference_shared: Array  # (R, ., h, w), of R views: the frames, and closer views of objects
    reference_masks: Array  # (R, N+1, h*side, w*side) shares
    # of the long-term memory, a ring: frame t lies in slot t % T
    memory_keys: Array  # (T, s, G, KEY)
    memory_valid: Array  # (T, s, G)
    memory_values: Array  # (T, s, G, M, VALUE + 1)
    memory_shared: Array  # (T, ., h, w)
    memory_masks: Array  # (T, N+1, h*side, w*side) probabilities
    # of the short-term memory, oldest first
    recent_keys: Array  # (2, h, w, NEAR)
    recent_valid: Array  # (2,)
    recent_values: Array  # (2, h*w, M, VALUE + 1)
    recent_shared: Array  # (2, ., h, w)
    recent_masks: Array  # (2, N+1, h*side, w*side) probabilities
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
        return self.recent_masks.shape[1] - 1

    @property
    def previous(self) -> Array:
        """(N+1, h*side, w*side) probabilities of the last frame."""
        return self.recent_masks[-1]


KEYS = "reference_keys", "memory_keys", "recent_keys"  # in the precision of the network
MASKS = "reference_masks", "memory_masks", "recent_masks"
TOKENS = "reference_tokens", "memory_tokens", "tokens"
INTEGERS = "reference_rows", "frames", "memories"


class Widths(NamedTuple):
    """Channels of a network's records."""

    features: int
    key: int
    near: int
    value: int
    shared: int
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
    shared, masks = (widths.shared, h, w), (labels, h * widths.side, w * widths.side)
    shapes = {
        "reference_keys": (0, *rows, widths.key), "reference_valid": (0, *rows),
        "reference_values": (0, *rows, followed, value), "reference_rows": (0, *rows),
        "reference_shared": (0, *shared), "reference_masks": (0, *masks),
        "memory_keys": (*slots, widths.key), "memory_valid": slots,
        "memory_values": (*slots, followed, value), "memory_shared": (MEM_FRAMES, *shared),
        "memory_masks": (MEM_FRAMES, *masks),
        "recent_keys": (SHORT_TERM, h, w, widths.near), "recent_valid": (SHORT_TERM,),
        "recent_values": (SHORT_TERM, h * w, followed, value),
        "recent_shared": (SHORT_TERM, *shared), "recent_masks": (SHORT_TERM, *masks),
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


def without(state: State, channel: int) -> State:
    """The state without one object, of which everything is forgotten; those behind it move up.

    Its locations are in no set then: were they background, it could not be found when it is asked
    for again. Values stay as they were: they are made again of what is left.

    Args:
        channel: of the object in `previous`, at least 1.
    """
    kept = [i for i in range(state.objects + 1) if i != channel]
    members = state.memory_valid.shape[1]
    each = extra(members)
    rows = [*range(members), *(members + i * each + row for i in kept for row in range(each))]
    found = {f"reference_{name}": getattr(state, f"reference_{name}")[:, rows]
             for name in ("keys", "valid", "rows")}
    # labels that are linear in features are linear in the labels, too
    for name in (*MASKS, "reference_labels", "memory_labels", "linear"):
        found[name] = getattr(state, name)[:, kept]
    for name in TOKENS:
        found[name] = getattr(state, name)[kept]
    return state._replace(**found)
