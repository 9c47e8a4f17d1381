"""The one road from a clip to masks: a tracker driven through its frames, and sinks behind it.

A clip of one's own and a sequence of a data set take it alike: to evaluate is to segment a clip
whose truth is known, with one sink more. What a tracker does with a frame is not known here.
"""

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

import preprocess
from media import drawing, images
from media.background import Background, ahead
from media.video import Clip
from media.writer import VideoWriter
from tracker import Step, Tracker
from videomatch import VideoMatch, save

KEPT_EVERY = 20.0  # seconds from one state that a run can go on from to the next


@dataclass
class Options:
    """What the masks depend on beside model, clip and given masks; the flags of `main.py`."""

    input_shape: tuple[int, int] | None = None  # (H, W) for the network; None: the frame's
    segmentation_shape: tuple[int, int] | None = None  # (H, W) where pixels are decided
    threshold: float = 0.5
    remove_outliers: bool = True
    # fits a copy of the model to a clip, given the reference frame and its mask
    adapt: Callable[[VideoMatch, np.ndarray, np.ndarray], VideoMatch] | None = None


@dataclass
class Frame:
    """A frame whose mask is known.

    Args:
        index: its number in the clip, from 0.
        image, mask: (H, W, 3) uint8 RGB and (H, W) uint8 object ids.
        step: what the tracker knows of it; None where an earlier run found the mask.
        forwards: the way on which it was met.
        tracker: at this frame; a sink that wants to go back to it takes a copy in time.
    """

    index: int
    image: np.ndarray
    mask: np.ndarray
    step: Step | None
    forwards: bool
    tracker: Tracker


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

    def mask(self, index: int, forwards: bool) -> np.ndarray | None:
        """That of a frame which an earlier run met on this way; None where it didn't."""
        if self.index is None or forwards > self.forwards:
            return None
        if forwards == self.forwards and (index > self.index) == forwards and index != self.index:
            return None
        return images.read_mask(self.folder / f"{self.clip.frame_name(index)}.png")

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
        self.path.unlink(missing_ok=True)


@torch.no_grad()
def track(model: VideoMatch, clip: Clip, masks: dict[int, np.ndarray], options: Options,
          progress: Progress | None = None) -> Iterator[Frame]:
    """Segment a clip from the first frame with a mask backwards to its start, then forwards.

    Forwards last, so that a video of the result can be written along with it, see `Film`. An
    object is looked for from the first frame on whose mask holds it.

    Args:
        masks: (H, W) uint8 object ids of frames, at least one.

    Raises:
        ValueError: a mask is of another size than the frame, or of a frame that isn't there.
    """
    model.eval()
    first, count = min(masks), 0
    _check_frames(masks, clip.count or max(masks) + 1)
    ways = [True]
    if first or options.adapt:
        reference = next(iter(clip.frames(first)), None)
        if reference is None:
            raise ValueError(f"--mask: the clip ends before frame {first}, counted from 0")
        if options.adapt:
            model = options.adapt(model, reference, masks[first])
    if first:
        ways.insert(0, False)
    with ThreadPoolExecutor(1) as pool:
        for forwards in ways:
            frames: Iterator[tuple[int, np.ndarray]]
            if forwards:
                frames, given = enumerate(clip.frames(first), first), masks
            else:
                before = zip(range(first - 1, -1, -1), clip.backwards(first))
                frames, given = itertools.chain([(first, reference)], before), {first: masks[first]}
            for frame in _way(model, _read(pool, frames), given, options, forwards, progress):
                if forwards or frame.index != first:
                    yield frame
                count = frame.index + 1
    _check_frames(masks, count)


def _check_frames(masks: dict[int, np.ndarray], count: int) -> None:
    missing = [frame for frame in masks if frame >= count]
    if missing:
        raise ValueError(f"--mask: there is no frame {missing[0]}, the clip has {count} frames, "
                         "counted from 0")


def _read(pool: Executor, frames: Iterator) -> Iterator:
    """The frames, decoded ahead; the pool has one thread, so they stay in order."""
    end = object()
    for frame in ahead(pool, lambda _: next(frames, end), itertools.count()):
        if frame is end:
            return
        yield frame


def _way(model: VideoMatch, frames: Iterable[tuple[int, np.ndarray]],
         masks: dict[int, np.ndarray], options: Options, forwards: bool,
         progress: Progress | None) -> Iterator[Frame]:
    """One tracker through frames in the order in which they come."""
    tracker = Tracker(model, options.threshold, options.remove_outliers)
    for index, image in frames:
        mask = progress.mask(index, forwards) if progress else None
        if mask is not None:
            yield Frame(index, image, mask, None, forwards, tracker)
            continue
        if progress and progress.state is not None and progress.forwards == forwards:
            tracker.load_state(progress.state)
            progress.state = None
        step = take_step(tracker, index, image, masks.get(index), options)
        yield Frame(index, image, images.resize_mask(step.mask, image.shape[:2]), step, forwards,
                    tracker)


