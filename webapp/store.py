"""A session's masks and objects: stored on disk, and edited by the user, with undo.

    given/00057.png   user masks: drawn, corrected or uploaded, as palette images
    found/00058.png   predicted masks
    found.jsonl       for each predicted mask the confidence measures and the frame that propagation
                      started from
    session.json      objects, where they are absent or gone, pending frames, colours of uploaded
                      masks, and what was read from the command line

Each file is complete at every moment, so that a killed process loses nothing.
"""

import json
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Set
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from masks.read import read_mask
from media import files, images
from media.prompts import Prompts
from tracking.presence import Presence

MAX_OBJECTS = 254  # 255 means "not labelled" in a mask
# Bytes of PNG masks kept for undo: thousands of steps at 480p, hundreds at 4K.
UNDO_BYTES = 64 * 2**20
STEP_BYTES = 1000  # of a step besides its mask, about; limits steps without a mask as well


@dataclass
class TrackedObject:
    """An object to segment; `id` is its value in masks and is never reused."""

    id: int
    name: str


@dataclass(frozen=True)
class Prediction:
    """What is stored about a predicted mask besides the mask.

    Args:
        origin: the frame that propagation started from.
        measures: rows of `tracking.confidence.Measures`, one per object.
    """

    origin: int
    measures: list[tuple]


