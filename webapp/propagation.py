"""Propagates masks through parts of a clip, from user masks and from saved tracker states.

Propagation starts at a frame and goes forward or backward. The session decides where it starts and
what happens to the masks.
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

from media.clip import Clip
from network.checkpoint import save
from tracking import pipeline
from tracking.confidence import measure_objects
from tracking.tracker import Tracker
from webapp.store import MaskStore, Prediction

log = logging.getLogger(__name__)


def propagation_end(start: int, forward: bool, user_frames: set[int],
                    predictions: dict[int, Prediction], count: int,
                    gone: Collection[int] = ()) -> int:
    """The first frame that propagation from `start` leaves unchanged.

    That is the next frame with a user mask. If frames before it were already predicted from that
    mask, it is the first of these that is nearer to that mask than to `start`. Backward propagation
    also stops at a frame from which on an object is `gone`, because its tracker has removed the
    object.
    """
    step = 1 if forward else -1
    others = [frame for frame in user_frames if (frame - start) * step > 0]
    if not forward:
        others += [frame - 1 for frame in gone if frame < start]
    if not others:
        return count if forward else -1
    other = min(others, key=lambda frame: abs(frame - start))
    for frame in range(start + step, other, step):
        prediction = predictions.get(frame)
        if (prediction and prediction.origin == other
                and abs(frame - other) < abs(frame - start)):
            return frame
    return other


@dataclass
class Provenance:
    """What a saved tracker state was computed from, to tell whether it is still valid.

    Args:
        origin: first frame of the consecutive frames that the tracker has seen up to now.
        inputs: the `MaskStore.input_key` of each frame with user input that the tracker has seen.
    """

    origin: int
    inputs: dict[int, tuple]

    def is_valid(self, frame: int, inputs: dict[int, tuple]) -> bool:
        """Whether a tracker at `frame` agrees with the current user input.

        It doesn't if a user mask in its memory was corrected or removed, or if a frame that it
        predicted has user input now. User masks added before `origin` don't matter: the tracker
        lacks them, but holds nothing wrong.
        """
        first, last = sorted((self.origin, frame))
        unchanged = all(inputs.get(other) == key for other, key in self.inputs.items())
        return unchanged and not any(
            first <= other <= last and other not in self.inputs for other in inputs)


@dataclass
class SavedState:
    """A tracker, or the file it was saved to, and its provenance (None until the file is loaded).

    Args:
        tensors: bytes of its tensors by address. Copies of a tracker share tensors, which must be
            counted once.
    """

    tracker: Tracker | Path
    provenance: Provenance | None = None
    tensors: dict[int, int] = field(default_factory=dict)


class StateCache:
    """Copies of the tracker at some frames, so that later propagation can start near its start.

    Args:
        folder: where the latest are saved as well, to resume after the process was killed.
        make: returns a new tracker.
        metadata: run metadata; states saved under other metadata are ignored.
    """

    # Frames between saved states. After a correction at most that many frames are repeated; a
    # smaller interval fills MEMORY sooner, so that old frames lose their states.
    INTERVAL = 5
    # Bytes of states in memory. At 480p a state has some 6 MB that no other state shares. With less
    # memory, a correction starts farther away.
    MEMORY = 512 * 2**20
    MAX_FILES = 6  # of 30 MB each at 480p
    FILE_INTERVAL = 20.0  # seconds between saved files, as in `pipeline.SAVE_INTERVAL`
    # Frames between a saved state and the wanted frame, at most. They are segmented again, which
    # takes seconds; beyond that it starts from the user masks alone.
    MAX_DISTANCE = 60

    def __init__(self, folder: Path, make: Callable[[], Tracker], metadata: dict[str, str]):
        self.folder, self.make = folder, make
        self.fingerprint = f"{zlib.crc32(repr(sorted(metadata.items())).encode()):08x}"
        self.saved_states: dict[tuple[bool, int], SavedState] = {}
        self.file_saved = time.monotonic()
        for path in sorted(folder.glob(f"{self.fingerprint}_*_*.pth")):
            direction, frame = path.stem.split("_")[1:]
            self.saved_states[direction == "forwards", int(frame)] = SavedState(path)

    def save(self, tracker: Tracker, frame: int, forward: bool, provenance: Provenance,
             last: bool = False) -> None:
        """Save a copy of a tracker that has just seen `frame`, if one is due or `last` is set."""
        if not last and frame % self.INTERVAL:
            return
        self.saved_states.pop((forward, frame), None)
        provenance, state = Provenance(provenance.origin, dict(provenance.inputs)), tracker.state()
        self.saved_states[forward, frame] = SavedState(tracker.copy(), provenance,
                                                       _tensor_sizes(state))
        if last or time.monotonic() - self.file_saved > self.FILE_INTERVAL:
            self.file_saved = time.monotonic()
            save(self._path(forward, frame), {"state": state, "origin": provenance.origin,
                                              "said": provenance.inputs})
            for path in sorted(self.folder.glob("*.pth"),
                               key=lambda path: path.stat().st_mtime)[:-self.MAX_FILES]:
                path.unlink()
        # the latest stay: corrections are usually made near them
        tensors: dict[int, int] = {}
        for key, one in reversed(list(self.saved_states.items())):
            tensors |= one.tensors
            if sum(tensors.values()) > self.MEMORY and key != (forward, frame):
                del self.saved_states[key]

    def nearest(self, frame: int, forward: bool,
                inputs: dict[int, tuple]) -> tuple[int, Tracker, Provenance] | None:
        """The frame and a copy of the nearest valid state from which `frame` can be reached.

        Args:
            inputs: the current user input by frame, see `MaskStore.input_keys`.

        Returns:
            None if no valid state is within `MAX_DISTANCE`.
        """
        step = 1 if forward else -1
        near = [(abs(frame - other), other) for direction, other in self.saved_states
                if direction == forward and 0 <= (frame - other) * step <= self.MAX_DISTANCE]
        for _, other in sorted(near):
            one = self._load(forward, other)
            if one and one[1].is_valid(other, inputs):
                return other, one[0].copy(), Provenance(one[1].origin, dict(one[1].inputs))
        return None

    def clear(self) -> None:
        """Delete all states, also their files."""
        for forward, frame in list(self.saved_states):
            self._delete(forward, frame)

    def _path(self, forward: bool, frame: int) -> Path:
        direction = "forwards" if forward else "backwards"
        return self.folder / f"{self.fingerprint}_{direction}_{frame:05d}.pth"

    def _delete(self, forward: bool, frame: int) -> None:
        del self.saved_states[forward, frame]
        self._path(forward, frame).unlink(missing_ok=True)

    def _load(self, forward: bool, frame: int) -> tuple[Tracker, Provenance] | None:
        """A state from memory or disk; None if its file can't be loaded."""
        saved = self.saved_states[forward, frame]
        if isinstance(saved.tracker, Tracker) and saved.provenance:
            return saved.tracker, saved.provenance
        tracker = self.make()
        try:
            content = torch.load(saved.tracker, map_location=tracker.model.device,
                                 weights_only=True)
            tracker.load_state(content["state"])
            provenance = Provenance(content["origin"], content["said"])
        except Exception as error:
            log.warning("%s: can't resume from this state (%s)", saved.tracker, error)
            self._delete(forward, frame)
            return None
        self.saved_states[forward, frame] = SavedState(tracker, provenance,
                                                       _tensor_sizes(content["state"]))
        return tracker, provenance


