"""Prompt decoder: segments one object of a frame from boxes, points and a previous mask.

A second decoder on the features of the same encoder. Its inputs are maps of the prompts (position
in the box, proximity to points; see `network.prompt_maps`) and similarity maps: of every location
to the clicked locations and, by soft matching (section 3.1), to the locations inside and outside of
the box or the previous mask.

Names of layers are keys of checkpoints and therefore stay as they are, even where a better word is
known now.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from media.prompts import Prompts
from network.decoder import Block, halved, resized
from network.prompt_maps import BOX, CLICKS, MASK, clicked_locations, prompt_maps

# Except for K, INNER and OUTER, all of these fix shapes of weights: another value needs newly
# trained prompts (`-m train --prompts`).
# Channels, finest level first: a finer level has four times the locations, so it must be narrow.
WIDTHS = (32, 64, 128, 128)
CONTEXT = 96  # channels of an extra level at half the coarsest features' resolution, for context
# Channels at stride 2, for thin parts: of the image's own layer, and of all others there. Few, as a
# channel costs four times as much there as at the finest level of features.
STEM, FINE = 8, 16
SIMILARITIES = 6  # similarity maps: positive and negative points at two levels, and two sets
# Top-k of soft matching. Less than the paper's 20, as a small box contains few locations; the
# similarity to a set of at most K locations is 0.
K = 5
# Depth in a box, in box sides (see `prompt_maps`): locations deeper than INNER are its foreground
# set, those less deep than OUTER, so outside of the box, the background set. Those in between are
# in neither: a narrower border puts locations into the wrong set where the box is inexact, a wider
# one empties the sets of small boxes.
INNER, OUTER = 0.2, -0.05
EXCLUDED = -2.0  # similarity of locations that must not be among the top-k: below every cosine
# Attention layers, heads of each, and expansion of their feed-forward networks
ATTENTION_LAYERS, HEADS, EXPANSION = 2, 4, 2
INPUTS = BOX + CLICKS + MASK + SIMILARITIES  # channels of the decoder's input


@dataclass
class PromptFeatures:
    """What the decoder needs of an image for any prompts: computed once for many clicks.

    Args:
        image: (1, 3, H, W) ImageNet-normalised.
        unit: two (1, C, h, w) L2-normalised feature maps for similarities, coarse and fine.
        levels: (1, C, h, w) features, finest first.
    """

    image: torch.Tensor
    unit: list[torch.Tensor]
    levels: list[torch.Tensor]


class Attention(nn.Module):
    """A pre-norm transformer layer (Vaswani et al., 2017): self-attention over all locations.

    Convolutions alone don't relate distant parts of a large object: attention gained 0.03 J for
    boxes (docs/log/2026-11-25-keys-and-values.md).

    Layers: `asked` projects to queries, keys and values, `answer` projects the heads' output, and
    `layers` is the feed-forward network.
    """

    def __init__(self, width: int):
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.asked = nn.Linear(width, 3 * width)
        self.answer = nn.Linear(width, width)
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, EXPANSION * width), nn.GELU(),
            nn.Linear(EXPANSION * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, C, h, w) -> (1, C, h, w)."""
        shape, tokens = x.shape, x.flatten(2).transpose(1, 2)  # (1, n, C)
        query, key, value = self.asked(self.before(tokens)).unflatten(
            2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)  # (1, HEADS, n, C / HEADS)
        tokens = tokens + self.answer(attended.transpose(1, 2).flatten(2))
        tokens = tokens + self.layers(tokens)
        return tokens.transpose(1, 2).reshape(shape)


