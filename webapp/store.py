"""Stores a session's masks and objects on disk.

    given/00057.png   user masks: drawn, corrected or uploaded, as palette images
    found/00058.png   predicted masks
    found.jsonl       for each predicted mask the confidence measures and the frame that propagation
                      started from
    session.json      objects, where they are absent or gone, and pending frames

Each file is complete at every moment, so that a killed process loses nothing.
"""

import json
import zlib
from collections.abc import Set
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from masks.read import read_mask
from media import files, images
from tracking.presence import Presence

MAX_OBJECTS = 254  # 255 means "not labelled" in a mask


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

    Raises:
        ValueError: another process uses the folder, it belongs to another clip, or one of its files
            is damaged.
    """

    def __init__(self, folder: Path, clip: str, shape: tuple[int, int]):
        self.folder, self.clip, self.shape = folder, clip, tuple(shape)
        self._lock = ExitStack()
        self._lock.enter_context(files.lock_folder(folder))
        for name in ("given", "found"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        folder = self.folder
        self.user_frames = {int(path.stem) for path in (folder / "given").glob("[0-9]*.png")}
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

    def input_frames(self) -> set[int]:
        """The frames with user input: a mask, or an object marked as absent or gone."""
        return {*self.user_frames, *self.presence.absent, *self.presence.gone}

    def input_key(self, frame: int) -> tuple | None:
        """A value that changes whenever the user input of a frame does; None without input."""
        presence, has_mask = self.presence, frame in self.user_frames
        if not (has_mask or frame in presence.absent or frame in presence.gone):
            return None
        return (self._checksums[frame] if has_mask else -1, *sorted(presence.missing(frame)))

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

    def add_object(self, name: str = "") -> TrackedObject:
        """Add an object and return it.

        Raises:
            ValueError: all ids are taken.
        """
        if self.next_id > MAX_OBJECTS:
            raise ValueError(f"expected at most {MAX_OBJECTS} objects")
        obj = TrackedObject(self.next_id, name or f"object {self.next_id}")
        self.objects, self.next_id = [*self.objects, obj], self.next_id + 1
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
            "absent": _listed(self.presence.absent), "gone": _listed(self.presence.gone)},
            indent=1))

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
            session = ([TrackedObject(obj["id"], obj["name"]) for obj in content["objects"]],
                       int(content["next_id"]), set(content["pending"]) & self.input_frames())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the file of a session ({error})") from error
        if (clip, shape) != (self.clip, self.shape):
            raise ValueError(f"{self.folder}: a session on {clip} with frames of "
                             f"{shape[1]}x{shape[0]} pixels, expected one on {self.clip}: name "
                             "another folder (--results_dir)")
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


def ids_in(mask: np.ndarray) -> set[int]:
    """Object ids in an (H, W) uint8 mask; much faster than `np.unique`, which sorts pixels."""
    return set(np.flatnonzero(np.bincount(mask.ravel(), minlength=1)).tolist()) - {0}


def _listed(marks: dict[int, set[int]]) -> dict[int, list[int]]:
    return {frame: sorted(ids) for frame, ids in sorted(marks.items())}
