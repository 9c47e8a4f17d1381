"""Track objects through one video, frame by frame.

A `Tracker` holds all per-video state; the network is stateless and may be shared. Imports no
PyTorch: the network is a `VideoMatch`, or a `LiteVideoMatch` on onnxruntime.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

import cv2
import numpy as np
from PIL import Image

from masks.validation import check_frame, check_normalized, id_mask
from media.images import resize_mask, scaled
from network.outliers import decide, keep_identities, remove_outliers
from network.state import MEM_EVERY, Array


@dataclass(frozen=True)
class Step:
    """The result of one frame.

    Args:
        mask: (H, W) uint8, 0 background, else object ids.
        probabilities: (N+1, H, W) float32 on the network's device, summing to 1: background, then
            `object_ids` in order, after outlier removal; 0 or 1 for a user mask.
        object_ids: all objects tracked so far.
    """

    mask: np.ndarray
    probabilities: Array
    object_ids: tuple[int, ...]

    def mask_at(self, shape: tuple[int, int], threshold: float) -> np.ndarray:
        """The mask at size `shape` (H, W): of probabilities resized bilinearly, if it differs."""
        if self.mask.shape == shape:
            return self.mask
        return decide(np.stack([
            cv2.resize(channel, shape[::-1], interpolation=cv2.INTER_LINEAR)
            for channel in to_numpy(self.probabilities)]), self.object_ids, threshold)

    def confidence(self) -> dict[int, float]:
        """Mean probability of each object over its mask, in [0, 1]; 0 for an empty mask.

        The mask must have the size of the probabilities.
        """
        confidences = {}
        for object_id, probability in zip(self.object_ids, to_numpy(self.probabilities)[1:]):
            inside = self.mask == object_id
            confidences[object_id] = float(probability[inside].mean()) if inside.any() else 0.0
        return confidences


class Tracker:
    """Takes the frames of a video in order, with user masks for the first and any later ones.

    Args:
        model: the network; may be shared between trackers and threads.
        threshold: a pixel is foreground where the probability of all objects together exceeds
            this, in [0, 1).
        outlier_removal: drop predictions further than the model's `dilation` from the object's
            previous mask (the paper's section 3.3), in pixels of the network's input. An object
            that has vanished may reappear anywhere.
        size: short side at which the network sees uint8 images, see `images.working_shape`; masks
            have the image's own size. Larger for small objects, at a cost in proportion to the
            area; 0: the image's own size. Tensors are taken as they are.

    Attributes:
        memory: the network's `State` of the video; None before the first reference frame.
        previous: (H, W) uint8 mask of the last frame; None before the first.
        shares: for each object, the share of its last reference frame that it covers.
    """

    def __init__(self, model: Any, threshold: float = 0.5, outlier_removal: bool = True,
                 size: int = 480):
        self.model, self.threshold, self.outlier_removal = model, threshold, outlier_removal
        self.size = size
        self.memory: Any = None
        self.previous: np.ndarray | None = None
        self.shares: dict[int, float] = {}

    @property
    def object_ids(self) -> tuple[int, ...]:
        """The tracked objects, in the order of the channels of probabilities."""
        return tuple(self.shares)

    def copy(self) -> Self:
        """Return a tracker at the same frame, to return to later; tensors are shared."""
        return copy.copy(self)

    def remove(self, object_id: int) -> None:
        """Stop tracking an object, from the next frame on, and forget it.

        A later user mask that contains the object again adds it as a new one. With no object left,
        masks are empty.

        Raises:
            ValueError: there is no such object.
        """
        if object_id not in self.object_ids:
            raise ValueError(f"object_id: expected one of {list(self.object_ids)}, got {object_id}")
        channel = 1 + self.object_ids.index(object_id)
        with self.model.inference():
            self.memory = (self.model.without(self.memory, channel) if len(self.object_ids) > 1
                           else None)
        self.shares = {i: share for i, share in self.shares.items() if i != object_id}
        self.previous = np.where(self.previous == object_id, 0, self.previous).astype(np.uint8)

    def state(self) -> dict:
        """Return everything but network and settings, as numbers, lists and tensors."""
        return {"memory": None if self.memory is None else self.model.serialize(self.memory),
                "previous": None if self.previous is None else self.model.array(self.previous),
                "shares": list(self.shares.items())}

    def load_state(self, state: dict) -> None:
        """Restore the `state` of a tracker with the same network and settings.

        Raises:
            KeyError, TypeError, ValueError: not such a state.
        """
        memory, previous = state["memory"], state["previous"]
        self.memory = None if memory is None else self.model.deserialize(memory)
        self.previous = None if previous is None else to_numpy(previous)
        self.shares = dict(state["shares"])

    def step(self, image: Array | Image.Image, mask: np.ndarray | None = None,
             shape: tuple[int, int] | None = None, absent: Collection[int] = ()) -> Step:
        """Process the next frame.

        Args:
            image: (H, W, 3) uint8 RGB, an array or a Pillow image (OpenCV's BGR: `[..., ::-1]`), or
                (3, H, W) float32, ImageNet-normalised.
            mask: (H, W) object ids, bool or integers, if known; its size may differ from the
                image's. A frame with a mask becomes a reference frame. The first one is required;
                later ones may add objects. Objects that a later mask lacks are predicted as usual,
                unless it is empty: then no object is visible.
            shape: (H, W) of the predicted mask; defaults to the image's.
            absent: ids of objects that are not in this frame but may come back, unlike after
                `remove`. Makes the frame a reference frame, even without a mask.

        Raises:
            ValueError: the first frame has no mask, or an empty one; the image has another size
                than the first (method "memory"); see also `check_frame`, `check_normalized` and
                `id_mask`.
        """
        image, size = self._network_input(image, shape)
        if mask is not None:
            mask = id_mask(mask)
        elif not set(absent).isdisjoint(self.object_ids):
            mask = np.zeros(size, np.uint8)
        if self.memory is None and self.previous is not None and (mask is None or not mask.any()):
            self.previous = np.zeros(size if mask is None else mask.shape, np.uint8)
            nothing = np.ones((1, *self.previous.shape), np.float32)
            return Step(self.previous.copy(), self.model.array(nothing), ())
        with self.model.inference():
            if mask is None:
                return self._predicted(image, size)
            return self._referred(image, mask, absent)

    def _network_input(self, image: Any,
                       shape: tuple[int, int] | None) -> tuple[Array, tuple[int, int]]:
        """The (3, h, w) network input of an image, and the (H, W) of the mask to return."""
        if isinstance(image, Image.Image):
            image = np.array(image.convert("RGB"))  # `asarray` would be read-only
        if getattr(image, "dtype", None) == np.uint8:
            check_frame(image)
            small = scaled(np.ascontiguousarray(image), self.size)
            return self.model.normalized(small), shape or image.shape[:2]
        check_normalized(image)
        return image, shape or tuple(image.shape[-2:])

    def _predicted(self, image: Array, shape: tuple[int, int]) -> Step:
        """Predict the masks of a frame and add it to the memory."""
        if self.memory is None:
            raise ValueError("mask: the first frame needs one, to know which objects to track")
        model = self.model
        features, before, after = self._find(image, shape)
        probabilities = model.array(after)
        if model.method == "paper":
            self.memory = model.online_update(self.memory, features, before, probabilities)
        elif model.method == "memory":
            frames = int(self.memory.frames) + 1
            self.memory = model.remember(self.memory, features, probabilities,
                                         frames % MEM_EVERY == 0)
        self.previous = decide(after, self.object_ids, self.threshold)
        return Step(self.previous.copy(), probabilities, self.object_ids)

    def _find(self, image: Array, shape: tuple[int, int]) -> tuple[Any, Array, np.ndarray]:
        """A frame's features; (N+1, H, W) probabilities, raw and after all corrections."""
        model = self.model
        features = model.encode(image[None])
        before = model.predict(self.memory, features, shape)
        # a copy, because the online update also needs the raw probabilities
        after = to_numpy(before).copy()
        previous = resize_mask(self.previous, shape)
        pixel = min(shape) / min(image.shape[-2:])  # distances are in pixels of the network's input
        # Identities first: outlier removal would give another object's part to the background.
        if model.method == "memory":
            keep_identities(after, previous, self.object_ids, self.shares, self.threshold, pixel)
        if self.outlier_removal:
            remove_outliers(after, previous, self.object_ids, self.shares, model.dilation * pixel)
        return features, before, after

    def _referred(self, image: Array, mask: np.ndarray, absent: Collection[int]) -> Step:
        """Add a reference frame."""
        missing = [i for i in self.object_ids if (mask.any() or absent) and i not in absent
                   and not (mask == i).any()]
        if missing:
            predicted = decide(self._find(image, mask.shape)[2], self.object_ids, self.threshold)
            mask = np.where((mask == 0) & np.isin(predicted, missing), predicted, mask)
        ids = [i for i in np.unique(mask).tolist() if i]
        if not ids and self.memory is None:  # a later empty mask means that no object is visible
            raise ValueError("mask: the reference mask holds no object, all of its pixels are 0")
        object_ids = tuple(dict.fromkeys((*self.object_ids, *ids)))
        self.memory = self.model.add_reference(self.memory, image[None], mask, object_ids)
        self.shares = {i: float((mask == i).mean()) or self.shares.get(i, 0.0)
                       for i in object_ids}
        self.previous = mask.copy()  # the caller may change theirs
        certain = np.stack([mask == i for i in (0, *self.object_ids)]).astype(np.float32)
        return Step(mask, self.model.array(certain), self.object_ids)


def to_numpy(x: Array) -> np.ndarray:
    """Copy to the CPU if necessary; memory may be shared."""
    return x if isinstance(x, np.ndarray) else x.detach().cpu().numpy()
