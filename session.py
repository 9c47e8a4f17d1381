"""The working session on one clip: what a person gives, what is found from it, what is under way.

Passes of a tracker start at a frame and run one way, in a thread of their own, as far as the next
frame that a person gave; a mended frame is done by the same pass, which starts from a state kept
near it. Who asks, and how it is shown, is not known here.
"""

import logging
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

import segment
from manifest import Manifest
from media import files, images
from media.annotate import Prompts
from media.video import Clip
from media.work import Found, Work
from passes import Passes, States, end_of_pass
from tracker import Tracker
from videomatch import VideoMatch

log = logging.getLogger(__name__)

WAYS = {"forwards": (True,), "backwards": (False,), "both": (True, False)}
UNDONE = 100  # steps that can be taken back
CACHED = 24  # decoded frames


def unsure_stretches(found: dict[int, Found], given: set[int], most: int = 6) -> list[dict]:
    """Stretches of frames in which an object is least sure, the worst first.

    A frame belongs to one where it is nearer to the object's least sure frame than to its usual
    one, the median. An object that is sure throughout has none.
    """
    stretches = []
    for object_id in sorted({i for entry in found.values() for i in entry.sure}):
        sure = {frame: entry.sure[object_id] for frame, entry in found.items()
                if object_id in entry.sure and frame not in given}
        if not sure or min(sure.values()) > 0.9:
            continue
        limit = min(0.9, (min(sure.values()) + float(np.median(list(sure.values())))) / 2)
        frames = sorted(frame for frame, value in sure.items() if value <= limit)
        for first, last in _runs(frames):
            inside = [sure[frame] for frame in frames if first <= frame <= last]
            worst = min((frame for frame in frames if first <= frame <= last), key=sure.get)
            stretches.append({"first": first, "last": last, "object": object_id, "worst": worst,
                              "sure": round(float(np.mean(inside)), 3)})
    return sorted(stretches, key=lambda stretch: stretch["sure"])[:most]


def _painted(mask: np.ndarray, drawn: np.ndarray, object_id: int) -> np.ndarray:
    """(H, W) object ids with one object where it is drawn, (H, W) bool, and nowhere else."""
    rest = np.where(mask == object_id, 0, mask)
    return np.where(drawn, object_id, rest).astype(np.uint8)


def _runs(frames: list[int], gap: int = 2) -> list[tuple[int, int]]:
    """First and last of each run of sorted numbers that lie at most `gap` apart."""
    runs: list[tuple[int, int]] = []
    for frame in frames:
        if runs and frame - runs[-1][1] <= gap:
            runs[-1] = (runs[-1][0], frame)
        else:
            runs.append((frame, frame))
    return runs


