"""Object tokens: a few vectors per object that attend to the whole frame, next to pixel memory.

Pixel memory matches every location on its own, so the most similar tail in memory wins no matter
whose it is. Object tokens summarise each object (Cheng et al.: Putting the object back into video
object segmentation, CVPR 2024) and encode where it was. They attend to the frame with foreground
and background masked attention, then to each other, so that two objects don't claim the same body,
and correct the memory readout.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from network.reader import foreground_first, rivals, with_union

# All of these fix shapes of weights: another value needs a newly trained checkpoint.
# Tokens per object. The first half attends to the foreground, inside the object's mask, the second
# half to the background, where distractors are. The object memory grows in proportion.
TOKENS = 8
# Channels per token. The time of a layer is about locations * WIDTH^2, hardly more per object.
WIDTH = 64
HEADS = 4  # attention heads, of WIDTH / HEADS = 16 channels each
LAYERS = 2  # each refines the coarse masks, under which the next one attends
READOUT = 32  # channels that the memory readout is projected to, which bounds the cost per object
PLACES = 6  # channels of the position relative to an object, see `_relative_position`
# Frequencies of the position encoding: wavelengths 2, 1, 1/2 and 1/4 of the frame's longer side.
# The longest is unambiguous over the whole frame; more would resolve finer positions.
WAVES = 4
EXTENT = 9  # channels of an object's position and size, see `_extent`


class Attention(nn.Module):
    """Pre-norm multi-head attention with a residual connection and an additive bias."""

    def __init__(self, width: int):
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, tokens: torch.Tensor, others: torch.Tensor | None = None,
                bias: torch.Tensor | None = None) -> torch.Tensor:
        """Update tokens by cross-attention to locations, or by self-attention among all tokens.

        Args:
            tokens: (M, Q, C) queries.
            others: (n, C) locations, the same for all tokens; None attends to the tokens of all
                objects.
            bias: (M, Q, n), added to the attention logits; the same for all heads.

        Returns:
            (M, Q, C) updated tokens.
        """
        normalised = self.before(tokens).reshape(-1, tokens.shape[-1])
        source = normalised if others is None else others
        query = self.query(normalised).unflatten(1, (HEADS, -1)).transpose(0, 1)
        key, value = self.key_value(source).unflatten(1, (2, HEADS, -1)).permute(1, 2, 0, 3)
        logits = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])  # (HEADS, M*Q, n)
        if bias is not None:
            logits = logits + bias.reshape(-1, bias.shape[-1])
        attended = (logits.softmax(2) @ value).transpose(0, 1).flatten(1)
        return tokens + self.out(attended).reshape(-1, *tokens.shape[1:])


class Layer(nn.Module):
    """One transformer layer: masked cross-attention to the frame, self-attention, feed-forward."""

    def __init__(self, width: int):
        super().__init__()
        # names of layers are keys of checkpoints; `look`: cross-attention to the frame, `compare`:
        # self-attention among all tokens, `think`: feed-forward
        self.look, self.compare = Attention(width), Attention(width)
        self.think = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
                                   nn.Linear(2 * width, width))
        self.affinity = nn.Linear(width, width)
        self.mask = nn.Conv1d(2 * TOKENS, 1, 1)

    def forward(self, tokens: torch.Tensor, locations: torch.Tensor, masks: torch.Tensor,
                objects: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Update the tokens and the coarse masks.

        Args:
            tokens: (M, Q, C) tokens of the objects and, where N > 1, of their union.
            locations: (n, C) features of the frame with position encoding.
            masks: (M, n) logits of the coarse masks so far.
            objects: number of objects N.

        Returns:
            (M, Q, C) tokens; (M, Q, n) affinity of tokens and locations; (M, n) mask logits.
        """
        # The log of a soft mask as bias multiplies attention weights by the mask. A hard mask would
        # pass no gradient, and leave nothing to attend to where an object has vanished.
        inside, outside = F.logsigmoid(masks), F.logsigmoid(-masks)
        half = TOKENS // 2
        bias = torch.stack([inside] * half + [outside] * (TOKENS - half), 1)
        tokens = self.compare(self.look(tokens, locations, bias))
        tokens = tokens + self.think(tokens)
        affinity = self.affinity(tokens) @ locations.T / math.sqrt(locations.shape[1])
        change = self.mask(torch.cat([affinity, rivals(affinity[:objects])], 1))[:, 0]
        return tokens, affinity, masks + change


