"""Object-level reading: a few tokens per object that see the whole frame, next to pixel memory.

Every location is matched on its own, so the most similar tail in memory wins no matter whose it is.
Tokens summarise each object (Cheng et al.: Putting the object back into video object segmentation,
CVPR 2024), know where it was, attend to the frame under a soft mask of it, and to each other, so
that two of them don't claim the same body. What they find is added to the memory readout.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from network.reader import foreground_first, rivals, with_union

TOKENS = 8  # per object: the first half summarises the inside of its mask, the rest the outside
WIDTH = 64  # channels of a token. A layer costs locations * WIDTH^2, and little per object
HEADS = 4
LAYERS = 2
READOUT = 32  # channels that the memory readout is reduced to
PLACES = 6  # channels that say where a location lies, seen from an object; see `_seen_from`
WAVES = 4  # wavelengths of the position encoding, from the whole frame to an eighth of it
EXTENT = 9  # numbers about the place and size of an object; see `_extent`


class Attention(nn.Module):
    """Multi-head attention with an additive bias, normalised before."""

    def __init__(self, width: int):
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, tokens: torch.Tensor, others: torch.Tensor | None = None,
                bias: torch.Tensor | None = None) -> torch.Tensor:
        """(M, Q, C) tokens ask (n, C) locations, or, without these, all tokens ask all.

        Args:
            bias: (M, Q, n), added to the logits of attention.
        """
        normal = self.before(tokens).reshape(-1, tokens.shape[-1])
        asked = normal if others is None else others
        query = self.query(normal).unflatten(1, (HEADS, -1)).transpose(0, 1)
        key, value = self.key_value(asked).unflatten(1, (2, HEADS, -1)).permute(1, 2, 0, 3)
        logits = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])  # (HEADS, M*Q, n)
        if bias is not None:
            logits = logits + bias.reshape(-1, bias.shape[-1])
        found = (logits.softmax(2) @ value).transpose(0, 1).flatten(1)
        return tokens + self.out(found).reshape(-1, *tokens.shape[1:])


class Layer(nn.Module):
    """Tokens look at the frame, then at each other; what they say of every location."""

    def __init__(self, width: int):
        super().__init__()
        self.look, self.compare = Attention(width), Attention(width)
        self.think = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
                                   nn.Linear(2 * width, width))
        self.affinity = nn.Linear(width, width)
        self.mask = nn.Conv1d(2 * TOKENS, 1, 1)

    def forward(self, tokens: torch.Tensor, locations: torch.Tensor, masks: torch.Tensor,
                objects: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens after this layer, (M, Q, n) their affinity with each location, (M, n) masks.

        Args:
            tokens, locations: (M, Q, C) and (n, C).
            masks: (M, n) logits: where each object, or the union, is thought to be.
            objects: N.
        """
        inside, outside = F.logsigmoid(masks), F.logsigmoid(-masks)
        half = TOKENS // 2
        bias = torch.stack([inside] * half + [outside] * (TOKENS - half), 1)
        tokens = self.compare(self.look(tokens, locations, bias))
        tokens = tokens + self.think(tokens)
        affinity = self.affinity(tokens) @ locations.T / math.sqrt(locations.shape[1])
        found = self.mask(torch.cat([affinity, rivals(affinity[:objects])], 1))[:, 0]
        return tokens, affinity, masks + found


