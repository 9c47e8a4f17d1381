"""One video: its state, and the masks of its frames one after the other.

A `Tracker` holds all that is known of a video, its network only weights. It imports no PyTorch:
the network is a `VideoMatch`, or what `lite.py` makes of an export. It knows neither files nor
clips.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import cv2
import numpy as np

from masks.validation import check_normalized, id_mask
from media.images import resize_mask
from network.outliers import decide, keep_identities, remove_outliers
from network.state import MEM_EVERY, Array


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


class Tracker:
    """Feed it the frames of a video in order, with the mask of the first, and later masks.

    Args:
        model: the network; may be shared, also with other threads.
        threshold: a pixel belongs to an object where the probability of all objects together is
            above it, in [0, 1).
        outlier_removal: drop what lies further than the model's `dilation` pixels from the
            object's place in the frame before (the paper's outlier removal, section 3.3). After
            an object vanished, it may re-appear anywhere.

    Attributes:
        memory: the network's `State` of the video; None before the first reference frame.
        previous: (H, W) uint8 mask of the last frame.
        shares: of each object, the share of the last reference frame with it that it covers.
    """

    def __init__(self, model: Any, threshold: float = 0.5, outlier_removal: bool = True):
        self.model, self.threshold, self.outlier_removal = model, threshold, outlier_removal
        self.memory: Any = None
        self.previous: np.ndarray | None = None
        self.shares: dict[int, float] = {}

    @property
    def object_ids(self) -> tuple[int, ...]:
        """The objects that are looked for, in the order of the channels of probabilities."""
        return tuple(self.shares)

    def copy(self) -> Self:
        """One at the same frame, to go back to; it takes no memory of its own."""
        return copy.copy(self)

    def remove(self, object_id: int) -> None:
        """Stop looking for an object, from the next frame on.

        What was seen of it is forgotten. A later mask that holds the object again brings it back,
        as a new object. Without any object left, masks are empty.

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
        """All but network and settings, as numbers, lists and arrays, for `load_state`."""
        return {"memory": None if self.memory is None else self.model.saved(self.memory),
                "previous": self.model.array(self.previous), "shares": list(self.shares.items())}

    def load_state(self, state: dict) -> None:
        """Go back to where a tracker of the same network and settings was.

        Raises:
            KeyError, TypeError, ValueError: not a state.
        """
        memory = state["memory"]
        self.memory = None if memory is None else self.model.restored(memory)
        self.previous, self.shares = to_numpy(state["previous"]), dict(state["shares"])

    def step(self, image: Array, mask: np.ndarray | None = None,
             shape: tuple[int, int] | None = None, absent: Collection[int] = ()) -> Step:
        """The next frame.

        Args:
            image: (3, H, W) float32, ImageNet-normalised.
            mask: (H, W) object ids where they are known, bool or integers; its size may differ
                from the image's. The first one makes a reference frame, later ones further ones,
                and objects that only they hold are looked for from then on. Objects that a later
                one lacks are looked for beside those that it holds; if it holds none, none is
                there.
            shape: (H, W) of the mask that is looked for; None takes the image's.
            absent: ids of objects that are not in this frame. They may come back in a later one,
                unlike after `remove`. The frame becomes a reference frame, also without a mask.

        Raises:
            ValueError: there was no mask yet and there is none now, or the first holds no object;
                the method is "memory", and the image is of another size than the first; see also
                `check_normalized` and `id_mask`.
        """
        check_normalized(image)
        size = shape or tuple(image.shape[-2:])
        if mask is not None:
            mask = id_mask(mask)
        elif not set(absent).isdisjoint(self.object_ids):
            mask = np.zeros(size, np.uint8)
        if self.memory is None and self.previous is not None and (mask is None or not mask.any()):
            self.previous = np.zeros(size if mask is None else mask.shape, np.uint8)
            nothing = np.ones((1, *self.previous.shape), np.float32)
            return Step(self.previous, self.model.array(nothing), ())
        with self.model.inference():
            if mask is None:
                return self._predicted(image, size)
            return self._referred(image, mask, absent)

    def _predicted(self, image: Array, shape: tuple[int, int]) -> Step:
        """A frame of which nothing is known."""
        if self.memory is None:
            raise ValueError("the first frame needs a mask, to know what to look for")
        model = self.model
        features, before, after, scores = self._find(image, shape)
        probabilities = model.array(after)
        if model.method == "paper":
            self.memory = model.update_online(self.memory, features, before, probabilities)
        elif model.method == "memory":
            frames = int(self.memory.frames) + 1
            self.memory = model.remember(self.memory, features, probabilities,
                                         frames % MEM_EVERY == 0)
        self.previous = decide(after, self.object_ids, self.threshold)
        return Step(self.previous, probabilities, self.object_ids, scores)

    def _find(self, image: Array,
              shape: tuple[int, int]) -> tuple[Any, Array, np.ndarray, Array]:
        """A frame's features; (N+1, H, W) probabilities, raw and as they are decided; scores."""
        model = self.model
        features = model.encode(image[None])
        if model.method == "memory" and tuple(features.near.shape[1:3]) != self.memory.grid:
            raise ValueError("expected a frame of the reference frame's size, got "
                             f"{tuple(image.shape[1:])}")
        before, scores = model.predict(self.memory, features, shape)
        # a copy: the online update needs the probabilities before as well
        after = to_numpy(before).copy()
        previous = resize_mask(self.previous, shape)
        # first, as outlier removal would give to the background what is another object's
        if model.method == "memory":
            keep_identities(after, previous, self.object_ids, self.shares, self.threshold)
        if self.outlier_removal:
            remove_outliers(after, previous, self.object_ids, self.shares, model.dilation)
        return features, before, after, scores

    def _referred(self, image: Array, mask: np.ndarray, absent: Collection[int]) -> Step:
        """A frame whose mask is known."""
        lacking = [i for i in self.object_ids if (mask.any() or absent) and i not in absent
                   and not (mask == i).any()]
        if lacking:
            found = decide(self._find(image, mask.shape)[2], self.object_ids, self.threshold)
            mask = np.where((mask == 0) & np.isin(found, lacking), found, mask)
        shown = [i for i in np.unique(mask).tolist() if i]
        if not shown and self.memory is None:  # later it tells that there is none
            raise ValueError("the reference mask holds no object: all of its pixels are 0")
        object_ids = tuple(dict.fromkeys((*self.object_ids, *shown)))
        self.memory = self.model.refer(self.memory, image[None], mask, object_ids)
        self.shares = {i: float((mask == i).mean()) or self.shares.get(i, 0.0)
                       for i in object_ids}
        self.previous = mask
        known = np.stack([mask == i for i in (0, *self.object_ids)]).astype(np.float32)
        return Step(mask, self.model.array(known), self.object_ids)


def to_numpy(x: Array) -> np.ndarray:
    """The same values on the CPU; memory may be shared."""
    return x if isinstance(x, np.ndarray) else x.detach().cpu().numpy()


def resized(probabilities: Array, shape: Sequence[int]) -> np.ndarray:
    """(N+1, h, w) probabilities -> (N+1, H, W) float32, of a frame of another size."""
    return np.stack([cv2.resize(channel, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
                     for channel in to_numpy(probabilities)])
