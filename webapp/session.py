"""The session behind the web page: frames, edits, propagation and export of one clip.

Propagation runs in a background thread, from a frame to the next user mask. After a correction it
starts again from a tracker state that was saved near the corrected frame.
"""

import itertools
import logging
import shlex
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np
import torch

from masks.read import mask_warning
from media import figures, files, images
from media.clip import Clip
from media.prompts import Prompts
from outputs import annotations, report, writers
from outputs.run_folder import RunFolder, read_metadata
from tracking import confidence, pipeline
from tracking.confidence import NOT_VISIBLE, Measures, measure_objects, stretches_to_review
from tracking.presence import Presence
from tracking.tracker import Tracker
from videomatch import VideoMatch
from webapp.store import Editor, MaskStore, Prediction

log = logging.getLogger(__name__)

DIRECTIONS = {"forward": (True,), "backward": (False,), "both": (True, False)}
# Decoded frames in memory, of the two readers each: 20 frames of 1080p, to step back and forth.
CACHE_BYTES = 128 * 2**20
# Seconds between searches for stretches to review during propagation. Each goes through the whole
# clip, which takes milliseconds for an hour of video; a frame of 480p takes about 0.1 s.
REVIEW_INTERVAL = 1.0


class FrameReader:
    """Random access to the frames of a clip, from any thread.

    The decoder continues from its position if that is nearer to the wanted frame than the last key
    frame, so playing a clip decodes each frame once. The frames used last are cached.
    """

    def __init__(self, clip: Clip):
        self.clip, self.lock = clip, threading.Lock()
        self.cache: dict[int, np.ndarray] = {}  # ordered by last use
        self.frames: Iterator[np.ndarray] = iter(())
        self.next: int | None = None  # index of the next frame in `frames`

    def __call__(self, frame: int) -> np.ndarray | None:
        """Return a frame as (H, W, 3) uint8 RGB; None if the clip ends before it."""
        with self.lock:
            if frame in self.cache:
                self.cache[frame] = image = self.cache.pop(frame)
                return image
            if self.next is None or not self.clip.start_of(frame) <= self.next <= frame:
                self.frames, self.next = self.clip.frames(frame), frame
            first, self.next = self.next, None  # start again after an error or the clip's end
            for number, image in enumerate(self.frames, first):
                self.cache[number] = image
                while len(self.cache) > 1 and len(self.cache) * image.nbytes > CACHE_BYTES:
                    del self.cache[next(iter(self.cache))]
                if number == frame:
                    self.next = number + 1
                    return image
            return None


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
class Propagation:
    """A tracker on its way through a clip, and what it has seen so far.

    Args:
        origin: first frame of the consecutive frames that the tracker has seen up to now.
        inputs: the `MaskStore.input_key` of each frame with user input that the tracker has seen.
    """

    tracker: Tracker
    origin: int
    inputs: dict[int, tuple]

    def copy(self) -> "Propagation":
        """Return a copy at the same frame; tensors are shared."""
        return Propagation(self.tracker.copy(), self.origin, dict(self.inputs))

    def is_valid(self, frame: int, inputs: dict[int, tuple]) -> bool:
        """Whether the tracker, which has just seen `frame`, agrees with the current user input.

        It doesn't if a user mask in its memory was corrected or removed, or if a frame that it
        predicted has user input now. User masks added before `origin` don't matter: the tracker
        lacks them, but holds nothing wrong.
        """
        first, last = sorted((self.origin, frame))
        unchanged = all(inputs.get(other) == key for other, key in self.inputs.items())
        return unchanged and not any(
            first <= other <= last and other not in self.inputs for other in inputs)


