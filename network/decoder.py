"""Learned refinement: from what a memory says, and the frame's finer features, to a mask."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = (16, 32, 96, 128)  # channels of the decoder, finest level first
SURVEY = 64  # channels of one level more, half as fine as the coarsest features
EDGES = 8  # channels at stride 2. All objects share the convolution that costs most
GROUPS = 8  # of GroupNorm, since a batch is too small for BatchNorm
PREVIOUS = 2  # channels of what was found in the frame before: the object, the best other one


class Block(nn.Module):
    """Two convolutions over what is known of a frame and of its objects.

    Args:
        shared: channels that all objects of a frame have in common; projected once.
        own: channels of each object.
        width: channels of the result.
    """

    def __init__(self, shared: int, own: int, width: int):
        super().__init__()
        self.project = nn.Conv2d(shared + own, width, 1)
        self.layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(GROUPS, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def project_shared(self, shared: torch.Tensor) -> torch.Tensor:
        """(1, S, h, w) -> (1, width, h, w), what `forward` takes."""
        return F.conv2d(shared, self.project.weight[:, :shared.shape[1]], self.project.bias)

    def forward(self, projected: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """(1, width, h, w) and (1, E, h, w) of one object -> (1, width, h, w)."""
        x = projected + F.conv2d(own, self.project.weight[:, -own.shape[1]:])
        return x + self.layers(x)


class Decoder(nn.Module):
    """From the coarsest features to the finest.

    What the memory says enters at the levels that are no finer than it, what was found in the
    frame before at those that are finer.

    Args:
        evidence: channels of what is known of an object at a cell.
        channels: of the features, finest first; as many levels as `WIDTHS` has, or fewer.
        finer: how many of the levels are finer than the evidence.
        stem: channels of the features of one more level, twice as fine, which sharpens edges and
            thin parts; 0: there is none.
    """

    def __init__(self, evidence: int, channels: tuple[int, ...], finer: int, stem: int = 0):
        super().__init__()
        self.finer = finer
        widths = (*WIDTHS[:len(channels)], SURVEY)
        self.detail = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels[:finer])
        shared = (*(2 * c for c in channels[:finer]), *channels[finer:], channels[-1])
        own = [PREVIOUS] * finer + [evidence] * (len(widths) - finer)
        below = (*widths[1:], 0)
        self.blocks = nn.ModuleList(Block(s, o + b, w)
                                    for s, o, b, w in zip(shared, own, below, widths))
        self.score = nn.Conv2d(widths[0], 1, 3, padding=1)
        self.edges = Edges(stem, widths[0]) if stem else None

    def forward(self, evidence: torch.Tensor, previous: torch.Tensor,
                levels: list[torch.Tensor]) -> torch.Tensor:
        """Logits of N objects of a frame, at the finest level.

        Args:
            evidence: (N, E, h, w).
            previous: (N, PREVIOUS, H, W), at the finest level but the stem.
            levels: (1, C, ., .) features, finest first, those of the stem before all others.

        Returns:
            (N, H, W).
        """
        if torch.onnx.is_in_onnx_export():  # of any number of objects
            return self.decode(evidence, previous, self.shared(list(levels)))
        evidence, previous, *levels = (
            x.to(levels[0].dtype).contiguous(memory_format=torch.channels_last)
            for x in (evidence, previous, *levels))
        shared = self.shared(levels)
        # one by one: five at once take longer, since caches are small. `split` keeps them NHWC
        return torch.cat([self.decode(*own, shared)
                          for own in zip(evidence.split(1), previous.split(1))])

    def shared(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        """What all objects of a frame have in common, for `decode`."""
        fine = [] if self.edges is None else [self.edges.stem(levels[0])]
        levels = [*levels[len(fine):], halved(levels[-1])]
        for i, layer in enumerate(self.detail):
            levels[i] = torch.cat([levels[i], F.relu(layer(levels[i]))], 1)
        return fine + [block.project_shared(level) for block, level in zip(self.blocks, levels)]

    def decode(self, evidence: torch.Tensor, previous: torch.Tensor,
               shared: list[torch.Tensor]) -> torch.Tensor:
        """As `forward`, of all objects at once."""
        x = None
        fine, shared = (None, shared) if self.edges is None else (shared[0], shared[1:])
        for i in reversed(range(len(shared))):
            own = [resized(previous if i < self.finer else evidence, shared[i])]
            if x is not None:
                own.append(resized(x, shared[i]))
            x = self.blocks[i](shared[i], torch.cat(own, 1))
        x = F.relu(x)
        logits = self.score(x)
        return (logits if fine is None else self.edges(x, logits, fine))[:, 0]


class Edges(nn.Module):
    """Logits at twice the resolution: enlarged, and corrected by features that know edges.

    Args:
        stem: channels of these features.
        width: channels at the level below.
    """

    def __init__(self, stem: int, width: int):
        super().__init__()
        self.stem = nn.Conv2d(stem, EDGES, 3, padding=1)
        self.own = nn.Conv2d(width + 1, EDGES, 1)
        self.score = nn.Conv2d(EDGES, 1, 3, padding=1)
        nn.init.zeros_(self.score.weight)  # begins as enlargement only
        nn.init.zeros_(self.score.bias)

    def forward(self, x: torch.Tensor, logits: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        """(N, 1, 2H, 2W).

        Args:
            x, logits: (N, C, H, W) features of each object, (N, 1, H, W).
            fine: (1, EDGES, 2H, 2W), what `stem` makes.
        """
        # logits are clipped, as only those near 0 are at an edge
        own = resized(self.own(torch.cat([x, logits.clamp(-6, 6) / 3], 1)), fine)
        return resized(logits, fine) + self.score(F.relu(own + fine))


def halved(x: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> half the size, rounded up.

    With `count_include_pad` onnxruntime before 1.29 divides what lies at an odd side's end by all
    four pixels, of which two are beyond it; PyTorch, without padding, gives the same either way.
    """
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(..., h, w) -> (..., H, W) as `like`: interpolated, or averaged where that is smaller."""
    size = like.shape[-2:]
    if x.shape[-2:] == size:
        return x
    if x.shape[-2] > size[0]:
        if torch.onnx.is_in_onnx_export():  # which pools to sizes that are constant only
            rows, columns = (pooling(a, b) for a, b in zip(x.shape[-2:], size))
            return rows @ x @ columns.T
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def pooling(before: int, after: int) -> torch.Tensor:
    """(after, before) float32: adaptive average pooling along one side, as a matrix."""
    number = torch.arange(after)[:, None]
    first = number * before // after
    end = ((number + 1) * before + after - 1) // after  # rounded up, of no negative number
    place = torch.arange(before)
    inside = ((place >= first) & (place < end)).float()
    return inside / inside.sum(1, keepdim=True)


def antialiased(before: int, after: int) -> torch.Tensor:
    """(after, before) float32: bilinear resizing along one side, antialiased, as a matrix."""
    scale = (torch.ones(1) * before / after).clamp(min=1)
    middle = (torch.arange(after)[:, None] + 0.5) * before / after
    weights = (1 - (torch.arange(before) + 0.5 - middle).abs() / scale).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)
