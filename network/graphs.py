"""The network as graphs without state, which an export writes down: tensors in, tensors out.

What PyTorch runs in several calls, here runs in one where nothing has to be decided between.
Sizes, numbers of objects and of what is kept may vary. `network.lite` runs them; inputs are called
as `forward`'s arguments.
"""

import torch
import torch.nn.functional as F
from torch import nn

from network.bank import Cells
from network.decoder import Decoder
from network.encoder import Encoder
from network.prompts import PromptDecoder, Seen
from network.reader import Reader, foreground_first, rivals, with_union
from network.rules import K_NEAR, K


class Encode(nn.Module):
    """A frame, of whole cells, to what is matched, kept and refined."""

    def __init__(self, encoder: Encoder, reader: Reader):
        super().__init__()
        self.encoder, self.reader = encoder, reader

    def forward(self, image):
        """(1, 3, H, W) normalised -> as `Cells`, `Entry.shared`, and (1, C, ., .) levels."""
        features, levels = self.encoder.pyramid(image)
        cells = self.reader.look(features[0])
        return cells.unit, cells.key, cells.near, self.reader.shared_of(cells), *levels


class Values(nn.Module):
    """What is kept of objects in a frame."""

    def __init__(self, reader: Reader):
        super().__init__()
        self.reader = reader

    def forward(self, shared, found):
        """(1, WIDTH, h, w) and (N+1, H, W) -> (h*w, M * (VALUE + 1))."""
        return self.reader.values(shared, [self.reader.own_of(found)])


class Nearest(nn.Module):
    """The K most similar ones of many keys, see `search.nearest`."""

    def forward(self, query, keys):
        """(n, KEY), and (size, groups, KEY) -> (n, K) each, the most similar first."""
        groups = keys.shape[1]
        similarity = (query @ keys.flatten(0, 1).T).reshape(-1, *keys.shape[:2])
        best, member = similarity.max(1)
        best, group = best.topk(K, dim=1)
        return best, member.gather(1, group) * groups + group


class Read(nn.Module):
    """What was found in a memory, and what is near in the last frames, to logits."""

    def __init__(self, reader: Reader, decoder: Decoder):
        super().__init__()
        self.reader, self.decoder = reader, decoder

    def forward(self, unit, near, scores, values, best, positions, linear, found, recent,
                recent_values, tiles, place, cells, windows, *levels):
        """(N, H/4, W/4).

        Args:
            unit, near, levels: of the frame, as `Encode` gives them.
            scores, values, best, positions: as `Rules._far` gives them.
            linear: (C, N+1) that makes labels of features.
            found: (N+1, H/4, W/4) of the frame before.
            recent, recent_values: (T*h*w, NEAR) and (T*h*w, M * (VALUE + 1)) of the last frames.
            tiles, place, cells, windows: as `network.tiles` gives them.
        """
        seen = Cells(unit, unit, near)
        queries = near.flatten(0, 1)[tiles]
        products = queries @ recent[cells].transpose(1, 2) + windows
        likest, where = products.flatten(0, 1).topk(K_NEAR, dim=1)
        where = cells.unsqueeze(1).expand(-1, tiles.shape[1], -1).flatten(0, 1).gather(1, where)
        evidence = self.reader.evidence(seen, linear, found, scores, (values, best, positions),
                                        (recent_values, likest[place], where[place]))
        before = found[1:]
        previous = torch.stack([with_union(before), rivals(before)], 1)
        logits = self.decoder.decode(evidence, previous, self.decoder.shared(list(levels)))
        return foreground_first(logits, before.shape[0])


class Show(nn.Module):
    """What a person showed of an object in a frame, to its logits."""

    def __init__(self, prompts: PromptDecoder, finer: int):
        super().__init__()
        self.prompts, self.finer = prompts, finer

    def forward(self, image, unit, known, points, not_points, fine_points, fine_not_points,
                *levels):
        """(H/2, W/2).

        Args:
            image: (1, 3, H, W) normalised, sides of whole cells of the coarsest level.
            unit, levels: of it, as `Encode` gives them.
            known, points, ...: see `PromptDecoder.answer`.
        """
        coarse = unit.T.reshape(1, unit.shape[1], *levels[self.finer].shape[2:])
        seen = Seen(image, [coarse, F.normalize(levels[0], dim=1)], list(levels))
        return self.prompts.answer(seen, known, [points, not_points, fine_points, fine_not_points])
