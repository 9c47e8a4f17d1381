"""From what a person shows of one object in a frame, and the frame's features, to its mask.

A second decoder on the features of the same encoder. What a person showed becomes evidence, as the
matching's scores are for the first: where the boxes are, how near the clicks are, and how alike
every cell is to those that were clicked, and to what lies inside and outside of the box or of the
mask so far, which is soft matching (section 3.1) with these as sets. It knows neither files nor
which part of a frame it sees.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from media.prompts import Prompts
from network.decoder import Block, halved, resized
from network.evidence import BOX, CLICKS, MASK, clicked, evidence

WIDTHS = (32, 64, 128, 128)  # channels, finest level first
SURVEY = 96  # of one level more, half as fine as the coarsest features
STEM, FINE = 8, 16  # channels at half the image's resolution, for what is thin
ALIKE = 6  # channels of evidence, beside those of what is shown
K = 5  # most alike cells of a set, whose mean counts
INNER, OUTER = 0.2, -0.05  # depth in a box from which a cell counts as in it, and as beside it
NEVER = -2.0  # below every cosine
LOOKS, HEADS, WIDEN = 2, 4, 2  # layers of attention, their heads, and how wide they get inside
EVIDENCE = BOX + CLICKS + MASK + ALIKE


@dataclass
class Seen:
    """An image as the decoder sees it, whatever is shown of it.

    Args:
        image: (1, 3, H, W) ImageNet-normalised.
        alike: (1, C, h, w) features of cells that are compared, of length 1, coarse and fine.
        levels: (1, C, h, w) features, finest first.
    """

    image: torch.Tensor
    alike: list[torch.Tensor]
    levels: list[torch.Tensor]


class Attention(nn.Module):
    """Every cell asks all others: what a box holds is one thing, however far apart its cells are.

    A layer of a transformer (Vaswani et al., 2017), normalised before each part.
    """

    def __init__(self, width: int):
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.asked = nn.Linear(width, 3 * width)
        self.answer = nn.Linear(width, width)
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WIDEN * width), nn.GELU(),
                                    nn.Linear(WIDEN * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, C, h, w) -> the same."""
        shape, cells = x.shape, x.flatten(2).transpose(1, 2)  # (1, n, C)
        parts = self.asked(self.before(cells)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(*parts)  # (1, HEADS, n, C / HEADS)
        cells = cells + self.answer(found.transpose(1, 2).flatten(2))
        cells = cells + self.layers(cells)
        return cells.transpose(1, 2).reshape(shape)


class PromptDecoder(nn.Module):
    """From prompts to a mask, on features that it leaves as they are.

    Args:
        channels: of the features, finest first; as many levels as `WIDTHS` has, or fewer.
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
        """What doesn't depend on prompts.

        Args:
            image: (1, 3, H, W) ImageNet-normalised.
            features, levels: as `Encoder.pyramid` gives them.
        """
        features, levels = features.float(), [level.float() for level in levels]
        return Seen(image, [F.normalize(x, dim=1) for x in (features, levels[0])], levels)

    def forward(self, seen: Seen, prompts: Prompts) -> torch.Tensor:
        """(H/2, W/2) logits of the object; `prompts` are in pixels of the image seen."""
        size, device = tuple(seen.image.shape[-2:]), seen.image.device
        known = torch.from_numpy(evidence(prompts, size, tuple(seen.levels[0].shape[-2:])))
        clicks = [torch.from_numpy(clicked(points, size, tuple(cells.shape[-2:]))).to(device)
                  for cells in seen.alike for points in (prompts.points, prompts.not_points)]
        return self.answer(seen, known[None].to(device), clicks)

    def answer(self, seen: Seen, known: torch.Tensor, clicks: list[torch.Tensor]) -> torch.Tensor:
        """(H/2, W/2) logits of the object.

        Args:
            known: (1, BOX + CLICKS + MASK, h, w), see `evidence`, at the finest level.
            clicks: points and not-points as `clicked` gives them, among coarse cells and fine.
        """
        known = self._evidence(seen, known, clicks)
        levels = [*seen.levels, halved(seen.levels[-1])]
        x = None
        for i in reversed(range(len(levels))):
            own = [known] if x is None else [known, x]
            own = torch.cat([resized(part, levels[i]) for part in own], 1)
            x = self.blocks[i](self.blocks[i].project_shared(levels[i]), own)
            if i == len(levels) - 3:  # coarse enough for all cells to ask all
                x = self.attention(x)
        fine = self.stem(seen.image)
        x = resized(self.narrow(F.relu(x)), fine)
        return self.score(F.relu(self.fine(F.relu(torch.cat([fine, x], 1)))))[0, 0]

    @staticmethod
    def _evidence(seen: Seen, known: torch.Tensor, clicks: list[torch.Tensor]) -> torch.Tensor:
        """(1, EVIDENCE, h, w) at the finest level."""
        coarse, fine = seen.alike
        maps = [likeness(cells, points)
                for cells, points in zip((coarse, coarse, fine, fine), clicks)]
        maps += similarities(coarse, *sets(known))
        return torch.cat([known, *(resized(x, known) for x in maps)], 1)


@torch.no_grad()
def looked(encoder: nn.Module, decoder: PromptDecoder | None, image: torch.Tensor,
           prompts: Prompts) -> torch.Tensor:
    """(1, 3, H, W) normalised, and what is shown in it -> (H/2, W/2) logits of the object.

    Raises:
        ValueError: there is no decoder.
    """
    if decoder is None:
        raise ValueError("expected a checkpoint that can be shown objects by boxes and clicks: "
                         "-m train --prompts -o CHECKPOINT makes one of this")
    return decoder(decoder.look(image, *encoder.pyramid(image)), prompts)


def sets(known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The shares of cells that are likely of the object, and likely not; both 0 if that is unknown.

    As the mask so far has it, or the box where there is none.

    Args:
        known: (1, BOX + CLICKS + MASK, h, w), what `evidence` gives.

    Returns:
        Two (1, 1, h, w) float32.
    """
    box, depth = known[:, :1], known[:, 2:4].amin(1, keepdim=True)
    masked, mask = known[:, BOX + CLICKS:].split(1, 1)
    return (torch.where(masked > 0, mask, box * (depth > INNER)),
            torch.where(masked > 0, 1 - mask, box * (depth < OUTER)))


def similarities(cells: torch.Tensor, *sets: torch.Tensor) -> list[torch.Tensor]:
    """The mean cosine of each cell with the K most alike of sets (section 3.1, equation 2).

    A cell doesn't count as alike to itself.

    Args:
        cells: (1, C, h, w) of length 1.
        sets: (1, 1, ., .), above 0.5 where a cell is in it.

    Returns:
        Of each set (1, 1, h, w), 0 where it has no more than K cells.
    """
    flat = cells[0].flatten(1)
    place, products = torch.arange(flat.shape[1], device=flat.device), flat.T @ flat
    found = []
    for share in sets:
        chosen = resized(share, cells).flatten() > 0.5
        others = chosen & (place != place[:, None])  # (n, n)
        # no branch, so that a trace holds for all sets: NEVER is in none of the K of a larger one
        best = torch.where(others, products, NEVER).topk(K).values.mean(1)
        best = torch.where(chosen.sum() > K, best, 0.0)
        found.append(best.reshape(1, 1, *cells.shape[-2:]))
    return found


def likeness(cells: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(1, C, h, w) of length 1 -> (1, 1, h, w) cosine with the most alike of the clicked cells.

    0 where nothing was clicked. `points` are as `clicked` gives them.
    """
    flat = cells[0].flatten(1)
    scores = flat[:, points].T @ flat  # (points, n)
    best = torch.cat([scores, scores.new_full((1, flat.shape[1]), NEVER)]).amax(0)
    return torch.where(best > NEVER, best, 0.0).reshape(1, 1, *cells.shape[-2:])