def take_step(tracker: Tracker, index: int, image: np.ndarray, mask: np.ndarray | None,
              options: Options) -> Step:
    """A tracker's next frame, at the sizes that the options name; arguments as elsewhere."""
    if mask is not None:
        images.check_same_shape(f"frame {index}", image.shape, f"--mask for frame {index}",
                                mask.shape)
    tensor = preprocess.to_tensor(image, options.input_shape, tracker.model.device)
    return tracker.step(tensor, mask, options.segmentation_shape or image.shape[:2])


class Sink:
    """Takes frames in the order in which they are segmented, in a thread in the background."""

    def write(self, frame: Frame) -> None:
        raise NotImplementedError

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def drain(frames: Iterable[Frame], sinks: list[Sink], progress: Progress | None = None,
          after: Callable[[Frame], object] = lambda _: None) -> int:
    """Hand every frame to every sink, one frame after the other, in a thread of its own.

    Args:
        progress: kept up to date.
        after: called with each frame.

    Returns:
        How many frames there were.
    """
    def write(frame: Frame, state: dict | None) -> None:
        for sink in sinks:
            sink.write(frame)
        if state is not None:
            progress.keep(frame, state)

    count = 0
    with ExitStack() as stack:
        for sink in sinks:
            stack.enter_context(sink)
        background = stack.enter_context(Background(write))
        for frame in frames:
            due = progress is not None and frame.step is not None and progress.due()
            background(frame, frame.tracker.state() if due else None)
            count += 1
            after(frame)
    if progress:
        progress.end()
    return count


class Masks(Sink):
    """A palette PNG for each frame, named as the clip names it."""

    def __init__(self, folder: Path, clip: Clip):
        self.folder, self.clip = folder, clip
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, frame: Frame) -> None:
        if frame.step is not None:
            images.write_mask(self.folder / f"{self.clip.frame_name(frame.index)}.png", frame.mask)


class Pictures(Sink):
    """An image file for each frame, of what `draw` makes of it and its mask."""

    def __init__(self, folder: Path, clip: Clip, draw: Callable):
        self.folder, self.clip, self.draw = folder, clip, draw
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, frame: Frame) -> None:
        images.write_image(self.folder / f"{self.clip.frame_name(frame.index)}.png",
                           self.draw(frame.image, frame.mask))


class Film(Sink):
    """A video of what `draw` makes of each frame and its mask.

    Frames before the first mask come last to first, and a video is written first to last. So what
    was drawn of them waits in a file, as JPEG, which the video's own loss hides.
    """

    QUALITY = 97

    def __init__(self, path: Path, clip: Clip, draw: Callable):
        self.draw, self.video = draw, VideoWriter(path, clip.fps)
        self.waiting: list[tuple[int, int]] = []  # where in the file, and how long
        self.file = tempfile.TemporaryFile()  # noqa: SIM115

    def write(self, frame: Frame) -> None:
        picture = self.draw(frame.image, frame.mask)
        if frame.forwards:
            self._flush()
            self.video.write(picture)
            return
        _, data = cv2.imencode(".jpg", picture[..., ::-1],
                               [cv2.IMWRITE_JPEG_QUALITY, self.QUALITY])
        self.waiting.append((self.file.tell(), len(data)))
        self.file.write(data.tobytes())

    def _flush(self) -> None:
        while self.waiting:
            place, length = self.waiting.pop()
            self.file.seek(place)
            data = np.frombuffer(self.file.read(length), np.uint8)
            self.video.write(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])

    def __exit__(self, *exception):
        self.file.close()
        self.video.__exit__(*exception)


def sinks(folder: Path, clip: Clip, cutout: str | None = None) -> list[Sink]:
    """What `-m segment` writes into a results folder.

    Args:
        cutout: "transparent", "blur" or "#rrggbb"; None: no cut-out.
    """
    found: list[Sink] = [Masks(folder / "masks", clip),
                         Film(folder / "overlay.mp4", clip, drawing.overlay)]
    if cutout == "transparent":
        found.append(Pictures(folder / "cutout", clip, drawing.transparent))
    elif cutout:
        found.append(Film(folder / "cutout.mp4", clip, lambda image, mask:
                          drawing.replace_background(image, mask, cutout)))
    return found