class MaskStore:
    """Reads and writes the folder of a session, which it locks.

    Args:
        folder: created if missing.
        clip: the clip's name; the folder of another clip is refused.
        shape: (H, W) of the clip's frames.

    Attributes:
        user_frames: frames with a user mask.
        predictions: by frame, for frames with a predicted mask.
        presence: objects that the user marked as absent or gone, and those in each user mask.
        pending: frames whose user input changed since propagation last started from them.
        colours: ids of colours in uploaded masks, so that a colour means the same in all of them.
        flags: what was read from the command line: marks, and checksums of masks by frame. The same
            command resumes a session and must not undo corrections.

    Raises:
        ValueError: another process uses the folder, it belongs to another clip, or one of its files
            is damaged.
    """

    def __init__(self, folder: Path, clip: str, shape: tuple[int, int]):
        self.folder, self.clip, self.shape = folder, clip, tuple(shape)
        self._lock = ExitStack()
        self._lock.enter_context(files.lock_folder(folder))
        self.colours: dict[tuple, int] = {}
        self.flags: dict[str, int] = {}
        for name in ("given", "found"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        folder = self.folder
        self.user_frames = {int(path.stem) for path in (folder / "given").glob("*.png")
                            if path.stem.isdecimal()}
        self.predictions = self._read_predictions()
        self.presence, self._checksums = Presence(), {}
        for frame in self.user_frames:
            mask = read_mask(self._path("given", frame))
            self.presence.in_user_mask[frame] = ids_in(mask)
            self._checksums[frame] = zlib.crc32(mask.tobytes())
        self.objects, self.next_id, self.pending = self._read_session()
        self.save()

    def mask(self, frame: int) -> np.ndarray | None:
        """The (H, W) uint8 user mask of a frame, else the predicted mask, else None.

        It lacks objects that were deleted or are marked as absent or gone.
        """
        if frame not in self.user_frames and frame not in self.predictions:
            return None
        kind = "given" if frame in self.user_frames else "found"
        mask = read_mask(self._path(kind, frame))
        visible_ids = np.zeros(256, np.uint8)
        missing = self.presence.missing(frame)
        for obj in self.objects:
            visible_ids[obj.id] = 0 if obj.id in missing else obj.id
        return visible_ids[mask]

    def user_mask(self, frame: int) -> np.ndarray | None:
        """The user mask of a frame, including objects that were deleted since."""
        return read_mask(self._path("given", frame)) if frame in self.user_frames else None

    def set_input(self, frame: int, mask: np.ndarray | None, absent: Set[int] = frozenset(),
             gone: Set[int] = frozenset()) -> None:
        """Replace the user input of a frame.

        Args:
            mask: (H, W) uint8 user mask of all objects in the frame, None for no mask.
            absent, gone: ids, as in `Presence`.
        """
        # replaced rather than modified, because propagation reads them without the lock
        absent_at, gone_at, in_user_mask = (dict(marks) for marks in (
            self.presence.absent, self.presence.gone, self.presence.in_user_mask))
        for marks, ids in ((absent_at, absent), (gone_at, gone)):
            marks.pop(frame, None)
            if ids:
                marks[frame] = set(ids)
        in_user_mask.pop(frame, None)
        if mask is None:
            self.user_frames = self.user_frames - {frame}
            self._path("given", frame).unlink(missing_ok=True)
        else:
            images.write_mask(self._path("given", frame), mask)
            in_user_mask[frame] = ids_in(mask)
            self._checksums[frame] = zlib.crc32(mask.tobytes())
            self.user_frames = self.user_frames | {frame}
        self.presence = Presence(absent_at, gone_at, in_user_mask)
        (self.pending.add if self.input_key(frame) else self.pending.discard)(frame)
        self.save()

    def reference_frames(self) -> list[int]:
        """The frames with a user mask, from the first one on that shows an object."""
        frames = sorted(self.user_frames)
        while frames and not self.mask(frames[0]).any():
            del frames[0]
        return frames

    def input_frames(self) -> set[int]:
        """The frames with user input: a mask, or an object marked as absent or gone."""
        return {*self.user_frames, *self.presence.absent, *self.presence.gone}

    def input_key(self, frame: int) -> tuple | None:
        """A value that changes whenever the user input of a frame does; None without input."""
        presence, has_mask = self.presence, frame in self.user_frames
        if not (has_mask or frame in presence.absent or frame in presence.gone):
            return None
        visible = presence.in_user_mask.get(frame, set()) & {obj.id for obj in self.objects}
        return (self._checksums[frame] if has_mask else -1, tuple(sorted(visible)),
                *sorted(presence.missing(frame)))

    def input_keys(self) -> dict[int, tuple]:
        """The `input_key` of every frame with user input."""
        return {frame: key for frame in self.input_frames() if (key := self.input_key(frame))}

    def save_prediction(self, frame: int, mask: np.ndarray, prediction: Prediction) -> None:
        """Write a predicted mask, replacing an earlier one."""
        images.write_mask(self._path("found", frame), mask)
        line = json.dumps({"frame": frame, "origin": prediction.origin,
                           "measures": prediction.measures})
        with open(self.folder / "found.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.predictions[frame] = prediction

    def mark_propagated(self, frame: int) -> None:
        """Propagation started from a frame, so it is no longer pending."""
        self.pending.discard(frame)
        self.save()

    def add_object(self, name: str = "", object_id: int | None = None) -> TrackedObject:
        """Add an object and return it; by default with the next id.

        Raises:
            ValueError: all ids are taken.
        """
        object_id = object_id or self.next_id
        if object_id > MAX_OBJECTS:
            raise ValueError(f"expected at most {MAX_OBJECTS} objects")
        obj = TrackedObject(object_id, name or f"object {object_id}")
        self.objects, self.next_id = [*self.objects, obj], max(self.next_id, object_id + 1)
        self.save()
        return obj

    def close(self) -> None:
        """Release the lock of the folder."""
        self._lock.close()

    def save(self) -> None:
        files.write(self.folder / "session.json", json.dumps({
            "clip": self.clip, "shape": self.shape,
            "objects": [asdict(obj) for obj in self.objects], "next_id": self.next_id,
            "pending": sorted(self.pending),
            "absent": _listed(self.presence.absent), "gone": _listed(self.presence.gone),
            "colours": list(self.colours.items()), "flags": self.flags}, indent=1))

    def _path(self, kind: str, frame: int) -> Path:
        return self.folder / kind / f"{frame:05d}.png"

    def _read_session(self) -> tuple[list[TrackedObject], int, set[int]]:
        path = self.folder / "session.json"
        if not path.is_file():
            return [], 1, set()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            clip, shape = content["clip"], tuple(content["shape"])
            for name in ("absent", "gone"):  # which earlier versions did not write
                getattr(self.presence, name).update(
                    (int(frame), set(ids)) for frame, ids in content.get(name, {}).items())
            self.colours = {tuple(colour): i for colour, i in content.get("colours", [])}
            self.flags = dict(content.get("flags", {}))
            session = ([TrackedObject(obj["id"], obj["name"]) for obj in content["objects"]],
                       int(content["next_id"]), set(content["pending"]) & self.input_frames())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the file of a session ({error})") from error
        if (clip, shape) != (self.clip, self.shape):
            raise ValueError(f"{self.folder}: a session on {clip} of {shape[1]}x{shape[0]} pixels, "
                             f"expected one on {self.clip} of {self.shape[1]}x{self.shape[0]}: "
                             "name another folder (--results_dir). The digits in brackets change "
                             "with the name, size and time of the clip's files")
        return session

    def _read_predictions(self) -> dict[int, Prediction]:
        """Read found.jsonl, then rewrite it with one line per frame.

        A frame's last line counts. The last line of the file may be cut off, if the process was
        killed.
        """
        path, predictions = self.folder / "found.jsonl", {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                frame, origin = int(entry["frame"]), int(entry["origin"])
                measures = [tuple(row) for row in entry["measures"]]
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    break
                raise ValueError(f"{path}, line {number}: not that of a predicted mask") from error
            if self._path("found", frame).is_file():
                predictions[frame] = Prediction(origin, measures)
        files.write(path, "".join(json.dumps({"frame": frame, "origin": one.origin,
                                              "measures": one.measures}) + "\n"
                                  for frame, one in predictions.items()))
        return predictions


class Editor:
    """Applies the user's edits. Every method may be called from any thread.

    Args:
        store: holds masks and objects.
        image: maps a frame index to the (H, W, 3) uint8 RGB image; raises a ValueError if there is
            no such frame.
        prompter: maps an (H, W, 3) uint8 RGB image and the `Prompts` of one object to its (H, W)
            bool mask.

    Attributes:
        lock: held during every change.
        version: increases with every change. It starts at the current time, so that a browser that
            outlives this process reloads everything.
        changed: version of the last change of each frame with a mask, oldest first.
        everywhere: last version at which masks of all frames may have changed, because an object
            was deleted or marked as gone.
        undo_stack: (bytes, undo) of each step that can be undone; `undo()` returns its frame.
    """

    def __init__(self, store: MaskStore, image: Callable[[int], np.ndarray],
                 prompter: Callable[[np.ndarray, Prompts], np.ndarray]):
        self.store, self.image, self.prompter = store, image, prompter
        self.lock = threading.RLock()
        self.version = self.everywhere = time.time_ns() // 10**6
        self.changed = dict.fromkeys(store.user_frames | set(store.predictions), self.version)
        self.prompts: dict[int, dict[int, Prompts]] = {}  # by frame, then by object; no masks
        self.undo_stack: list[tuple[int, Callable[[], int]]] = []

    def change(self, *frames: int) -> None:
        """Record a change, with the frames whose masks it changed."""
        with self.lock:
            self.version += 1
            for frame in frames:
                self.changed.pop(frame, None)  # so that the latest changes are last
                self.changed[frame] = self.version

    def changes_since(self, version: int) -> dict[int, int]:
        """Frames whose mask changed after a version, with the version of their last change."""
        changes = {}
        for frame, changed in reversed(self.changed.items()):
            if changed <= version:
                break
            changes[frame] = changed
        return changes

    def add_prompt(self, frame: int, object_id: int,
                   box: tuple[int, int, int, int] | None = None,
                   point: tuple[int, int] | None = None, positive: bool = True) -> None:
        """Predict an object's mask from a box, or correct it with a positive or negative point.

        Points add to the object's earlier prompts in this frame; a box replaces them.

        Args:
            box: x, y, width, height.
            point: x, y; ignored if there is a box.

        Raises:
            ValueError: there is no such frame or object, or nothing is found.
        """
        image = self.image(frame)
        with self.lock:
            find_object(self.store.objects, object_id)
            current = self._mask_or_empty(frame)
            earlier = self.prompts.get(frame, {}).get(object_id) or Prompts()
            prompts = earlier.extended(box, point, positive)
            # points correct the current mask; a box starts from nothing
            mask = np.asarray(self.prompter(image, prompts if box else replace(
                prompts, mask=current == object_id)), bool)
            if positive and not mask.any():
                raise ValueError("nothing was found there: draw a box, or click on another part")
            self._set_object_mask(frame, current, mask, object_id, {object_id: prompts})

    def paint(self, frame: int, object_id: int, points: list[tuple[int, int]], radius: int,
              erase: bool) -> None:
        """Add a stroke of the brush to an object's mask, or erase it there.

        An object that is erased completely is marked as absent from this frame.

        Args:
            points: x, y along the stroke, at least one.
            radius: of the brush, in pixels.
        """
        with self.lock:
            find_object(self.store.objects, object_id)
            current, stroke = self._mask_or_empty(frame), np.zeros(self.store.shape, np.uint8)
            cv2.polylines(stroke, [np.array(points, np.int32)], False, 1, 2 * radius)
            for x, y in (points[0], points[-1]):  # round ends
                cv2.circle(stroke, (x, y), radius, 1, cv2.FILLED)
            mask = current == object_id
            mask = mask & (stroke == 0) if erase else mask | (stroke > 0)
            self._set_object_mask(frame, current, mask, object_id, {})

    def mark(self, frame: int, object_id: int, word: str, on: bool = True) -> None:
        """Mark an object as not in a frame, or remove that mark.

        The object is erased from a user mask of this frame. Masks of other frames keep it on disk,
        but are displayed and exported without it where it is gone.

        Args:
            word: "absent" (not in this frame) or "gone" (neither in this frame nor in later ones,
                until a user mask contains it again).
            on: False removes the mark.
        """
        self.image(frame)
        with self.lock:
            find_object(self.store.objects, object_id)
            marks = {name: set(getattr(self.store.presence, name).get(frame, ()))
                     for name in ("absent", "gone")}
            if (object_id in marks[word]) == on:
                return
            (marks[word].add if on else marks[word].discard)(object_id)
            mask = self.store.mask(frame) if frame in self.store.user_frames else None
            if on and mask is not None:
                mask = np.where(mask == object_id, 0, mask).astype(np.uint8)
            self._set_input(frame, mask, self.prompts.get(frame, {}), **marks)

    def set_mask(self, frame: int, mask: np.ndarray,
                 names: Mapping[int, str] | None = None) -> None:
        """Replace the user mask of a frame; unknown ids in it become new objects.

        Args:
            mask: (H, W) uint8.
            names: of new objects, by id.

        Raises:
            ValueError: the mask's size differs from the clip's, or there is no such frame.
        """
        self.image(frame)
        with self.lock:
            if frame in self.store.user_frames and np.array_equal(mask, self.store.mask(frame)):
                return
            images.check_same_shape("the clip", self.store.shape, "the mask", mask.shape)
            self._set_input(frame, self._with_objects(mask, names or {}), {})

    def remove_mask(self, frame: int) -> None:
        """Remove the user mask of a frame; its predicted mask is shown again."""
        with self.lock:
            if frame in self.store.input_frames():
                self._set_input(frame, None, {})

    def undo(self) -> int | None:
        """Undo the last step; return its frame, or None if there is no step."""
        with self.lock:
            return self.undo_stack.pop()[1]() if self.undo_stack else None

    def _mask_or_empty(self, frame: int) -> np.ndarray:
        self.image(frame)
        mask = self.store.mask(frame)
        return np.zeros(self.store.shape, np.uint8) if mask is None else mask

    def _set_object_mask(self, frame: int, current: np.ndarray, object_mask: np.ndarray,
                         object_id: int, prompts: dict[int, Prompts]) -> None:
        """Set one object's (H, W) bool mask in the frame's `current` mask of all objects."""
        mask = np.where(current == object_id, 0, current)
        mask = np.where(object_mask, object_id, mask).astype(np.uint8)
        absent = set(self.store.presence.absent.get(frame, ()))
        self._set_input(frame, mask, prompts,
                        absent if object_mask.any() else absent | {object_id},
                        set(self.store.presence.gone.get(frame, ())))

    def _set_input(self, frame: int, mask: np.ndarray | None, prompts: dict[int, Prompts],
                   absent: Set[int] = frozenset(), gone: Set[int] = frozenset()) -> None:
        """Replace the user input of a frame, as a step that can be undone.

        Earlier prompts of the frame are dropped, and so are marks of objects that the mask
        contains.
        """
        store, presence = self.store, self.store.presence
        old_mask, was_pending = store.user_mask(frame), frame in store.pending
        # as PNG: undo may hold thousands of masks
        old_png = b"" if old_mask is None else encode_mask(old_mask)
        old_marks = presence.absent.get(frame, set()), presence.gone.get(frame, set())
        old_prompts = self.prompts.get(frame, {})

        def undo() -> int:
            # whether propagation has not started from the frame since this step
            unused = frame in store.pending or not store.input_key(frame)
            self._store_input(frame, _decode(old_png) if old_png else None, *old_marks)
            if unused and not was_pending:
                store.mark_propagated(frame)
            self.prompts[frame] = old_prompts
            return frame

        self._push_undo(len(old_png), undo)
        contained = set() if mask is None else ids_in(mask)
        self._store_input(frame, mask, set(absent) - contained, set(gone) - contained)
        self.prompts[frame] = dict(prompts)

    def _store_input(self, frame: int, mask: np.ndarray | None, absent: Set[int],
                     gone: Set[int]) -> None:
        # objects that are gone are left out of later frames as well, as far as the next user mask
        affects_later_frames = bool(self.store.presence.gone or gone)
        self.store.set_input(frame, mask, absent, gone)
        self.change(frame)
        if affects_later_frames:
            self.everywhere = self.version

    def _push_undo(self, size: int, undo: Callable[[], int]) -> None:
        """Add a step, and drop the oldest ones beyond `UNDO_BYTES`; one step always remains."""
        self.undo_stack.append((size + STEP_BYTES, undo))
        while len(self.undo_stack) > 1 and sum(size for size, _ in self.undo_stack) > UNDO_BYTES:
            del self.undo_stack[0]

    def add_object(self) -> int:
        """Add an object and return its id."""
        with self.lock:
            obj = self.store.add_object()
            self.change()
            return obj.id

    def rename_object(self, object_id: int, name: str) -> None:
        with self.lock:
            find_object(self.store.objects, object_id).name = name
            self.store.save()
            self.change()

    def delete_object(self, object_id: int) -> None:
        """Delete an object; its mask stays in the files, so that undo brings it back."""
        with self.lock:
            deleted = find_object(self.store.objects, object_id)
            index = self.store.objects.index(deleted)

            def others() -> list[TrackedObject]:
                return [obj for obj in self.store.objects if obj.id != object_id]

            def undo() -> int:
                # keep objects added since: adding one cannot be undone
                self._set_objects([*others()[:index], deleted, *others()[index:]])
                return min(self.store.user_frames, default=0)

            self._push_undo(0, undo)
            self._set_objects(others())

    def _set_objects(self, objects: list[TrackedObject]) -> None:
        self.store.objects = objects
        self.store.save()
        self.change()
        self.everywhere = self.version

    def _with_objects(self, mask: np.ndarray, names: Mapping[int, str]) -> np.ndarray:
        """Add an object for each id that no object has yet; returns the mask with their ids.

        An id that a deleted object had becomes a new one, else its masks in other frames would
        come back.
        """
        store, first_unused = self.store, self.store.next_id
        missing = sorted(ids_in(mask) - {obj.id for obj in store.objects})
        for object_id in missing:
            if object_id >= first_unused:
                store.add_object(names.get(object_id, ""), object_id)
        for object_id in missing:  # second, so that new ids are none of the mask's
            if object_id < first_unused:
                new = store.add_object(names.get(object_id, "")).id
                mask = np.where(mask == object_id, new, mask).astype(np.uint8)
        return mask


def find_object(objects: list[TrackedObject], object_id: int) -> TrackedObject:
    """The object with this id; raises a ValueError if there is none."""
    for obj in objects:
        if obj.id == object_id:
            return obj
    raise ValueError(f"there is no object {object_id}")


def ids_in(mask: np.ndarray) -> set[int]:
    """Object ids in an (H, W) uint8 mask; much faster than `np.unique`, which sorts pixels."""
    return set(np.flatnonzero(np.bincount(mask.ravel(), minlength=1)).tolist()) - {0}


def _listed(marks: dict[int, set[int]]) -> dict[int, list[int]]:
    return {frame: sorted(ids) for frame, ids in sorted(marks.items())}


def encode_mask(mask: np.ndarray) -> bytes:
    """An (H, W) uint8 mask as PNG, with the fastest compression."""
    return cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _decode(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
