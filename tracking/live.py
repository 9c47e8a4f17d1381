"""Tracks objects in a live clip; masks may be added and objects ended at any time."""

from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np
import torch

from media.live import LiveClip
from tracking.pipeline import Frame, Options, resize_for_network, segment_frame
from tracking.tracker import Tracker
from videomatch import VideoMatch


@dataclass(frozen=True)
class Reference:
    """Adds a frame as a reference frame; objects that its mask lacks are predicted there.

    Args:
        index: of a frame that `track` has yielded, usually not the last one: it takes time to draw.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8 ids of the objects to add or correct.
    """

    index: int
    image: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Removal:
    """Ends the tracking of an object."""

    object_id: int


@torch.no_grad()
def track(model: VideoMatch, clip: LiveClip, changes: "SimpleQueue[Reference | Removal]",
          options: Options) -> Iterator[Frame]:
    """Segment the frames of a live clip as they arrive.

    Frames are not read ahead, unlike in `pipeline.track`: the next one is always the newest.

    Args:
        changes: applied before the next frame, in order; other threads may add to it.

    Yields:
        Each processed frame. Before the first reference frame they have an empty mask and no step.
        A reference frame that has no step yet is yielded again, with its mask.
    """
    model.eval()
    tracker = Tracker(model, options.threshold, options.remove_outliers)
    last = -1  # index of the last frame with a step

    def applied() -> Iterator[Frame]:
        """Apply the changes; yields the frames that they add."""
        nonlocal last
        for change in _pending(changes):
            if isinstance(change, Removal):
                if change.object_id in tracker.object_ids:
                    tracker.remove(change.object_id)
                continue
            frame = _segment(tracker, change.index, change.image, change.mask, options)
            if change.index > last:
                last = change.index
                yield frame

    for index, image in enumerate(clip.frames()):
        yield from applied()
        if tracker.previous is None:
            yield Frame(index, image, None, True, tracker, np.zeros(image.shape[:2], np.uint8))
        else:
            last = index
            yield _segment(tracker, index, image, None, options)
    yield from applied()  # what was asked for while the last frame was segmented


def _segment(tracker: Tracker, index: int, image: np.ndarray, mask: np.ndarray | None,
             options: Options) -> Frame:
    return segment_frame(tracker, index, image, resize_for_network(image, options), mask, options)


def _pending(changes: SimpleQueue) -> Iterator[Reference | Removal]:
    while True:
        try:
            yield changes.get_nowait()
        except Empty:
            return
