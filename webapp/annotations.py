"""What a person gives in a session on one clip, and how each step is taken back.

Boxes, points and strokes become masks of one object in one frame, at once. It knows no network:
what makes a mask of them is handed in.
"""

import threading
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import replace

import cv2
import numpy as np

from media import images
from media.prompts import Prompts
from webapp.store import Work, ids_in

UNDONE = 64 * 2**20  # bytes of masks kept to take steps back: thousands at 480p, hundreds at 4K
STEP = 1000  # bytes that a step takes beside a mask


class Edits:
    """The steps of a person. Every method may be called from any thread.

    Args:
        work: where masks and objects are kept.
        image: a frame's (H, W, 3) uint8 RGB by its number; a ValueError where there is none.
        prompter: (H, W, 3) uint8 RGB and the `Prompts` of one object -> (H, W) bool, its mask.
        forget: called when no saved tracker state is valid any more.

    Attributes:
        lock: held while something changes.
        version: grows with every change. It starts at the current time, so that a browser that
            outlives this process loads everything again.
        changed: of each frame whose mask is known the version of its last change, oldest first.
        everywhere: the last version at which masks of all frames may have changed, because an
            object was deleted or marked as gone.
        past: (bytes, undo) of each step that can be undone; `undo()` returns the step's frame.
    """

    def __init__(self, work: Work, image: Callable[[int], np.ndarray],
                 prompter: Callable[[np.ndarray, Prompts], np.ndarray],
                 forget: Callable[[], None]):
        self.work, self.image, self.prompter, self.forget_states = work, image, prompter, forget
        self.lock = threading.RLock()
        self.version = self.everywhere = time.time_ns() // 10**6
        self.changed = dict.fromkeys(work.given | set(work.found), self.version)
        self.prompts: dict[int, dict[int, Prompts]] = {}  # by frame, then by object; no masks
        self.past: list[tuple[int, Callable[[], int]]] = []

    def change(self, *frames: int) -> None:
        """Something is new, of these frames their masks."""
        with self.lock:
            self.version += 1
            for frame in frames:
                self.changed.pop(frame, None)  # so that the newest stand last
                self.changed[frame] = self.version

    def since(self, version: int) -> dict[int, int]:
        """The frames that changed after a version, each with the version of its change."""
        found = {}
        for frame, changed in reversed(self.changed.items()):
            if changed <= version:
                break
            found[frame] = changed
        return found

    def show(self, frame: int, object_id: int, box: tuple[int, int, int, int] | None = None,
             point: tuple[int, int] | None = None, wanted: bool = True) -> None:
        """A box around an object, or a point on it (`wanted`) or beside it; mends its mask."""
        image = self.image(frame)
        with self.lock:
            self._object(object_id)
            before = self._base(frame)
            prompts = self.prompts.get(frame, {}).get(object_id) or Prompts()
            if box:
                prompts = Prompts([box])
            else:
                points = [(prompts.points, prompts.not_points)[not wanted] + [point]]
                prompts = Prompts(prompts.boxes, points[0] if wanted else prompts.points,
                                  prompts.not_points if wanted else points[0])
            # clicks correct the mask so far; a box begins anew
            found = np.asarray(self.prompter(image, prompts if box else replace(
                prompts, mask=before == object_id)), bool)
            self._draw(frame, before, found, object_id, {object_id: prompts})

    def stroke(self, frame: int, object_id: int, points: list[tuple[int, int]], radius: int,
               erase: bool) -> None:
        """Paint an object's mask along a line, or erase it there.

        An object that is erased completely is marked as absent from this frame.
        """
        with self.lock:
            self._object(object_id)
            before, line = self._base(frame), np.zeros(self.work.shape, np.uint8)
            cv2.polylines(line, [np.array(points, np.int32)], False, 1, 2 * radius)
            for x, y in (points[0], points[-1]):
                cv2.circle(line, (x, y), radius, 1, cv2.FILLED)
            found = before == object_id
            found = found & (line == 0) if erase else found | (line > 0)
            self._draw(frame, before, found, object_id, {})

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
            self._object(object_id)
            marks = {name: set(getattr(self.work.presence, name).get(frame, ()))
                     for name in ("absent", "gone")}
            if (object_id in marks[word]) == on:
                return
            (marks[word].add if on else marks[word].discard)(object_id)
            mask = self.work.mask(frame) if frame in self.work.given else None
            if on and mask is not None:
                mask = np.where(mask == object_id, 0, mask).astype(np.uint8)
            self._give(frame, mask, self.prompts.get(frame, {}), **marks)

    def give(self, frame: int, mask: np.ndarray, names: Mapping[int, str] | None = None) -> None:
        """A whole mask, (H, W) uint8; objects that it holds and nobody knows yet are added.

        Args:
            names: of objects that are added, by their ids.

        Raises:
            ValueError: it is of another size than the frames, or there is no such frame.
        """
        self.image(frame)
        with self.lock:
            if frame in self.work.given and np.array_equal(mask, self.work.mask(frame)):
                return
            images.check_same_shape("the clip", self.work.shape, "the mask", mask.shape)
            self._meet(np.unique(mask[mask > 0]).tolist(), names or {})
            self._give(frame, mask, {})

    def forget(self, frame: int) -> None:
        """Take back the mask given for a frame; what was found there shows again."""
        with self.lock:
            if frame in self.work.said():
                self._give(frame, None, {})

    def undo(self) -> int | None:
        """Take the last step back; returns the frame of it."""
        with self.lock:
            return self.past.pop()[1]() if self.past else None

    def _base(self, frame: int) -> np.ndarray:
        self.image(frame)
        mask = self.work.mask(frame)
        return np.zeros(self.work.shape, np.uint8) if mask is None else mask

    def _draw(self, frame: int, before: np.ndarray, drawn: np.ndarray, object_id: int,
              prompts: dict[int, Prompts]) -> None:
        """Set one object's mask in a frame to `drawn`, (H, W) bool."""
        mask = np.where(before == object_id, 0, before)
        mask = np.where(drawn, object_id, mask).astype(np.uint8)
        absent = set(self.work.presence.absent.get(frame, ()))
        self._give(frame, mask, prompts, absent if drawn.any() else absent | {object_id},
                   set(self.work.presence.gone.get(frame, ())))

    def _give(self, frame: int, mask: np.ndarray | None, prompts: dict[int, Prompts],
              absent: Set[int] = frozenset(), gone: Set[int] = frozenset()) -> None:
        """Replace the user input of a frame, and remember how to undo that.

        Earlier prompts of the frame are dropped, and so are marks of objects that the mask
        contains.
        """
        work, presence = self.work, self.work.presence
        raw, pending = work.raw(frame), frame in work.pending
        before = b"" if raw is None else _packed(raw)
        marks = presence.absent.get(frame, set()), presence.gone.get(frame, set())
        shown = self.prompts.get(frame, {})

        def back() -> int:
            self._set(frame, _unpacked(before) if before else None, *marks)
            if not pending:
                work.spread(frame)
            self.prompts[frame] = shown
            return frame

        self._remember(len(before), back)
        held = set() if mask is None else ids_in(mask)
        self._set(frame, mask, set(absent) - held, set(gone) - held)
        self.prompts[frame] = dict(prompts)

    def _set(self, frame: int, mask: np.ndarray | None, absent: Set[int], gone: Set[int]) -> None:
        reaching = bool(self.work.presence.gone)  # marks that also change masks of later frames
        self.work.give(frame, mask, absent, gone)
        self.change(frame)
        if reaching or gone:
            self.everywhere = self.version

    def _remember(self, size: int, back: Callable[[], int]) -> None:
        """Add a step to undo, and drop the oldest ones that exceed the limit."""
        self.past.append((size + STEP, back))
        while len(self.past) > 1 and sum(size for size, _ in self.past) > UNDONE:
            del self.past[0]

    def add_object(self) -> int:
        with self.lock:
            thing = self.work.add_object()
            self.change()
            return thing.id

    def rename_object(self, object_id: int, name: str) -> None:
        with self.lock:
            self._object(object_id).name = name
            self.work.save()
            self.change()

    def delete_object(self, object_id: int) -> None:
        """Leave an object out of every mask."""
        with self.lock:
            self._object(object_id)
            before = list(self.work.objects)

            def back() -> int:
                self._set_objects(before)
                return min(self.work.given, default=0)

            self._remember(0, back)
            self._set_objects([thing for thing in before if thing.id != object_id])

    def _set_objects(self, objects: list) -> None:
        self.work.objects = objects
        self.work.save()
        self.forget_states()
        self.change()
        self.everywhere = self.version

    def _meet(self, object_ids: list[int], names: Mapping[int, str]) -> None:
        """Know these objects from now on."""
        known = {thing.id for thing in self.work.objects}
        for object_id in object_ids:
            if object_id not in known:
                self.work.next_id, after = object_id, max(self.work.next_id, object_id + 1)
                self.work.add_object(names.get(object_id, ""))
                self.work.next_id = after
        self.work.save()

    def _object(self, object_id: int):
        for thing in self.work.objects:
            if thing.id == object_id:
                return thing
        raise ValueError(f"there is no object {object_id}")


def _packed(mask: np.ndarray) -> bytes:
    return cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _unpacked(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
