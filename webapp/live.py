"""The session behind the page of a live clip: the picture as it arrives, prompts, objects.

Unlike a `Session` it can't return to a frame: a prompt corrects the frames that follow. There is
nothing to undo, propagate or export; results are written as they are made.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from media.live import LiveClip
from media.prompts import Prompts
from tracking import live, pipeline
from videomatch import VideoMatch
from webapp.store import MAX_OBJECTS, TrackedObject, find_object

# Bytes of the newest frames, which the page asks for, of those it was given last, on which a user
# may be about to draw, and of those a user draws on, each: 50 frames of 480p, 2 seconds.
KEPT_BYTES = 64 * 2**20
KEPT_FRAMES = 8  # at least, of large frames
MEASURED = 20  # frames over which the frame rate and the delay are taken: about a second


class LiveSession:
    """A live clip with its objects. Every method may be called from any thread, `run` once.

    Args:
        model, clip, options: see `live.track`.
        folder: where the results go, for the page.
        prompter: maps an (H, W, 3) uint8 RGB image and `Prompts` to an (H, W) bool mask.
        sinks: receive the frames from the first object on.

    Attributes:
        shape: (H, W) of the frames.
        version: increases with every frame and every change of the objects.
        ended: whether the clip has ended and all results are written.
        written: the number of frames passed to the sinks.
    """

    live = True

    def __init__(self, model: VideoMatch, clip: LiveClip, folder: Path, options: pipeline.Options,
                 prompter: Callable[[np.ndarray, Prompts], np.ndarray],
                 sinks: Sequence[pipeline.Sink]):
        self.model, self.clip, self.folder, self.options = model, clip, folder, options
        self.prompter, self.sinks, self.shape = prompter, list(sinks), clip.shape
        self.editor = self  # has those methods of an `Editor` that apply here
        self.lock = threading.RLock()
        self.objects: list[TrackedObject] = []
        self.version = time.time_ns() // 10**6  # see `Editor`
        self.ended, self.written = False, 0
        self._next_id = 1
        self._prompts: dict[int, tuple[int, Prompts]] = {}  # by object, with their frame
        # images and masks by frame: the newest ones, those the page was given, those held
        self._recent: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._shown: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._held: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._confidences: dict[int, float] = {}  # by object, in the newest frame
        self._times: deque[tuple[float, float]] = deque(maxlen=MEASURED)  # when, and the delay
        self._changes: SimpleQueue[live.Reference | live.Removal] = SimpleQueue()

    def run(self) -> int:
        """Track until the clip ends, and return the number of frames written."""
        try:
            pipeline.drain(self._frames(), self.sinks)
        finally:
            with self.lock:
                self.ended = True
                self.version += 1
        return self.written

    def _frames(self) -> Iterator[pipeline.Frame]:
        for frame in live.track(self.model, self.clip, self._changes, self.options):
            mask = frame.mask
            with self.lock:
                _keep(self._recent, frame.index, (frame.image, mask))
                if frame.step is not None and not self.written:
                    self._times.clear()  # frames without an object take no time
                now = time.monotonic()
                self._times.append((now, now - self.clip.arrived))
                self._confidences = frame.step.confidence() if frame.step else {}
                self.written += frame.step is not None
                self.version += 1
            if frame.step is not None:
                yield frame

    def image(self, frame: int) -> np.ndarray:
        """A recent frame, (H, W, 3) uint8 RGB; raises a ValueError if it isn't kept any more."""
        with self.lock:
            _keep(self._shown, frame, self._kept(frame))
            return self._kept(frame)[0]

    def mask(self, frame: int) -> np.ndarray:
        """The (H, W) uint8 mask of a recent frame; raises a ValueError as `image` does."""
        return self._kept(frame)[1]

    def hold(self, frame: int) -> None:
        """Keep a recent frame, on which a user begins to draw, until others are held."""
        with self.lock:
            _keep(self._held, frame, self._kept(frame))

    def _kept(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        with self.lock:
            for frames in (self._held, self._shown, self._recent):
                if frame in frames:
                    return frames[frame]
        raise ValueError("the picture has moved on: draw again")

    def add_prompt(self, frame: int, object_id: int,
                   box: tuple[int, int, int, int] | None = None,
                   point: tuple[int, int] | None = None, positive: bool = True) -> None:
        """Track an object from a box or point on, or correct it; see `Editor.add_prompt`.

        Raises:
            ValueError: there is no such object, the frame isn't kept any more, or nothing is found.
        """
        image, current = self._kept(frame)
        with self.lock:
            find_object(self.objects, object_id)
            at, earlier = self._prompts.get(object_id, (frame, Prompts()))
            if at != frame:  # earlier points are in other places of the picture
                earlier = Prompts()
            prompts = earlier.extended(box, point, positive)
            self._prompts[object_id] = frame, prompts
        found = self.prompter(image, prompts if box else replace(
            prompts, mask=current == object_id))
        if not found.any():
            raise ValueError("nothing was found there: draw a box, or click on another part")
        with self.lock:
            find_object(self.objects, object_id)  # it may have been deleted meanwhile
            if box:  # forget what the object was before
                self._changes.put(live.Removal(object_id))
            self._changes.put(live.Reference(frame, image,
                                             np.where(found, object_id, 0).astype(np.uint8)))

    def add_object(self) -> int:
        """Add an object and return its id."""
        with self.lock:
            if self._next_id > MAX_OBJECTS:
                raise ValueError(f"expected at most {MAX_OBJECTS} objects")
            added, self._next_id = self._next_id, self._next_id + 1
            self.objects.append(TrackedObject(added, f"object {added}"))
            self.version += 1
            return added

    def rename_object(self, object_id: int, name: str) -> None:
        with self.lock:
            find_object(self.objects, object_id).name = name
            self.version += 1

    def delete_object(self, object_id: int) -> None:
        """End the tracking of an object."""
        with self.lock:
            self.objects.remove(find_object(self.objects, object_id))
            self._changes.put(live.Removal(object_id))
            self.version += 1

    def stop(self) -> None:
        """End the clip; what was tracked so far is written."""
        self.clip.close()

    def state(self, since: int = 0) -> dict:
        """Everything the page shows except images and masks, as JSON; see `Session.state`."""
        with self.lock:
            newest = max(self._recent, default=0)
            times = list(self._times)
            seconds = times[-1][0] - times[0][0] if times else 0.0
            confidences = {obj.id: self._confidences.get(obj.id) for obj in self.objects
                           if obj.id in self._confidences}
            return {"version": self.version, "everywhere": 0, "count": len(self._recent) and
                    newest + 1, "fps": self.clip.fps, "height": self.shape[0],
                    "width": self.shape[1], "pending": [], "undo": 0, "run": None, "review": [],
                    "frames": {newest: {"user_mask": False, "version": self.version,
                                        "confidence": confidences}},
                    "objects": [vars(obj) | {"absent": [], "gone": []} for obj in self.objects],
                    "numbers": None, "formats": [],
                    "live": {"name": self.clip.name, "frame": newest,
                             "rate": (len(times) - 1) / seconds if seconds else 0.0,
                             "delay": statistics.median(d for _, d in times) if times else 0.0,
                             "received": self.clip.count + self.clip.skipped,
                             "skipped": self.clip.skipped, "written": self.written,
                             "folder": str(self.folder), "ended": self.ended}}


def _keep(frames: dict[int, tuple[np.ndarray, np.ndarray]], frame: int,
          kept: tuple[np.ndarray, np.ndarray]) -> None:
    """Add a frame's image and mask as the latest ones, and drop the earliest of too many."""
    frames.pop(frame, None)
    frames[frame] = kept
    while len(frames) > KEPT_FRAMES and len(frames) * kept[0].nbytes > KEPT_BYTES:
        del frames[next(iter(frames))]
