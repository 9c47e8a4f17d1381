"""Passes of a tracker over parts of a clip, from the masks that a person gave and from kept states.

A pass starts at a frame and runs one way. Which passes are wanted, and what becomes of the masks,
is not known here.
"""

import itertools
import logging
import time
import zlib
from collections.abc import Callable, Generator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch

import segment
from checkpoint import save
from confidence import measure
from media.clip import Clip
from page.work import Found, Work
from tracker import Tracker

log = logging.getLogger(__name__)


def end_of_pass(start: int, forwards: bool, given: set[int], found: dict[int, Found],
                count: int) -> int:
    """The first frame that a pass from `start` leaves alone.

    That is the next frame that a person gave; or, where masks come from that one already, the
    first of those that is nearer to it than to `start`.
    """
    way = 1 if forwards else -1
    others = [frame for frame in given if (frame - start) * way > 0]
    if not others:
        return count if forwards else -1
    other = min(others, key=lambda frame: abs(frame - start))
    for frame in range(start + way, other, way):
        entry = found.get(frame)
        if entry and entry.origin == other and abs(frame - other) < abs(frame - start):
            return frame
    return other


class States:
    """Trackers at some of the frames that passes met, so that a later one needn't start far away.

    Args:
        folder: of the few that are kept on disk as well, for after a kill.
        make: a tracker that has seen nothing.
        facts: states that were made with others are left alone.
    """

    EVERY = 5  # frames from one that is kept to the next
    MOST, MOST_ON_DISK = 64, 6  # of some 6 MB each, and on disk of 30 MB, at 480p
    SECONDS = 20.0  # from one that is kept on disk to the next
    REACH = 60  # frames that are done again at most, to come from a state to where one is wanted

    def __init__(self, folder: Path, make: Callable[[], Tracker], facts: dict[str, str]):
        self.folder, self.make = folder, make
        self.maker = f"{zlib.crc32(repr(sorted(facts.items())).encode()):08x}"
        self.kept: dict[tuple[bool, int], Tracker | Path] = {}
        self.saved = time.monotonic()
        for path in sorted(folder.glob(f"{self.maker}_*_*.pth")):
            way, frame = path.stem.split("_")[1:]
            self.kept[way == "forwards", int(frame)] = path

    def keep(self, tracker: Tracker, frame: int, forwards: bool, last: bool = False) -> None:
        """Keep a tracker that has just seen `frame`, where it is time to, or if it is the last."""
        if not last and frame % self.EVERY:
            return
        self.kept.pop((forwards, frame), None)
        self.kept[forwards, frame] = tracker.copy()
        if last or time.monotonic() - self.saved > self.SECONDS:
            self.saved = time.monotonic()
            save(self._path(forwards, frame), tracker.state())
            for path in sorted(self.folder.glob("*.pth"),
                               key=lambda path: path.stat().st_mtime)[:-self.MOST_ON_DISK]:
                path.unlink()
        for key in list(self.kept)[:-self.MOST]:
            del self.kept[key]

    def nearest(self, frame: int, forwards: bool) -> tuple[int, Tracker] | None:
        """The one last kept on the way to `frame`, at most REACH frames before it; a copy."""
        way = 1 if forwards else -1
        near = [(abs(frame - other), other) for kept, other in self.kept
                if kept == forwards and 0 <= (frame - other) * way <= self.REACH]
        for _, other in sorted(near):
            tracker = self._tracker(forwards, other)
            if tracker:
                return other, tracker
        return None

    def drop(self, frame: int, given: set[int]) -> None:
        """Forget those that the mask of `frame` was in, or is to be in now."""
        before = max((other for other in given if other < frame), default=-1)
        after = min((other for other in given if other > frame), default=float("inf"))
        for forwards, other in list(self.kept):
            if (frame <= other < after) if forwards else (before < other <= frame):
                self._forget(forwards, other)

    def clear(self) -> None:
        for forwards, frame in list(self.kept):
            self._forget(forwards, frame)

    def _path(self, forwards: bool, frame: int) -> Path:
        way = "forwards" if forwards else "backwards"
        return self.folder / f"{self.maker}_{way}_{frame:05d}.pth"

    def _forget(self, forwards: bool, frame: int) -> None:
        del self.kept[forwards, frame]
        self._path(forwards, frame).unlink(missing_ok=True)

    def _tracker(self, forwards: bool, frame: int) -> Tracker | None:
        kept = self.kept[forwards, frame]
        if isinstance(kept, Tracker):
            return kept.copy()
        tracker = self.make()
        try:
            tracker.load_state(torch.load(kept, map_location=tracker.model.device,
                                          weights_only=True))
        except Exception as error:
            log.warning("%s: not a state that can be gone on from (%s)", kept, error)
            self._forget(forwards, frame)
            return None
        return tracker


@dataclass
class Passes:
    """How passes over a clip are made.

    Args:
        clip, options: as for `segment.track`.
        image: a frame's (H, W, 3) uint8 RGB, by its number.
        work: the masks that are known.
    """

    clip: Clip
    options: segment.Options
    image: Callable[[int], np.ndarray]
    work: Work
    states: States

    def run(self, start: int, forwards: bool) -> Generator[tuple[int, np.ndarray, Found]]:
        """Each frame behind `start` with its mask, as long as it is asked for more."""
        tracker, way = self.tracker_at(start, forwards), 1 if forwards else -1
        frame, before = start, {}
        frames = self.clip.frames(start + 1) if forwards else self.clip.backwards(start)
        try:
            for frame, image in zip(itertools.count(start + way, way), frames):
                seen = self._follow(tracker, frame, image, None)
                measures = measure(frame, seen.step, before)
                before = {one.object_id: one.area for one in measures}
                yield frame, seen.mask, Found(start, [astuple(one) for one in measures])
                self.states.keep(tracker, frame, forwards)
        finally:
            # a mask that was given meanwhile isn't in it
            if frame != start and frame not in self.work.given:
                self.states.keep(tracker, frame, forwards, last=True)

    def tracker_at(self, start: int, forwards: bool) -> Tracker:
        """A tracker that has just seen `start`.

        From the nearest state on the way to it; without one, from the masks given for earlier
        frames as references, which is where the command line stands at the first of them.

        Raises:
            ValueError: none of these masks holds an object.
        """
        near = self.states.nearest(start, forwards)
        if near:
            way = 1 if forwards else -1
            tracker, frames = near[1], list(range(near[0] + way, start + way, way))
        else:
            tracker = self.states.make()
            earlier = [frame for frame in sorted(self.work.given) if frame < start]
            frames = [frame for frame in [*earlier, start] if self.work.mask(frame).any()]
            if not frames:
                raise ValueError(f"frame {self.clip.number(start)}: its mask holds no object to "
                                 "look for")
        for frame in frames:
            mask = self.work.mask(frame) if not near or frame in self.work.given else None
            self._follow(tracker, frame, self.image(frame), mask)
        return tracker

    def _follow(self, tracker: Tracker, frame: int, image: np.ndarray,
                mask: np.ndarray | None) -> segment.Frame:
        return segment.follow(tracker, frame, image, segment.scaled(image, self.options), mask,
                              self.options)
