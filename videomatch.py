"""The VideoMatch network: segments a frame by matching it with reference frames and a memory.

Hu, Huang, Schwing: VideoMatch: Matching based Video Object Segmentation, ECCV 2018.

`VideoMatch` holds weights and settings only. Everything known about a video is a `State` (or, for
the methods "matching" and "paper", a `Sets`) that the caller keeps: methods take one and return the
next. `tracking.tracker.Tracker` does so frame by frame.

As a script it shows the probabilities of single frames:
    python videomatch.py REF.jpg REF_MASK.png TEST.jpg [TEST.jpg ...] [--save DIR]
"""

import argparse
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F

import preprocess
from masks.read import read_masks
from masks.validation import check_normalized, id_mask
from media import drawing, figures, images
from media.prompts import Prompts
from network import precision
from network.checkpoint import Checkpointed
from network.decoder import Decoder
from network.encoder import Encoder
from network.matching import Grid, soft_match
from network.outliers import decide
from network.prompt_decoder import PromptDecoder
from network.reader import READOUT, Reader, foreground_first, rivals, with_union
from network.sets import Sets
from network.state import INTEGERS, KEYS, Features, State, blank, without
from network.views import labels_of, reference
from system import errors
from tracking.tracker import Tracker

log = logging.getLogger(__name__)

# The checkpoints in models/, by the name of their encoder
SHIPPED = {"mobilenet": Path(__file__).parent / "models" / "videomatch_mobilenet.pth"}
METHODS = ("matching", "paper", "memory")


def load_tracker(checkpoint: str | Path = SHIPPED["mobilenet"],
                 device: str | torch.device = "cpu", **settings) -> Tracker:
    """Load a checkpoint for inference and return a tracker for one video.

        tracker = load_tracker()
        tracker.step(first_frame, first_mask)
        mask = tracker.step(next_frame).mask

    Frames are (H, W, 3) uint8 RGB, masks (H, W) object ids; see `Tracker.step`.

    Args:
        checkpoint: file written by training; defaults to the one in models/.
        device: "cpu", "cuda", "cuda:1" or "mps".
        settings: arguments of `Tracker`, such as `size` and `threshold`.

    Raises:
        FileNotFoundError, ValueError: as `VideoMatch.load`.
    """
    return Tracker(VideoMatch.load(checkpoint).to(device).for_inference(), **settings)


