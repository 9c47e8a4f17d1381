"""The network's functions as modules from tensors to tensors, which an export can trace.

They wrap the functions that PyTorch runs, `VideoMatch.encode`, `start`, `step` and `remember`; the
fields of `State` and `Features` become inputs and outputs of the same names. Image sizes and the
numbers of objects and of reference frames may vary.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import nn

from network.prompt_decoder import PromptDecoder, PromptFeatures
from network.state import Features, State

FIELDS = ("unit", "key", "local_key", "shared")  # of `Features`, which are followed by its levels
# Dynamic axes of each tensor, one letter per axis: f reference frames, r their views, m members of
# their rows, s members of a long-term memory frame's rows, g groups, o objects and their union, n
# objects and background, h, w locations, c all locations, y, x mask pixels, v views of a frame,
# Y, X pixels, k, l locations of the finest level that prompts use, p, q positive and negative
# points, P, Q the same at that level. A dot is an axis of fixed size. An axis that is missing here
# would be frozen at the traced size.
AXES = {
    "reference_keys": "fmg.", "reference_valid": "fmg", "reference_values": "fmgo.",
    "reference_rows": "fmg", "reference_shared": "r.hw", "reference_masks": "rnyx",
    "memory_keys": ".sg.", "memory_valid": ".sg", "memory_values": ".sgo.",
    "memory_shared": "..hw", "memory_masks": ".nyx", "recent_keys": ".hw.", "recent_valid": ".",
    "recent_values": ".co.", "recent_shared": "..hw", "recent_masks": ".nyx",
    "reference_squares": "..", "reference_labels": ".n", "memory_squares": "..",
    "memory_labels": ".n", "linear": ".n", "frames": "", "memories": "", "unit": ".c.",
    "key": "vc.", "local_key": ".hw.", "shared": "v.hw", "masks": "vnyx", "labels": "vhw",
    "probabilities": "nYX", "image": "..YX", "prompt_maps": "..kl", "points": "p",
    "negative_points": "q", "fine_points": "P", "fine_negative_points": "Q"}


class Graph(nn.Module):
    """A function of a network whose inputs and outputs are tensors.

    Args:
        network: the module that holds the weights.
        function: from a `State`, `Features` and further tensors to the next `State` or to tensors.
        more: names of the further tensors.
        changed: fields of the next state that are returned. Only those that change, as copying
            the memory would cost time in every frame.
    """

    def __init__(self, network: nn.Module, function: Callable, more: tuple[str, ...] = (),
                 changed: tuple[str, ...] = ()):
        super().__init__()
        self.network, self.function, self.more, self.changed = network, function, more, changed

    def forward(self, *inputs):
        """Fields of the state and of the features, levels, further tensors -> changed fields."""
        state, rest = State(*inputs[:len(State._fields)]), inputs[len(State._fields):]
        fields, rest = rest[:len(FIELDS)], rest[len(FIELDS):]
        levels, more = rest[:len(rest) - len(self.more)], rest[len(rest) - len(self.more):]
        result = self.function(state, Features(None, *fields, levels=tuple(levels)), *more)
        if not isinstance(result, State):
            return result
        return tuple(getattr(result, name) for name in self.changed)


class Revalue(nn.Module):
    """Recompute the values of a state after an object was removed, see `Reader.revalued`."""

    changed = "reference_values", "memory_values", "recent_values"

    def __init__(self, reader: nn.Module):
        super().__init__()
        self.reader = reader

    def forward(self, *inputs):
        state = self.reader.revalued(State(*inputs))
        return tuple(getattr(state, name) for name in self.changed)


class Encode(nn.Module):
    """Encode a frame whose sides are multiples of the stride."""

    def __init__(self, encoder: nn.Module, reader: nn.Module):
        super().__init__()
        self.encoder, self.reader = encoder, reader

    def forward(self, image):
        """(1, 3, H, W) normalised -> the `FIELDS` of its `Features`, then their levels."""
        features = self.reader.describe(*self.encoder.pyramid(image))
        return *(getattr(features, name) for name in FIELDS), *features.levels


class SegmentFromPrompts(nn.Module):
    """Segment a prompted object in a frame."""

    def __init__(self, prompts: PromptDecoder, finer: int):
        super().__init__()
        self.prompts, self.finer = prompts, finer

    def forward(self, image, unit, prompt_maps, points, negative_points, fine_points,
                fine_negative_points, *levels):
        """Predict the (H/2, W/2) logits of the object.

        Args:
            image: (1, 3, H, W) normalised; sides are multiples of the coarsest level's stride.
            unit, levels: the image's outputs of `Encode`.
            prompt_maps, points, ...: see `PromptDecoder.decode`.
        """
        coarse = unit[0].T.reshape(1, unit.shape[2], *levels[self.finer].shape[2:])
        features = PromptFeatures(image, [coarse, F.normalize(levels[0], dim=1)], list(levels))
        return self.prompts.decode(features, prompt_maps,
                                   [points, negative_points, fine_points, fine_negative_points])
