"""The network's functions as graphs, which an export writes down: tensors in, tensors out.

They are the functions that PyTorch runs, `VideoMatch.encode`, `start`, `step` and `remember`, with
the fields of their records as inputs and outputs of their names. Sizes, numbers of objects and of
reference frames may vary.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import nn

from network.prompts import PromptDecoder, Seen
from network.state import Features, State

SEEN = ("unit", "key", "near", "shared")  # fields of `Features`; levels follow
# Axes that may vary, by name: f reference frames, r their views, m members of their rows, s of a
# long-term memory frame's, g groups, o objects and their union, n objects and background, h, w
# locations, c all of them, y, x pixels of masks, v views of a frame. A dot: never varies.
AXES = {
    "reference_keys": "fmg.", "reference_valid": "fmg", "reference_values": "fmgo.",
    "reference_rows": "fmg", "reference_shared": "r.hw", "reference_masks": "rnyx",
    "memory_keys": ".sg.", "memory_valid": ".sg", "memory_values": ".sgo.",
    "memory_shared": "..hw", "memory_masks": ".nyx", "recent_keys": ".hw.", "recent_valid": ".",
    "recent_values": ".co.", "recent_shared": "..hw", "recent_masks": ".nyx",
    "reference_squares": "..", "reference_labels": ".n", "reference_tokens": "n.",
    "memory_squares": "..", "memory_labels": ".n", "memory_tokens": "n.", "linear": ".n",
    "tokens": "n.", "frames": "", "memories": "", "unit": ".c.", "key": "vc.", "near": ".hw.",
    "shared": "v.hw", "masks": "vnyx", "labels": "vhw", "probabilities": "nYX", "image": "..YX",
    "known": "..yx", "points": "1", "not_points": "2", "fine_points": "3", "fine_not_points": "4"}


class Graph(nn.Module):
    """A function of the network, of tensors alone.

    Args:
        network: whose weights it has.
        function: of a `State`, `Features` and more -> the next `State`, or tensors.
        more: what its other inputs are called.
        changed: the fields of the next state that it returns; no other is copied.
    """

    def __init__(self, network: nn.Module, function: Callable, more: tuple[str, ...] = (),
                 changed: tuple[str, ...] = ()):
        super().__init__()
        self.network, self.function, self.more, self.changed = network, function, more, changed

    def forward(self, *inputs):
        """The fields of the state, those of the features, levels and others -> what changes."""
        state, rest = State(*inputs[:len(State._fields)]), inputs[len(State._fields):]
        seen, rest = rest[:len(SEEN)], rest[len(SEEN):]
        levels, more = rest[:len(rest) - len(self.more)], rest[len(rest) - len(self.more):]
        found = self.function(state, Features(None, *seen, levels=tuple(levels)), *more)
        if not isinstance(found, State):
            return found
        return tuple(getattr(found, name) for name in self.changed)


class Revalue(nn.Module):
    """What `Reader.revalued` does, after an object was removed from a state."""

    changed = "reference_values", "memory_values", "recent_values"

    def __init__(self, reader: nn.Module):
        super().__init__()
        self.reader = reader

    def forward(self, *inputs):
        state = self.reader.revalued(State(*inputs))
        return tuple(getattr(state, name) for name in self.changed)


class Encode(nn.Module):
    """A frame, of whole locations, to its features."""

    def __init__(self, encoder: nn.Module, reader: nn.Module, edges: bool):
        super().__init__()
        self.encoder, self.reader, self.edges = encoder, reader, edges

    def forward(self, image):
        """(1, 3, H, W) normalised -> the fields `SEEN` of `Features`, and its levels."""
        features = self.reader.describe(*self.encoder.pyramid(image, self.edges))
        return *(getattr(features, name) for name in SEEN), *features.levels


class Show(nn.Module):
    """What a person showed of an object in a frame, to its logits."""

    def __init__(self, prompts: PromptDecoder, finer: int, edges: bool):
        super().__init__()
        self.prompts, self.finer, self.edges = prompts, finer, edges

    def forward(self, image, unit, known, points, not_points, fine_points, fine_not_points,
                *levels):
        """(H/2, W/2).

        Args:
            image: (1, 3, H, W) normalised, sides of whole cells of the coarsest level.
            unit, levels: of it, as `Encode` gives them.
            known, points, ...: see `PromptDecoder.answer`.
        """
        levels = levels[int(self.edges):]  # prompts don't use the level of stride 2
        coarse = unit[0].T.reshape(1, unit.shape[2], *levels[self.finer].shape[2:])
        seen = Seen(image, [coarse, F.normalize(levels[0], dim=1)], list(levels))
        return self.prompts.answer(seen, known, [points, not_points, fine_points, fine_not_points])
