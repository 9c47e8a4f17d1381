"""The network of VideoMatch: a frame's features, matched with those of frames whose mask is known.

Hu, Huang, Schwing: VideoMatch: Matching based Video Object Segmentation, ECCV 2018.

It has weights and configuration and nothing of a video: what is known of one is a `Memory`, which
is handed in; a `Tracker` drives both. Run by itself it shows the probabilities:
    python videomatch.py REF.jpg REF_MASK.png TEST.jpg [TEST.jpg ...] [--save DIR]
"""

import argparse
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import preprocess
from media import drawing, figures, files, images
from media.masks import read_masks
from network.decoder import Decoder
from network.encoder import Encoder
from network.matching import Grid, soft_match
from network.memory import Memory, View
from network.outliers import decide

SHIPPED = {"mobilenet": Path(__file__).parent / "models" / "videomatch_mobilenet.pth"}
METHODS = ("matching", "paper", "memory")
CLOSER = (2.0, 4.0)  # how many times nearer the reference frame is looked at too


@dataclass
class Frames:
    """B frames as the network sees them.

    Args:
        grids: the features of each that are matched, on an enlarged grid.
        levels: (B, C, h, w) features of each level of the backbone, finest first.
        size: (H, W) of the images.
    """

    grids: list[Grid]
    levels: list[torch.Tensor]
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of the enlarged grids."""
        return self.grids[0].shape


class VideoMatch(nn.Module):
    """Encode frames, match them with memories of their videos, refine.

    Nothing here changes while a video is segmented, so any number of videos, and threads, may
    share one.

    Args:
        encoder: images to features; see `Encoder`.
        upsample_factor: bilinear enlargement of the feature grid, > 0.
        top_k: K, how many of the best similarities are averaged (the paper: 20).
        temperature: divides the scores before the softmax. Cosines lie in [-1, 1], so
            without it no probability could leave [0.12, 0.88].
        dilation: outlier removal keeps what lies within this many pixels of the object's
            previous mask (the paper: 100).
        recent: how many of the last frames are matched as well; above 0 there is a `Decoder`.
        zoom: in use, not in training, frames are enlarged by this before the encoder, > 0.

    Attributes:
        method: "matching": the scores of the reference frame decide. "paper": its sets grow with
            the video, by the paper's online update. "memory", the default where `recent` is
            above 0: scores, what the recent frames say, and the frame's finer features go
            through the decoder.
        confidence: c, the probability from which the online update believes in an object (the
            paper: 0.95).
        precision: of the encoder and of products; sums are float32.
    """

    EVIDENCE = 7  # channels, see `_evidence`

    def __init__(self, encoder: Encoder, upsample_factor: float = 1.0, top_k: int = 20,
                 temperature: float = 0.05, dilation: int = 100, recent: int = 0,
                 zoom: float = 1.0):
        super().__init__()
        if not upsample_factor > 0:
            raise ValueError(f"upsample factor must be above 0, got {upsample_factor}")
        if top_k < 1:
            raise ValueError(f"top K must be at least 1, got {top_k}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if not zoom > 0:
            raise ValueError(f"zoom must be above 0, got {zoom}")
        if dilation < 0:
            raise ValueError(f"dilation must not be negative, got {dilation}")
        self.encoder, self.upsample_factor = encoder, float(upsample_factor)
        self.top_k, self.temperature, self.dilation = top_k, temperature, dilation
        self.recent, self.zoom = recent, zoom
        self.method, self.confidence = "memory" if recent else "matching", 0.95
        if recent:
            self.decoder = Decoder(self.EVIDENCE, tuple(encoder.spec.levels.values()))
        self.precision = torch.float32
        self.facts: dict = {}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, image: torch.Tensor, scale: float = 1.0) -> Frames:
        """(B, 3, H, W) float32, ImageNet-normalised -> their features.

        Args:
            scale: enlarges the images beyond `zoom`.
        """
        image, size = image.to(self.device), tuple(image.shape[-2:])
        scale = 1.0 if self.training else self.zoom * scale
        if scale != 1:
            image = F.interpolate(image, scale_factor=scale, mode="bilinear",
                                  align_corners=False, antialias=scale < 1)
        with torch.autocast(self.device.type, self.precision,
                            enabled=self.precision != torch.float32):
            features, levels = self.encoder.pyramid(image)
        return Frames([Grid(frame, self.upsample_factor) for frame in features], levels, size)

    def memory(self, object_ids: list[int]) -> Memory:
        """That of a video of which nothing is known yet."""
        # the frames of a clip to train on lie apart already
        return Memory(object_ids, self.recent, every=1 if self.training else 5)

    def refer(self, image: torch.Tensor, mask: torch.Tensor | np.ndarray,
              memories: list[Memory]) -> Frames:
        """Add frames whose masks are known, the reference frames, to the memories of their videos.

        Args:
            image: (B, 3, H, W) float32, ImageNet-normalised.
            mask: (B, H, W) integers, 0 background, else object ids; its size may differ from the
                image's. What none of the memories' objects is is in no set.
            memories: B, with as many objects each.

        Returns:
            The encoded frames.
        """
        image, mask = image.to(self.device), torch.as_tensor(mask).to(self.device)
        frames = self.encode(image)
        for memory, grid, x, y in zip(memories, frames.grids, image, mask):
            views = [(grid, self._sets_of(y, grid.shape, memory.object_ids))]
            if self.method == "memory" and not self.training:
                views += self._closer(x, y, memory.object_ids)
            memory.refer(views)
        if self.method == "memory":
            found = torch.stack([mask == i for i in (0, *memories[0].object_ids)], 1).float()
            self.remember(frames, memories, found, given=True)
        return frames

    @staticmethod
    def _sets_of(mask: torch.Tensor, shape: tuple[int, int], object_ids) -> torch.Tensor:
        """(H, W) object ids -> (h, w) the set of each feature cell."""
        labels = cell_labels(mask[None], shape)[0]
        sets = torch.full_like(labels, -1)
        for i, object_id in enumerate((0, *object_ids)):
            sets[labels == object_id] = i
        return sets

    def _closer(self, image: torch.Tensor, mask: torch.Tensor, object_ids) -> Iterator[View]:
        """(3, H, W) and (H, W): how each object and what is around it would look from nearer.

        An object that comes closer is matched with these.
        """
        mask = F.interpolate(mask[None, None].float(), size=image.shape[1:],
                             mode="nearest-exact")[0, 0].long()
        for object_id in set(object_ids) & set(mask.unique().tolist()):
            for scale in CLOSER:
                part = around(mask == object_id, scale)
                grid = self.encode(image[None, :, *part], scale).grids[0]
                yield grid, self._sets_of(mask[part], grid.shape, object_ids)

    def _finest(self, grid: Grid) -> Grid:
        """The layer that knows best where things are, for matching near a position."""
        return Grid(grid.features[:self.encoder.spec.finest], grid.factor)

    def remember(self, frames: Frames, memories: list[Memory], probabilities: torch.Tensor,
                 given: bool = False) -> None:
        """Keep frames for those to come.

        Args:
            probabilities: (B, N+1, H, W) what was found in them.
            given: they are reference frames.
        """
        cells = F.interpolate(probabilities, size=frames.shape, mode="bilinear",
                              align_corners=False, antialias=True)
        for memory, grid, labels in zip(memories, frames.grids, cells):
            memory.recent.add(self._finest(grid), labels)
            memory.past.add(grid.features, labels, given)

    def predict(self, frames: Frames, memories: list[Memory],
                shape: tuple[int, int] | None = None) -> torch.Tensor:
        """Probabilities of background and objects.

        Args:
            memories: that of the video of each frame.
            shape: (H, W) of the result; None takes the images'.

        Returns:
            (B, N+1, H, W) float32 that sum to 1 over the channels: background, then the memories'
            objects in order. Differentiable.

        Raises:
            RuntimeError: there is no reference frame yet.
            ValueError: the method is "memory", and the frames' size isn't that of the reference.
        """
        scores = self.match(frames, memories)
        logits = (self.refine(frames, memories, scores) if self.method == "memory"
                  else scores / self.temperature)
        return self.enlarged(logits, shape or frames.size)

    def match(self, frames: Frames, memories: list[Memory]) -> torch.Tensor:
        """(B, N+1, h, w) scores of soft matching (section 3.1), cosines in [-1, 1]."""
        if any(memory.sets is None for memory in memories):
            raise RuntimeError("nothing to match with: refer to a reference frame first")
        return torch.stack([soft_match(grid, memory.sets.reference, self.top_k)
                            for grid, memory in zip(frames.grids, memories)])

    def refine(self, frames: Frames, memories: list[Memory],
               scores: torch.Tensor) -> torch.Tensor:
        """(B, N+1, h, w) scores -> (B, N+1, H/4, W/4) logits; that of the background is 0."""
        if frames.shape != memories[0].recent.shape:
            raise ValueError(f"expected a frame of the reference frame's size, got {frames.size}")
        evidence = torch.stack([self._evidence(*parts)
                                for parts in zip(scores, frames.grids, memories)])
        logits = self.decoder(evidence, [level.float() for level in frames.levels])
        return F.pad(logits, (0, 0, 0, 0, 1, 0))

    @staticmethod
    def enlarged(logits: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """(B, N+1, h, w) logits -> (B, N+1, *shape) probabilities."""
        logits = F.interpolate(logits, size=tuple(shape), mode="bilinear", align_corners=False)
        return logits.softmax(1)

    def _evidence(self, scores: torch.Tensor, grid: Grid, memory: Memory) -> torch.Tensor:
        """(N, EVIDENCE, h, w): what speaks for each object of a frame and against it."""
        labels, similarity = memory.recent.propagate(self._finest(grid))  # (N+1, h, w), (h, w)
        far = F.interpolate(memory.past.propagate(grid.features)[None], size=grid.shape,
                            mode="bilinear", align_corners=False)[0]
        before, objects = memory.recent.labels[-1], []
        for i in range(1, len(scores)):
            others = torch.cat([scores[:i], scores[i + 1:]]).amax(0)
            objects.append(torch.stack([10 * (scores[i] - others), scores[i], others,
                                        labels[i], before[i], similarity, far[i]]))
        return torch.stack(objects)

    def update_online(self, frames: Frames, memory: Memory, before: torch.Tensor,
                      after: torch.Tensor) -> None:
        """Add a frame's features that are sure of their set (the paper's online update).

        An object's: above `confidence` after outlier removal, so within the extruded previous
        mask. The background's: taken for an object and removed as outliers, which tells the next
        frames what only looks like one.

        Args:
            before, after: (N+1, H, W) probabilities, of outlier removal.
        """
        grid = frames.grids[0]
        before, after = (F.interpolate(p[None], size=grid.shape, mode="bilinear",
                                       align_corners=False, antialias=True)[0]
                         for p in (before, after))
        best, labels = after[1:].max(0)
        labels = torch.where(best > self.confidence, labels + 1, -1)
        labels[(before[0] < 0.5) & (after[0] > self.confidence)] = 0
        memory.sets.update(grid, labels)

    def save(self, path: str | Path, **facts) -> None:
        """Write a checkpoint that needs no flags to be loaded: weights and configuration.

        Args:
            facts: numbers and texts kept beside it, such as `held_out_iou`.
        """
        save(path, {"config": self.configuration(), "facts": facts, "model": self.state_dict()})

    def digest(self) -> str:
        """SHA-256 of weights and configuration, in hexadecimal: equal for equal models only."""
        found = hashlib.sha256(repr(self.configuration()).encode())
        for name, tensor in self.state_dict().items():
            found.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def configuration(self) -> dict:
        """What it takes, beside the weights, to build the model again."""
        return {"encoder": self.encoder.name, "layer": self.encoder.spec.layer,
                "upsample_factor": self.upsample_factor, "top_k": self.top_k,
                "temperature": self.temperature, "dilation": self.dilation,
                "recent": self.recent, "zoom": self.zoom}

    @classmethod
    def load(cls, path: str | Path) -> "VideoMatch":
        """Build the model that `save` wrote, on the CPU. `facts` holds what was kept beside it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a checkpoint of this toolkit.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected a checkpoint written by "
                                    "--model_save")
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            config = dict(checkpoint["config"])
            encoder = Encoder(config.pop("encoder"))
            layer = config.pop("layer")
            if layer != encoder.spec.layer:
                raise ValueError(f"features of layer {layer}, expected {encoder.spec.layer}")
            model = cls(encoder, **config)
            model.load_state_dict(checkpoint["model"])
            model.facts = dict(checkpoint["facts"])
            for name, tensor in model.state_dict().items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{name} holds values that are not finite")
        except Exception as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise ValueError(f"{path}: not a checkpoint of this toolkit ({reason})") from error
        return model