class PromptDecoder(nn.Module):
    """Predicts an object's mask from prompts and the encoder's features.

    Args:
        channels: channels of the features, finest level first; at most as many as `WIDTHS`.
    """

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        widths = (*WIDTHS[:len(channels)], CONTEXT)
        channels = (*channels, channels[-1])
        below = (*widths[1:], 0)
        self.blocks = nn.ModuleList(Block(c, INPUTS + b, w)
                                    for c, b, w in zip(channels, below, widths))
        self.attention = nn.Sequential(*(Attention(widths[-3]) for _ in range(ATTENTION_LAYERS)))
        self.stem = nn.Conv2d(3, STEM, 3, stride=2, padding=1)
        self.narrow = nn.Conv2d(widths[0], FINE, 1)
        self.fine = nn.Conv2d(STEM + FINE, FINE, 3, padding=1)
        self.score = nn.Conv2d(FINE, 1, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # NHWC, as in the encoder

    @staticmethod
    def prepare(image: torch.Tensor, features: torch.Tensor,
                levels: list[torch.Tensor]) -> PromptFeatures:
        """Compute everything of an image that doesn't depend on prompts.

        Args:
            image: (1, 3, H, W) ImageNet-normalised.
            features, levels: returned by `Encoder.pyramid`.
        """
        features, levels = features.float(), [level.float() for level in levels]
        return PromptFeatures(image, [F.normalize(x, dim=1) for x in (features, levels[0])], levels)

    def forward(self, features: PromptFeatures, prompts: Prompts) -> torch.Tensor:
        """Predict the (H/2, W/2) logits of the object; `prompts` are in pixels of the image."""
        size, device = tuple(features.image.shape[-2:]), features.image.device
        maps = torch.from_numpy(prompt_maps(prompts, size, tuple(features.levels[0].shape[-2:])))
        clicks = [clicked_locations(points, size, tuple(unit.shape[-2:]))
                  for unit in features.unit for points in (prompts.points, prompts.negative_points)]
        return self.decode(features, maps[None].to(device),
                           [torch.from_numpy(indices).to(device) for indices in clicks])

    def decode(self, features: PromptFeatures, maps: torch.Tensor,
               clicks: list[torch.Tensor]) -> torch.Tensor:
        """Like `forward`, but from tensors only, as an exported graph takes nothing else.

        Args:
            features: of the image.
            maps: (1, BOX + CLICKS + MASK, h, w) maps of the prompts at the finest level, see
                `prompt_maps`.
            clicks: four tensors of flat indices, see `clicked_locations`: positive and negative
                points at the coarse level, then at the finest one.

        Returns:
            (H/2, W/2) logits.
        """
        inputs = self._inputs(features, maps, clicks)
        levels = [*features.levels, halved(features.levels[-1])]
        x = None
        for i in reversed(range(len(levels))):
            own = (inputs,) if x is None else (inputs, x)
            x = self.blocks[i](self.blocks[i].project_shared(levels[i]), *own)
            if i == len(levels) - 3:  # coarse enough: the cost of attention is quadratic
                x = self.attention(x)
        fine = self.stem(features.image)
        x = resized(self.narrow(F.relu(x)), fine)
        return self.score(F.relu(self.fine(F.relu(torch.cat([fine, x], 1)))))[0, 0]

    @staticmethod
    def _inputs(features: PromptFeatures, maps: torch.Tensor,
                clicks: list[torch.Tensor]) -> torch.Tensor:
        """Return the maps of prompts and similarities, (1, INPUTS, h, w) at the finest level."""
        coarse, fine = features.unit
        similarities = [click_similarity(unit, points)
                        for unit, points in zip((coarse, coarse, fine, fine), clicks)]
        similarities += set_similarities(coarse, *matching_sets(maps))
        return torch.cat([maps, *(resized(x, maps) for x in similarities)], 1)


def matching_sets(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the foreground and background sets for soft matching within the image.

    The previous mask defines them or, without one, the box.

    Args:
        maps: (1, BOX + CLICKS + MASK, h, w) maps of the prompts, see `prompt_maps`.

    Returns:
        Two (1, 1, h, w) float32: the fraction of each location in the set; 0 everywhere if there
        is neither a mask nor a box.
    """
    has_box, depth = maps[:, :1], maps[:, 2:4].amin(1, keepdim=True)
    has_mask, mask = maps[:, BOX + CLICKS:].split(1, 1)
    return (torch.where(has_mask > 0, mask, has_box * (depth > INNER)),
            torch.where(has_mask > 0, 1 - mask, has_box * (depth < OUTER)))


def set_similarities(unit: torch.Tensor, *sets: torch.Tensor) -> list[torch.Tensor]:
    """Soft matching within an image: mean of the K best cosines (section 3.1, equation 2).

    A location is not compared with itself: that cosine is always 1.

    Args:
        unit: (1, C, h, w) L2-normalised features.
        sets: (1, 1, ., .) each, above 0.5 at the members of the set.

    Returns:
        (1, 1, h, w) of each set; 0 for a set of at most K locations.
    """
    flat = unit[0].flatten(1)
    index, cosines = torch.arange(flat.shape[1], device=flat.device), flat.T @ flat
    scores = []
    for share in sets:
        members = resized(share, unit).flatten() > 0.5
        others = members & (index != index[:, None])  # (n, n)
        # No branch, so that a traced graph is valid for all sets. In a set of more than K members,
        # K cosines outrank EXCLUDED.
        best = torch.where(others, cosines, EXCLUDED).topk(K).values.mean(1)
        best = torch.where(members.sum() > K, best, 0.0)
        scores.append(best.reshape(1, 1, *unit.shape[-2:]))
    return scores


def click_similarity(unit: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return the cosine of each location with the most similar clicked location.

    Args:
        unit: (1, C, h, w) L2-normalised features.
        points: flat indices of the clicked locations, see `clicked_locations`.

    Returns:
        (1, 1, h, w); 0 if there are no clicks.
    """
    flat = unit[0].flatten(1)
    scores = flat[:, points].T @ flat  # (points, n)
    best = torch.cat([scores, scores.new_full((1, flat.shape[1]), EXCLUDED)]).amax(0)
    return torch.where(best > EXCLUDED, best, 0.0).reshape(1, 1, *unit.shape[-2:])
