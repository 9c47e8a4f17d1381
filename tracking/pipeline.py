"""Inference pipeline: runs a tracker over a clip and sends every frame to output sinks.

`-m segment`, `-m eval` and the web page all use it; evaluation adds a sink that scores masks
against the ground truth.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import preprocess
from masks.read import read_mask
from media import images
from media.background import Background, ahead, interruptible
from media.clip import Clip
from network.checkpoint import save
from tracking.presence import Presence
from tracking.tracker import Step, Tracker
from videomatch import VideoMatch

# Seconds between saved tracker states. A killed run repeats at most that much work; a shorter
# interval repeats less and writes more: a state has about 30 MB at 480p.
SAVE_INTERVAL = 20.0


@dataclass
class Options:
    """Settings that change the masks, besides model, clip and user masks; see the flags of main.py.

    Args:
        size: short side of the images for the network in pixels, see `images.working_shape`;
            0 keeps the frame's own size.
        input_shape: (H, W) of the images for the network; takes precedence over `size`.
        segmentation_shape: (H, W) at which probabilities become a mask, which is then resized to
            the frame; by default probabilities are resized to the frame and become a mask there.
        start: index of the first frame to segment.
        stop: end of the range of frames, exclusive; None is the end of the clip.
        threshold: a pixel is foreground above this probability, in [0, 1).
        remove_outliers: apply the paper's outlier removal (section 3.3).
        presence: objects that the user marked as absent or gone.
    """

    size: int = 480
    input_shape: tuple[int, int] | None = None
    segmentation_shape: tuple[int, int] | None = None
    start: int = 0
    stop: int | None = None
    threshold: float = 0.5
    remove_outliers: bool = True
    presence: Presence = field(default_factory=Presence)


@dataclass
class Frame:
    """A segmented frame.

    Args:
        index: its index in the clip.
        image: (H, W, 3) uint8 RGB.
        step: the tracker's output, possibly at another size; None if the mask was read from the
            files of an interrupted run.
        forward: whether the tracker came to it in the forward direction.
        tracker: has just processed this frame. It moves on afterwards: copy it to keep this state.
        mask_override: (H, W) uint8 mask that replaces the one computed from the resized
            probabilities: a user mask, the mask of an interrupted run, or one decided at
            `Options.segmentation_shape`.
    """

    index: int
    image: np.ndarray
    step: Step | None
    forward: bool
    tracker: Tracker
    mask_override: np.ndarray | None = None

    @cached_property
    def mask(self) -> np.ndarray:
        """(H, W) uint8 object ids."""
        if self.mask_override is not None:
            return self.mask_override
        return self.step.mask_at(self.image.shape[:2], self.tracker.threshold)


class TrackerCheckpoint:
    """The saved tracker state from which an interrupted run resumes.

    It lies next to the folder of the masks: the masks up to the saved frame are read from there.

    Args:
        folder: of the masks.
        clip: gives the mask files their names.
    """

    def __init__(self, folder: Path, clip: Clip):
        self.folder, self.clip = folder, clip
        self.path = folder.with_name(f".{folder.name}.progress")
        self.forward, self.state = False, None  # direction at the saved frame
        self.index: float | None = None  # the saved frame; None if there is none
        self.saved = time.monotonic()

    def load(self, model: VideoMatch) -> "TrackerCheckpoint":
        """Load the state that an interrupted run saved, if there is one.

        Raises:
            ValueError: the file holds no state of this network.
        """
        if self.path.is_file():
            try:
                content = torch.load(self.path, map_location=model.device, weights_only=True)
                self.forward, self.index, self.state = (
                    content[name] for name in ("forwards", "index", "state"))
                Tracker(model).load_state(self.state)
            except Exception as error:
                raise ValueError(f"{self.path}: not the state of an interrupted run "
                                 "(--overwrite starts over)") from error
        return self

    def mark_all_done(self) -> "TrackerCheckpoint":
        """Take the masks of all frames from their files, so that only other outputs are written."""
        self.forward, self.index = True, math.inf
        return self

    def is_done(self, index: int, forward: bool) -> bool:
        """Whether the interrupted run already segmented a frame in this direction."""
        if self.index is None or forward > self.forward:
            return False
        return (forward < self.forward or index == self.index
                or (index > self.index) != forward)

    def mask(self, index: int) -> np.ndarray:
        """Read the (H, W) uint8 mask of a frame that is done."""
        return read_mask(self.mask_path(index))

    def mask_path(self, index: int) -> Path:
        return self.folder / f"{self.clip.frame_name(index)}.png"

    def due(self) -> bool:
        """Whether `SAVE_INTERVAL` has passed since the last call that returned True."""
        if time.monotonic() - self.saved < SAVE_INTERVAL:
            return False
        self.saved = time.monotonic()
        return True

    def save(self, frame: Frame, state: dict) -> None:
        """Save the tracker state after `frame`, whose mask must already be on disk."""
        save(self.path, {"forwards": frame.forward, "index": frame.index, "state": state})

    def delete(self) -> None:
        """Delete the saved state once the clip is finished."""
        self.path.unlink(missing_ok=True)


@torch.no_grad()
def track(model: VideoMatch, clip: Clip, masks: dict[int, np.ndarray], options: Options,
          checkpoint: TrackerCheckpoint | None = None) -> Iterator[Frame]:
    """Segment a clip: backward from the first user mask to the start, then forward to the end.

    The forward pass comes second because a video must be written in order: by then the masks of
    the earlier frames are on disk. An object is tracked from the first user mask that contains it.

    Args:
        masks: (H, W) uint8 user masks by frame index, at least one.
        checkpoint: where to resume.

    Raises:
        ValueError: a mask's size differs from the frame's, or its frame doesn't exist or is outside
            `options.start` and `options.stop`.
    """
    model.eval()
    marked = [*masks, *options.presence.absent, *options.presence.gone]
    if not clip.has(max(marked)):
        raise ValueError(f"--mask: there is no frame {max(marked)}, the clip has {clip.count} "
                         "frames, counted from 0")
    masks = {frame: clip.fit(mask) for frame, mask in masks.items()}
    first, start, stop = min(masks), options.start, options.stop
    for index in marked:
        if index < start or stop is not None and index >= stop:
            raise ValueError(f"--mask: frame {clip.number(index)} is not in --frames")
    reference = next(clip.frames(first))
    with ThreadPoolExecutor(1) as pool:
        for forward in (False, True) if first > start else (True,):
            user_masks = masks if forward else {first: masks[first]}
            others = (enumerate(clip.frames(first + 1, stop), first + 1) if forward else
                      zip(range(first - 1, start - 1, -1), clip.backwards(first)))
            frames = ((index, image, resize_for_network(image, options))
                      for index, image in itertools.chain([(first, reference)], others))
            for frame in _propagate(model, _prefetch(pool, frames), user_masks, options, forward,
                                    checkpoint):
                if forward or frame.index != first:  # the first frame is written only once
                    yield frame


def _prefetch(pool: Executor, frames: Iterator) -> Iterator:
    """Decode and resize frames in advance; the pool must have one thread, to keep their order."""
    end = object()
    for frame in ahead(pool, lambda _: next(frames, end), itertools.count()):
        if frame is end:
            return
        yield frame


def _propagate(model: VideoMatch, frames: Iterable[tuple[int, np.ndarray, np.ndarray]],
               masks: dict[int, np.ndarray], options: Options, forward: bool,
               checkpoint: TrackerCheckpoint | None) -> Iterator[Frame]:
    """Propagate masks through frames in one direction, with one tracker.

    Args:
        frames: index, image, and image for the network, beginning with the first user mask's.
    """
    tracker = Tracker(model, options.threshold, options.remove_outliers)
    for index, image, network_image in frames:
        if checkpoint and checkpoint.is_done(index, forward):
            # the file of the first frame may not exist yet: only the forward pass writes it
            mask = masks[index] if index == min(masks) else checkpoint.mask(index)
            yield Frame(index, image, None, forward, tracker, mask)
            continue
        if checkpoint and checkpoint.state is not None and checkpoint.forward == forward:
            tracker.load_state(checkpoint.state)
            checkpoint.state = None
        yield segment_frame(tracker, index, image, network_image, masks.get(index), options,
                            forward)


def segment_frame(tracker: Tracker, index: int, image: np.ndarray, network_image: np.ndarray,
                  user_mask: np.ndarray | None, options: Options, forward: bool = True,
                  presence: Presence | None = None) -> Frame:
    """Run the tracker on its next frame.

    Args:
        image: (H, W, 3) uint8 RGB frame.
        network_image: (h, w, 3) uint8 RGB, the frame as resized by `resize_for_network`.
        user_mask: (H, W) uint8 object ids; None to predict the mask.
        presence: objects that are absent or gone; defaults to that in `options`.

    Raises:
        ValueError: the mask's size differs from the frame's.
    """
    presence = presence or options.presence
    missing = presence.missing(index).intersection(tracker.object_ids)
    if user_mask is None and missing.intersection(presence.absent.get(index, ())):
        # makes it a reference frame: the tracker predicts the other objects and adds them
        user_mask = np.zeros(image.shape[:2], np.uint8)
    if user_mask is None:
        # Objects that are gone are removed, so that they cost no time. At a user mask they stay in
        # the memory: it may contain them again.
        for object_id in sorted(missing):
            tracker.remove(object_id)
    else:
        images.check_same_shape(f"frame {index}", image.shape, f"--mask for frame {index}",
                                user_mask.shape)
    tensor = preprocess.to_tensor(network_image, options.input_shape, tracker.model.device)
    shape = options.segmentation_shape or network_image.shape[:2]
    step = tracker.step(tensor, user_mask, shape, missing)
    # the step's mask also has the predictions of objects that the user mask lacks
    override = None if user_mask is None else step.mask
    if options.segmentation_shape and user_mask is None:
        override = images.resize_mask(step.mask, image.shape[:2])
    return Frame(index, image, step, forward, tracker, override)


def resize_for_network(image: np.ndarray, options: Options) -> np.ndarray:
    """(H, W, 3) uint8 RGB frame -> (h, w, 3), at the working size.

    With `options.input_shape` it stays as it is; `to_tensor` resizes it then.
    """
    return images.scaled(image, 0 if options.input_shape else options.size)


def location_size(model: VideoMatch, shape: tuple[int, int], options: Options) -> float:
    """Side length of a feature-map location, in pixels of an (H, W) frame."""
    small = options.input_shape or images.working_shape(shape, options.size)
    finer = 1.0 if model.method == "memory" else model.upsample_factor
    return model.encoder.spec.stride / (model.zoom * finer) * min(shape) / min(small)


class Sink:
    """Base class of outputs; receives the frames in the order of segmentation.

    All methods are called from one background thread.
    """

    def write(self, frame: Frame) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        """Put everything written so far on disk: an interrupted run will resume from here."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def drain(frames: Iterable[Frame], sinks: list[Sink], checkpoint: TrackerCheckpoint | None = None,
          on_frame: Callable[[Frame], object] = lambda _: None) -> int:
    """Send all frames to all sinks, which write in a background thread.

    Args:
        checkpoint: saved every `SAVE_INTERVAL` and on Ctrl+C, deleted at the end.
        on_frame: called with each frame before it goes to the sinks.

    Returns:
        The number of frames.

    Raises:
        KeyboardInterrupt: on Ctrl+C, after the current frame is written and its state saved.
    """
    def write(frame: Frame, state: dict | None) -> None:
        for sink in sinks:
            sink.write(frame)
        if state is not None:
            for sink in sinks:
                sink.flush()
            checkpoint.save(frame, state)

    count = 0
    with interruptible() as interrupted, ExitStack() as stack:
        for sink in sinks:
            stack.enter_context(sink)
        background = stack.enter_context(Background(write))
        for frame in frames:
            on_frame(frame)
            stop = interrupted()
            save_now = (checkpoint is not None and frame.step is not None
                        and (checkpoint.due() or stop))
            # here, not in the background: by then the tracker may be at a later frame
            background(frame, frame.tracker.state() if save_now else None)
            count += 1
            if stop:
                raise KeyboardInterrupt
        stack.close()  # completes all files before the state is deleted
        if interrupted():  # after the last frame
            raise KeyboardInterrupt
    if checkpoint:
        checkpoint.delete()
    return count
