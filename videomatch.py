"""The network of VideoMatch: a frame's features, matched with those of frames whose mask is known.

Hu, Huang, Schwing: VideoMatch: Matching based Video Object Segmentation, ECCV 2018.

It has weights and configuration and nothing of a video: what is known of one is a `Memory`, which
is handed in; a `Tracker` drives both. Run by itself it shows the probabilities:
    python videomatch.py REF.jpg REF_MASK.png TEST.jpg [TEST.jpg ...] [--save DIR]
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import preprocess
from checkpoint import Checkpointed
from masks.read import read_masks
from masks.validation import check_id_masks, check_normalized
from media import drawing, figures, images
from media.prompts import Prompts
from network.bank import Cells, Frames
from network.decoder import Decoder
from network.encoder import Encoder
from network.matching import Grid, soft_match
from network.memory import Memory
from network.object_tokens import ObjectTokens
from network.outliers import decide
from network.prompts import PromptDecoder, looked
from network.reader import EVIDENCE, Reader, foreground_first, rivals, with_union
from network.rules import View
from network.sets import refer
from network.views import sets_of
from system import errors

SHIPPED = {"mobilenet": Path(__file__).parent / "models" / "videomatch_mobilenet.pth"}
METHODS = ("matching", "paper", "memory")


class VideoMatch(Checkpointed):
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
        refined: there are a `Reader` and a `Decoder`.
        zoom: in use, not in training, frames are enlarged by this before the encoder, > 0.
        prompts: there is a `PromptDecoder`, for which no part of a video's road has any use.
        object_tokens: there are `ObjectTokens` beside the memory.
        edges: the decoder has a level of stride 2.

    Attributes:
        method: "matching": the scores of the reference frame decide. "paper": its sets grow with
            the video, by the paper's online update. "memory", the default where it is
            `refined`: what the reader finds in earlier frames, and the frame's finer features,
            go through the decoder.
        confidence: c, the probability from which the online update believes in an object (the
            paper: 0.95).
        precision: of the encoder and of products; sums are float32.
    """

    def __init__(self, encoder: Encoder, upsample_factor: float = 1.0, top_k: int = 20,
                 temperature: float = 0.05, dilation: int = 100, refined: bool = False,
                 zoom: float = 1.0, prompts: bool = False, object_tokens: bool = False,
                 edges: bool = False):
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
        self.refined, self.zoom = refined, zoom
        self.method, self.confidence = "memory" if refined else "matching", 0.95
        spec = encoder.spec
        channels = tuple(spec.levels.values())
        if refined:
            self.reader = Reader(spec.channels, spec.finest, 2 ** spec.finer)
            if object_tokens:
                self.reader.tokens = ObjectTokens(spec.channels, EVIDENCE)
            # NHWC, as in the encoder
            self.decoder = Decoder(EVIDENCE, channels, spec.finer,
                                   spec.stem[1] if edges else 0).to(
                                       memory_format=torch.channels_last)
        self.object_tokens, self.edges = object_tokens, edges
        self.prompts = PromptDecoder(channels) if prompts else None
        self.precision = torch.float32

    def extend(self) -> None:
        """Add object tokens and the level of stride 2, unless they are there.

        They have no effect until they are trained, so that a checkpoint without them can be.
        """
        spec = self.encoder.spec
        whole = VideoMatch(self.encoder, refined=True, object_tokens=True, edges=bool(spec.stem))
        if not self.object_tokens:
            self.object_tokens, self.reader.tokens = True, whole.reader.tokens.to(self.device)
        if not self.edges and spec.stem:
            self.edges, self.decoder.edges = True, whole.decoder.edges.to(self.device)

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
        if self.method == "memory":  # whole cells, of which the finest level divides each
            stride = self.encoder.spec.stride
            image = _resized(image, [max(1, round(side * scale / stride)) * stride
                                     for side in size], antialias=scale < 1)
        elif scale != 1:
            image = F.interpolate(image, scale_factor=scale, mode="bilinear",
                                  align_corners=False, antialias=scale < 1)
        with self._in_precision():
            features, levels = self.encoder.pyramid(image, self.edges)
        cells = []
        if self.method == "memory":
            precision = torch.float32 if self.training else self.precision
            cells = [self.reader.look(x, precision) for x in features]
        return Frames(features, levels, size, cells)

    def _in_precision(self):
        return torch.autocast(self.device.type, self.precision,
                              enabled=self.precision != torch.float32)

    def memory(self, object_ids: list[int]) -> Memory:
        """That of a video of which nothing is known yet."""
        # the frames of a clip to train on lie apart already
        return Memory(object_ids, every=1 if self.training else 5)

    def refer(self, image: torch.Tensor, mask: torch.Tensor | np.ndarray, memories: list[Memory],
              frames: Frames | None = None) -> Frames:
        """Add frames whose masks are known, the reference frames, to the memories of their videos.

        Args:
            image: (B, 3, H, W) float32, ImageNet-normalised.
            mask: (B, H, W) integers, 0 background, else object ids; its size may differ from the
                image's. What none of the memories' objects is is in no set.
            memories: B, with as many objects each.
            frames: the images encoded, if they are already.

        Returns:
            The encoded frames.

        Raises:
            ValueError: other dimensions or types, or an image that isn't normalised.
        """
        check_normalized(image, dimensions=4)
        check_id_masks(mask)
        image, mask = image.to(self.device), torch.as_tensor(mask).to(self.device)
        frames = frames or self.encode(image)
        if self.method == "memory":
            for memory, cells, x, y in zip(memories, frames.cells, image, mask):
                views = [View(cells, y)]
                if not self.training:
                    y = F.interpolate(y[None, None].float(), size=x.shape[1:],
                                      mode="nearest-exact")[0, 0].long()
                    views += self.reader.closer(self._look, x, y, memory.object_ids)
                self.reader.refer(memory.bank, views, memory.object_ids)
        if self.method != "memory" or self.training:
            for memory, features, y in zip(memories, frames.features, mask):
                grid = self._grid(features)
                refer(memory, [(grid, sets_of(y, grid.shape, memory.object_ids))])
        return frames

    def _look(self, image: torch.Tensor, scale: float) -> Cells:
        return self.encode(image[None], scale).cells[0]

    def _grid(self, features: torch.Tensor) -> Grid:
        """(C, h, w), to match with all features; beside keys, in training, on the small grid."""
        return Grid(features, 1.0 if self.method == "memory" else self.upsample_factor)

    def remember(self, frames: Frames, memories: list[Memory], probabilities: torch.Tensor) -> None:
        """Keep frames for those to come.

        Args:
            probabilities: (B, N+1, H, W) what was found in them.
        """
        for memory, cells, found in zip(memories, frames.cells, probabilities):
            self.reader.remember(memory.bank, cells, found)

    def predict(self, frames: Frames, memories: list[Memory],
                shape: tuple[int, int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities, and how like each cell is to what is remembered of each object.

        Args:
            memories: that of the video of each frame, with as many objects each.
            shape: (H, W) of the result; None takes the images'.

        Returns:
            (B, N+1, H, W) float32 that sum to 1 over the channels: background, then the memories'
            objects in order; (B, N+1, h, w) cosines. Differentiable.

        Raises:
            RuntimeError: there is no reference frame yet.
            ValueError: the method is "memory", and the frames' size isn't that of the reference.
        """
        if self.method == "memory":
            logits, scores, _ = self.refine(frames, memories)
        else:
            logits = (scores := self.match(frames, memories)) / self.temperature
        return self.enlarged(logits, shape or frames.size), scores

    def match(self, frames: Frames, memories: list[Memory]) -> torch.Tensor:
        """(B, N+1, h, w) scores of soft matching (section 3.1), cosines in [-1, 1]."""
        if any(memory.sets is None for memory in memories):
            raise RuntimeError("nothing to match with: refer to a reference frame first")
        return torch.stack([soft_match(self._grid(features), memory.sets.reference, self.top_k)
                            for features, memory in zip(frames.features, memories)])

    def refine(self, frames: Frames, memories: list[Memory]
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """By method "memory": logits, the scores of the keys alone, logits of object tokens alone.

        Returns:
            (B, N+1, H/4, W/4) logits (H/2, W/2 with `edges`), those of the background 0;
            (B, N+1, h, w) scores, cosines; (B, N+1, h, w) logits, None without `object_tokens`.
        """
        if any(memory.bank.shape is None for memory in memories):
            raise RuntimeError("nothing to match with: refer to a reference frame first")
        found = []
        for i, (memory, cells) in enumerate(zip(memories, frames.cells)):
            if cells.shape != memory.bank.shape:
                raise ValueError("expected a frame of the reference frame's size, got "
                                 f"{frames.size}")
            evidence, scores = self.reader.read(memory.bank, cells)
            before, coarse = memory.bank.recent[-1].found[1:], None
            if self.object_tokens:
                evidence, coarse = self.reader.tokens(cells.unit, memory.bank.tokens, evidence,
                                                      self.reader.shares(before))
            with self._in_precision():
                logits = self.decoder(evidence,
                                      torch.stack([with_union(before), rivals(before)], 1),
                                      [level[i:i + 1] for level in frames.levels])
            logits = foreground_first(logits.float(), len(before))
            found.append((_beside_background(logits), scores,
                          None if coarse is None else _beside_background(coarse)))
        logits, scores, coarse = zip(*found)
        return (torch.stack(logits), torch.stack(scores),
                torch.stack(coarse) if self.object_tokens else None)

    @staticmethod
    def enlarged(logits: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """(B, N+1, h, w) logits -> (B, N+1, *shape) probabilities."""
        logits = F.interpolate(logits, size=tuple(shape), mode="bilinear", align_corners=False)
        return logits.softmax(1)

    def update_online(self, frames: Frames, memory: Memory, before: torch.Tensor,
                      after: torch.Tensor) -> None:
        """Add a frame's features that are sure of their set (the paper's online update).

        An object's: above `confidence` after outlier removal, so within the extruded previous
        mask. The background's: taken for an object and removed as outliers, which tells the next
        frames what only looks like one.

        Args:
            before, after: (N+1, H, W) probabilities, of outlier removal.
        """
        grid = self._grid(frames.features[0])
        before, after = (F.interpolate(p[None], size=grid.shape, mode="bilinear",
                                       align_corners=False, antialias=True)[0]
                         for p in (before, after))
        best, labels = after[1:].max(0)
        labels = torch.where(best > self.confidence, labels + 1, -1)
        labels[(before[0] < 0.5) & (after[0] > self.confidence)] = 0
        memory.sets.update(grid, labels)

    def look(self, image: np.ndarray, prompts: Prompts) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (H/2, W/2) float32, above 0 on the object that is shown in it."""
        tensor = preprocess.to_tensor(image)[None].to(self.device)
        return looked(self.encoder, self.prompts, tensor, prompts).cpu().numpy()

    def configuration(self) -> dict:
        # unless it is there nothing is said of it: older models keep their digest
        shown = {name: True for name, there in (
            ("prompts", self.prompts is not None), ("object_tokens", self.object_tokens),
            ("edges", self.edges)) if there}
        return {"encoder": self.encoder.name, "layer": self.encoder.spec.layer,
                "upsample_factor": self.upsample_factor, "top_k": self.top_k,
                "temperature": self.temperature, "dilation": self.dilation,
                "refined": self.refined, "zoom": self.zoom, **shown}

    @classmethod
    def configured(cls, config: dict) -> "VideoMatch":
        config = dict(config)
        encoder, layer = Encoder(config.pop("encoder")), config.pop("layer")
        if config.pop("recent", 0):
            raise ValueError("of an earlier version's --method memory: train again, or take "
                             "the one in models/")
        if layer != encoder.spec.layer:
            raise ValueError(f"features of layer {layer}, expected {encoder.spec.layer}")
        return cls(encoder, **config)


def _beside_background(logits: torch.Tensor) -> torch.Tensor:
    """(N, h, w) logits of objects -> (N+1, h, w), those of the background 0."""
    return F.pad(logits[None], (0, 0, 0, 0, 1, 0))[0]


def _resized(image: torch.Tensor, size, antialias: bool) -> torch.Tensor:
    if list(image.shape[-2:]) == list(size):
        return image
    return F.interpolate(image, list(size), mode="bilinear", antialias=antialias)


def main():
    parser = argparse.ArgumentParser(description="Show the probabilities of test frames.")
    parser.add_argument("reference", type=Path, help="the reference frame")
    parser.add_argument("mask", type=Path, help="the mask of the object in the reference frame")
    parser.add_argument("tests", type=Path, nargs="+", metavar="TEST", help="frames to search")
    parser.add_argument("--model_load", "-o", type=Path, default=SHIPPED["mobilenet"],
                        metavar="PATH", help="checkpoint (default: the one in models/)")
    parser.add_argument("--save", metavar="DIR", type=Path, help="write figures, open no windows")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what was guessed
    with errors.one_line(parser):
        show(args)


@torch.no_grad()
def show(args) -> None:
    if len({path.stem for path in args.tests}) < len(args.tests):
        raise ValueError("two test frames of one name, whose figures would be one file")
    model = VideoMatch.load(args.model_load).eval()
    image = images.read_image(args.reference)
    mask = read_masks({0: [args.mask]}, image.shape[:2], args.reference)[0]
    memory = model.memory([i for i in np.unique(mask).tolist() if i])
    model.refer(preprocess.to_tensor(image)[None], mask[None], [memory])
    for path in args.tests:
        test = images.read_image(path)
        frames = model.encode(preprocess.to_tensor(test)[None])
        probabilities = model.predict(frames, [memory])[0][0].cpu().numpy()
        panels = [
            ("reference frame", image), ("reference mask", drawing.overlay(image, mask)),
            (f"test frame {path.name}", test), ("foreground probability", 1 - probabilities[0]),
            ("background probability", probabilities[0]),
            ("result", drawing.overlay(test, decide(probabilities, memory.object_ids)))]
        name = f"{path.stem}_probabilities.png"
        figures.show_or_save(panels, 3, args.save and args.save / name, default=Path(name))


if __name__ == "__main__":
    main()
