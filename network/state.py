"""The inference state of one video under `--method memory`: an immutable record of arrays.

Because it is arrays only, copying it is an assignment, saving it is `torch.save`, and an exported
graph takes it as inputs and returns it as outputs. Arrays are never modified in place. They are
PyTorch tensors or NumPy arrays; this module imports neither, so that lite runs without PyTorch.

Shapes depend on the frame size, the number of objects and the number of reference frames, never on
values. Foreground and background sets, which vary in size, therefore occupy a fixed number of rows
with a validity flag each. Rows are stored as (members, groups), because the top-k search compares
only the best member of each group (see `search.nearest`). Consecutive locations go to different
groups: neighbours are similar, and a group returns only one of its members. A set with no more
rows than groups is searched exactly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

Array = Any

# Frames between long-term memory frames. Lower it for fast changes of appearance: the memory then
# reaches back less far, MEM_EVERY * MEM_FRAMES = 20 frames now.
MEM_EVERY = 5
# Long-term memory frames. With one reference frame and its zoomed crops, which count as another
# frame, each takes 1/6 of the time of the search.
MEM_FRAMES = 4
# Last frames in the short-term memory. It is searched only in a window around each location, so it
# costs little; each frame more adds as many candidates again.
SHORT_TERM = 2
# Members per group, at most: the top-k is taken among the groups' best members. Larger groups are
# faster to search and miss more of the true top-k. At most `search.MAX_MEMBERS`.
MEMBERS = 16
# Small frames get smaller groups, so that this many remain where a frame has enough locations: the
# top-k (16) of fewer groups would take in locations that aren't similar.
LEAST_GROUPS = 64


class Features(NamedTuple):
    """Features of B frames, or of one frame and zoomed crops of it.

    Methods other than "memory" have `matched` only.
    """

    matched: Array  # (B, C, h, w) encoder features
    unit: Array | None = None  # (B, h*w, C) the same, normalised to unit length
    key: Array | None = None  # (B, h*w, KEY) global keys, unit vectors
    local_key: Array | None = None  # (B, h, w, LOCAL_KEY) local keys, unit vectors
    shared: Array | None = None  # (B, WIDTH, h, w) the part of the values that all objects share
    levels: tuple[Array, ...] = ()  # (B, C, ., .) feature maps for the decoder, finest first

    def frame(self, i: int) -> "Features":
        """Return the features of frame i, with B = 1."""
        parts = {name: x[i:i + 1] for name, x in self._asdict().items()
                 if name != "levels" and x is not None}
        return Features(**parts, levels=tuple(level[i:i + 1] for level in self.levels))


class State(NamedTuple):
    """Inference state of a video with N objects.

    F reference frames, T long-term and 2 short-term memory frames; C feature channels; h, w
    locations of the feature map. M channels are read: the N objects and, where N > 1, their union.
    """

    # Reference frames. (F, m, G) rows: the members of the background's set, then of each object's.
    reference_keys: Array  # (F, m, G, KEY) unit vectors
    reference_valid: Array  # (F, m, G) 1, or 0 for an empty row
    reference_values: Array  # (F, m, G, M, VALUE + 1), the last channel is the object's area share
    reference_rows: Array  # (F, m, G) int64, index of the row's location, counted through all views
    # Inputs of the values of R views (frames and zoomed crops), stored because values depend on
    # all objects: they are recomputed when an object is added or removed.
    reference_shared: Array  # (R, ., h, w)
    reference_masks: Array  # (R, N+1, h*side, w*side) shares of a pixel, in [0, 1]
    # Long-term memory, a ring buffer: its t-th frame is in slot t % T.
    memory_keys: Array  # (T, s, G, KEY)
    memory_valid: Array  # (T, s, G)
    memory_values: Array  # (T, s, G, M, VALUE + 1)
    memory_shared: Array  # (T, ., h, w)
    memory_masks: Array  # (T, N+1, h*side, w*side) probabilities
    # Short-term memory, oldest first.
    recent_keys: Array  # (2, h, w, LOCAL_KEY)
    recent_valid: Array  # (2,)
    recent_values: Array  # (2, h*w, M, VALUE + 1)
    recent_shared: Array  # (2, ., h, w)
    recent_masks: Array  # (2, N+1, h*side, w*side) probabilities
    # Sums over frames: the normal equations of the ridge regression, features times features and
    # features times labels.
    reference_squares: Array  # (C, C), sum over the reference frames
    reference_labels: Array  # (C, N+1)
    memory_squares: Array  # (C, C), moving average over long-term memory frames
    memory_labels: Array  # (C, N+1)
    linear: Array  # (C, N+1) weights of the ridge regression
    frames: Array  # () int64, number of frames processed
    memories: Array  # () int64, number of frames added to the long-term memory

    @property
    def grid(self) -> tuple[int, int]:
        """Size (h, w) of the feature map."""
        return tuple(self.recent_keys.shape[1:3])

    def check_size(self, features: Features) -> None:
        """Check that a frame has the size of the reference frame: locations of both are compared.

        Raises:
            ValueError: their feature maps differ in size.
        """
        if tuple(features.local_key.shape[1:3]) != self.grid:
            raise ValueError("image: expected the size of the reference frame, whose feature map "
                             f"is {self.grid}, got one of {tuple(features.local_key.shape[1:3])}")

    @property
    def objects(self) -> int:
        """Number of objects N."""
        return self.recent_masks.shape[1] - 1

    @property
    def previous(self) -> Array:
        """(N+1, h*side, w*side) probabilities of the previous frame, or its reference mask."""
        return self.recent_masks[-1]


KEYS = "reference_keys", "memory_keys", "recent_keys"  # stored in the network's precision
# fields with one entry per background and object, on axis 1
PER_LABEL = ("reference_masks", "memory_masks", "recent_masks", "reference_labels", "memory_labels",
             "linear")
INTEGERS = "reference_rows", "frames", "memories"


class Widths(NamedTuple):
    """Numbers of channels in the features and the state of a network."""

    features: int
    key: int
    local_key: int
    value: int
    shared: int
    side: int  # mask pixels along each side of a location


def blank(grid: tuple[int, int], objects: int, widths: Widths,
          zeros: Callable[[str, tuple[int, ...]], Array]) -> State:
    """Return the empty state of a video before its first frame.

    Args:
        grid: size (h, w) of the feature map.
        objects: number of objects N, >= 0.
        widths: the network's numbers of channels.
        zeros: called with a field's name and shape, returns an array of zeros.
    """
    (h, w), channels, value = grid, objects + (objects > 1), widths.value + 1
    members = min(MEMBERS, max(1, h * w // LEAST_GROUPS))
    # at least as many groups as the top-k takes (`reader.K`, 16 as well)
    groups = max(MEMBERS, -(-h * w // members))
    rows = members + (objects + 1) * extra(members), groups
    slots = MEM_FRAMES, members, groups
    features, labels = widths.features, objects + 1
    shared, masks = (widths.shared, h, w), (labels, h * widths.side, w * widths.side)
    shapes = {
        "reference_keys": (0, *rows, widths.key), "reference_valid": (0, *rows),
        "reference_values": (0, *rows, channels, value), "reference_rows": (0, *rows),
        "reference_shared": (0, *shared), "reference_masks": (0, *masks),
        "memory_keys": (*slots, widths.key), "memory_valid": slots,
        "memory_values": (*slots, channels, value), "memory_shared": (MEM_FRAMES, *shared),
        "memory_masks": (MEM_FRAMES, *masks),
        "recent_keys": (SHORT_TERM, h, w, widths.local_key), "recent_valid": (SHORT_TERM,),
        "recent_values": (SHORT_TERM, h * w, channels, value),
        "recent_shared": (SHORT_TERM, *shared), "recent_masks": (SHORT_TERM, *masks),
        "reference_squares": (features, features), "reference_labels": (features, labels),
        "memory_squares": (features, features), "memory_labels": (features, labels),
        "linear": (features, labels), "frames": (), "memories": ()}
    return State(**{name: zeros(name, shape) for name, shape in shapes.items()})


def extra(members: int) -> int:
    """Return the members per group of each object's set in a reference frame.

    A quarter of a frame's, which bounds time and memory with many objects. The locations of an
    object that covers more than that are subsampled evenly. The background's set has this many in
    addition to a whole frame's, for its part of the zoomed crops.

    Args:
        members: members per group of a whole frame.
    """
    # max(1, members // 4), without `max`, which would be a constant in an exported graph
    return members // 4 + (members < 4)


def without(state: State, channel: int) -> State:
    """Remove an object from the state; the channels after it move up by one.

    Its locations end up in no set: in the background set they would keep the object from being
    segmented if it is added again. Values are left as they are; recompute them with
    `Reader.revalued`.

    Args:
        channel: index of the object in `previous`, >= 1.
    """
    remaining = [i for i in range(state.objects + 1) if i != channel]
    members = state.memory_valid.shape[1]
    each = extra(members)
    rows = [*range(members), *(members + i * each + row for i in remaining for row in range(each))]
    fields = {f"reference_{name}": getattr(state, f"reference_{name}")[:, rows]
             for name in ("keys", "valid", "rows")}
    # ridge regression is linear in its targets, so dropping a column equals fitting without it
    for name in PER_LABEL:
        fields[name] = getattr(state, name)[:, remaining]
    return state._replace(**fields)
