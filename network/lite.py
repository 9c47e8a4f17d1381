"""`VideoMatch` without PyTorch, of method "memory": numpy around graphs that somebody runs.

What it is to a `Follower`, `videomatch.VideoMatch` is too; what is kept and looked for, the same
`Rules` say. It doesn't know who runs the graphs (`network.graphs` tells what they take), nor files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from media.prompts import Prompts
from network.arrays import bilinear
from network.bank import Bank, Cells
from network.evidence import clicked, evidence
from network.memory import Memory
from network.rules import K_SET, RADIUS, K, Rules, View
from network.tiles import NOTHING, group_size, tiles, windows_of_tiles

Run = Callable[..., list[np.ndarray]]  # a graph's name and its inputs by theirs -> its outputs
ROWS = 512  # that are compared at once: their products fit into caches
ENCODED = ("unit", "key", "near", "shared")  # outputs of the first graph; levels follow


@dataclass
class Seen(Cells):
    """A frame's cells, also with (1, WIDTH, h, w) of which its values are made."""

    shared: np.ndarray


@dataclass
class Frames:
    """One frame as the network sees it.

    Args:
        features: (h*w, C) unit vectors.
        levels: (1, C, ., .) features, finest first.
        size: (H, W) of the image.
    """

    features: np.ndarray
    cells: Seen
    levels: list[np.ndarray]
    size: tuple[int, int]