class StateCache:
    """Copies of the tracker at some frames, so that later propagation can start near its start.

    They are in memory only: a session that is opened again starts from the nearest user mask.
    """

    # Frames between saved states. After a correction at most that many frames are repeated; a
    # smaller interval fills MEMORY sooner, so that old frames lose their states.
    INTERVAL = 5
    # Bytes of states in memory. At 480p a state has some 6 MB that no other state shares. With less
    # memory, a correction starts farther away.
    MEMORY = 512 * 2**20
    # Frames between a saved state or a user mask and the wanted frame, at most. They are segmented
    # again, which takes seconds.
    MAX_DISTANCE = 60

    def __init__(self) -> None:
        # by direction and frame, latest last: the state, and bytes of its tensors by address;
        # copies of a tracker share tensors, which must be counted once
        self.saved_states: dict[tuple[bool, int], tuple[Propagation, dict[int, int]]] = {}

    def save(self, propagation: Propagation, frame: int, forward: bool) -> None:
        """Save a copy of a tracker that has just seen `frame`."""
        self.saved_states.pop((forward, frame), None)
        self.saved_states[forward, frame] = (propagation.copy(),
                                             _tensor_sizes(propagation.tracker.state()))
        # the latest stay: corrections are usually made near them
        tensors: dict[int, int] = {}
        for key, (_, sizes) in reversed(list(self.saved_states.items())):
            tensors |= sizes
            if sum(tensors.values()) > self.MEMORY and key != (forward, frame):
                del self.saved_states[key]

    def nearest(self, frame: int, forward: bool,
                inputs: dict[int, tuple]) -> tuple[int, Propagation] | None:
        """The frame and a copy of the nearest valid state from which `frame` can be reached.

        Args:
            inputs: the current user input by frame, see `MaskStore.input_keys`.

        Returns:
            None if no valid state is within `MAX_DISTANCE`.
        """
        near = [(abs(frame - other), other, state)
                for (direction, other), (state, _) in self.saved_states.items()
                if direction == forward and self.in_reach(other, frame, forward)
                and state.is_valid(other, inputs)]
        if not near:
            return None
        _, other, state = min(near, key=lambda one: one[0])
        return other, state.copy()

    def in_reach(self, start: int, frame: int, forward: bool) -> bool:
        """Whether `frame` is at most `MAX_DISTANCE` frames after `start` in this direction."""
        return 0 <= (frame - start if forward else start - frame) <= self.MAX_DISTANCE


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
    """Propagates masks through parts of a clip.

    Args:
        model, clip, options: see `pipeline.track`.
        image: maps a frame index to the (H, W, 3) uint8 RGB image.
        store: the user masks.
        states: saved tracker states to start from.
    """

    model: VideoMatch
    clip: Clip
    options: pipeline.Options
    image: Callable[[int], np.ndarray]
    store: MaskStore
    states: StateCache = field(default_factory=StateCache)

    def run(self, start: int, forward: bool) -> Generator[tuple[int, np.ndarray, Prediction]]:
        """Yield frame, (H, W) mask and `Prediction` of each frame after `start` in a direction."""
        propagation = self.propagation_to(start, forward)
        step, frame, areas = 1 if forward else -1, start, {}
        frames = self.clip.frames(start + 1) if forward else self.clip.backwards(start)
        try:
            for number, image in zip(itertools.count(start + step, step), frames):
                frame = start  # if this fails, the tracker is between frames and must not be saved
                result = self._segment(propagation, number, image, False)
                frame = number
                measures = measure_objects(frame, result.step, areas)
                areas = {one.object_id: one.area for one in measures}
                yield frame, result.mask, Prediction(start, [astuple(one) for one in measures])
                if frame % self.states.INTERVAL == 0:
                    self.states.save(propagation, frame, forward)
        finally:
            if frame != start:
                self.states.save(propagation, frame, forward)

    def propagation_to(self, start: int, forward: bool) -> Propagation:
        """A propagation that has just seen `start`.

        It comes from the nearest valid state, or else from the nearest user mask. If neither is in
        reach, the mask of `start` is its last reference mask, even if it was predicted.

        Raises:
            ValueError: there is no mask with an object to start from.
        """
        step = 1 if forward else -1
        first, propagation = (self.states.nearest(start, forward, self.store.input_keys())
                              or self._from_user_masks(start, forward))
        for frame in range(first + step, start + step, step):
            self._segment(propagation, frame, self.image(frame), frame in self.store.user_frames)
        return propagation

    def _from_user_masks(self, start: int, forward: bool) -> tuple[int, Propagation]:
        """A frame, and a propagation whose reference masks are those of the frames up to it.

        Earlier user masks are reference masks, as they are on the command line.
        """
        store = self.store
        references = store.reference_frames()
        near = [] if start in store.user_frames else [
            frame for frame in references if self.states.in_reach(frame, start, forward)]
        first = min(near, key=lambda frame: abs(frame - start), default=start)
        references = [frame for frame in references if frame <= first]
        if first not in references and store.mask(first).any():  # a predicted mask
            references.append(first)
        if not references:
            raise ValueError(f"frame {self.clip.number(start)}: its mask contains no object to "
                             "segment")
        propagation = Propagation(
            Tracker(self.model, self.options.threshold, self.options.remove_outliers), first,
            {frame: key for frame, key in store.input_keys().items() if frame <= first})
        for frame in references:
            self._segment(propagation, frame, self.image(frame), True)
        return first, propagation

    def _segment(self, propagation: Propagation, frame: int, image: np.ndarray,
                 is_reference: bool) -> pipeline.Frame:
        # Recorded before it is read: if the input changes in between, the state counts as outdated,
        # not as valid.
        if key := self.store.input_key(frame):
            propagation.inputs[frame] = key
        mask = self.store.mask(frame) if is_reference else None
        network_image = pipeline.resize_for_network(image, self.options)
        return pipeline.segment_frame(propagation.tracker, frame, image, network_image, mask,
                                      self.options, presence=self.store.presence)


