"""One video, frame by frame: the rules, whatever library's arrays network and memory hold.

It imports no PyTorch: `tracker.Tracker` follows with `VideoMatch`, `lite.py` with an export of it.
Files and clips it doesn't know either.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import cv2
import numpy as np

from media.images import resize_mask
from network.arrays import Array, like, to_numpy
from network.memory import Memory
from network.outliers import decide, keep_identities, remove_outliers


@dataclass(frozen=True)
class Step:
    """What is known of a frame after it was seen.

    Args:
        mask: (H, W) uint8, 0 background, else the object's id.
        probabilities: (N+1, H, W) float32 on the network's device, which sum to 1: background,
            then `object_ids` in order, after outlier removal; of a given mask 0 or 1.
        object_ids: all objects known so far.
        scores: (N+1, h, w) float32, cosines of each cell with what is remembered; None where the
            mask was given.
    """

    mask: np.ndarray
    probabilities: Array
    object_ids: tuple[int, ...]
    scores: Array | None = None

    def similarity(self) -> dict[int, float]:
        """Of each object the mean of its scores over its mask; 1 where the mask was given.

        0 where it has none. Cosines of neighbours in the memory, so in [-1, 1].
        """
        if self.scores is None:
            return dict.fromkeys(self.object_ids, 1.0)
        found = {}
        for object_id, scores in zip(self.object_ids, to_numpy(self.scores)[1:]):
            inside = (self.mask == object_id).astype(np.float32)
            share = cv2.resize(inside, scores.shape[::-1], interpolation=cv2.INTER_AREA)
            found[object_id] = float((share * scores).sum() / max(float(share.sum()), 1e-6))
        return found

    def confidence(self) -> dict[int, float]:
        """Of each object the mean of its probability over its mask, in [0, 1]; 0 where it has none.

        The mask's size must be that of the probabilities.
        """
        found = {}
        for object_id, probability in zip(self.object_ids, to_numpy(self.probabilities)[1:]):
            inside = self.mask == object_id
            found[object_id] = float(probability[inside].mean()) if inside.any() else 0.0
        return found


class Follower:
    """Feed it the frames of a video in order, with the mask of the first, and later masks.

    Args:
        model: the network, as `VideoMatch` is one; may be shared, also with other threads.
        threshold: a pixel belongs to an object where the probability of all objects together is
            above it, in [0, 1).
        outlier_removal: drop what lies further than the model's `dilation` pixels from the
            object's place in the frame before (the paper's outlier removal, section 3.3). After
            an object vanished, it may re-appear anywhere.
    """

    def __init__(self, model: Any, threshold: float = 0.5, outlier_removal: bool = True):
        self.model, self.threshold, self.outlier_removal = model, threshold, outlier_removal
        self.memory: Memory | None = None
        self.previous: np.ndarray | None = None  # (H, W) mask of the frame before
        self.shares: dict[int, float] = {}  # of each object, of the last reference frame with it

    @property
    def object_ids(self) -> tuple[int, ...]:
        """The objects looked for, in the order of the channels of probabilities."""
        return tuple(self.memory.object_ids) if self.memory else ()

    def copy(self) -> Self:
        """One at the same frame, to go back to; it takes no memory of its own at first."""
        other = copy.copy(self)
        other.memory, other.shares = self.memory and self.memory.copy(), dict(self.shares)
        return other

    def remove(self, object_id: int) -> None:
        """Stop looking for an object, from the next frame on.

        What was seen of it is forgotten. A later mask that holds the object again brings it back,
        as a new object. Without any object left, masks are empty.

        Raises:
            ValueError: there is no such object.
        """
        if object_id not in self.object_ids:
            raise ValueError(f"object_id: expected one of {list(self.object_ids)}, got {object_id}")
        self.shares.pop(object_id, None)
        self.previous = np.where(self.previous == object_id, 0, self.previous).astype(np.uint8)
        if len(self.object_ids) == 1:
            self.memory = None
        else:
            self.memory.remove(object_id)
            if self.model.method == "memory":
                self.model.reader.catch_up(self.memory.bank)

    def step(self, image: Array, mask: np.ndarray | None = None,
             shape: tuple[int, int] | None = None, absent: Collection[int] = ()) -> Step:
        """The next frame.

        Args:
            image: (3, H, W) float32, ImageNet-normalised.
            mask: (H, W) uint8 object ids where they are known; its size may differ from the
                image's. The first one makes a reference frame, later ones further ones, and
                objects that only they hold are looked for from then on. Objects that a later one
                lacks are looked for beside those that it holds; if it holds none, none is there.
            shape: (H, W) of the mask that is looked for; None takes the image's.
            absent: ids of objects that are not in this frame. They may come back in a later one,
                unlike after `remove`. The frame becomes a reference frame, also without a mask.

        Raises:
            ValueError: there was no mask yet and there is none now, or the first holds no object;
                the method is "memory", and the image is of another size than the first.
        """
        size = shape or tuple(image.shape[-2:])
        if mask is None and not set(absent).isdisjoint(self.object_ids):
            mask = np.zeros(size, np.uint8)
        if self.memory is None and self.previous is not None and (mask is None or not mask.any()):
            self.previous = np.zeros(size if mask is None else mask.shape, np.uint8)
            return Step(self.previous, like(np.ones((1, *self.previous.shape), np.float32), image),
                        ())
        if mask is not None:
            mask = np.asarray(mask, dtype=np.uint8)
            lacking = [i for i in self.object_ids if (mask.any() or absent) and i not in absent
                       and not (mask == i).any()]
            if lacking:
                after = self._find(image, mask.shape)[2]
                found = decide(to_numpy(after), self.memory.object_ids, self.threshold)
                mask = np.where((mask == 0) & np.isin(found, lacking), found, mask)
            return self._refer(image, mask)
        if self.memory is None:
            raise ValueError("the first frame needs a mask, to know what to look for")
        model, memory = self.model, self.memory
        frames, found, after, scores = self._find(image, shape)
        if model.method == "paper":
            model.update_online(frames, memory, found, after)
        elif model.method == "memory":
            model.remember(frames, [memory], after[None])
        self.previous = decide(to_numpy(after), memory.object_ids, self.threshold)
        return Step(self.previous, after, self.object_ids, scores)

    def _find(self, image: Array, shape: tuple[int, int] | None) -> tuple[Any, Array, Array, Array]:
        """A frame encoded; (N+1, H, W) probabilities before and after outlier removal; scores."""
        model, memory = self.model, self.memory
        frames = model.encode(image[None])
        (found,), (scores,) = model.predict(frames, [memory], shape)
        # a copy: the online update needs the probabilities before as well
        probabilities = to_numpy(found).copy()
        previous = resize_mask(self.previous, probabilities.shape[1:])
        if model.method == "memory":
            keep_identities(probabilities, previous, memory.object_ids, self.threshold)
        if self.outlier_removal:
            remove_outliers(probabilities, previous, memory.object_ids, self.shares,
                            model.dilation)
        return frames, found, like(probabilities, found), scores

    def _refer(self, image: Array, mask: np.ndarray) -> Step:
        """A frame whose mask is known."""
        shown = [i for i in np.unique(mask).tolist() if i]
        if not shown and self.memory is None:  # later it tells that there is none
            raise ValueError("the reference mask holds no object: all of its pixels are 0")
        if self.memory is None:
            self.memory = self.model.memory(shown)
        elif new := [i for i in shown if i not in self.object_ids]:
            self.memory.widen(new)
        for i in self.object_ids:
            self.shares[i] = float((mask == i).mean()) or self.shares.get(i, 0.0)
        frames = self.model.refer(image[None], mask[None], [self.memory])
        self.previous = mask
        known = np.stack([mask == i for i in (0, *self.object_ids)]).astype(np.float32)
        return Step(mask, like(known, frames.features), self.object_ids)


def resized(probabilities: Array, shape: Sequence[int]) -> np.ndarray:
    """(N+1, h, w) probabilities -> (N+1, H, W) float32, of a frame of another size."""
    return np.stack([cv2.resize(channel, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
                     for channel in to_numpy(probabilities)])
