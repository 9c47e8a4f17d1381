"""Passes of a tracker over parts of a clip, from the masks that a person gave and from kept states.

A pass starts at a frame and runs one way. Which passes are wanted, and what becomes of the masks,
is not known here.
"""

import itertools
import logging
import time
import zlib
from collections.abc import Callable, Collection, Generator
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np
import torch

from checkpoint import save
from media.clip import Clip
from tracker import Tracker
from tracking import pipeline
from tracking.confidence import measure
from webapp.store import Found, Work

log = logging.getLogger(__name__)


def end_of_pass(start: int, forwards: bool, given: set[int], found: dict[int, Found],
                count: int, gone: Collection[int] = ()) -> int:
    """The first frame that a pass from `start` leaves alone.

    That is the next frame that a person gave; or, where masks come from that one already, the
    first of those that is nearer to it than to `start`. Backwards, a pass doesn't go beyond a frame
    from which on an object is `gone`: it doesn't know that object.
    """
    way = 1 if forwards else -1
    others = [frame for frame in given if (frame - start) * way > 0]
    if not forwards:
        others += [frame - 1 for frame in gone if frame < start]
    if not others:
        return count if forwards else -1
    other = min(others, key=lambda frame: abs(frame - start))
    for frame in range(start + way, other, way):
        entry = found.get(frame)
        if entry and entry.origin == other and abs(frame - other) < abs(frame - start):
            return frame
    return other


@dataclass
class Made:
    """What a tracker is made of.

    Args:
        origin: the first frame that it went through in one go, from there to where it is.
        said: by frame, the `Work.key` of what a person said about it and the tracker took in.
    """

    origin: int
    said: dict[int, tuple]

    def holds(self, frame: int, said: dict[int, tuple]) -> bool:
        """Whether what a person says now is still what a tracker at `frame` was made of.

        It isn't if a mask that it holds was corrected, or a frame that it went through by itself
        has a user mask now. Masks before that may be missing.
        """
        first, last = sorted((self.origin, frame))
        return all(said.get(other) == key for other, key in self.said.items()) and not any(
            first <= other <= last and other not in self.said for other in said)


@dataclass
class Kept:
    """A tracker, or the file that it is in, with what it is made of."""

    tracker: Tracker | Path
    made: Made | None = None
    tensors: dict[int, int] = field(default_factory=dict)  # address and bytes; copies share them


class States:
    """Trackers at some of the frames that passes met, so that a later one needn't start far away.

    Args:
        folder: of the few that are kept on disk as well, for after a kill.
        make: a tracker that has seen nothing.
        facts: states that were made with others are left alone.
    """

    EVERY = 5  # frames from one that is kept to the next
    # at 480p a state takes some 6 MB that no other holds; fewer of them mean that a correction
    # starts farther away
    MEMORY = 512 * 2**20  # bytes
    MOST_ON_DISK = 6  # of 30 MB at 480p
    SECONDS = 20.0  # from one that is kept on disk to the next
    REACH = 60  # frames that are done again at most, to come from a state to where one is wanted

    def __init__(self, folder: Path, make: Callable[[], Tracker], facts: dict[str, str]):
        self.folder, self.make = folder, make
        self.maker = f"{zlib.crc32(repr(sorted(facts.items())).encode()):08x}"
        self.kept: dict[tuple[bool, int], Kept] = {}
        self.saved = time.monotonic()
        for path in sorted(folder.glob(f"{self.maker}_*_*.pth")):
            way, frame = path.stem.split("_")[1:]
            self.kept[way == "forwards", int(frame)] = Kept(path)

    def keep(self, tracker: Tracker, frame: int, forwards: bool, made: Made,
             last: bool = False) -> None:
        """Keep a tracker that has just seen `frame`, where it is time to, or if it is the last."""
        if not last and frame % self.EVERY:
            return
        self.kept.pop((forwards, frame), None)
        made, state = Made(made.origin, dict(made.said)), tracker.state()
        self.kept[forwards, frame] = Kept(tracker.copy(), made, _tensors(state))
        if last or time.monotonic() - self.saved > self.SECONDS:
            self.saved = time.monotonic()
            save(self._path(forwards, frame), {"state": state, "origin": made.origin,
                                               "said": made.said})
            for path in sorted(self.folder.glob("*.pth"),
                               key=lambda path: path.stat().st_mtime)[:-self.MOST_ON_DISK]:
                path.unlink()
        # the newest stay
        tensors: dict[int, int] = {}
        for key, one in reversed(list(self.kept.items())):
            tensors |= one.tensors
            if sum(tensors.values()) > self.MEMORY and key != (forwards, frame):
                del self.kept[key]

    def nearest(self, frame: int, forwards: bool,
                said: dict[int, tuple]) -> tuple[int, Tracker, Made] | None:
        """The nearest on the way to `frame`, at most REACH frames before it; a copy.

        Args:
            said: by frame, what a person says now; a state made of anything else is left alone.
        """
        way = 1 if forwards else -1
        near = [(abs(frame - other), other) for kept, other in self.kept
                if kept == forwards and 0 <= (frame - other) * way <= self.REACH]
        for _, other in sorted(near):
            one = self._loaded(forwards, other)
            if one and one[1].holds(other, said):
                return other, one[0].copy(), Made(one[1].origin, dict(one[1].said))
        return None

    def clear(self) -> None:
        for forwards, frame in list(self.kept):
            self._forget(forwards, frame)

    def _path(self, forwards: bool, frame: int) -> Path:
        way = "forwards" if forwards else "backwards"
        return self.folder / f"{self.maker}_{way}_{frame:05d}.pth"

    def _forget(self, forwards: bool, frame: int) -> None:
        del self.kept[forwards, frame]
        self._path(forwards, frame).unlink(missing_ok=True)

    def _loaded(self, forwards: bool, frame: int) -> tuple[Tracker, Made] | None:
        """The state, read if it is on disk only; None where it can't be."""
        kept = self.kept[forwards, frame]
        if isinstance(kept.tracker, Tracker) and kept.made:
            return kept.tracker, kept.made
        tracker = self.make()
        try:
            content = torch.load(kept.tracker, map_location=tracker.model.device,
                                 weights_only=True)
            tracker.load_state(content["state"])
            made = Made(content["origin"], content["said"])
        except Exception as error:
            log.warning("%s: can't resume from this state (%s)", kept.tracker, error)
            self._forget(forwards, frame)
            return None
        self.kept[forwards, frame] = Kept(tracker, made, _tensors(content["state"]))
        return tracker, made


