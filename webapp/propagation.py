"""Propagates masks through parts of a clip, starting from user masks and from saved tracker states.

A pass starts at a frame and goes forward or backward. The session decides which passes to run and
what to do with the masks.
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
from tracking.confidence import measure_objects
from webapp.store import Found, Work

log = logging.getLogger(__name__)


def end_of_pass(start: int, forwards: bool, given: set[int], found: dict[int, Found],
                count: int, gone: Collection[int] = ()) -> int:
    """The first frame that a pass from `start` leaves unchanged.

    That is the next frame with a user mask. If frames before it were already predicted from that
    mask, it is the first of these that is nearer to that mask than to `start`. A backward pass also
    stops at a frame from which on an object is `gone`, because its tracker has removed the object.
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
    """What a saved tracker state was made from, to tell whether it is still valid.

    Args:
        origin: first frame of the consecutive frames that the tracker has seen up to now.
        said: the `Work.key` of the user input of each frame that the tracker has used.
    """

    origin: int
    said: dict[int, tuple]

    def holds(self, frame: int, said: dict[int, tuple]) -> bool:
        """Whether a tracker at `frame` agrees with the current user input.

        It doesn't if a user mask in its memory was corrected or removed, or if a frame that it
        predicted has user input now. User masks added before `origin` don't matter: the tracker
        lacks them, but holds nothing wrong.
        """
        first, last = sorted((self.origin, frame))
        return all(said.get(other) == key for other, key in self.said.items()) and not any(
            first <= other <= last and other not in self.said for other in said)


@dataclass
class Kept:
    """A tracker, or the file it was saved to, and what it was made from."""

    tracker: Tracker | Path
    made: Made | None = None
    tensors: dict[int, int] = field(default_factory=dict)  # address and bytes; copies share them


class States:
    """Copies of the tracker at some frames, so that a later pass can start near its first frame.

    Args:
        folder: where the last few are saved as well, to resume after a kill.
        make: returns a new tracker.
        facts: run metadata; states that were saved under other metadata are ignored.
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
        """Keep a copy of a tracker that has just seen `frame`, if one is due or `last` is set."""
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
        """A copy of the nearest valid state on the way to `frame`, at most REACH frames before it.

        Args:
            said: the current user input by frame, as from `Work.keys`.
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
        """The state, loaded from disk if need be; None if it can't be loaded."""
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
    """Address and size in bytes of each tensor's memory in nested dicts, lists and tuples."""
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
        """Yield each frame after `start`, in the direction of the pass, with its predicted mask."""
        tracker, made = self.tracker_at(start, forwards)
        way, frame, before = 1 if forwards else -1, start, {}
        frames = self.clip.frames(start + 1) if forwards else self.clip.backwards(start)
        try:
            for number, image in zip(itertools.count(start + way, way), frames):
                self._note(made, number)
                frame = start  # where following fails, the tracker is at no frame: it isn't kept
                seen = self._follow(tracker, number, image, None)
                frame = number
                measures = measure_objects(frame, seen.step, before)
                before = {one.object_id: one.area for one in measures}
                yield frame, seen.mask, Found(start, [astuple(one) for one in measures])
                self.states.keep(tracker, frame, forwards, made)
        finally:
            if frame != start:
                self.states.keep(tracker, frame, forwards, made, last=True)

    def tracker_at(self, start: int, forwards: bool) -> tuple[Tracker, Made]:
        """A tracker that has just seen `start`, and what it was made from.

        It starts from the nearest valid state. Without one, earlier user masks are its reference
        masks, as they are on the command line.

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
        """Record the user input of a frame. Call it before reading the input: if that changes in
        between, the state counts as outdated, not as valid."""
        if key := self.work.key(frame):
            made.said[frame] = key

    def _follow(self, tracker: Tracker, frame: int, image: np.ndarray,
                mask: np.ndarray | None) -> pipeline.Frame:
        network_image = pipeline.resize_for_network(image, self.options)
        return pipeline.segment_frame(tracker, frame, image, network_image, mask, self.options,
                                      presence=self.work.presence)