class Session:
    """A working session on one clip. Every method may be called from any thread.

    Args:
        model, clip, options: see `pipeline.track`.
        folder: results folder; the session's own files are in `page/` in it.
        prompter: maps an (H, W, 3) uint8 RGB image and the `Prompts` of one object to its (H, W)
            bool mask.
        metadata: run metadata, what the results depend on.
        command: words of the command line that repeats the session, without flags for masks,
            cut-out, annotations and folder.
        formats: annotation formats to preselect on the page.

    Raises:
        ValueError: the folder holds a session on another clip.
    """

    live = False  # see `LiveSession`

    def __init__(self, model: VideoMatch, clip: Clip, folder: Path, options: pipeline.Options,
                 prompter: Callable[[np.ndarray, Prompts], np.ndarray], metadata: dict[str, str],
                 command: list[str], formats: Sequence[str] = ()):
        model.eval()
        self.clip, self.folder, self.formats = clip, folder, list(formats)
        self.metadata, self.command = metadata, command
        self.count = clip.count or sum(1 for _ in clip.frames())
        # separate decoders, so that scrubbing doesn't wait for thumbnails
        self._reader, self._thumbnail_reader = FrameReader(clip), FrameReader(clip)
        # frame numbers, where they differ from the indices
        self.numbers = None if clip.numbers in (None, [*range(self.count)]) else [*clip.numbers]
        self.store = MaskStore(folder / "page", Path(metadata["data"]).name,
                               self.image(0).shape[:2])
        height, width = self.shape = self.store.shape
        self.location_size = pipeline.location_size(model, (height, width), options)
        # which earlier versions saved there, up to 200 MB
        shutil.rmtree(folder / "page" / "states", ignore_errors=True)
        self.propagator = Propagator(model, clip, options, self.image, self.store)
        self.editor = Editor(self.store, self.image, prompter)
        self.lock = self.editor.lock
        self._confidences: dict[int, np.ndarray] = {}  # by object id, (frames,)
        for frame, prediction in self.store.predictions.items():
            self._note_confidences(frame, prediction)
        self._review: tuple[int, float, list[dict]] = (0, 0.0, [])  # version, time, stretches
        self.thread: threading.Thread | None = None
        self.run: dict | None = None  # the current job, or the last one and how it ended
        self.stopping = threading.Event()

    def image(self, frame: int) -> np.ndarray:
        """Return a frame as (H, W, 3) uint8 RGB.

        Raises:
            ValueError: there is no such frame.
        """
        return self._image(self._reader, frame)

    def thumbnail(self, frame: int) -> np.ndarray:
        """Like `image`, but with a decoder of its own, for the timeline."""
        return self._image(self._thumbnail_reader, frame)

    def _image(self, reader: FrameReader, frame: int) -> np.ndarray:
        if not 0 <= frame < self.count:
            raise ValueError(f"there is no frame {frame}, the clip has {self.count} frames, "
                             "counted from 0")
        image = reader(frame)
        if image is None:
            self._shorten(self.clip.count)
            raise ValueError(f"there is no frame {frame}, the clip ends before it")
        return image

    def _shorten(self, count: int) -> None:
        """Correct the number of frames when the clip turns out to be shorter."""
        with self.lock:
            if count < self.count:
                log.warning("the clip ends after %d frames, though it declares %d", count,
                            self.count)
                self.count = count
                self.editor.change()

    def mask(self, frame: int) -> np.ndarray | None:
        """The (H, W) uint8 user mask of a frame, else the predicted mask, else None."""
        with self.lock:
            return self.store.mask(frame)

    @property
    def version(self) -> int:
        """Increases with every change, see `Editor`."""
        return self.editor.version

    def state(self, since: int = 0) -> dict:
        """Everything the page shows except images and masks, as JSON.

        Of the frames it contains those that changed after version `since`. Frames are indices;
        `numbers` maps them to the frame numbers that users see (null where they are the same).
        `numbers` and `formats` never change and are sent only with `since` 0.
        """
        with self.lock:
            store, presence = self.store, self.store.presence
            frames = {frame: {"user_mask": frame in store.user_frames, "version": version,
                              "confidence": _object_confidences(store.predictions.get(frame))}
                      for frame, version in self.editor.changes_since(since).items()}
            objects = [vars(obj) | {
                "absent": sorted(frame for frame, ids in presence.absent.items()
                                 if obj.id in ids),
                "gone": presence.intervals(obj.id)} for obj in store.objects]
            return {"version": self.editor.version, "everywhere": self.editor.everywhere,
                    "count": self.count, "fps": self.clip.fps,
                    "height": store.shape[0], "width": store.shape[1], "frames": frames,
                    "objects": objects,
                    "pending": sorted(store.pending), "undo": len(self.editor.undo_stack),
                    "run": self.run, "review": self._to_review(),
                    **({} if since else {"numbers": self.numbers, "formats": self.formats})}

    def _note_confidences(self, frame: int, prediction: Prediction) -> None:
        """Store the confidences of a new mask in `_confidences`, which `_to_review` reads.

        A running array costs far less than going through all predictions at every change.
        """
        for values in self._confidences.values():
            values[frame:frame + 1] = np.nan  # also of objects that are no longer tracked
        for object_id, value in _object_confidences(prediction).items():
            if object_id not in self._confidences:
                self._confidences[object_id] = np.full(self.count, np.nan)
            values = self._confidences[object_id]
            values[frame:frame + 1] = NOT_VISIBLE if value is None else value

    def _to_review(self) -> list[dict]:
        """The stretches to review; during a job up to `REVIEW_INTERVAL` seconds out of date."""
        version, updated, stretches = self._review
        now = time.monotonic()
        running = self.run and not self.run["ended"]
        if version == self.editor.version or running and now - updated < REVIEW_INTERVAL:
            return stretches
        confidences, presence = {}, self.store.presence
        for obj in self.store.objects:
            if obj.id in self._confidences:
                confidences[obj.id] = values = self._confidences[obj.id].copy()
                # what the user decided needs no review
                decided = {*self.store.user_frames, *(frame for frame, ids in
                                                      presence.absent.items() if obj.id in ids)}
                values[[frame for frame in decided if frame < len(values)]] = np.nan
                for first, stop in presence.intervals(obj.id):
                    values[first:stop] = np.nan
        stretches = [vars(stretch) for stretch in stretches_to_review(confidences)]
        self._review = self.editor.version, now, stretches
        return stretches

    def measures(self) -> list[Measures]:
        """Measures of all predictions in use, of objects that weren't deleted, absent or gone."""
        object_ids = {obj.id for obj in self.store.objects}
        absent = self.store.presence.absent
        gone = {i: self.store.presence.intervals(i) for i in object_ids}
        rows = (Measures.of_row(row) for frame, prediction
                in sorted(self.store.predictions.items())
                if frame not in self.store.user_frames for row in prediction.measures)
        return [one for one in rows if one.object_id in object_ids
                and one.object_id not in absent.get(one.frame, ()) and not any(
            first <= one.frame and (stop is None or one.frame < stop)
            for first, stop in gone[one.object_id])]

    def segment_from(self, start: int, direction: str) -> None:
        """Propagate the mask of a frame in a background thread.

        Args:
            direction: "forward", "backward" or "both".

        Raises:
            ValueError: the frame has no mask, or another job is running.
        """
        with self.lock:
            if self.store.mask(start) is None:
                raise ValueError(f"frame {self.clip.number(start)} has no mask to start from: "
                                 "draw one first")
            ends = [(forward, self._end(start, forward)) for forward in DIRECTIONS[direction]]
            total = sum(abs(end - start) - 1 for _, end in ends)
            self._start({"kind": "segment", "frame": start, "direction": direction, "total": total,
                         "warning": mask_warning(self.store.mask(start), self.location_size)},
                        lambda: self._segment(start, [forward for forward, _ in ends]))

    def stop(self) -> None:
        """Stop the current job after the current frame; masks predicted so far stay."""
        self.stopping.set()

    def export(self, cutout: str | None = None, form: str = "png",
               formats: Sequence[str] = ()) -> None:
        """Write the outputs of the command line in a background thread, and that command line.

        Args:
            cutout, form: see `writers.cutout_name`.
            formats: from `annotations.FORMATS`; the objects' names become categories.
        """
        form = form if cutout == "transparent" else "png"
        with self.lock:
            missing = self.count - len(self.store.user_frames | self.store.predictions.keys())
            warning = f"{missing} frames have no mask yet: they are exported as empty"
            self._start({"kind": "export", "total": self.count,
                         "warning": warning if missing else ""},
                        lambda: self._export(cutout, form, list(formats)))

    def close(self) -> None:
        """Stop the current job, wait for it, and release the folder."""
        self.stop()
        if self.thread:
            self.thread.join()
        self.store.close()

    def _end(self, start: int, forward: bool) -> int:
        return propagation_end(start, forward, self.store.user_frames, self.store.predictions,
                               self.count, self.store.presence.gone)

    def _start(self, run: dict, job: Callable[[], None]) -> None:
        if self.run and not self.run["ended"]:
            raise ValueError("another job is running: stop it first")
        self.stopping.clear()
        number = self.run["number"] + 1 if self.run else 1
        self.run = {"number": number, "done": 0, "seconds": 0.0, "ended": "", "error": "", **run}
        self.editor.change()
        self.thread = threading.Thread(target=self._run_job, args=(job,), daemon=True)
        self.thread.start()

    def _run_job(self, job: Callable[[], None]) -> None:
        try:
            job()
            ended = {"ended": "stopped" if self.stopping.is_set() else "done"}
        except Exception as error:  # the page must show it and go on working
            log.warning("%s ended early: %s", self.run["kind"], error)
            log.debug("traceback:", exc_info=True)
            ended = {"ended": "error", "error": str(error) or type(error).__name__}
        with self.lock:
            self.run = self.run | ended
            self.editor.change()

    def _progress(self, began: float, *frames: int) -> None:
        self.run = self.run | {"done": self.run["done"] + 1,
                               "seconds": round(time.monotonic() - began, 3)}
        self.editor.change(*frames)

    def _segment(self, start: int, directions: list[bool]) -> None:
        with self.lock:
            self.store.mark_propagated(start)
            self.editor.change(start)
        began = time.monotonic()
        for forward in directions:
            self._propagate(start, forward, began)

    def _propagate(self, start: int, forward: bool, began: float) -> None:
        step, frame, end = 1 if forward else -1, start, self._end(start, forward)
        if end == start + step or self.stopping.is_set():
            return
        with closing(self.propagator.run(start, forward)) as masks:
            for frame, mask, prediction in masks:
                with self.lock:
                    if frame in self.store.user_frames:  # added while this runs
                        return
                    self.store.save_prediction(frame, mask, prediction)
                    self._note_confidences(frame, prediction)
                    self._progress(began, frame)
                if frame + step == end or self.stopping.is_set():
                    return
        if forward:
            self._shorten(frame + 1)

    def _export(self, cutout: str | None, form: str, formats: list[str]) -> None:
        with files.lock_folder(self.folder):
            command = self._write_results(cutout, form, formats)
        with self.lock:
            self.run = self.run | {"folder": str(self.folder), "command": command}

    def _write_results(self, cutout: str | None, form: str, formats: list[str]) -> str:
        """Write the outputs, replacing earlier ones; return the command line that repeats it."""
        # without metadata, what is in the folder isn't ours and must stay
        run_folder = RunFolder(self.folder, {**self.metadata, "masks": "of the page"},
                               overwrite=read_metadata(self.folder) is not None)
        run_folder.start([self.folder / "masks", self.folder / "cutout"])
        paths = {frame: self.folder / f"mask_{self.clip.number(frame):05d}.png"
                 for frame in self.store.reference_frames()}
        if run_folder.replaces:
            writers.delete_outputs(self.folder, set())
        for frame, path in paths.items():
            images.write_mask(path, self.mask(frame))
        names = {obj.id: obj.name for obj in self.store.objects}
        pipeline.drain(self._frames(), [
            *writers.clip_sinks(self.folder, self.clip, cutout, form, redraw=True),
            *annotations.clip_sinks(self.folder, self.clip, formats, names)])
        measures = self.measures()
        confidence.write(self.folder / "confidence.csv", measures, self.clip)
        report.write_clip(self.folder / "report.html", self.clip.path.name, self.clip, measures,
                          self.metadata)
        masks = [f"{self.clip.number(frame)}:{path}" for frame, path in paths.items()]
        masks += self._marks()
        command = shlex.join([*self.command, *(["--mask", *masks] if masks else []),
                              *_flags_of(cutout, form, formats),
                              "-j", f"{self.folder}_again"])
        files.write(self.folder / "command.txt", command + "\n")
        return command

    def _marks(self) -> list[str]:
        """The --mask arguments for absent and gone objects that an earlier user mask contains."""
        presence, object_ids = self.store.presence, {obj.id for obj in self.store.objects}
        arguments = []
        for word in ("absent", "gone"):
            for frame, ids in sorted(getattr(presence, word).items()):
                earlier = set().union(*(
                    ids for at, ids in presence.in_user_mask.items() if at < frame))
                if ids := ",".join(map(str, sorted(ids & earlier & object_ids))):
                    arguments.append(f"{self.clip.number(frame)}:{word}={ids}")
        return arguments

    def _frames(self) -> Iterator[pipeline.Frame]:
        """Yield all frames of the clip for the sinks; a frame without a mask gets an empty one."""
        began = time.monotonic()
        for frame, image in enumerate(self.clip.frames()):
            if self.stopping.is_set():
                raise ValueError("export: stopped before the end, so there is no video")
            mask = self.mask(frame)
            mask = np.zeros(image.shape[:2], np.uint8) if mask is None else mask
            images.write_mask(self.folder / "masks" / f"{self.clip.frame_name(frame)}.png", mask)
            with self.lock:
                self._progress(began)
            yield pipeline.Frame(frame, image, None, True, None, mask)