class Session:
    """One clip that a person works on. Every method may be called from any thread.

    Args:
        model, clip, options: as for `segment.track`.
        folder: of the results; what the session keeps lies in `page/` in it.
        prompt: (H, W, 3) uint8 RGB and `Prompts` of one object -> (H, W) bool, its mask.
        facts: what the results depend on, for the manifest.
        command: of the command line that repeats it, all but masks, cut-out and folder.

    Raises:
        ValueError: the folder holds a session on another clip.
    """

    def __init__(self, model: VideoMatch, clip: Clip, folder: Path, options: segment.Options,
                 prompt: Callable[[np.ndarray, Prompts], np.ndarray], facts: dict[str, str],
                 command: list[str]):
        model.eval()
        self.clip, self.folder = clip, folder
        self.prompter, self.facts, self.command = prompt, facts, command
        record = Manifest(folder / "page", {"data": facts["data"]})
        self.count = clip.count or sum(1 for _ in clip.frames())
        self._read = lru_cache(CACHED)(lambda frame: next(clip.frames(frame)))
        self.work = Work(folder / "page", self.image(0).shape[:2])
        self.shape = self.work.shape
        record.begin()
        self.states = States(folder / "page" / "states", lambda: Tracker(
            model, options.threshold, options.remove_outliers), facts)
        self.passes = Passes(clip, options, self.image, self.work, self.states)
        self.lock = threading.RLock()
        self.prompts: dict[tuple[int, int], Prompts] = {}
        self.past: list[Callable[[], int]] = []  # each takes a step back and tells its frame
        self.version, self.changed = 1, dict.fromkeys(self.work.given | set(self.work.found), 1)
        self.thread: threading.Thread | None = None
        self.run: dict | None = None  # what is under way, or how the last one ended
        self.stopping = threading.Event()

    # what is known

    def image(self, frame: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB.

        Raises:
            ValueError: there is no such frame.
        """
        if not 0 <= frame < self.count:
            raise ValueError(f"there is no frame {frame}, the clip has {self.count}")
        try:
            return self._read(frame)
        except StopIteration:
            raise ValueError(f"there is no frame {frame}, the clip ends before it") from None

    def mask(self, frame: int) -> np.ndarray | None:
        """(H, W) uint8 object ids: what a person gave, else what was found."""
        with self.lock:
            return self.work.mask(frame)

    def state(self, since: int = 0) -> dict:
        """All that a page shows but the pictures; of frames only what changed after `since`."""
        with self.lock:
            work = self.work
            frames = {frame: {"given": frame in work.given, "version": version,
                              "sure": work.found[frame].sure if frame in work.found else None}
                      for frame, version in self.changed.items() if version > since}
            return {"version": self.version, "count": self.count, "fps": self.clip.fps,
                    "height": work.shape[0], "width": work.shape[1], "frames": frames,
                    "objects": [vars(thing) for thing in work.objects],
                    "pending": sorted(work.pending), "undo": len(self.past), "run": self.run,
                    "unsure": unsure_stretches(work.found, work.given)}

    def _change(self, *frames: int) -> None:
        self.version += 1
        self.changed.update(dict.fromkeys(frames, self.version))

    # what a person gives

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
        self._change(frame)

    # objects

    def add_object(self) -> int:
        with self.lock:
            thing = self.work.add_object()
            self._change()
            return thing.id

    def change_object(self, object_id: int, name: str | None = None,
                      hidden: bool | None = None) -> None:
        with self.lock:
            thing = self._object(object_id)
            thing.name = thing.name if name is None else name
            thing.hidden = thing.hidden if hidden is None else hidden
            self.work.save()
            self._change()

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
        self._change(*self.changed)

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

    # what is under way

    def segment_from(self, start: int, way: str) -> None:
        """Find the masks behind a frame, `way` "forwards", "backwards" or "both", in a thread.

        Raises:
            ValueError: the frame has no mask, or something is under way.
        """
        with self.lock:
            if self._base(start).max() == 0 and not self.work.given - {start}:
                raise ValueError(f"frame {start} has no mask to start from: draw one first")
            if self.work.mask(start) is None:
                raise ValueError(f"frame {start} is not segmented yet: draw a mask, or start at "
                                 "a frame that has one")
            ends = [(forwards, self._end(start, forwards)) for forwards in WAYS[way]]
            total = sum(abs(end - start) - 1 for _, end in ends)
            self._start({"kind": "segment", "frame": start, "way": way, "total": total},
                        lambda: self._segment(start, [forwards for forwards, _ in ends]))

    def stop(self) -> None:
        """End what is under way after the frame that it is at; what was found stays."""
        self.stopping.set()

    def export(self, cutout: str | None = None) -> None:
        """Write masks, overlay and cut-out as the command line does, and that command line."""
        with self.lock:
            self._start({"kind": "export", "total": self.count}, lambda: self._export(cutout))

    def close(self) -> None:
        """End what is under way, and wait for it."""
        self.stop()
        if self.thread:
            self.thread.join()

    def _end(self, start: int, forwards: bool) -> int:
        return end_of_pass(start, forwards, self.work.given, self.work.found, self.count)

    def _start(self, run: dict, job: Callable[[], None]) -> None:
        if self.run and not self.run["ended"]:
            raise ValueError("something is under way already: stop it first")
        self.stopping.clear()
        self.run = {"done": 0, "seconds": 0.0, "ended": "", "error": "", **run}
        self._change()
        self.thread = threading.Thread(target=self._work, args=(job,), daemon=True)
        self.thread.start()

    def _work(self, job: Callable[[], None]) -> None:
        try:
            job()
            ended = {"ended": "stopped" if self.stopping.is_set() else "done"}
        except Exception as error:  # whatever it is, the page shall say so and live on
            log.warning("%s ended early: %s", self.run["kind"], error)
            log.debug("where the error came from:", exc_info=True)
            ended = {"ended": "error", "error": str(error) or type(error).__name__}
        with self.lock:
            self.run = self.run | ended
            self._change()

    def _progress(self, began: float, *frames: int) -> None:
        self.run = self.run | {"done": self.run["done"] + 1,
                               "seconds": round(time.monotonic() - began, 3)}
        self._change(*frames)

    def _segment(self, start: int, ways: list[bool]) -> None:
        with self.lock:
            self.work.spread(start)
            self._change(start)
        began = time.monotonic()
        for forwards in ways:
            self._pass(start, forwards, began)

    def _pass(self, start: int, forwards: bool, began: float) -> None:
        way, frame, end = 1 if forwards else -1, start, self._end(start, forwards)
        if end == start + way or self.stopping.is_set():
            return
        with closing(self.passes.run(start, forwards)) as masks:
            for frame, mask, found in masks:
                with self.lock:
                    if frame in self.work.given:  # since the pass began
                        return
                    self.work.find(frame, mask, found)
                    self._progress(began, frame)
                if frame + way == end or self.stopping.is_set():
                    return
        if forwards and frame + 1 < self.count:
            log.warning("the clip ends after %d frames, though it declares %d", frame + 1,
                        self.count)
            self.count = frame + 1

    def _export(self, cutout: str | None) -> None:
        given = {frame: self.folder / f"mask_{frame:05d}.png" for frame in sorted(self.work.given)}
        for frame, path in given.items():
            images.write_mask(path, self.mask(frame))
        Manifest(self.folder, {**self.facts, "masks": "of the page"}, overwrite=True).begin()
        segment.drain(self._frames(), segment.sinks(self.folder, self.clip, cutout))
        again = [*self.command, "--mask", *(f"{frame}:{path}" for frame, path in given.items()),
                 *(["--cutout", cutout] if cutout else []), "-j", f"{self.folder}_again"]
        files.write(self.folder / "command.txt", shlex.join(again) + "\n")
        with self.lock:
            self.run = self.run | {"folder": str(self.folder), "command": shlex.join(again)}

    def _frames(self) -> Iterator[segment.Frame]:
        """The clip with the masks that are known; elsewhere they are empty."""
        began = time.monotonic()
        for frame, image in enumerate(self.clip.frames()):
            if self.stopping.is_set():
                raise ValueError("export: stopped before the end, so there is no video")
            mask = self.mask(frame)
            mask = np.zeros(image.shape[:2], np.uint8) if mask is None else mask
            images.write_mask(self.folder / "masks" / f"{self.clip.frame_name(frame)}.png", mask)
            with self.lock:
                self._progress(began)
            yield segment.Frame(frame, image, mask, None, True, None)