class ObjectTokens(nn.Module):
    """Corrects the memory readout of each location by object-level appearance and position.

    The object memory of a video is the output of `sums`. It has a fixed shape and is linear in the
    masks, so that several memory frames are averaged instead of stored.

    Args:
        channels: feature channels of a location.
        readout: channels of the memory readout, `reader.READOUT`.
    """

    memory_size = TOKENS * (WIDTH + 1)  # numbers per object in the object memory

    def __init__(self, channels: int, readout: int):
        super().__init__()
        # names of layers are keys of checkpoints; `see` projects features, `place` and `extent`
        # encode positions, `kind` and `union` are learned embeddings of a token and of the union
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
        # without effect at first, so that training starts from a network without object tokens
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def sums(self, unit: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return the object memory of a frame: features pooled over each mask.

        Each token has learned weights of its own and can pool over another part of the object.

        Args:
            unit: (n, C) features of the frame's n locations, of unit length.
            shares: (N+1, n) shares of background and objects in each location, in [0, 1].

        Returns:
            (N+1, TOKENS * (WIDTH + 1)): for each token, weighted sums of features, and the sum of
            the weights to divide them by later; both divided by n.
        """
        projected = self.normal(self.see(unit))
        weights = self.weights(projected).sigmoid()  # (n, TOKENS)
        projected = torch.cat([projected, torch.ones_like(projected[:, :1])], 1)
        each = (weights[:, :, None] * projected[:, None]).flatten(1)
        return shares @ each / unit.shape[0]

    def forward(self, unit: torch.Tensor, sums: torch.Tensor, readout: torch.Tensor,
                previous: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Correct the memory readout of a frame.

        Args:
            unit: (n, C) features of the frame's n = h*w locations, of unit length.
            sums: (N+1, TOKENS * (WIDTH + 1)) object memory, see `sums`.
            readout: (M, E, h, w) memory readout of N objects and, where N > 1, of their union.
            previous: (N, n) the objects' shares of each location in the previous frame, in [0, 1].

        Returns:
            (M, E, h, w) corrected readout, and (N, h, w) logits of coarse masks, for a loss in
            training; the background's logit is 0.
        """
        (h, w), objects = readout.shape[2:], previous.shape[0]
        previous = with_union(previous)  # (M, n)
        axes = _axes(h, w, unit)
        extent = _extent(previous, axes)
        locations = self.normal(self.see(unit)) + self.place(_waves(*axes))
        places = _relative_position(extent, axes)  # (M, PLACES, n)
        projected = torch.cat([readout.flatten(2), places, rivals(places[:objects])], 1)
        projected = F.relu(self.readout(projected.transpose(1, 2)))  # (M, n, READOUT)
        masks = self.mask(projected)[..., 0]
        tokens = self.start(sums, extent)
        for layer in self.layers:
            tokens, affinity, masks = layer(tokens, locations, masks, objects)
        values = affinity.transpose(1, 2).softmax(2) @ self.value(tokens)  # (M, n, WIDTH)
        scores = torch.cat([affinity, rivals(affinity[:objects]), masks[:, None],
                            rivals(masks[:objects])[:, None]], 1)
        joined = F.relu(self.join(torch.cat([projected, scores.transpose(1, 2), values], 2)))
        correction = self.correction(joined).transpose(1, 2).reshape(readout.shape)
        coarse = foreground_first(masks.reshape(-1, h, w), objects)
        return readout + correction, coarse

    def start(self, sums: torch.Tensor, extent: torch.Tensor) -> torch.Tensor:
        """Return the (M, TOKENS, WIDTH) initial tokens of a frame.

        Args:
            sums: (N+1, TOKENS * (WIDTH + 1)) object memory.
            extent: (M, EXTENT) positions and sizes in the previous frame, see `_extent`.
        """
        half = TOKENS // 2
        sums = sums.unflatten(1, (TOKENS, WIDTH + 1))
        own = sums[1:]
        inside = with_union(own)
        outside = sums.sum(0) - inside
        sums = torch.cat([inside[:, :half], outside[:, half:]], 1)
        # 1e-4 of the frame: the mean of a much smaller or absent object tends to 0
        means = sums[..., :-1] / (sums[..., -1:] + 1e-4)
        tokens = self.summary(means) + self.kind
        # 0 for each object, 1 for the union; without a branch for the export, as in `with_union`
        union = torch.cat([0 * own[:, 0, 0], 0 * own[1:2, 0, 0] + 1])
        place = self.extent(torch.cat([extent, _waves(extent[:, 0], extent[:, 1])], 1))
        return tokens + union[:, None, None] * self.union + place.unflatten(1, (TOKENS, WIDTH))


def _axes(h: int, w: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and y (n,) of the locations' centres, in units of the frame's longer side."""
    longest = max(h, w)
    y = (torch.arange(h, device=like.device) + 0.5) / longest
    x = (torch.arange(w, device=like.device) + 0.5) / longest
    return x.repeat(h), y[:, None].expand(-1, w).reshape(-1)


def _waves(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the (n, 4 * WAVES) sinusoidal position encoding of x (n,) and y (n,)."""
    angles = [2 ** i * math.pi * z for i in range(WAVES) for z in (x, y)]
    return torch.stack([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


def _extent(shares: torch.Tensor, axes: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return each object's position and size, (M, EXTENT).

    The channels: centroid x and y, size (root of the share of the frame), its logarithm, standard
    deviation along x and y, logarithm of their ratio, presence, absence. An absent object is at
    (0, 0) with presence 0.

    Args:
        shares: (M, n) shares of the objects in each location, in [0, 1].
        axes: x and y of the locations, see `_axes`.
    """
    area = shares.sum(1)  # in locations
    # soft and differentiable: half present at a twentieth of a location
    presence = area / (area + 0.05)
    weights = shares / (area[:, None] + 1e-4)
    x, y = ((weights * z).sum(1) for z in axes)
    wide, high = (((weights * (z - centre[:, None]) ** 2).sum(1) + 1e-6).sqrt()
                  for z, centre in zip(axes, (x, y)))
    size = (area / shares.shape[1] + 1e-6).sqrt()
    return torch.stack([x, y, size, size.log() / 4, wide, high, (wide / high).log().clamp(-2, 2),
                        presence, 1 - presence], 1)


def _relative_position(extent: torch.Tensor,
                       axes: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the position of each location relative to each object, (M, PLACES, n).

    The channels: offset along x and y squashed to (-1, 1), three Gaussians of the distance, and the
    object's presence. Distances are in units of the object's spread; all channels are 0 for an
    absent object.

    Args:
        extent: (M, EXTENT) as `_extent` returns it.
        axes: x and y of the locations, see `_axes`.
    """
    x, y, presence = extent[:, 0:1], extent[:, 1:2], extent[:, 7:8]
    spread = extent[:, 4:6].norm(dim=1, keepdim=True) + 0.01
    across, down = (axes[0] - x) / spread, (axes[1] - y) / spread
    squared = across.square() + down.square()
    # standard deviations 1, 2 and 5.7: on the object, next to it, in its neighbourhood
    return torch.stack([torch.tanh(across / 2) * presence, torch.tanh(down / 2) * presence,
                        (-squared / 2).exp() * presence, (-squared / 8).exp() * presence,
                        (-squared / 64).exp() * presence, presence.expand_as(across)], 1)
