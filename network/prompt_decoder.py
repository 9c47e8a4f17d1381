"""Prompt decoder: segments one object of a frame from boxes, clicks and a previous mask.

A second decoder on the features of the same encoder. Its input are maps of the prompts (position
in the box, proximity to clicks; see `network.evidence`) and of similarities: of every location to
the clicked ones, and, by soft matching (section 3.1), to the locations inside and outside of the
box or of the previous mask.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from media.prompts import Prompts
from network.decoder import Block, halved, resized
from network.evidence import BOX, CLICKS, MASK, clicked, evidence

WIDTHS = (32, 64, 128, 128)  # channels, finest level first
SURVEY = 96  # channels of one more level, of half the coarsest features' resolution: context
# Channels at stride 2, for thin parts. Few, as a channel costs four times as much there as at the
# finest level of features
STEM, FINE = 8, 16
ALIKE = 6  # similarity maps: of positive and negative clicks at two levels, and of two sets
K = 5  # top-k of soft matching (the paper: 20); sets of at most K locations, of small boxes, give 0
# Depth in a box, in box sides (see `evidence`): deeper locations are its foreground set, those
# beyond OUTER the background set. Those in between are in neither set: a narrower border puts the
# wrong side into a set where the box is inexact, a wider one empties the sets of small boxes.
INNER, OUTER = 0.2, -0.05
NEVER = -2.0  # similarity of padding, below every cosine
LOOKS, HEADS, WIDEN = 2, 4, 2  # attention layers, heads of each, expansion of its hidden layer
EVIDENCE = BOX + CLICKS + MASK + ALIKE


@dataclass
class Seen:
    """An image's inputs to the decoder, independent of prompts: computed once for many clicks.

    Args:
        image: (1, 3, H, W) ImageNet-normalised.
        alike: two (1, C, h, w) L2-normalised features for similarities, coarse and fine.
        levels: (1, C, h, w) features, finest first.
    """

    image: torch.Tensor
    alike: list[torch.Tensor]
    levels: list[torch.Tensor]


class Attention(nn.Module):
    """Global self-attention over all feature locations: a pre-norm transformer layer.

    (Vaswani et al., 2017.) Convolutions alone don't relate distant parts of a large object:
    attention gained 0.03 J for boxes (docs/log/2026-11-25-keys-and-values.md).
    """

    def __init__(self, width: int):
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.asked = nn.Linear(width, 3 * width)
        self.answer = nn.Linear(width, width)
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WIDEN * width), nn.GELU(),
                                    nn.Linear(WIDEN * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, C, h, w) -> (1, C, h, w)."""
        shape, tokens = x.shape, x.flatten(2).transpose(1, 2)  # (1, n, C)
        query, key, value = self.asked(self.before(tokens)).unflatten(
            2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        readout = F.scaled_dot_product_attention(query, key, value)  # (1, HEADS, n, C / HEADS)
        tokens = tokens + self.answer(readout.transpose(1, 2).flatten(2))
        tokens = tokens + self.layers(tokens)
        return tokens.transpose(1, 2).reshape(shape)


class PromptDecoder(nn.Module):
    """Predict an object's mask from prompts and the encoder's features.

    Args:
        channels: channels of the features, finest level first; at most as many as `WIDTHS`.
    """

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        widths = (*WIDTHS[:len(channels)], SURVEY)
        channels = (*channels, channels[-1])
        below = (*widths[1:], 0)
        self.blocks = nn.ModuleList(Block(c, EVIDENCE + b, w)
                                    for c, b, w in zip(channels, below, widths))
        self.attention = nn.Sequential(*(Attention(widths[-3]) for _ in range(LOOKS)))
        self.stem = nn.Conv2d(3, STEM, 3, stride=2, padding=1)
        self.narrow = nn.Conv2d(widths[0], FINE, 1)
        self.fine = nn.Conv2d(STEM + FINE, FINE, 3, padding=1)
        self.score = nn.Conv2d(FINE, 1, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # NHWC, as the encoder

    @staticmethod
    def look(image: torch.Tensor, features: torch.Tensor, levels: list[torch.Tensor]) -> Seen:
        """Prepare an image: everything that doesn't depend on prompts.

        Args:
            image: (1, 3, H, W) ImageNet-normalised.
            features, levels: returned by `Encoder.pyramid`.
        """
        features, levels = features.float(), [level.float() for level in levels]
        return Seen(image, [F.normalize(x, dim=1) for x in (features, levels[0])], levels)

    def forward(self, seen: Seen, prompts: Prompts) -> torch.Tensor:
        """(H/2, W/2) logits of the object; `prompts` are in pixels of the image of `seen`."""
        size, device = tuple(seen.image.shape[-2:]), seen.image.device
        inputs = torch.from_numpy(evidence(prompts, size, tuple(seen.levels[0].shape[-2:])))
        clicks = [torch.from_numpy(clicked(points, size, tuple(unit.shape[-2:]))).to(device)
                  for unit in seen.alike for points in (prompts.points, prompts.not_points)]
        return self.answer(seen, inputs[None].to(device), clicks)

    def answer(self, seen: Seen, inputs: torch.Tensor, clicks: list[torch.Tensor]) -> torch.Tensor:
        """The same from tensors only, as an export needs it.

        Args:
            inputs: (1, BOX + CLICKS + MASK, h, w) maps of the prompts at the finest level, see
                `evidence`.
            clicks: four sets of flat indices, see `clicked`: positive and negative points at the
                coarse level, then at the finest one.
        """
        inputs = self._inputs(seen, inputs, clicks)
        levels = [*seen.levels, halved(seen.levels[-1])]
        x = None
        for i in reversed(range(len(levels))):
            own = [inputs] if x is None else [inputs, x]
            own = torch.cat([resized(part, levels[i]) for part in own], 1)
            x = self.blocks[i](self.blocks[i].project_shared(levels[i]), own)
            if i == len(levels) - 3:  # coarse enough for attention, which is quadratic
                x = self.attention(x)
        fine = self.stem(seen.image)
        x = resized(self.narrow(F.relu(x)), fine)
        return self.score(F.relu(self.fine(F.relu(torch.cat([fine, x], 1)))))[0, 0]

    @staticmethod
    def _inputs(seen: Seen, inputs: torch.Tensor, clicks: list[torch.Tensor]) -> torch.Tensor:
        """Maps of prompts and of similarities, (1, EVIDENCE, h, w) at the finest level."""
        coarse, fine = seen.alike
        maps = [likeness(unit, points)
                for unit, points in zip((coarse, coarse, fine, fine), clicks)]
        maps += similarities(coarse, *sets(inputs))
        return torch.cat([inputs, *(resized(x, inputs) for x in maps)], 1)


@torch.no_grad()
def looked(encoder: nn.Module, decoder: PromptDecoder | None, image: torch.Tensor,
           prompts: Prompts) -> torch.Tensor:
    """Segment the prompted object: (1, 3, H, W) normalised image -> (H/2, W/2) logits.

    Raises:
        ValueError: `decoder` is None, as in a checkpoint without trained prompts.
    """
    if decoder is None:
        raise ValueError("this checkpoint has no prompt decoder, expected one that takes boxes and "
                         "clicks: -m train --prompts -o CHECKPOINT adds it")
    return decoder(decoder.look(image, *encoder.pyramid(image)), prompts)


def sets(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Foreground and background sets for soft matching, by the previous mask or else by the box.

    Args:
        inputs: (1, BOX + CLICKS + MASK, h, w) maps of the prompts, see `evidence`.

    Returns:
        Two (1, 1, h, w) float32: the fraction of each location in the set; 0 everywhere if there
        is neither a mask nor a box.
    """
    box, depth = inputs[:, :1], inputs[:, 2:4].amin(1, keepdim=True)
    masked, mask = inputs[:, BOX + CLICKS:].split(1, 1)
    return (torch.where(masked > 0, mask, box * (depth > INNER)),
            torch.where(masked > 0, 1 - mask, box * (depth < OUTER)))


def similarities(unit: torch.Tensor, *sets: torch.Tensor) -> list[torch.Tensor]:
    """Soft matching inside of one image: mean of the K best cosines (section 3.1, equation 2).

    A location is not compared with itself, whose cosine of 1 says nothing.

    Args:
        unit: (1, C, h, w) L2-normalised features.
        sets: (1, 1, ., .) each, above 0.5 at the members of the set.

    Returns:
        (1, 1, h, w) of each set; 0 for a set of at most K locations.
    """
    flat = unit[0].flatten(1)
    place, products = torch.arange(flat.shape[1], device=flat.device), flat.T @ flat
    scores = []
    for share in sets:
        chosen = resized(share, unit).flatten() > 0.5
        others = chosen & (place != place[:, None])  # (n, n)
        # no branch, so that a trace is valid for all sets: more than K members leave NEVER no place
        best = torch.where(others, products, NEVER).topk(K).values.mean(1)
        best = torch.where(chosen.sum() > K, best, 0.0)
        scores.append(best.reshape(1, 1, *unit.shape[-2:]))
    return scores


def likeness(unit: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Cosine of each location with the most similar one of the clicked locations.

    Args:
        unit: (1, C, h, w) L2-normalised features.
        points: flat indices of the clicked locations, see `clicked`.

    Returns:
        (1, 1, h, w); 0 if there are no clicks.
    """
    flat = unit[0].flatten(1)
    scores = flat[:, points].T @ flat  # (points, n)
    best = torch.cat([scores, scores.new_full((1, flat.shape[1]), NEVER)]).amax(0)
    return torch.where(best > NEVER, best, 0.0).reshape(1, 1, *unit.shape[-2:])
