"""The user's edits of masks and objects in a session, with undo.

Boxes, points and strokes become a mask of one object in one frame immediately.
"""

import threading
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import replace

import cv2
import numpy as np

from media import images
from media.prompts import Prompts
from webapp.store import MaskStore, TrackedObject, ids_in

# Bytes of PNG masks kept for undo: thousands of steps at 480p, hundreds at 4K.
UNDO_BYTES = 64 * 2**20
STEP_BYTES = 1000  # of a step besides its mask, about; limits steps without a mask as well


class Editor:
    """Applies the user's edits. Every method may be called from any thread.

    Args:
        store: holds masks and objects.
        image: maps a frame index to the (H, W, 3) uint8 RGB image; raises a ValueError if there is
            no such frame.
        prompter: maps an (H, W, 3) uint8 RGB image and the `Prompts` of one object to its (H, W)
            bool mask.
        forget_states: called when no saved tracker state is valid any more.

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
                 prompter: Callable[[np.ndarray, Prompts], np.ndarray],
                 forget_states: Callable[[], None]):
        self.store, self.image, self.prompter = store, image, prompter
        self.forget_states = forget_states
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
        """
        image = self.image(frame)
        with self.lock:
            self._object(object_id)
            current = self._mask_or_empty(frame)
            prompts = self.prompts.get(frame, {}).get(object_id) or Prompts()
            if box:
                prompts = Prompts([box])
            elif positive:
                prompts = replace(prompts, points=[*prompts.points, point])
            else:
                prompts = replace(prompts, not_points=[*prompts.not_points, point])
            # points correct the current mask; a box starts from nothing
            mask = np.asarray(self.prompter(image, prompts if box else replace(
                prompts, mask=current == object_id)), bool)
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
            self._object(object_id)
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
            self._object(object_id)
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
            self._add_missing_objects(np.unique(mask[mask > 0]).tolist(), names or {})
            self._set_input(frame, mask, {})

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
        old_png = b"" if old_mask is None else _encode(old_mask)
        old_marks = presence.absent.get(frame, set()), presence.gone.get(frame, set())
        old_prompts = self.prompts.get(frame, {})

        def undo() -> int:
            self._store_input(frame, _decode(old_png) if old_png else None, *old_marks)
            if not was_pending:
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
            self._object(object_id).name = name
            self.store.save()
            self.change()

    def delete_object(self, object_id: int) -> None:
        """Delete an object; its mask stays in the files, so that undo brings it back."""
        with self.lock:
            self._object(object_id)
            old_objects = list(self.store.objects)

            def undo() -> int:
                self._set_objects(old_objects)
                return min(self.store.user_frames, default=0)

            self._push_undo(0, undo)
            self._set_objects([obj for obj in old_objects if obj.id != object_id])

    def _set_objects(self, objects: list[TrackedObject]) -> None:
        self.store.objects = objects
        self.store.save()
        self.forget_states()
        self.change()
        self.everywhere = self.version

    def _add_missing_objects(self, object_ids: list[int], names: Mapping[int, str]) -> None:
        """Add an object for each id that no object has yet."""
        existing = {obj.id for obj in self.store.objects}
        for object_id in object_ids:
            if object_id not in existing:
                self.store.next_id, after = object_id, max(self.store.next_id, object_id + 1)
                self.store.add_object(names.get(object_id, ""))
                self.store.next_id = after
        self.store.save()

    def _object(self, object_id: int) -> TrackedObject:
        for obj in self.store.objects:
            if obj.id == object_id:
                return obj
        raise ValueError(f"there is no object {object_id}")


def _encode(mask: np.ndarray) -> bytes:
    return cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _decode(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
