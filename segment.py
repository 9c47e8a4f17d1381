"""The one road from a clip to masks: a tracker driven through its frames, sinks behind it.

A clip of one's own and a sequence of a data set take it alike: to evaluate is to segment a clip
whose truth is known, with one sink more. What a tracker does with a frame is not known here, nor
what becomes of the masks (`sinks.py`).
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import preprocess
from checkpoint import save
from follow import resized
from media import images
from media.background import Background, ahead, interruptible
from media.clip import Clip
from media.masks import read_mask
from network.outliers import decide
from tracker import Step, Tracker
from videomatch import VideoMatch

KEPT_EVERY = 20.0  # seconds from one state that a run can go on from to the next


@dataclass
class Options:
    """What the masks depend on beside model, clip and given masks; the flags of `main.py`."""

    size: int = 480  # short side for the network, see `images.working_shape`; 0: the frame's own
    input_shape: tuple[int, int] | None = None  # (H, W) for the network, whatever `size` says
    segmentation_shape: tuple[int, int] | None = None  # (H, W) where pixels are decided
    start: int = 0  # the first frame of the clip that counts
    stop: int | None = None  # the first behind the last; None: the clip's end
    threshold: float = 0.5
    remove_outliers: bool = True


@dataclass
class Frame:
    """A frame whose mask is known.

    Args:
        index: its number in the clip, from 0.
        image: (H, W, 3) uint8 RGB.
        step: what the tracker knows of it, maybe at another size; None where an earlier run
            found the mask.
        forwards: the way on which it was met.
        tracker: at this frame; a sink that wants to go back to it takes a copy in time.
        known: (H, W) uint8 mask, where it isn't to be decided from resized probabilities: given,
            found by an earlier run, or decided at a size of its own.
    """

    index: int
    image: np.ndarray
    step: Step | None
    forwards: bool
    tracker: Tracker
    known: np.ndarray | None = None

    @cached_property
    def mask(self) -> np.ndarray:
        """(H, W) uint8 object ids."""
        if self.known is not None:
            return self.known
        if self.step.mask.shape == self.image.shape[:2]:
            return self.step.mask
        return decide(self.probabilities, self.step.object_ids, self.tracker.threshold)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """(N+1, H, W) float32, as the step has them, resized."""
        return resized(self.step.probabilities, self.image.shape[:2])


class Progress:
    """How far a clip is, kept beside the folder of its masks: a run that was killed can go on.

    Args:
        folder: that of the masks.
        clip: which names them.
    """

    def __init__(self, folder: Path, clip: Clip):
        self.folder, self.clip = folder, clip
        self.path = folder.with_name(f".{folder.name}.progress")
        self.forwards, self.state = False, None
        self.index: float | None = None  # of the last frame whose mask is known, on this way
        self.saved = time.monotonic()

    def load(self, model: VideoMatch) -> "Progress":
        """Go back to what an earlier run kept, if there is something."""
        if self.path.is_file():
            try:
                kept = torch.load(self.path, map_location=model.device, weights_only=True)
                self.forwards, self.index, self.state = (
                    kept[name] for name in ("forwards", "index", "state"))
                Tracker(model).load_state(self.state)
            except Exception as error:
                raise ValueError(f"{self.path}: not the state of an interrupted run "
                                 "(--overwrite starts over)") from error
        return self

    def all(self) -> "Progress":
        """Every frame's mask is known: there is only something to draw."""
        self.forwards, self.index = True, math.inf
        return self

    def met(self, index: int, forwards: bool) -> bool:
        """Whether an earlier run met the frame on this way, so that its mask is known."""
        if self.index is None or forwards > self.forwards:
            return False
        return (forwards < self.forwards or index == self.index
                or (index > self.index) != forwards)

    def mask(self, index: int) -> np.ndarray:
        return read_mask(self.path_of(index))

    def path_of(self, index: int) -> Path:
        """Of a frame's mask."""
        return self.folder / f"{self.clip.frame_name(index)}.png"

    def due(self) -> bool:
        """Whether it is time to keep a state; says so once."""
        if time.monotonic() - self.saved < KEPT_EVERY:
            return False
        self.saved = time.monotonic()
        return True

    def keep(self, frame: Frame, state: dict) -> None:
        """Make `frame` the last that a later run needn't segment; its mask must be written."""
        save(self.path, {"forwards": frame.forwards, "index": frame.index, "state": state})

    def end(self) -> None:
        """There is nothing left to go on with, nor what a kill left of a file half written."""
        for path in (self.path, *self.path.parent.glob(f".{self.path.stem}.part*")):
            path.unlink(missing_ok=True)


