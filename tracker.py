"""One video: the state of it, and the mask of its next frame.

A `Tracker` has all that is known of a video, its network only weights. It knows neither files nor
clips: images come as tensors, masks leave as arrays, and what becomes of them is not its matter.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch

from media.images import resize_mask
from network.memory import Memory
from network.outliers import decide, remove_outliers
from network.state import plain, restored
from videomatch import VideoMatch


@dataclass(frozen=True)
class Step:
    """What is known of a frame after it was seen.

    Args:
        mask: (H, W) uint8, 0 background, else the object's id.
        probabilities: (N+1, H, W) float32 on the network's device, which sum to 1: background,
            then `object_ids` in order, after outlier removal; of a given mask 0 or 1.
        object_ids: all objects known so far.
    """

    mask: np.ndarray
    probabilities: torch.Tensor
    object_ids: tuple[int, ...]

    def confidence(self) -> dict[int, float]:
        """Of each object the mean of its probability over its mask, in [0, 1]; 0 where it has none.

        The mask's size must be that of the probabilities.
        """
        found = {}
        for object_id, probability in zip(self.object_ids, self.probabilities[1:].cpu().numpy()):
            inside = self.mask == object_id
            found[object_id] = float(probability[inside].mean()) if inside.any() else 0.0
        return found


class Tracker:
    """Feed it the frames of a video in order, with the mask of the first, and later masks.

    Args:
        model: may be shared with other trackers, also in other threads.
        threshold: a pixel belongs to an object where the probability of all objects together is
            above it, in [0, 1).
        outlier_removal: drop what lies further than the model's `dilation` pixels from the
            object's place in the frame before (the paper's outlier removal, section 3.3). After
            an object vanished, it may re-appear anywhere.
    """

    def __init__(self, model: VideoMatch, threshold: float = 0.5, outlier_removal: bool = True):
        self.model, self.threshold, self.outlier_removal = model, threshold, outlier_removal
        self.memory: Memory | None = None
        self.previous: np.ndarray | None = None  # (H, W) mask of the frame before
        self.shares: dict[int, float] = {}  # of each object, of the last reference frame with it

    @property
    def object_ids(self) -> tuple[int, ...]:
        """The objects looked for, in the order of the channels of probabilities."""
        return tuple(self.memory.object_ids) if self.memory else ()

    def copy(self) -> "Tracker":
        """A tracker at the same frame, to go back to; it takes no memory of its own at first."""
        other = copy.copy(self)
        other.memory, other.shares = self.memory and self.memory.copy(), dict(self.shares)
        return other

    def state(self) -> dict:
        """All but network and settings, as numbers, lists and tensors, for `load_state`."""
        return {"memory": plain(self.memory), "previous": torch.from_numpy(self.previous),
                "shares": list(self.shares.items())}

    def load_state(self, state: dict) -> None:
        """Go on from where a tracker of the same network and settings was.

        Raises:
            KeyError, TypeError: not a state.
        """
        self.memory = restored(state["memory"])
        self.previous, self.shares = state["previous"].numpy(), dict(state["shares"])

    @torch.no_grad()
    def step(self, image: torch.Tensor, mask: np.ndarray | None = None,
             shape: tuple[int, int] | None = None) -> Step:
        """The next frame.

        Args:
            image: (3, H, W) float32, ImageNet-normalised.
            mask: (H, W) uint8 object ids where they are known; its size may differ from the
                image's. The first one makes a reference frame, later ones further ones, and
                objects that only they hold are looked for from then on.
            shape: (H, W) of the mask that is looked for; None takes the image's.

        Raises:
            ValueError: there was no mask yet and there is none now, or the first holds no object;
                the method is "memory", and the image is of another size than the first.
        """
        if mask is not None:
            return self._refer(image, np.asarray(mask, dtype=np.uint8))
        if self.memory is None:
            raise ValueError("the first frame needs a mask, to know what to look for")
        model, memory = self.model, self.memory
        frames = model.encode(image[None])
        found = model.predict(frames, [memory], shape)[0]
        # on a CPU an array shares its memory with the tensor, which the online update needs whole
        probabilities = found.cpu().numpy().copy()
        if self.outlier_removal:
            remove_outliers(probabilities, resize_mask(self.previous, probabilities.shape[1:]),
                            self.shares, model.dilation)
        after = torch.from_numpy(probabilities).to(found)
        if model.method == "paper":
            model.update_online(frames, memory, found, after)
        elif model.method == "memory":
            model.remember(frames, [memory], after[None])
        self.previous = decide(probabilities, memory.object_ids, self.threshold)
        return Step(self.previous, after, self.object_ids)

    def _refer(self, image: torch.Tensor, mask: np.ndarray) -> Step:
        """A frame whose mask is known."""
        shown = [i for i in np.unique(mask).tolist() if i]
        if not shown:
            raise ValueError("the reference mask holds no object: all of its pixels are 0")
        if self.memory is None:
            self.memory = self.model.memory(shown)
        elif new := [i for i in shown if i not in self.object_ids]:
            self.memory.widen(new)
        for i in self.object_ids:
            self.shares[i] = float((mask == i).mean()) or self.shares.get(i, 0.0)
        self.model.refer(image[None], mask[None], [self.memory])
        self.previous = mask
        known = np.stack([mask == i for i in (0, *self.object_ids)]).astype(np.float32)
        return Step(mask, torch.from_numpy(known).to(self.model.device), self.object_ids)