def _tensors(value) -> dict[int, int]:
    """Address and bytes of the memory of each tensor in dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    found: dict[int, int] = {}
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            found |= _tensors(item)
    return found


@dataclass
class Passes:
    """How passes over a clip are made.

    Args:
        clip, options: as for `segment.track`.
        image: a frame's (H, W, 3) uint8 RGB, by its number.
        work: the masks that are known.
    """

    clip: Clip
    options: pipeline.Options
    image: Callable[[int], np.ndarray]
    work: Work
    states: States

    def run(self, start: int, forwards: bool) -> Generator[tuple[int, np.ndarray, Found]]:
        """Each frame behind `start` with its mask, as long as it is asked for more."""
        tracker, made = self.tracker_at(start, forwards)
        way, frame, before = 1 if forwards else -1, start, {}
        frames = self.clip.frames(start + 1) if forwards else self.clip.backwards(start)
        try:
            for number, image in zip(itertools.count(start + way, way), frames):
                self._note(made, number)
                seen = self._follow(tracker, number, image, None)
                frame = number  # not before: where following it failed, it was not seen
                measures = measure(frame, seen.step, before)
                before = {one.object_id: one.area for one in measures}
                yield frame, seen.mask, Found(start, [astuple(one) for one in measures])
                self.states.keep(tracker, frame, forwards, made)
        finally:
            if frame != start:
                self.states.keep(tracker, frame, forwards, made, last=True)

    def tracker_at(self, start: int, forwards: bool) -> tuple[Tracker, Made]:
        """A tracker that has just seen `start`, and what it is made of.

        From the nearest state on the way to it; without one, from the masks given for earlier
        frames as references, which is where the command line stands at the first of them.

        Raises:
            ValueError: none of these masks holds an object.
        """
        work, way = self.work, 1 if forwards else -1
        near = self.states.nearest(start, forwards, work.keys())
        if near:
            other, tracker, made = near
            frames = list(range(other + way, start + way, way))
            known = work.given.intersection(frames)
        else:
            tracker = self.states.make()
            frames = [frame for frame in sorted(work.given) if frame < start]
            if start in work.given or work.mask(start).any():
                frames.append(start)
            known = set(frames)
            while frames and not work.mask(frames[0]).any():
                frames = frames[1:]
            if not frames:
                raise ValueError(f"frame {self.clip.number(start)}: its mask holds no object to "
                                 "look for")
            made = Made(start, {frame: key for frame, key in work.keys().items() if frame <= start})
        for frame in frames:
            self._note(made, frame)
            mask = work.mask(frame) if frame in known else None
            self._follow(tracker, frame, self.image(frame), mask)
        return tracker, made

    def _note(self, made: Made, frame: int) -> None:
        """What a person says of a frame; before it is read, so that a change meanwhile counts."""
        if key := self.work.key(frame):
            made.said[frame] = key

    def _follow(self, tracker: Tracker, frame: int, image: np.ndarray,
                mask: np.ndarray | None) -> pipeline.Frame:
        return pipeline.follow(tracker, frame, image, pipeline.scaled(image, self.options), mask,
                              self.options, presence=self.work.presence)