@torch.no_grad()
def track(model: VideoMatch, clip: Clip, masks: dict[int, np.ndarray], options: Options,
          progress: Progress | None = None) -> Iterator[Frame]:
    """Segment a clip from the first frame with a mask backwards to its start, then forwards.

    Forwards last, so that a video of the result can be written along with it, see `Film`. An
    object is looked for from the first frame on whose mask holds it.

    Args:
        masks: (H, W) uint8 object ids of frames, at least one.

    Raises:
        ValueError: a mask is of another size than the frame, or of a frame that isn't there or
            not in the part of the clip that counts.
    """
    model.eval()
    if not clip.has(max(masks)):
        raise ValueError(f"--mask: there is no frame {max(masks)}, the clip has {clip.count} "
                         "frames, counted from 0")
    masks = {frame: clip.fit(mask) for frame, mask in masks.items()}
    first, start, stop = min(masks), options.start, options.stop
    for given in masks:
        if given < start or stop is not None and given >= stop:
            raise ValueError(f"--mask: frame {clip.number(given)} is not in --frames")
    reference = next(clip.frames(first))
    with ThreadPoolExecutor(1) as pool:
        for forwards in (False, True) if first > start else (True,):
            known = masks if forwards else {first: masks[first]}
            others = (enumerate(clip.frames(first + 1, stop), first + 1) if forwards else
                      zip(range(first - 1, start - 1, -1), clip.backwards(first)))
            frames = _scaled(itertools.chain([(first, reference)], others), options)
            for frame in _way(model, _read(pool, frames), known, options, forwards, progress):
                if forwards or frame.index != first:
                    yield frame


def _read(pool: Executor, frames: Iterator) -> Iterator:
    """The frames, decoded ahead; the pool has one thread, so they stay in order."""
    end = object()
    for frame in ahead(pool, lambda _: next(frames, end), itertools.count()):
        if frame is end:
            return
        yield frame


def _way(model: VideoMatch, frames: Iterable[tuple[int, np.ndarray, np.ndarray]],
         masks: dict[int, np.ndarray], options: Options, forwards: bool,
         progress: Progress | None) -> Iterator[Frame]:
    """One tracker through frames, each with what the network sees, in the order they come in."""
    tracker = Tracker(model, options.threshold, options.remove_outliers)
    for index, image, small in frames:
        if progress and progress.met(index, forwards):
            # that of the first frame is written on the way forwards only
            mask = masks[index] if index == min(masks) else progress.mask(index)
            yield Frame(index, image, None, forwards, tracker, mask)
            continue
        if progress and progress.state is not None and progress.forwards == forwards:
            tracker.load_state(progress.state)
            progress.state = None
        yield follow(tracker, index, image, small, masks.get(index), options, forwards)


def follow(tracker: Tracker, index: int, image: np.ndarray, small: np.ndarray,
           given: np.ndarray | None, options: Options, forwards: bool = True) -> Frame:
    """A tracker's next frame.

    Args:
        image, small: (H, W, 3) uint8 RGB, the frame and, as `scaled` makes it, what the network
            sees of it.
        given: (H, W) uint8 object ids where a mask was given.

    Raises:
        ValueError: the mask is of another size than the frame.
    """
    if given is not None:
        images.check_same_shape(f"frame {index}", image.shape, f"--mask for frame {index}",
                                given.shape)
    tensor = preprocess.to_tensor(small, options.input_shape, tracker.model.device)
    shape = options.segmentation_shape or small.shape[:2]
    step = tracker.step(tensor, given, shape)
    known = None if given is None else step.mask  # with the objects that it lacked
    if options.segmentation_shape and given is None:
        known = images.resize_mask(step.mask, image.shape[:2])
    return Frame(index, image, step, forwards, tracker, known)


def scaled(image: np.ndarray, options: Options) -> np.ndarray:
    """(H, W, 3) uint8 RGB: what the network sees of a frame."""
    return images.scaled(image, 0 if options.input_shape else options.size)


def cell(model: VideoMatch, shape: tuple[int, int], options: Options) -> float:
    """The side of a feature cell, in pixels of an (H, W) frame."""
    small = options.input_shape or images.working_shape(shape, options.size)
    finer = 1.0 if model.method == "memory" else model.upsample_factor
    return model.encoder.spec.stride / (model.zoom * finer) * min(shape) / min(small)


def _scaled(frames: Iterable[tuple[int, np.ndarray]],
            options: Options) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Each frame with what the network sees of it."""
    for index, image in frames:
        yield index, image, scaled(image, options)


class Sink:
    """Takes frames in the order in which they are segmented, in a thread in the background."""

    def write(self, frame: Frame) -> None:
        raise NotImplementedError

    def keep(self) -> None:
        """What was written so far is what a later run goes on from."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def drain(frames: Iterable[Frame], sinks: list[Sink], progress: Progress | None = None,
          seen: Callable[[Frame], object] = lambda _: None) -> int:
    """Hand every frame to every sink, one frame after the other, in a thread of its own.

    Args:
        progress: kept up to date.
        seen: called with each frame, before any sink.

    Returns:
        How many frames there were.

    Raises:
        KeyboardInterrupt: Ctrl+C; after the frame under way, which a later run need not repeat.
    """
    def write(frame: Frame, state: dict | None) -> None:
        for sink in sinks:
            sink.write(frame)
        if state is not None:
            for sink in sinks:
                sink.keep()
            progress.keep(frame, state)

    count = 0
    with interruptible() as interrupted, ExitStack() as stack:
        for sink in sinks:
            stack.enter_context(sink)
        background = stack.enter_context(Background(write))
        for frame in frames:
            seen(frame)
            stop = interrupted()
            keep = progress is not None and frame.step is not None and (progress.due() or stop)
            background(frame, frame.tracker.state() if keep else None)
            count += 1
            if stop:
                raise KeyboardInterrupt
        stack.close()  # every file is whole before anything else
        if interrupted():  # behind the last frame
            raise KeyboardInterrupt
    if progress:
        progress.end()
    return count
