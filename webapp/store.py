"""The folder of a session on one clip: masks that a person gave, masks that were found.

    given/00057.png   palette masks that a person drew, mended or brought
    found/00058.png   palette masks that a tracker found
    found.jsonl       of each found mask how sure it is, and which given frame it comes from
    session.json      objects, where they are said not to be, and the changed frames that no pass
                      has started from since

Each file is whole at every moment, so a kill loses nothing. It knows no network, and of the clip
only the size of its frames.
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

MOST_OBJECTS = 254  # 255 means "not labelled" in a mask


@dataclass
class Object:
    """Something to be cut out; `id` is its value in masks and is never used twice."""

    id: int
    name: str


@dataclass(frozen=True)
class Found:
    """What is known of a found mask beside the mask.

    Args:
        origin: the frame that the pass started from.
        measures: rows of numbers that tell how sure it is, whose meaning isn't known here.
    """

    origin: int
    measures: list[tuple]


class Work:
    """What lies in the folder, and how it is changed.

    Args:
        folder: made if it isn't there.
        clip: its name; another one's masks are none of this one's.
        shape: (H, W) of the clip's frames.

    Attributes:
        given: the frames whose mask a person gave.
        found: what is known of those whose mask was found.
        presence: which objects the person said are not in a frame, and which those masks show.
        pending: frames that a person changed since a pass started from them.

    Raises:
        ValueError: somebody works there, the folder is of another clip, or a file of it can't be
            understood.
    """

    def __init__(self, folder: Path, clip: str, shape: tuple[int, int]):
        self.folder, self.clip, self.shape = folder, clip, tuple(shape)
        self._held = ExitStack()
        self._held.enter_context(files.hold(folder))
        for name in ("given", "found"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        folder = self.folder
        self.given = {int(path.stem) for path in (folder / "given").glob("[0-9]*.png")}
        self.found = self._read_found()
        self.presence, self._sums = Presence(), {}
        for frame in self.given:
            mask = read_mask(self._path("given", frame))
            self.presence.in_user_mask[frame] = ids_in(mask)
            self._sums[frame] = zlib.crc32(mask.tobytes())
        self.objects, self.next_id, self.pending = self._read_session()
        self.save()

    def mask(self, frame: int) -> np.ndarray | None:
        """(H, W) uint8 of the objects that weren't deleted: given, else found, else None.

        Objects that are marked as absent or gone are left out.
        """
        kind = "given" if frame in self.given else "found" if frame in self.found else None
        if kind is None:
            return None
        mask = read_mask(self._path(kind, frame))
        known = np.zeros(256, np.uint8)
        missing = self.presence.missing(frame)
        for thing in self.objects:
            known[thing.id] = 0 if thing.id in missing else thing.id
        # the only object may have any number, but a file with 255 alone reads as 1
        return known[mask]

    def raw(self, frame: int) -> np.ndarray | None:
        """The user mask of a frame, including objects that were deleted since."""
        return read_mask(self._path("given", frame)) if frame in self.given else None

    def give(self, frame: int, mask: np.ndarray | None, absent: Set[int] = frozenset(),
             gone: Set[int] = frozenset()) -> None:
        """Replace the user input of a frame.

        Args:
            mask: (H, W) uint8 user mask of all objects in the frame, None for no mask.
            absent, gone: ids, as in `Presence`.
        """
        # replaced rather than modified, because propagation reads them without the lock
        absent_at, gone_at, shown = (dict(marks) for marks in (
            self.presence.absent, self.presence.gone, self.presence.in_user_mask))
        for kept, ids in ((absent_at, absent), (gone_at, gone)):
            kept.pop(frame, None)
            if ids:
                kept[frame] = set(ids)
        shown.pop(frame, None)
        if mask is None:
            self.given = self.given - {frame}
            self._path("given", frame).unlink(missing_ok=True)
        else:
            images.write_mask(self._path("given", frame), mask)
            shown[frame], self._sums[frame] = ids_in(mask), zlib.crc32(mask.tobytes())
            self.given = self.given | {frame}
        self.presence = Presence(absent_at, gone_at, shown)
        (self.pending.add if self.key(frame) else self.pending.discard)(frame)
        self.save()

    def said(self) -> set[int]:
        """The frames with user input: a mask, or an object marked as absent or gone."""
        return {*self.given, *self.presence.absent, *self.presence.gone}

    def key(self, frame: int) -> tuple | None:
        """A value that changes whenever the user input of a frame does; None without input."""
        presence, given = self.presence, frame in self.given
        if not (given or frame in presence.absent or frame in presence.gone):
            return None
        return (self._sums[frame] if given else -1, *sorted(presence.missing(frame)))

    def keys(self) -> dict[int, tuple]:
        """The key of every frame with user input."""
        return {frame: key for frame in self.said() if (key := self.key(frame))}

    def find(self, frame: int, mask: np.ndarray, found: Found) -> None:
        """Keep a mask that a tracker found."""
        images.write_mask(self._path("found", frame), mask)
        line = json.dumps({"frame": frame, "origin": found.origin,
                           "measures": found.measures})
        with open(self.folder / "found.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.found[frame] = found

    def spread(self, frame: int) -> None:
        """A pass started from a given frame, so nothing of it is pending."""
        self.pending.discard(frame)
        self.save()

    def add_object(self, name: str = "") -> Object:
        """A new object.

        Raises:
            ValueError: a mask has no number left for it.
        """
        if self.next_id > MOST_OBJECTS:
            raise ValueError(f"a mask holds {MOST_OBJECTS} objects at most")
        thing = Object(self.next_id, name or f"object {self.next_id}")
        self.objects, self.next_id = [*self.objects, thing], self.next_id + 1
        self.save()
        return thing

    def close(self) -> None:
        """Let others work in the folder."""
        self._held.close()

    def save(self) -> None:
        files.write(self.folder / "session.json", json.dumps({
            "clip": self.clip, "shape": self.shape,
            "objects": [asdict(thing) for thing in self.objects], "next_id": self.next_id,
            "pending": sorted(self.pending),
            "absent": _listed(self.presence.absent), "gone": _listed(self.presence.gone)},
            indent=1))

    def _path(self, kind: str, frame: int) -> Path:
        return self.folder / kind / f"{frame:05d}.png"

    def _read_session(self) -> tuple[list[Object], int, set[int]]:
        path = self.folder / "session.json"
        if not path.is_file():
            return [], 1, set()
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            of = kept["clip"], tuple(kept["shape"])
            for name in ("absent", "gone"):  # which earlier versions did not write
                getattr(self.presence, name).update(
                    (int(frame), set(ids)) for frame, ids in kept.get(name, {}).items())
            found = ([Object(thing["id"], thing["name"]) for thing in kept["objects"]],
                     int(kept["next_id"]), set(kept["pending"]) & self.said())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not that of a session ({error})") from error
        if of != (self.clip, self.shape):
            raise ValueError(f"{self.folder}: a session on {of[0]} with frames of "
                             f"{of[1][1]}x{of[1][0]} pixels, expected one on {self.clip} or a "
                             "folder of its own (--results_dir)")
        return found

    def _read_found(self) -> dict[int, Found]:
        """The last line of a frame counts; a kill may have cut the last line of all."""
        path, found = self.folder / "found.jsonl", {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                kept = json.loads(line)
                frame, origin = int(kept["frame"]), int(kept["origin"])
                measures = [tuple(row) for row in kept["measures"]]
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    break
                raise ValueError(f"{path}, line {number}: not of a found mask") from error
            if self._path("found", frame).is_file():
                found[frame] = Found(origin, measures)
        files.write(path, "".join(json.dumps({"frame": frame, "origin": entry.origin,
                                              "measures": entry.measures}) + "\n"
                                  for frame, entry in found.items()))
        return found


def ids_in(mask: np.ndarray) -> set[int]:
    """Object ids in an (H, W) uint8 mask; much faster than `np.unique`, which sorts pixels."""
    return set(np.flatnonzero(np.bincount(mask.ravel(), minlength=1)).tolist()) - {0}


def _listed(marks: dict[int, set[int]]) -> dict[int, list[int]]:
    return {frame: sorted(ids) for frame, ids in sorted(marks.items())}
