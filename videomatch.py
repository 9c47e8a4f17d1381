"""VideoMatch: find the object of a reference frame in other frames by matching features.

Hu, Huang, Schwing: VideoMatch: Matching based Video Object Segmentation, ECCV 2018.

Run by itself it shows the probabilities:
    python videomatch.py REF.jpg REF_MASK.png TEST.jpg [TEST.jpg ...] [--save DIR]
"""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import cv2
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
from network.memory import Past, Recent, Sets, View

SHIPPED = {"mobilenet": Path(__file__).parent / "models" / "videomatch_mobilenet.pth"}
METHODS = ("matching", "paper", "memory")
CLOSER = (2.0, 4.0)  # how many times nearer the reference frame is looked at too
VANISHED = 0.01  # an object at most this share of its reference area no longer guides anything


class VideoMatch(nn.Module):
    """Set the reference once, then predict or segment any number of frames.

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
        self.precision = torch.float32  # of the encoder and of products; sums are float32
        self.facts: dict = {}
        self.object_ids: list[int] = []
        self._sets: list[Sets] = []  # one for each frame of a batch
        self._recent: list[Recent] = []
        self._past: list[Past] = []
        self._seen: list[Grid] = []  # the frame encoded last
        self.scores: torch.Tensor | None = None  # (B, N+1, h, w), of the last soft matching
        self._reference_share: dict[int, float] = {}
        self._previous: np.ndarray | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def set_reference(self, image: torch.Tensor, mask: torch.Tensor | np.ndarray,
                      object_ids: list[int] | None = None) -> None:
        """Gather the features of the background and of each object of the reference frame.

        Args:
            image: (3, H, W) or (B, 3, H, W) float32, ImageNet-normalised.
            mask: (H, W) or (B, H, W) integers, 0 background, else object ids; its size may
                differ from the image's.
            object_ids: the objects to look for; None takes all that are in the mask.

        Raises:
            ValueError: the mask holds no object.
        """
        image, mask = image.to(self.device), torch.as_tensor(mask).to(self.device)
        if mask.ndim == 2:
            self._previous = mask.cpu().numpy().astype(np.uint8)
            image, mask = image[None], mask[None]
        self.object_ids = list(object_ids or _objects(mask))
        self._sets, self._recent, self._reference_share = [], [], {}
        self._refer(image, mask)

    def add_reference(self, image: torch.Tensor, mask: torch.Tensor | np.ndarray) -> None:
        """Another frame whose mask is known, of a video that has a reference frame already.

        Objects that only this mask holds are looked for from now on.

        Args:
            image: (3, H, W) float32, ImageNet-normalised.
            mask: (H, W) integers, 0 background, else object ids.

        Raises:
            ValueError: the mask holds no object.
        """
        image, mask = image.to(self.device), torch.as_tensor(mask).to(self.device)
        self._previous = mask.cpu().numpy().astype(np.uint8)
        new = [i for i in _objects(mask) if i not in self.object_ids]
        self.object_ids += new
        for recent, past in zip(self._recent, self._past):
            recent.widen(len(self.object_ids) + 1)
            past.widen(len(self.object_ids) + 1)
        self._refer(image[None], mask[None])

    def _refer(self, image: torch.Tensor, mask: torch.Tensor) -> None:
        """(B, 3, H, W) and (B, H, W): gather their features, and remember them as recent."""
        for i in self.object_ids:
            self._reference_share[i] = ((mask == i).float().mean().item()
                                        or self._reference_share.get(i, 0.0))
        self._seen, _ = self._encode(image)
        views = [[view] for view in zip(self._seen, self._sets_of(mask, self._seen[0].shape))]
        if self.method == "memory" and not self.training:
            for frame, x, y in zip(views, image, mask):
                frame += self._closer(x, y)
        count = len(self.object_ids) + 1
        if self._sets:
            self._sets[0].add(views[0], count)
        else:
            self._sets = [Sets(frame, count) for frame in views]
            self._recent = [Recent(self.recent) for _ in self._seen]
            # the frames of a clip to train on lie apart already
            self._past = [Past(every=1) if self.training else Past() for _ in self._seen]
        if self.method == "memory":
            found = torch.stack([mask == i for i in (0, *self.object_ids)], 1).float()
            self.remember(found, given=True)

    def _sets_of(self, mask: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """(B, H, W) object ids -> (B, h, w) the set of each feature cell."""
        labels = cell_labels(mask, shape)
        sets = torch.full_like(labels, -1)
        for i, object_id in enumerate((0, *self.object_ids)):
            sets[labels == object_id] = i
        return sets

    def _closer(self, image: torch.Tensor, mask: torch.Tensor) -> Iterator[View]:
        """(3, H, W) and (H, W): how each object and what is around it would look from nearer.

        An object that comes closer is matched with these.
        """
        mask = F.interpolate(mask[None, None].float(), size=image.shape[1:],
                             mode="nearest-exact")[0, 0].long()
        for object_id in set(self.object_ids) & set(mask.unique().tolist()):
            for scale in CLOSER:
                part = around(mask == object_id, scale)
                (grid,), _ = self._encode(image[None, :, *part], scale)
                yield grid, self._sets_of(mask[None, *part], grid.shape)[0]

    def _encode(self, image: torch.Tensor,
                scale: float = 1.0) -> tuple[list[Grid], list[torch.Tensor]]:
        """(B, 3, H, W) -> the enlarged feature grid of each frame, and the features of levels."""
        scale = 1.0 if self.training else self.zoom * scale
        if scale != 1:
            image = F.interpolate(image, scale_factor=scale, mode="bilinear",
                                  align_corners=False, antialias=scale < 1)
        with torch.autocast(self.device.type, self.precision,
                            enabled=self.precision != torch.float32):
            features, levels = self.encoder.pyramid(image)
        return [Grid(frame, self.upsample_factor) for frame in features], levels

    def _finest(self, grid: Grid) -> Grid:
        """The layer that knows best where things are, for matching near a position."""
        return Grid(grid.features[:self.encoder.spec.finest], grid.factor)

    def remember(self, probabilities: torch.Tensor, given: bool = False) -> None:
        """Keep the frames that `predict` saw last for those to come.

        Args:
            probabilities: (B, N+1, H, W) what was found in them.
            given: they are reference frames.
        """
        cells = F.interpolate(probabilities, size=self._seen[0].shape, mode="bilinear",
                              align_corners=False, antialias=True)
        for recent, past, grid, labels in zip(self._recent, self._past, self._seen, cells):
            recent.add(self._finest(grid), labels)
            past.add(grid.features, labels, given)

    def predict(self, image: torch.Tensor, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """Probabilities of background and objects.

        Args:
            image: (3, H, W), or (B, 3, H, W) with one frame for each reference frame.
            shape: (H, W) of the result; None takes the image's.

        Returns:
            (N+1, H, W) or (B, N+1, H, W) float32 that sum to 1 over the channels: background,
            then `object_ids` in order. Differentiable.

        Raises:
            RuntimeError: there is no reference frame yet.
            ValueError: the method is "memory", and the frame's size isn't that of the reference.
        """
        if not self._sets:
            raise RuntimeError("predict needs a reference frame: call set_reference first")
        images = image.to(self.device).view(-1, *image.shape[-3:])
        self._seen, levels = self._encode(images)
        if self.method == "memory" and self._seen[0].shape != self._recent[0].shape:
            raise ValueError(f"expected a frame of the reference frame's size, got "
                             f"{tuple(image.shape[-2:])}")
        self.scores = torch.stack([soft_match(grid, sets.reference, self.top_k)
                                   for grid, sets in zip(self._seen, self._sets)])
        if self.method == "memory":
            logits = self._refine(self._evidence(), levels)
            probabilities = self._enlarged(logits, shape or image.shape[-2:])
        else:
            probabilities = self.matched(shape or image.shape[-2:])
        return probabilities if image.ndim == 4 else probabilities[0]

    def matched(self, shape: tuple[int, int]) -> torch.Tensor:
        """(B, N+1, *shape) probabilities by the last `predict`'s matching alone."""
        return self._enlarged(self.scores / self.temperature, shape)

    @staticmethod
    def _enlarged(logits: torch.Tensor, shape) -> torch.Tensor:
        logits = F.interpolate(logits, size=tuple(shape), mode="bilinear", align_corners=False)
        return logits.softmax(1)

    def _evidence(self) -> torch.Tensor:
        """(B, N, EVIDENCE, h, w): what speaks for each object and against it."""
        frames = []
        for scores, grid, recent, past in zip(self.scores, self._seen, self._recent, self._past):
            labels, similarity = recent.propagate(self._finest(grid))  # (N+1, h, w), (h, w)
            far = F.interpolate(past.propagate(grid.features)[None], size=grid.shape,
                                mode="bilinear", align_corners=False)[0]
            before, objects = recent.labels[-1], []
            for i in range(1, len(scores)):
                others = torch.cat([scores[:i], scores[i + 1:]]).amax(0)
                objects.append(torch.stack([10 * (scores[i] - others), scores[i], others,
                                            labels[i], before[i], similarity, far[i]]))
            frames.append(torch.stack(objects))
        return torch.stack(frames)

    def _refine(self, evidence: torch.Tensor, levels: list[torch.Tensor]) -> torch.Tensor:
        """(B, N, EVIDENCE, h, w) -> (B, N+1, H/4, W/4) logits; that of the background is 0."""
        logits = self.decoder(evidence, [level.float() for level in levels])
        return F.pad(logits, (0, 0, 0, 0, 1, 0))

    @torch.no_grad()
    def segment(self, image: torch.Tensor, shape: tuple[int, int] | None = None,
                threshold: float = 0.5, remove_outliers: bool = True) -> np.ndarray:
        """The mask of the next frame of a video.

        Args:
            image: (3, H, W) float32, ImageNet-normalised.
            shape: (H, W) of the mask; None takes the image's.
            threshold: a pixel belongs to an object where the probability of all objects
                together is above it, in [0, 1].
            remove_outliers: drop what lies further than `dilation` pixels from the object's
                place in the frame before (the paper's outlier removal). After an object
                vanished, it may re-appear anywhere.

        Returns:
            (H, W) uint8 with the ids of the reference mask.
        """
        found = self.predict(image, shape)
        probabilities = found.cpu().numpy().copy()
        if remove_outliers:
            self._remove_outliers(probabilities)
        if self.method == "paper":
            self._update_online(found, torch.from_numpy(probabilities).to(found))
        elif self.method == "memory":
            self.remember(torch.from_numpy(probabilities).to(found)[None])
        self._previous = self.decide(probabilities, threshold)
        return self._previous

    def _update_online(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add the frame's features that are sure of their set (the paper's online update).

        An object's: above `confidence` after outlier removal, so within the extruded previous
        mask. The background's: taken for an object and removed as outliers, which tells the next
        frames what only looks like one.

        Args:
            before, after: (N+1, H, W) probabilities, of outlier removal.
        """
        grid = self._seen[0]
        before, after = (F.interpolate(p[None], size=grid.shape, mode="bilinear",
                                       align_corners=False, antialias=True)[0]
                         for p in (before, after))
        best, labels = after[1:].max(0)
        labels = torch.where(best > self.confidence, labels + 1, -1)
        labels[(before[0] < 0.5) & (after[0] > self.confidence)] = 0
        self._sets[0].update(grid, labels)

    def decide(self, probabilities: np.ndarray, threshold: float = 0.5) -> np.ndarray:
        """(N+1, H, W) probabilities -> (H, W) uint8 mask; `threshold` as for `segment`."""
        ids = np.array(self.object_ids, dtype=np.uint8)
        mask = ids[probabilities[1:].argmax(0)]
        mask[probabilities[0] >= 1 - threshold] = 0
        return mask

    def _remove_outliers(self, probabilities: np.ndarray) -> None:
        """Give an object's probability outside its extruded previous mask to the background."""
        previous = images.resize_mask(self._previous, probabilities.shape[1:])
        for channel, object_id in enumerate(self.object_ids, start=1):
            before = previous == object_id
            if before.mean() <= VANISHED * self._reference_share[object_id]:
                continue
            outside = ~extrude(before, self.dilation)
            probabilities[0][outside] += probabilities[channel][outside]
            probabilities[channel][outside] = 0

    def save(self, path: str | Path, **facts) -> None:
        """Write a checkpoint that needs no flags to be loaded: weights and configuration.

        Args:
            facts: numbers and texts kept beside it, such as `held_out_iou`.
        """
        files.save(path, {"config": self.configuration(), "facts": facts,
                          "model": self.state_dict()})

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


def _objects(mask: torch.Tensor) -> list[int]:
    found = [i for i in mask.unique().tolist() if i != 0]
    if not found:
        raise ValueError("the reference mask holds no object: all of its pixels are 0")
    return found


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


def extrude(mask: np.ndarray, distance: float) -> np.ndarray:
    """(H, W) bool -> (H, W) bool: the pixels within `distance` of the mask (a disk dilation).

    By the distance transform, whose cost doesn't grow with the distance.
    """
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2,
                                 cv2.DIST_MASK_PRECISE) <= distance


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
    model.set_reference(preprocess.to_tensor(image), mask)
    for path in args.tests:
        test = images.read_image(path)
        probabilities = model.predict(preprocess.to_tensor(test)).cpu().numpy()
        figure = figures.grid([
            ("reference frame", image), ("reference mask", drawing.overlay(image, mask)),
            (f"test frame {path.name}", test), ("foreground probability", 1 - probabilities[0]),
            ("background probability", probabilities[0]),
            ("result", drawing.overlay(test, model.decide(probabilities)))], columns=3)
        name = f"{path.stem}_probabilities.png"
        figures.show_or_save(figure, args.save and args.save / name, default=Path(name))


if __name__ == "__main__":
    main()
