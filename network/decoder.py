"""Decoder: refines an object's memory readout with the frame's finer features to a mask."""

import torch
import torch.nn.functional as F
from torch import nn

# Channels, finest level first. Each finer level has four times the locations, so that fine levels
# must be narrow
WIDTHS = (16, 32, 96, 128)
CONTEXT = 64  # channels of an extra level at half the coarsest features' resolution, for context
GROUPS = 8  # of GroupNorm, as batches are too small for BatchNorm
PREVIOUS = 2  # channels of the previous prediction: the object, and the most likely other object


class Block(nn.Module):
    """Residual block of two convolutions on inputs of the frame and of an object.

    Args:
        shared: channels common to all objects of a frame, projected once per frame.
        own: channels of each object.
        width: output channels.
    """

    def __init__(self, shared: int, own: int, width: int):
        super().__init__()
        self.project = nn.Conv2d(shared + own, width, 1)
        self.layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(GROUPS, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def project_shared(self, shared: torch.Tensor) -> torch.Tensor:
        """Project a frame's channels for `forward`: (1, S, h, w) -> (1, width, h, w)."""
        return F.conv2d(shared, self.project.weight[:, :shared.shape[1]], self.project.bias)

    def forward(self, projected: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
        """Combine a frame's channels with those of N objects.

        Args:
            projected: (1, width, h, w), see `project_shared`.
            own: the objects' channels in parts, (N, E, ., .) each, which are resized.

        Returns:
            (N, width, h, w).
        """
        channels = [part.shape[1] for part in own]
        weights = self.project.weight[:, -sum(channels):].split(channels, 1)
        x = projected
        for part, weight in zip(own, weights):
            if part.shape[-2] < x.shape[-2]:
                # The projection commutes with bilinear resizing, and before it there are fewer
                # locations to project and afterwards fewer channels to resize.
                x = x + resized(F.conv2d(part, weight), x)
            else:
                x = x + F.conv2d(resized(part, x), weight)
        return x + self.layers(x)


class Decoder(nn.Module):
    """Predict logits from coarse to fine.

    The memory readout enters at its own level and the coarser ones, the previous prediction at
    the finer ones.

    Args:
        readout: channels of an object's memory readout.
        channels: channels of the features, finest level first; at most as many as `WIDTHS`.
        finer: number of levels finer than the memory readout.
    """

    def __init__(self, readout: int, channels: tuple[int, ...], finer: int):
        super().__init__()
        self.finer = finer
        widths = (*WIDTHS[:len(channels)], CONTEXT)
        self.detail = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels[:finer])
        shared = (*(2 * c for c in channels[:finer]), *channels[finer:], channels[-1])
        own = [PREVIOUS] * finer + [readout] * (len(widths) - finer)
        below = (*widths[1:], 0)
        self.blocks = nn.ModuleList(Block(s, o + b, w)
                                    for s, o, b, w in zip(shared, own, below, widths))
        self.score = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, readout: torch.Tensor, previous: torch.Tensor,
                levels: list[torch.Tensor]) -> torch.Tensor:
        """Predict the logits of a frame's N objects.

        Args:
            readout: (N, E, h, w) memory readout.
            previous: (N, PREVIOUS, H, W) previous prediction, at the finest level of `channels`.
            levels: (1, C, ., .) features, finest first.

        Returns:
            (N, H, W), at the finest level of `channels`.
        """
        if torch.onnx.is_in_onnx_export():  # a trace of the loop would fix N
            shared = self.project_frame(list(levels))
            coarse = self.coarse(readout, previous, shared)
            return self.finest(coarse, readout, previous, shared)
        readout, previous, *levels = (
            x.to(levels[0].dtype).contiguous(memory_format=torch.channels_last)
            for x in (readout, previous, *levels))
        shared = self.project_frame(levels)
        # the finest level one object at a time: five at once exceed the caches and take longer.
        # `split` keeps NHWC
        coarse = self.coarse(readout, previous, shared)
        return torch.cat([self.finest(*own, shared) for own in zip(
            coarse.split(1), readout.split(1), previous.split(1))])

    def project_frame(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Compute what is common to all objects, an input of `coarse` and `finest`."""
        levels = [*levels, halved(levels[-1])]
        for i, layer in enumerate(self.detail):
            levels[i] = torch.cat([levels[i], F.relu(layer(levels[i]))], 1)
        return [block.project_shared(level) for block, level in zip(self.blocks, levels)]

    def coarse(self, readout: torch.Tensor, previous: torch.Tensor,
               shared: list[torch.Tensor]) -> torch.Tensor:
        """Decode N objects up to the second finest level of `channels`: (N, C, ., .) features."""
        x = None
        for level in reversed(range(1, len(self.blocks))):
            x = self._decoded(level, x, readout, previous, shared)
        return x

    def finest(self, coarse: torch.Tensor, readout: torch.Tensor, previous: torch.Tensor,
               shared: list[torch.Tensor]) -> torch.Tensor:
        """Decode N objects at the finest level of `channels`: (N, H, W) logits.

        Args:
            coarse: as `coarse` returns it; other arguments as there.
        """
        return self.score(F.relu(self._decoded(0, coarse, readout, previous, shared)))[:, 0]

    def _decoded(self, level: int, below: torch.Tensor | None, readout: torch.Tensor,
                 previous: torch.Tensor, shared: list[torch.Tensor]) -> torch.Tensor:
        """Run the block of a level, with the features of the level below it, if there is one."""
        own = previous if level < self.finer else readout
        return self.blocks[level](shared[level], *((own,) if below is None else (own, below)))


def halved(x: torch.Tensor) -> torch.Tensor:
    """Average-pool (B, C, h, w) to half the size, rounded up.

    With `count_include_pad` onnxruntime before 1.29 divides the last window of an odd side by four
    although two of its pixels are outside; in PyTorch the argument has no effect without padding.
    """
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Resize (..., h, w) to the size of `like`: bilinear, or average pooling if that is smaller."""
    size = like.shape[-2:]
    if x.shape[-2:] == size:
        return x
    if x.shape[-2] > size[0]:
        if torch.onnx.is_in_onnx_export():  # ONNX pools to constant sizes only
            rows, columns = (pooling(a, b) for a, b in zip(x.shape[-2:], size))
            return rows @ x @ columns.T
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def pooling(before: int, after: int) -> torch.Tensor:
    """Matrix of adaptive average pooling along one side, (after, before) float32."""
    number = torch.arange(after)[:, None]
    first = number * before // after
    end = ((number + 1) * before + after - 1) // after  # rounds up
    place = torch.arange(before)
    inside = ((place >= first) & (place < end)).float()
    return inside / inside.sum(1, keepdim=True)


def antialiased(before: int, after: int) -> torch.Tensor:
    """Matrix of antialiased bilinear resizing along one side, (after, before) float32."""
    scale = (torch.ones(1) * before / after).clamp(min=1)
    middle = (torch.arange(after)[:, None] + 0.5) * before / after
    weights = (1 - (torch.arange(before) + 0.5 - middle).abs() / scale).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)