class VideoMatch(Checkpointed):
    """Encodes frames, matches them with the memory of their video and decodes masks.

    Nothing in it changes during inference, so any number of videos and threads may share a network.

    Args:
        encoder: computes features from images.
        upsample_factor: bilinear enlargement of the feature map before matching, > 0. Used by the
            methods "matching" and "paper" (section 3.1: features are upsampled).
        top_k: K, the number of best similarities that are averaged (20 in the paper).
        temperature: divides the scores before the softmax, > 0. Cosines lie in [-1, 1], so
            without it no probability could leave [0.12, 0.88].
        dilation: outlier removal keeps pixels within this distance, in pixels, of the object's
            previous mask (100 in the paper).
        refined: add a `Reader` and a `Decoder`, which the method "memory" needs.
        zoom: enlargement of the frames before the encoder, > 0, at inference only. A larger one
            finds smaller objects, at a cost in proportion to its square.
        prompts: add a `PromptDecoder`, which turns boxes and points into masks; tracking doesn't
            use it.

    Attributes:
        method: "matching": soft matching with the reference frames only. "paper": the same, but the
            sets grow during the video by the paper's online update. "memory", the default of a
            `refined` network: the memory readout and finer features of the frame are decoded.
        confidence: c, the probability above which the online update adds a location to an object's
            set (0.95 in the paper).
        precision: data type of the encoder, the decoder and the memory's keys; everything else is
            float32.
    """

    def __init__(self, encoder: Encoder, upsample_factor: float = 1.0, top_k: int = 20,
                 temperature: float = 0.05, dilation: int = 100, refined: bool = False,
                 zoom: float = 1.0, prompts: bool = False):
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
            # NHWC, as in the encoder
            self.decoder = Decoder(READOUT, channels, spec.finer).to(
                memory_format=torch.channels_last)
        self.prompts = PromptDecoder(channels) if prompts else None
        self.precision = torch.float32

    def for_inference(self, precision_name: str | None = None) -> Self:
        """Fold BatchNorm into convolutions and choose the precision.

        The network can't be trained afterwards. The digest of the weights before folding is kept in
        `metadata`, since it identifies the checkpoint.

        Args:
            precision_name: a key of `precision.NAMES`; None chooses the fastest one that has no
                visible effect on masks on this device.

        Returns:
            The network itself, in eval mode.
        """
        self.metadata["digest"] = self.digest()
        self.eval().encoder.fold_batchnorm()
        self.precision = precision.of(precision_name, self.device, self.method)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, image: torch.Tensor, grid: tuple[int, int] | None = None) -> Features:
        """Compute the features of images.

        Args:
            image: (B, 3, H, W) float32, ImageNet-normalised.
            grid: size (h, w) of the feature map, for which the images are resized; by default it
                follows from their size, enlarged by `zoom`. Method "memory" only.
        """
        image, size = image.to(self.device), image.shape[-2:]
        scale = 1.0 if self.training else self.zoom
        if self.method == "memory":
            # sides are multiples of the stride, so that finer levels divide evenly into locations
            stride = self.encoder.spec.stride
            grid = grid or [max(1, round(side * scale / stride)) for side in size]
            image = _resized(image, [side * stride for side in grid],
                             antialias=grid[0] * stride < size[0])
        elif scale != 1:
            image = F.interpolate(image, scale_factor=scale, mode="bilinear",
                                  align_corners=False, antialias=scale < 1)
        with self._in_precision():
            features, levels = self.encoder.pyramid(image)
        if self.method != "memory":
            return Features(features)
        precision = torch.float32 if self.training else self.precision
        return self.reader.describe(features, levels, precision)

    def _in_precision(self):
        if self.precision == torch.float32:  # not every device has autocast
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def start(self, state: State | None, features: Features, masks: torch.Tensor,
              labels: torch.Tensor) -> State:
        """Add a reference frame to the state of a video.

        Args:
            state: None before the first reference frame.
            features: of V views, the frame first, then zoomed crops of its objects.
            masks, labels: their reference masks, see `Reader.start`.
        """
        if state is None:
            def zeros(name, shape):
                dtype = torch.long if name in INTEGERS else torch.float32
                return torch.zeros(shape, dtype=features.key.dtype if name in KEYS else dtype,
                                   device=self.device)
            state = blank(features.local_key.shape[1:3], masks.shape[1] - 1, self.reader.widths,
                          zeros)
        return self.reader.start(state, features, masks, labels)

    def step(self, state: State, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the logits of a frame from the state; `remember` then returns the next state.

        Returns:
            (N+1, H/4, W/4) logits, channel 0 the background with logit 0; (N+1, h, w) scores of
            soft matching, cosines in [-1, 1]. Differentiable.
        """
        readout, scores = self.reader.read(state, features)
        previous = state.previous[1:]
        with self._in_precision():
            logits = self.decoder(readout, torch.stack([with_union(previous), rivals(previous)], 1),
                                  features.levels)
        logits = foreground_first(logits.float(), previous.shape[0])
        return F.pad(logits, (0, 0, 0, 0, 1, 0)), scores  # prepend the background's logit, 0

    def remember(self, state: State, features: Features, probabilities: torch.Tensor,
                 long: bool) -> State:
        """Return the state after a frame.

        Separate from `step`, because the memory holds the final mask, which depends on connected
        components (see `network.outliers`), for which ONNX has no operator.

        Args:
            probabilities: (N+1, H, W), of any size, after outlier removal.
            long: also add the frame to the long-term memory.
        """
        return self.reader.remember(state, features, probabilities, long)

    # for any method

    def add_reference(self, state: Any, image: torch.Tensor, mask: np.ndarray,
              object_ids: Sequence[int]) -> State | Sets:
        """Add a reference frame.

        Args:
            state: a `State`, or `Sets` if the method is not "memory"; None before the first
                reference frame.
            image: (1, 3, H, W) float32, ImageNet-normalised.
            mask: (H, W) object ids; its size may differ from the image's. Pixels with other ids
                than `object_ids` are ignored.
            object_ids: all tracked objects, those in the state first.

        Raises:
            ValueError: image or mask has other dimensions or another type, the image is not
                normalised, or (method "memory") its size is not that of the first reference frame.
        """
        check_normalized(image, dimensions=4)
        mask = id_mask(mask)
        if self.method == "memory":
            features, *rest = reference(self, image, mask, object_ids)
            if state is not None:
                state.check_size(features)
            return self.start(state, features, *(self.array(x) for x in rest))
        return self.add_to_sets(state, self.encode(image).matched[0], mask, object_ids)

    def add_to_sets(self, state: Sets | None, features: torch.Tensor, mask: np.ndarray,
                   object_ids: Sequence[int]) -> Sets:
        """Add the (C, h, w) features of a reference frame to foreground and background sets.

        Other arguments as for `add_reference`.
        """
        grid, sets = self._grid(features), len(object_ids) + 1
        labels = self.array(labels_of(mask, grid.shape, object_ids))
        return (state or Sets(sets)).add_reference(grid, labels, sets)

    def predict(self, state: Any, features: Features, shape: tuple[int, int]) -> torch.Tensor:
        """Predict the probabilities of a frame, by any method.

        Args:
            state: as `add_reference` returns it.
            features: of one frame.
            shape: (H, W) of the probabilities.

        Returns:
            (N+1, H, W) probabilities, channel 0 the background, summing to 1. Differentiable.

        Raises:
            RuntimeError: there is no reference frame yet.
            ValueError: method "memory": the frame has another size than the reference frame.
        """
        if state is None:
            raise RuntimeError("nothing to match with: add a reference frame first")
        if self.method == "memory":
            state.check_size(features)
            return self.to_probabilities(self.step(state, features)[0], shape, decoded=True)
        return self.to_probabilities(self.match(features, state) / self.temperature, shape)

    def match(self, features: Features, sets: Sets) -> torch.Tensor:
        """Return the (N+1, h, w) scores of soft matching (section 3.1), mean cosines in [-1, 1]."""
        return soft_match(self._grid(features.matched[0]), sets.reference, self.top_k)

    def _grid(self, features: torch.Tensor) -> Grid:
        """Prepare (C, h, w) features for matching.

        Method "memory" needs soft matching for an auxiliary loss only and doesn't upsample them.
        """
        return Grid(features, 1.0 if self.method == "memory" else self.upsample_factor)

    def array(self, x: np.ndarray) -> torch.Tensor:
        """Copy an array to the network's device."""
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

    def without(self, state: State | Sets, channel: int) -> State | Sets:
        """Return a state without one object; `channel` is its channel in the probabilities."""
        if isinstance(state, State):
            return self.reader.revalued(without(state, channel))
        return state.without(channel)

    def serialize(self, state: State | Sets) -> dict:
        """Convert a state to numbers, lists and tensors, which load without running code."""
        return state._asdict() if isinstance(state, State) else state.plain()

    def deserialize(self, plain: dict) -> State | Sets:
        """Convert the output of `serialize` back.

        Raises:
            KeyError, TypeError, ValueError: it is malformed.
        """
        return State(**plain) if self.method == "memory" else Sets.from_plain(plain)

    @property
    def side(self) -> int:
        """Pixels along each side of a location in the masks that the memory stores."""
        return self.reader.side

    concatenate = staticmethod(torch.cat)
    inference = staticmethod(torch.no_grad)

    @staticmethod
    def to_probabilities(logits: torch.Tensor, shape: tuple[int, int],
                         decoded: bool = False) -> torch.Tensor:
        """Turn (N+1, h, w) logits into probabilities of size `shape`, (N+1, H, W).

        Args:
            decoded: of `step`, whose background has logit 0. They are resized bicubically: between
                two locations bilinear interpolation flattens the peaks that thin parts consist of.
        """
        if not decoded:
            return F.interpolate(logits[None], size=tuple(shape), mode="bilinear",
                                 align_corners=False).softmax(1)[0]
        # `antialias` has no effect on an enlargement, but chooses a separable implementation, five
        # times as fast, and the kernel that Pillow has too (see lite_runtime/model.py)
        objects = F.interpolate(logits[None, 1:], size=tuple(shape), mode="bicubic",
                                align_corners=False, antialias=True)
        return F.pad(objects[0], (0, 0, 0, 0, 1, 0)).softmax(0)

    def online_update(self, sets: Sets, features: Features, before: torch.Tensor,
                      after: torch.Tensor) -> Sets:
        """Add the confident features of a frame to the sets (the paper's online update).

        A location joins an object's set if its probability exceeds `confidence` after outlier
        removal, so only within the extruded previous mask. It joins the background's set if it was
        foreground before outlier removal and is confidently background after it: those are the
        distractors that the next frames should not match.

        Args:
            before, after: (N+1, H, W) probabilities before and after outlier removal.
        """
        grid = self._grid(features.matched[0])
        before, after = (F.interpolate(p[None], size=grid.shape, mode="bilinear",
                                       align_corners=False, antialias=True)[0]
                         for p in (before, after))
        best, labels = after[1:].max(0)
        labels = torch.where(best > self.confidence, labels + 1, -1)
        labels[(before[0] < 0.5) & (after[0] > self.confidence)] = 0
        return sets.update(grid, labels)

    def normalized(self, image: np.ndarray) -> torch.Tensor:
        """Normalise an (H, W, 3) uint8 RGB image: (3, H, W) float32 on the network's device."""
        return preprocess.to_tensor(image, device=self.device)

    @torch.no_grad()
    def segment_from_prompts(self, image: np.ndarray, prompts: Prompts) -> np.ndarray:
        """Segment the prompted object: (H, W, 3) uint8 RGB -> (H/2, W/2) float32 logits.

        Raises:
            ValueError: the checkpoint has no prompt decoder.
        """
        if self.prompts is None:
            raise ValueError("this checkpoint has no prompt decoder, expected one that takes boxes "
                             "and clicks: -m train --prompts -o CHECKPOINT adds it")
        tensor = self.normalized(image)[None]
        features = self.prompts.prepare(tensor, *self.encoder.pyramid(tensor))
        return self.prompts(features, prompts).cpu().numpy()

    def configuration(self) -> dict:
        """Return the constructor's arguments, as a checkpoint stores them."""
        # left out if absent, so that the digests of older checkpoints stay valid
        parts = {} if self.prompts is None else {"prompts": True}
        return {"encoder": self.encoder.name, "layer": self.encoder.spec.layer,
                "upsample_factor": self.upsample_factor, "top_k": self.top_k,
                "temperature": self.temperature, "dilation": self.dilation,
                "refined": self.refined, "zoom": self.zoom, **parts}

    @classmethod
    def configured(cls, config: dict) -> "VideoMatch":
        """Build a network with random weights from a checkpoint's `configuration`.

        Raises:
            ValueError: the configuration is that of an incompatible earlier version.
        """
        config = dict(config)
        encoder, layer = Encoder(config.pop("encoder")), config.pop("layer")
        if config.pop("recent", 0):
            raise ValueError("written by an earlier version's --method memory: train again, or use "
                             "the checkpoint in models/")
        if layer != encoder.spec.layer:
            raise ValueError(f"features of layer {layer}, expected {encoder.spec.layer}")
        return cls(encoder, **config)

    @classmethod
    def upgrade(cls, config: dict, weights: dict) -> None:
        """Rename weights, and leave out parts of earlier versions that changed no mask.

        See docs/log/2026-11-29-faster-step.md.
        """
        parts = {"object_tokens": "reader.tokens.", "edges": "decoder.edges."}
        present = [part for part in parts if config.pop(part, False)]
        if present:
            log.info("ignored, since this version has no such parts: %s", ", ".join(present))
        for name in [name for name in weights if name.startswith(tuple(parts.values()))]:
            del weights[name]
        if "reader.near.weight" in weights:
            weights["reader.local_key.weight"] = weights.pop("reader.near.weight")


def _resized(image: torch.Tensor, size, antialias: bool) -> torch.Tensor:
    """Resize images to (height, width) `size`; one that has this size already is not copied."""
    if list(image.shape[-2:]) == list(size):
        return image
    return F.interpolate(image, list(size), mode="bilinear", antialias=antialias)


def main():
    parser = argparse.ArgumentParser(description="Show the probabilities of test frames.")
    parser.add_argument("reference", type=Path, help="the reference frame")
    parser.add_argument("mask", type=Path, help="the mask of the object in the reference frame")
    parser.add_argument("tests", type=Path, nargs="+", metavar="TEST", help="test frames")
    parser.add_argument("--model_load", "-o", type=Path, default=SHIPPED["mobilenet"],
                        metavar="PATH", help="checkpoint (default: the one in models/)")
    parser.add_argument("--save", metavar="DIR", type=Path,
                        help="write the figures to DIR instead of opening windows")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # guesses are logged
    with errors.one_line(parser):
        show(args)


@torch.no_grad()
def show(args) -> None:
    """Predict each test frame from the reference frame alone; save or show its figure."""
    if len({path.stem for path in args.tests}) < len(args.tests):
        raise ValueError("TEST: two test frames have the same name, so their figures would "
                         "overwrite each other")
    model = VideoMatch.load(args.model_load).eval()
    image = images.read_image(args.reference)
    mask = read_masks({0: [args.mask]}, image.shape[:2], args.reference)[0]
    object_ids = [i for i in np.unique(mask).tolist() if i]
    state = model.add_reference(None, preprocess.to_tensor(image)[None], mask, object_ids)
    for path in args.tests:
        test = images.read_image(path)
        features = model.encode(preprocess.to_tensor(test)[None])
        try:
            probabilities = model.predict(state, features, test.shape[:2]).cpu().numpy()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        panels = [
            ("reference frame", image), ("reference mask", drawing.overlay(image, mask)),
            (f"test frame {path.name}", test), ("foreground probability", 1 - probabilities[0]),
            ("background probability", probabilities[0]),
            ("result", drawing.overlay(test, decide(probabilities, object_ids)))]
        name = f"{path.stem}_probabilities.png"
        figures.show_or_save(panels, 3, args.save and args.save / name, default=Path(name))


if __name__ == "__main__":
    main()