class ObjectTokens(nn.Module):
    """Corrects the memory readout of objects by what whole objects look like, and where they were.

    The state of a video is `sums`: of fixed shape, and linear in the masks of memory frames, so
    that those of several frames are averaged.

    Args:
        channels: of a location's features.
        readout: channels of the memory readout.
    """

    kept = TOKENS * (WIDTH + 1)  # numbers of each object in `sums`

    def __init__(self, channels: int, readout: int):
        super().__init__()
        self.see = nn.Linear(channels, WIDTH)
        self.normal = nn.LayerNorm(WIDTH)
        self.weights = nn.Linear(WIDTH, TOKENS)
        self.place = nn.Linear(4 * WAVES, WIDTH)
        self.summary = nn.Linear(WIDTH, WIDTH)
        self.kind = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.union = nn.Parameter(0.02 * torch.randn(WIDTH))
        self.extent = nn.Linear(EXTENT + 4 * WAVES, TOKENS * WIDTH)
        self.readout = nn.Linear(readout + 2 * PLACES, READOUT)
        self.mask = nn.Linear(READOUT, 1)
        self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(LAYERS))
        self.value = nn.Linear(WIDTH, WIDTH)
        self.join = nn.Linear(READOUT + 2 * TOKENS + 2 + WIDTH, WIDTH)
        self.correction = nn.Linear(WIDTH, readout)
        nn.init.zeros_(self.correction.weight)  # begins as the network without tokens
        nn.init.zeros_(self.correction.bias)

    def sums(self, unit: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """What is kept of a memory frame: features summed over each mask, weighed in TOKENS ways.

        Args:
            unit: (n, C) features of its locations.
            shares: (N+1, n) of each location, how much of it is background, and each object.

        Returns:
            (N+1, TOKENS * (WIDTH + 1)): sums of features, and of weights.
        """
        seen = self.normal(self.see(unit))
        weights = self.weights(seen).sigmoid()  # (n, TOKENS)
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        each = (weights[:, :, None] * seen[:, None]).flatten(1)
        return shares @ each / unit.shape[0]

    def forward(self, unit: torch.Tensor, sums: torch.Tensor, evidence: torch.Tensor,
                before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The corrected memory readout, and coarse masks.

        Args:
            unit: (n, C) features of the frame's locations.
            sums: (N+1, TOKENS * (WIDTH + 1)), see `sums`.
            evidence: (M, E, h, w) memory readout of N objects, and of their union.
            before: (N, n) their shares of each location in the frame before.

        Returns:
            (M, E, h, w), and (N, h, w) logits beside 0 for the background.
        """
        (h, w), objects = evidence.shape[2:], before.shape[0]
        before = with_union(before)  # (M, n)
        axes = _axes(h, w, unit)
        extent = _extent(before, axes)
        locations = self.normal(self.see(unit)) + self.place(_waves(*axes))
        places = _seen_from(extent, axes)  # (M, PLACES, n)
        known = torch.cat([evidence.flatten(2), places, rivals(places[:objects])], 1)
        known = F.relu(self.readout(known.transpose(1, 2)))  # (M, n, READOUT)
        masks = self.mask(known)[..., 0]
        tokens = self.start(sums, extent)
        for layer in self.layers:
            tokens, affinity, masks = layer(tokens, locations, masks, objects)
        read = affinity.transpose(1, 2).softmax(2) @ self.value(tokens)  # (M, n, WIDTH)
        scores = torch.cat([affinity, rivals(affinity[:objects]), masks[:, None],
                            rivals(masks[:objects])[:, None]], 1)
        found = F.relu(self.join(torch.cat([known, scores.transpose(1, 2), read], 2)))
        correction = self.correction(found).transpose(1, 2).reshape(evidence.shape)
        coarse = foreground_first(masks.reshape(-1, h, w), objects)
        return evidence + correction, coarse

    def start(self, sums: torch.Tensor, extent: torch.Tensor) -> torch.Tensor:
        """(M, TOKENS, WIDTH) tokens of objects before they look at a frame."""
        half = TOKENS // 2
        sums = sums.unflatten(1, (TOKENS, WIDTH + 1))
        own = sums[1:]
        inside = with_union(own)
        outside = sums.sum(0) - inside
        sums = torch.cat([inside[:, :half], outside[:, half:]], 1)
        means = sums[..., :-1] / (sums[..., -1:] + 1e-4)
        tokens = self.summary(means) + self.kind
        union = torch.cat([0 * own[:, 0, 0], 0 * own[1:2, 0, 0] + 1])  # like `with_union`
        place = self.extent(torch.cat([extent, _waves(extent[:, 0], extent[:, 1])], 1))
        return tokens + union[:, None, None] * self.union + place.unflatten(1, (TOKENS, WIDTH))


def _axes(h: int, w: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) x and y of the middles of locations, in units of the frame's longer side."""
    longest = max(h, w)
    y = (torch.arange(h, device=like.device) + 0.5) / longest
    x = (torch.arange(w, device=like.device) + 0.5) / longest
    return x.repeat(h), y[:, None].expand(-1, w).reshape(-1)


def _waves(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(n,) and (n,) -> (n, 4 * WAVES) sines and cosines of growing frequency."""
    angles = [2 ** i * math.pi * z for i in range(WAVES) for z in (x, y)]
    return torch.stack([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


def _extent(shares: torch.Tensor, axes: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(M, n) shares of locations -> (M, EXTENT): x, y, size, its logarithm, spread, if it is there.

    Of an object that is nowhere the place is (0, 0), and its last number 0.
    """
    area = shares.sum(1)
    there = area / (area + 0.05)
    weights = shares / (area[:, None] + 1e-4)
    x, y = ((weights * z).sum(1) for z in axes)
    wide, high = (((weights * (z - middle[:, None]) ** 2).sum(1) + 1e-6).sqrt()
                  for z, middle in zip(axes, (x, y)))
    size = (area / shares.shape[1] + 1e-6).sqrt()
    return torch.stack([x, y, size, size.log() / 4, wide, high, (wide / high).log().clamp(-2, 2),
                        there, 1 - there], 1)


def _seen_from(extent: torch.Tensor, axes: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(M, PLACES, n): how far each location is from an object's middle, and in which direction.

    In units of the object's spread; 0 of an object that is nowhere.
    """
    x, y, there = extent[:, 0:1], extent[:, 1:2], extent[:, 7:8]
    spread = extent[:, 4:6].norm(dim=1, keepdim=True) + 0.01
    across, down = (axes[0] - x) / spread, (axes[1] - y) / spread
    distance = across.square() + down.square()
    return torch.stack([torch.tanh(across / 2) * there, torch.tanh(down / 2) * there,
                        (-distance / 2).exp() * there, (-distance / 8).exp() * there,
                        (-distance / 64).exp() * there, there.expand_as(across)], 1)