class LiteReader(Rules):
    """Keys, values, and what is read.

    Args:
        side: masks are seen with so many pixels on each side of a cell.
        ridge: of the linear labels.
    """

    def __init__(self, run: Run, side: int, ridge: float):
        self.run, self.side, self._ridge = run, side, np.float32(ridge)

    def ridge(self) -> np.float32:
        return self._ridge

    @staticmethod
    def token_sums(cells: Cells, shares: np.ndarray) -> tuple:
        return ()

    @staticmethod
    def best_mean(best: np.ndarray) -> np.ndarray:
        return -np.partition(-best, min(K_SET, best.shape[1]) - 1)[:, :K_SET].mean(1)

    def pixels(self, found: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        h, w = (self.side * side for side in shape)
        if found.shape[1:] == (h, w):
            return found
        rows, columns = bilinear(found.shape[1], h), bilinear(found.shape[2], w)
        return rows @ found @ columns.T

    def shares(self, found: np.ndarray) -> np.ndarray:
        count, height, width = found.shape
        cells = found.reshape(count, height // self.side, self.side, width // self.side, self.side)
        return cells.mean((2, 4)).reshape(count, -1)

    def shared_of(self, cells: Seen) -> np.ndarray:
        return cells.shared

    def values_of(self, shared: np.ndarray, found: np.ndarray) -> np.ndarray:
        return self.run("values", shared=shared, found=found)[0]

    def nearest(self, query: np.ndarray, keys: np.ndarray, k: int):
        """As `search.nearest`, the most similar first."""
        if len(keys) <= k:
            similarity = query @ keys.T
            order = np.argsort(-similarity, axis=1)
            return np.take_along_axis(similarity, order, 1), order
        size = max(1, group_size(len(keys), k))
        groups = len(keys) // size
        keys = keys[:groups * size].reshape(size, groups, -1)
        found = [self.run("nearest", query=query[i:i + ROWS], keys=keys)
                 for i in range(0, len(query), ROWS)]
        return [np.concatenate(parts) for parts in zip(*found)]

    def sets_of(self, mask: np.ndarray, shape: tuple[int, int], object_ids) -> np.ndarray:
        """As `views.sets_of`."""
        sets = np.full(shape, -1)
        rows, columns = (_middles(side, cells) for side, cells in zip(mask.shape, shape))
        labels = mask[rows][:, columns].astype(np.int64)
        for object_id in set(np.unique(mask).tolist()) - set(np.unique(labels).tolist()) - {0}:
            share = _pooled((mask == object_id).astype(np.float32), shape)
            labels.flat[share.argmax()] = object_id
        for i, object_id in enumerate((0, *object_ids)):
            sets[labels == object_id] = i
        return sets

    def read(self, bank: Bank, frames: Frames) -> tuple[np.ndarray, np.ndarray]:
        """(N, H/4, W/4) logits, and (N+1, h, w) scores, as `Reader.read` has them."""
        cells, (h, w) = frames.cells, frames.cells.shape
        scores, values, best, positions = self._far(bank, cells)
        if (missing := K - best.shape[1]) > 0:  # fewer cells than are read of any frame
            best = np.pad(best, ((0, 0), (0, missing)), constant_values=NOTHING)
            positions = np.pad(positions, ((0, 0), (0, missing)))
        recent = list(bank.recent)
        windows, inside = windows_of_tiles(h, w, RADIUS, len(recent))
        of_tile, place = tiles(h, w)
        logits, = self.run(
            "read", unit=cells.unit, near=cells.near, scores=scores, values=values, best=best,
            positions=positions, linear=bank.linear, found=recent[-1].found,
            recent=np.concatenate([entry.near.reshape(h * w, -1) for entry in recent]),
            recent_values=np.concatenate([entry.values for entry in recent]), tiles=of_tile,
            place=place, cells=inside, windows=windows,
            **{f"level{i}": level for i, level in enumerate(frames.levels)})
        return logits, scores[:len(logits) + 1].reshape(-1, h, w)


def _middles(side: int, cells: int) -> np.ndarray:
    """Of each cell the pixel that its middle is in, as PyTorch rounds it ("nearest-exact")."""
    where = (np.arange(cells, dtype=np.float32) + np.float32(0.5)) * np.float32(side / cells)
    return np.minimum(where.astype(np.int64), side - 1)


def _pooled(x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) -> (h, w): adaptive average pooling."""
    for side, cells in zip(x.shape, shape):  # rows, then columns
        bounds = [(i * side // cells, -(-(i + 1) * side // cells)) for i in range(cells)]
        x = np.stack([x[first:end].mean(0) for first, end in bounds]).T
    return x


class LiteVideoMatch:
    """The network of an export; see `VideoMatch`, whose methods of these names do the same.

    Args:
        run: runs the graphs.
        stride: pixels of the network's image on each side of a cell.
        zoom: frames are enlarged by this before the encoder, at least 1.
        dilation: of outlier removal, in pixels.
        mean, std: of the colours of images that the encoder is used to, in [0, 1].
        shown: it can be shown objects.
        side, ridge: see `LiteReader`.
    """

    method = "memory"

    def __init__(self, run: Run, stride: int, zoom: float, dilation: int, mean: list[float],
                 std: list[float], shown: bool, side: int, ridge: float):
        self.run, self.stride, self.zoom, self.dilation = run, stride, zoom, dilation
        self.mean, self.std = np.float32(mean), np.float32(std)
        self.shown, self.reader = shown, LiteReader(run, side, ridge)

    def normalized(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (3, H, W) float32, as the network was trained on."""
        return ((image.astype(np.float32) / 255 - self.mean) / self.std).transpose(2, 0, 1)

    def look(self, image: np.ndarray, prompts: Prompts) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (H/2, W/2) float32, above 0 on the object that is shown in it.

        Raises:
            ValueError: the checkpoint that was exported was not trained for it.
        """
        if not self.shown:
            raise ValueError("expected an export of a checkpoint that can be shown objects by "
                             "boxes and clicks")
        size, image = image.shape[:2], np.ascontiguousarray(self.normalized(image)[None])
        unit, _, near, _, *levels = self.run("encode", image=image)
        shapes = near.shape[:2], levels[0].shape[2:]
        names = "points", "not_points", "fine_points", "fine_not_points"
        clicks = [clicked(points, size, shape) for shape in shapes
                  for points in (prompts.points, prompts.not_points)]
        return self.run("show", image=image, unit=unit,
                        known=evidence(prompts, size, shapes[1])[None],
                        **dict(zip(names, clicks)),
                        **{f"level{i}": level for i, level in enumerate(levels)})[0]

    def encode(self, image: np.ndarray, scale: float = 1.0) -> Frames:
        """(1, 3, H, W) float32, ImageNet-normalised -> its features."""
        size = image.shape[2:]
        height, width = (max(1, round(side * self.zoom * scale / self.stride)) * self.stride
                         for side in size)
        large = cv2.resize(np.ascontiguousarray(image[0].transpose(1, 2, 0)), (width, height),
                           interpolation=cv2.INTER_LINEAR)
        unit, key, near, shared, *levels = self.run(
            "encode", image=np.ascontiguousarray(large.transpose(2, 0, 1))[None])
        return Frames(unit, Seen(unit, key, near, shared), levels, size)

    def memory(self, object_ids: list[int]) -> Memory:
        return Memory(object_ids)

    def refer(self, image: np.ndarray, mask: np.ndarray, memories: list[Memory]) -> Frames:
        """Add a frame whose (1, H, W) mask is known to the memory of its video."""
        frames, memory = self.encode(image), memories[0]
        large = cv2.resize(mask[0], image.shape[:1:-1], interpolation=cv2.INTER_NEAREST_EXACT)
        views = [View(frames.cells, mask[0]), *self.reader.closer(
            lambda part, scale: self.encode(part[None], scale).cells, image[0], large,
            memory.object_ids)]
        self.reader.refer(memory.bank, views, memory.object_ids)
        return frames

    def remember(self, frames: Frames, memories: list[Memory], probabilities: np.ndarray) -> None:
        self.reader.remember(memories[0].bank, frames.cells, probabilities[0])

    def predict(self, frames: Frames, memories: list[Memory],
                shape: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(1, N+1, H, W) float32 probabilities, and (1, N+1, h, w) scores.

        Raises:
            ValueError: the frame's size isn't that of the reference frame.
        """
        bank = memories[0].bank
        if frames.cells.shape != bank.shape:
            raise ValueError(f"expected a frame of the reference frame's size, got {frames.size}")
        height, width = shape or frames.size
        found, scores = self.reader.read(bank, frames)
        logits = [cv2.resize(channel, (width, height), interpolation=cv2.INTER_LINEAR)
                  for channel in found]
        logits = np.stack([np.zeros_like(logits[0]), *logits])
        odds = np.exp(logits - logits.max(0))
        return (odds / odds.sum(0))[None], scores[None]