def save(path: str | Path, content: dict) -> None:
    """Write what `torch.save` writes, whole or not at all; raises an OSError as `files.write`."""
    buffer = io.BytesIO()  # on a full disk torch.save itself raises a RuntimeError
    torch.save(content, buffer)
    files.write(path, buffer.getvalue())


def cell_labels(mask: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """(B, H, W) object ids -> (B, h, w) object ids of the feature cells, by nearest neighbour.

    An object too small to be met by any cell's centre gets the cell that holds most of it.
    """
    cells = F.interpolate(mask[:, None].float(), size=shape, mode="nearest-exact")[:, 0].long()
    for frame, grid in zip(mask, cells):
        for object_id in set(frame.unique().tolist()) - set(grid.unique().tolist()) - {0}:
            share = F.adaptive_avg_pool2d((frame == object_id)[None].float(), shape)[0]
            grid.view(-1)[share.argmax()] = object_id
    return cells


def around(mask: torch.Tensor, scale: float) -> tuple[slice, slice]:
    """Rows and columns of the part of a frame that shows an object `scale` times as near.

    Args:
        mask: (H, W) bool, somewhere true: the object, whose middle is that of the part, or as
            close to it as the frame's edges allow.
    """
    part = []
    for found, side in zip(mask.nonzero(as_tuple=True), mask.shape):
        length = max(1, round(side / scale))
        middle = (int(found.min()) + int(found.max()) + 1) / 2
        first = min(max(0, round(middle - length / 2)), side - length)
        part.append(slice(first, first + length))
    return part[0], part[1]


def main():
    parser = argparse.ArgumentParser(
        description="Show the foreground and background probabilities of test frames.")
    parser.add_argument("reference", type=Path, help="the reference frame")
    parser.add_argument("mask", type=Path, help="the mask of the object in the reference frame")
    parser.add_argument("tests", type=Path, nargs="+", metavar="TEST", help="frames to search")
    parser.add_argument("--model_load", "-o", type=Path, default=SHIPPED["mobilenet"],
                        metavar="PATH", help="checkpoint (default: the one in models/)")
    parser.add_argument("--save", metavar="DIR", type=Path,
                        help="write the figures there instead of opening windows")
    args = parser.parse_args()
    try:
        show(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))


@torch.no_grad()
def show(args) -> None:
    model = VideoMatch.load(args.model_load).eval()
    image = images.read_image(args.reference)
    mask = read_masks({0: [args.mask]}, image.shape[:2], args.reference)[0]
    memory = model.memory([i for i in np.unique(mask).tolist() if i])
    model.refer(preprocess.to_tensor(image)[None], mask[None], [memory])
    for path in args.tests:
        test = images.read_image(path)
        frames = model.encode(preprocess.to_tensor(test)[None])
        probabilities = model.predict(frames, [memory])[0].cpu().numpy()
        panels = [
            ("reference frame", image), ("reference mask", drawing.overlay(image, mask)),
            (f"test frame {path.name}", test), ("foreground probability", 1 - probabilities[0]),
            ("background probability", probabilities[0]),
            ("result", drawing.overlay(test, decide(probabilities, memory.object_ids)))]
        name = f"{path.stem}_probabilities.png"
        figures.show_or_save(panels, 3, args.save and args.save / name, default=Path(name))


if __name__ == "__main__":
    main()
