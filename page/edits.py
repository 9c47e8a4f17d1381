"""What a person gives in a session on one clip, and how each step is taken back.

Boxes, points and strokes become masks of one object in one frame, at once. It knows no network:
what makes a mask of them is handed in.
"""

import threading
from collections.abc import Callable

import cv2
import numpy as np

from media import images
from media.shown import Prompts
from page.work import Work

UNDONE = 100  # steps that can be taken back


class Edits:
    """The steps of a person. Every method may be called from any thread.

    Args:
        work: where masks and objects are kept.
        image: a frame's (H, W, 3) uint8 RGB by its number; a ValueError where there is none.
        prompter: (H, W, 3) uint8 RGB and the `Prompts` of one object -> (H, W) bool, its mask.
        states: has `drop(frame, given)` and `clear()`, called when a mask or all masks changed.

    Attributes:
        lock: held while something changes.
        version: one more with every change.
        changed: of each frame whose mask is known the version of its last change.
        past: the steps; each, called, takes itself back and returns its frame.
    """

    def __init__(self, work: Work, image: Callable[[int], np.ndarray],
                 prompter: Callable[[np.ndarray, Prompts], np.ndarray], states):
        self.work, self.image, self.prompter, self.states = work, image, prompter, states
        self.lock = threading.RLock()
        self.version, self.changed = 1, dict.fromkeys(work.given | set(work.found), 1)
        self.prompts: dict[tuple[int, int], Prompts] = {}  # by frame and object
        self.past: list[Callable[[], int]] = []

    def change(self, *frames: int) -> None:
        """Something is new, of these frames their masks."""
        with self.lock:
            self.version += 1
            self.changed.update(dict.fromkeys(frames, self.version))

    def show(self, frame: int, object_id: int, box: tuple[int, int, int, int] | None = None,
             point: tuple[int, int] | None = None, wanted: bool = True) -> None:
        """A box around an object, or a point on it (`wanted`) or beside it; mends its mask."""
        image = self.image(frame)
        with self.lock:
            self._object(object_id)
            before = self._base(frame)
            prompts = self.prompts.get((frame, object_id)) or Prompts()
            drawn = before == object_id
            if box:
                prompts = Prompts([box])
            else:
                points = [(prompts.points, prompts.not_points)[not wanted] + [point]]
                prompts = Prompts(prompts.boxes, points[0] if wanted else prompts.points,
                                  prompts.not_points if wanted else points[0], drawn)
            found = np.asarray(self.prompter(image, prompts), bool)
            self._give(frame, _painted(before, found, object_id), {(frame, object_id): prompts})

    def stroke(self, frame: int, object_id: int, points: list[tuple[int, int]], radius: int,
               erase: bool) -> None:
        """Paint an object's mask along a line, or wipe it."""
        with self.lock:
            self._object(object_id)
            before, line = self._base(frame), np.zeros(self.work.shape, np.uint8)
            cv2.polylines(line, [np.array(points, np.int32)], False, 1, 2 * radius)
            for x, y in (points[0], points[-1]):
                cv2.circle(line, (x, y), radius, 1, cv2.FILLED)
            found = before == object_id
            found = found & (line == 0) if erase else found | (line > 0)
            self._give(frame, _painted(before, found, object_id), {})

    def give(self, frame: int, mask: np.ndarray) -> None:
        """A whole mask, (H, W) uint8; objects that it holds and nobody knows yet are added.

        Raises:
            ValueError: it is of another size than the frames, or there is no such frame.
        """
        self.image(frame)
        with self.lock:
            if frame in self.work.given and np.array_equal(mask, self.work.mask(frame)):
                return
            images.check_same_shape("the clip", self.work.shape, "the mask", mask.shape)
            self._meet(np.unique(mask[mask > 0]).tolist())
            self._give(frame, mask, {})

    def forget(self, frame: int) -> None:
        """Take back the mask given for a frame; what was found there shows again."""
        with self.lock:
            if frame in self.work.given:
                self._give(frame, None, {})

    def undo(self) -> int | None:
        """Take the last step back; returns the frame of it."""
        with self.lock:
            return self.past.pop()() if self.past else None

    def _base(self, frame: int) -> np.ndarray:
        self.image(frame)
        mask = self.work.mask(frame)
        return np.zeros(self.work.shape, np.uint8) if mask is None else mask

    def _give(self, frame: int, mask: np.ndarray | None, prompts: dict) -> None:
        """Keep a given mask and how to take it back; prompts of the frame that it doesn't come
        from count no more."""
        before = self.work.mask(frame) if frame in self.work.given else None
        shown, pending = dict(self.prompts), frame in self.work.pending

        def back() -> int:
            self.work.give(frame, before)
            if not pending:
                self.work.spread(frame)
            self.prompts = shown
            self._touch(frame)
            return frame

        self.past = [*self.past, back][-UNDONE:]
        self.work.give(frame, mask)
        kept = {key: value for key, value in self.prompts.items() if key[0] != frame}
        self.prompts = kept | prompts
        self._touch(frame)

    def _touch(self, frame: int) -> None:
        self.states.drop(frame, self.work.given)
        self.change(frame)

    def add_object(self) -> int:
        with self.lock:
            thing = self.work.add_object()
            self.change()
            return thing.id

    def change_object(self, object_id: int, name: str | None = None,
                      hidden: bool | None = None) -> None:
        with self.lock:
            thing = self._object(object_id)
            thing.name = thing.name if name is None else name
            thing.hidden = thing.hidden if hidden is None else hidden
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

            self.past = [*self.past, back][-UNDONE:]
            self._set_objects([thing for thing in before if thing.id != object_id])

    def _set_objects(self, objects: list) -> None:
        self.work.objects = objects
        self.work.save()
        self.states.clear()
        self.change(*self.changed)

    def _meet(self, object_ids: list[int]) -> None:
        """Know these objects from now on."""
        known = {thing.id for thing in self.work.objects}
        for object_id in object_ids:
            if object_id not in known:
                self.work.next_id, after = object_id, max(self.work.next_id, object_id + 1)
                self.work.add_object()
                self.work.next_id = after
        self.work.save()

    def _object(self, object_id: int):
        for thing in self.work.objects:
            if thing.id == object_id:
                return thing
        raise ValueError(f"there is no object {object_id}")


def _painted(mask: np.ndarray, drawn: np.ndarray, object_id: int) -> np.ndarray:
    """(H, W) object ids with one object where it is drawn, (H, W) bool, and nowhere else."""
    rest = np.where(mask == object_id, 0, mask)
    return np.where(drawn, object_id, rest).astype(np.uint8)