def _object_confidences(prediction: Prediction | None) -> dict[int, float | None] | None:
    """Confidence of each object of a prediction, None where it isn't visible; None without one."""
    if prediction is None:
        return None
    rows = (Measures.of_row(row) for row in prediction.measures)
    return {one.object_id: one.confidence for one in rows}


def _flags_of(cutout: str | None, form: str, formats: list[str]) -> list[str]:
    return [*(["--cutout", cutout] if cutout else []),
            *(["--cutout_format", form] if form != "png" else []),
            *(["--export", *formats] if formats else [])]


def check_page(port: int | None) -> None:
    """Check that the page can be opened.

    Args:
        port: None if --page wasn't passed and the page is opened for lack of a mask.

    Raises:
        ValueError: there is no browser to open, or a package is missing.
    """
    if port is None and not figures.has_browser():
        raise ValueError("--mask, --box, --page: expected one of them, as there is no browser on "
                         "this machine to draw a mask in")
    try:
        from webapp import server  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--page: expected the package {error.name}: pip install -r "
                         "requirements.txt") from error


def open_page(session: Session, masks: dict[int, np.ndarray], presence: Presence,
              port: int | None, hosts: list[str],
              names: Mapping[int, str] | None = None) -> None:
    """Serve a session in a browser until Ctrl+C. Call `check_page` before.

    A session that is resumed keeps the user's corrections: masks and marks that it was given before
    are not read again.

    Args:
        masks: (H, W) uint8 user masks to start with, by frame.
        presence: objects that are absent or gone to start with.
        port: None or 0 takes a free port.
        hosts: see `server.serve`.
        names: labels of objects by id, as found in annotation files.
    """
    from webapp import server  # here, because only the page needs its packages
    try:
        flags, editor = session.store.flags, session.editor
        for frame, mask in masks.items():
            if flags.get(f"mask {frame}") != (checksum := zlib.crc32(mask.tobytes())):
                editor.set_mask(frame, mask, names)
                flags[f"mask {frame}"] = checksum
        for word in ("absent", "gone"):
            for frame, ids in getattr(presence, word).items():
                for object_id in sorted(ids):
                    if (flag := f"{word} {frame} {object_id}") not in flags:
                        editor.mark(frame, object_id, word)
                        flags[flag] = 1
        session.store.save()
        server.serve(session, port or 0, figures.has_browser(), hosts)
    finally:
        session.close()
    print(f"all masks of this session are in {session.store.folder}")


def command_line(flags: dict[str, object]) -> list[str]:
    """The words of a command line of `-m segment`.

    Args:
        flags: values by name; True stands for a flag without a value.
    """
    words = ["python", "main.py", "-m", "segment"]
    for name, value in flags.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    return words