def _tensor_sizes(value) -> dict[int, int]:
    """Address and size in bytes of each tensor's memory in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    sizes: dict[int, int] = {}
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            sizes |= _tensor_sizes(item)
    return sizes


@dataclass
class Propagator:
    """Propagates masks through a clip.

    Args:
        clip, options: see `pipeline.track`.
        image: maps a frame index to the (H, W, 3) uint8 RGB image.
        store: the user masks.
        states: saved tracker states to start from.
    """

    clip: Clip
    options: pipeline.Options
    image: Callable[[int], np.ndarray]
    store: MaskStore
    states: StateCache

    def run(self, start: int, forward: bool) -> Generator[tuple[int, np.ndarray, Prediction]]:
        """Yield frame, (H, W) mask and `Prediction` of each frame after `start` in a direction."""
        tracker, provenance = self.tracker_at(start, forward)
        step, frame, areas = 1 if forward else -1, start, {}
        frames = self.clip.frames(start + 1) if forward else self.clip.backwards(start)
        try:
            for number, image in zip(itertools.count(start + step, step), frames):
                self._record_input(provenance, number)
                frame = start  # if this fails, the tracker is between frames and must not be saved
                result = self._segment(tracker, number, image, None)
                frame = number
                measures = measure_objects(frame, result.step, areas)
                areas = {one.object_id: one.area for one in measures}
                yield frame, result.mask, Prediction(start, [astuple(one) for one in measures])
                self.states.save(tracker, frame, forward, provenance)
        finally:
            if frame != start:
                self.states.save(tracker, frame, forward, provenance, last=True)

    def tracker_at(self, start: int, forward: bool) -> tuple[Tracker, Provenance]:
        """A tracker that has just seen `start`, and its provenance.

        It starts from the nearest valid state. Without one, earlier user masks are its reference
        masks, as they are on the command line.

        Raises:
            ValueError: these masks contain no object.
        """
        store, step = self.store, 1 if forward else -1
        near = self.states.nearest(start, forward, store.input_keys())
        if near:
            other, tracker, provenance = near
            frames = list(range(other + step, start + step, step))
            mask_frames = store.user_frames.intersection(frames)
        else:
            tracker = self.states.make()
            frames = [frame for frame in sorted(store.user_frames) if frame < start]
            if start in store.user_frames or store.mask(start).any():
                frames.append(start)
            mask_frames = set(frames)
            while frames and not store.mask(frames[0]).any():
                frames = frames[1:]
            if not frames:
                raise ValueError(f"frame {self.clip.number(start)}: its mask contains no object to "
                                 "segment")
            provenance = Provenance(start, {
                frame: key for frame, key in store.input_keys().items() if frame <= start})
        for frame in frames:
            self._record_input(provenance, frame)
            mask = store.mask(frame) if frame in mask_frames else None
            self._segment(tracker, frame, self.image(frame), mask)
        return tracker, provenance

    def _record_input(self, provenance: Provenance, frame: int) -> None:
        """Record the user input of a frame.

        Call it before reading the input: if that changes in between, the state counts as outdated,
        not as valid.
        """
        if key := self.store.input_key(frame):
            provenance.inputs[frame] = key

    def _segment(self, tracker: Tracker, frame: int, image: np.ndarray,
                 mask: np.ndarray | None) -> pipeline.Frame:
        network_image = pipeline.resize_for_network(image, self.options)
        return pipeline.segment_frame(tracker, frame, image, network_image, mask, self.options,
                                      presence=self.store.presence)
