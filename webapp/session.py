"""The working session on one clip: what a person gives, what is found from it, what is under way.

Passes of a tracker start at a frame and run one way, in a thread of their own, as far as the next
frame that a person gave; a mended frame is done by the same pass, which starts from a state kept
near it. Who asks, and how it is shown, is not known here.
"""

import logging
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from masks.read import mask_warning
from media import figures, files, images
from media.clip import Clip
from media.prompts import Prompts
from outputs import annotations, report, writers
from outputs.run_folder import RunFolder, read_metadata
from tracker import Tracker
from tracking import confidence, pipeline
from tracking.confidence import NOT_VISIBLE, Measures, stretches_to_review
from tracking.presence import Presence
from videomatch import VideoMatch
from webapp.annotations import Edits
from webapp.propagation import Passes, States, end_of_pass
from webapp.store import Found, Work

log = logging.getLogger(__name__)

WAYS = {"forwards": (True,), "backwards": (False,), "both": (True, False)}
CACHED = 128 * 2**20  # bytes of decoded frames, those looked at and those of thumbnails each
# seconds from one search for stretches to review to the next while masks are found: each goes
# through the whole clip, milliseconds for an hour
REVIEW = 1.0


class Pictures:
    """Random access to the frames of a clip, from any thread.

    The decoder continues from its position if that is nearer to the wanted frame than the last key
    frame, so playing a clip decodes each frame once. The frames used last are cached.
    """

    def __init__(self, clip: Clip):
        self.clip, self.lock = clip, threading.Lock()
        self.kept: dict[int, np.ndarray] = {}  # in the order of their last use
        self.frames: Iterator[np.ndarray] = iter(())
        self.next: int | None = None  # the frame that `frames` gives next

    def __call__(self, frame: int) -> np.ndarray | None:
        """(H, W, 3) uint8 RGB; None where the clip ends before it."""
        with self.lock:
            if frame in self.kept:
                self.kept[frame] = image = self.kept.pop(frame)
                return image
            if self.next is None or not self.clip.start_of(frame) <= self.next <= frame:
                self.frames, self.next = self.clip.frames(frame), frame
            first, self.next = self.next, None  # start again after an error or the clip's end
            for number, image in enumerate(self.frames, first):
                self.kept[number] = image
                while len(self.kept) > 1 and len(self.kept) * image.nbytes > CACHED:
                    del self.kept[next(iter(self.kept))]
                if number == frame:
                    self.next = number + 1
                    return image
            return None


class Session:
    """One clip that a person works on. Every method may be called from any thread.

    Args:
        model, clip, options: as for `segment.track`.
        folder: of the results; what the session keeps lies in `page/` in it.
        prompt: (H, W, 3) uint8 RGB and `Prompts` of one object -> (H, W) bool, its mask.
        facts: what the results depend on, for the manifest.
        command: of the command line that repeats it, all but masks, cut-out, annotations and
            folder.
        formats: of annotations that the command line asked for; the page has them chosen.

    Raises:
        ValueError: the folder holds a session on another clip.
    """

    def __init__(self, model: VideoMatch, clip: Clip, folder: Path, options: pipeline.Options,
                 prompt: Callable[[np.ndarray, Prompts], np.ndarray], facts: dict[str, str],
                 command: list[str], formats: Sequence[str] = ()):
        model.eval()
        self.clip, self.folder, self.formats = clip, folder, list(formats)
        self.facts, self.command = facts, command
        self.count = clip.count or sum(1 for _ in clip.frames())
        # separate decoders, so that scrubbing doesn't wait for thumbnails
        self._pictures, self._thumbnails = Pictures(clip), Pictures(clip)
        self.numbers = None if clip.numbers in (None, [*range(self.count)]) else [*clip.numbers]
        self.work = Work(folder / "page", Path(facts["data"]).name, self.image(0).shape[:2])
        height, width = self.shape = self.work.shape
        self.cell = pipeline.location_size(model, (height, width), options)
        self.states = States(folder / "page" / "states", lambda: Tracker(
            model, options.threshold, options.remove_outliers), facts)
        self.passes = Passes(clip, options, self.image, self.work, self.states)
        self.edits = Edits(self.work, self.image, prompt, self.states.clear)
        self.lock = self.edits.lock
        self._sureness: dict[int, np.ndarray] = {}  # by object, of each frame
        for frame, found in self.work.found.items():
            self._note(frame, found)
        self._review: tuple[int, float, list[dict]] = (0, 0.0, [])  # version, time, stretches
        self.thread: threading.Thread | None = None
        self.run: dict | None = None  # what is under way, or how the last one ended
        self.stopping = threading.Event()

    def image(self, frame: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB.

        Raises:
            ValueError: there is no such frame.
        """
        return self._image(self._pictures, frame)

    def thumbnail(self, frame: int) -> np.ndarray:
        """The same, for the timeline."""
        return self._image(self._thumbnails, frame)

    def _image(self, pictures: Pictures, frame: int) -> np.ndarray:
        if not 0 <= frame < self.count:
            raise ValueError(f"there is no frame {frame}, the clip has {self.count}")
        image = pictures(frame)
        if image is None:
            self._ends(self.clip.count)
            raise ValueError(f"there is no frame {frame}, the clip ends before it")
        return image

    def _ends(self, count: int) -> None:
        """Correct the number of frames when the clip turns out to be shorter."""
        with self.lock:
            if count < self.count:
                log.warning("the clip ends after %d frames, though it declares %d", count,
                            self.count)
                self.count = count
                self.edits.change()

    def mask(self, frame: int) -> np.ndarray | None:
        """(H, W) uint8 object ids: what a person gave, else what was found."""
        with self.lock:
            return self.work.mask(frame)

    @property
    def version(self) -> int:
        """One more with every change."""
        return self.edits.version

    def state(self, since: int = 0) -> dict:
        """All that a page shows but the pictures; of frames only what changed after `since`.

        Frames are indices; `numbers` are those that a person reads and types, null where they are
        the indices. They and `formats`, which never change, are sent once.
        """
        with self.lock:
            work, presence = self.work, self.work.presence
            frames = {frame: {"given": frame in work.given, "version": version,
                              "sure": _sure(work.found.get(frame))}
                      for frame, version in self.edits.since(since).items()}
            objects = [vars(thing) | {
                "absent": sorted(frame for frame, ids in presence.absent.items()
                                 if thing.id in ids),
                "gone": presence.intervals(thing.id)} for thing in work.objects]
            return {"version": self.edits.version, "everywhere": self.edits.everywhere,
                    "count": self.count, "fps": self.clip.fps,
                    "height": work.shape[0], "width": work.shape[1], "frames": frames,
                    "objects": objects,
                    "pending": sorted(work.pending), "undo": len(self.edits.past), "run": self.run,
                    "unsure": self._to_review(),
                    **({} if since else {"numbers": self.numbers, "formats": self.formats})}

    def _note(self, frame: int, found: Found) -> None:
        """Store the confidence of a new mask in `_sureness`, which `_to_review` reads."""
        for values in self._sureness.values():
            values[frame:frame + 1] = np.nan  # also of objects that are no longer looked for
        for object_id, value in _sure(found).items():
            if object_id not in self._sureness:
                self._sureness[object_id] = np.full(self.count, np.nan)
            values = self._sureness[object_id]
            values[frame:frame + 1] = NOT_VISIBLE if value is None else value

    def _to_review(self) -> list[dict]:
        """The stretches to review first; during a run at most `REVIEW` seconds out of date."""
        version, looked, found = self._review
        now = time.monotonic()
        running = self.run and not self.run["ended"]
        if version == self.edits.version or running and now - looked < REVIEW:
            return found
        known, presence = {}, self.work.presence
        for thing in self.work.objects:
            if thing.id in self._sureness:
                known[thing.id] = values = self._sureness[thing.id].copy()
                said = {*self.work.given, *(frame for frame, ids in presence.absent.items()
                                            if thing.id in ids)}
                values[[frame for frame in said if frame < len(values)]] = np.nan
                for first, stop in presence.intervals(thing.id):
                    values[first:stop] = np.nan
        found = [vars(stretch) for stretch in stretches_to_review(known)]
        self._review = self.edits.version, now, found
        return found

    def measures(self) -> list[Measures]:
        """Of every mask that was found, and not replaced by a given one, of objects still there."""
        known = {thing.id for thing in self.work.objects}
        absent = self.work.presence.absent
        gone = {i: self.work.presence.intervals(i) for i in known}
        rows = (Measures.of_row(row) for frame, found in sorted(self.work.found.items())
                if frame not in self.work.given for row in found.measures)
        return [one for one in rows if one.object_id in known
                and one.object_id not in absent.get(one.frame, ()) and not any(
            first <= one.frame and (stop is None or one.frame < stop)
            for first, stop in gone[one.object_id])]

    def segment_from(self, start: int, way: str) -> None:
        """Find the masks behind a frame, `way` "forwards", "backwards" or "both", in a thread.

        Raises:
            ValueError: the frame has no mask, or something is under way.
        """
        with self.lock:
            if self.work.mask(start) is None:
                raise ValueError(f"frame {self.clip.number(start)} has no mask to start from: "
                                 "draw one first")
            ends = [(forwards, self._end(start, forwards)) for forwards in WAYS[way]]
            total = sum(abs(end - start) - 1 for _, end in ends)
            self._start({"kind": "segment", "frame": start, "way": way, "total": total,
                         "concern": mask_warning(self.work.mask(start), self.cell)},
                        lambda: self._segment(start, [forwards for forwards, _ in ends]))

    def stop(self) -> None:
        """End what is under way after the frame that it is at; what was found stays."""
        self.stopping.set()

    def export(self, cutout: str | None = None, form: str = "png",
               formats: Sequence[str] = ()) -> None:
        """Write masks, overlay and cut-out as the command line does, and that command line.

        Args:
            cutout, form: as for `sinks.cutout_name`.
            formats: some of `annotations.FORMATS`, with the objects' names as categories.
        """
        form = form if cutout == "transparent" else "png"
        with self.lock:
            self._start({"kind": "export", "total": self.count},
                        lambda: self._export(cutout, form, list(formats)))

    def close(self) -> None:
        """End what is under way, and wait for it."""
        self.stop()
        if self.thread:
            self.thread.join()
        self.work.close()

    def _end(self, start: int, forwards: bool) -> int:
        return end_of_pass(start, forwards, self.work.given, self.work.found, self.count,
                           self.work.presence.gone)

    def _start(self, run: dict, job: Callable[[], None]) -> None:
        if self.run and not self.run["ended"]:
            raise ValueError("something is under way already: stop it first")
        self.stopping.clear()
        number = self.run["number"] + 1 if self.run else 1
        self.run = {"number": number, "done": 0, "seconds": 0.0, "ended": "", "error": "", **run}
        self.edits.change()
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
            self.edits.change()

    def _progress(self, began: float, *frames: int) -> None:
        self.run = self.run | {"done": self.run["done"] + 1,
                               "seconds": round(time.monotonic() - began, 3)}
        self.edits.change(*frames)

    def _segment(self, start: int, ways: list[bool]) -> None:
        with self.lock:
            self.work.spread(start)
            self.edits.change(start)
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
                    self._note(frame, found)
                    self._progress(began, frame)
                if frame + way == end or self.stopping.is_set():
                    return
        if forwards:
            self._ends(frame + 1)

    def _export(self, cutout: str | None, form: str, formats: list[str]) -> None:
        with files.hold(self.folder):
            again = self._write_results(cutout, form, formats)
        with self.lock:
            self.run = self.run | {"folder": str(self.folder), "command": again}

    def _write_results(self, cutout: str | None, form: str, formats: list[str]) -> str:
        """Replace what an earlier export or run wrote; the command line that repeats it."""
        made_before = read_metadata(self.folder) is not None
        manifest = RunFolder(self.folder, {**self.facts, "masks": "of the page"}, made_before)
        manifest.begin([self.folder / "masks", self.folder / "cutout"])
        given = {frame: self.folder / f"mask_{self.clip.number(frame):05d}.png"
                 for frame in sorted(self.work.given)}
        if made_before:  # else nothing there is of this toolkit, and must stay
            writers.delete_outputs(self.folder, set())
        for frame, path in given.items():
            images.write_mask(path, self.mask(frame))
        names = {thing.id: thing.name for thing in self.work.objects}
        pipeline.drain(self._frames(), [
            *writers.clip_sinks(self.folder, self.clip, cutout, form, again=True),
            *annotations.clip_sinks(self.folder, self.clip, formats, names)])
        measures = self.measures()
        confidence.write(self.folder / "confidence.csv", measures, self.clip)
        report.write_clip(self.folder / "report.html", self.work.clip, self.clip, measures,
                          self.facts)
        masks = [f"{self.clip.number(frame)}:{path}" for frame, path in given.items()]
        masks += self._marks()
        again = shlex.join([*self.command, "--mask", *masks, *_flags_of(cutout, form, formats),
                            "-j", f"{self.folder}_again"])
        files.write(self.folder / "command.txt", again + "\n")
        return again

    def _marks(self) -> list[str]:
        """The --mask arguments for absent and gone objects that an earlier user mask contains."""
        presence, known = self.work.presence, {thing.id for thing in self.work.objects}
        found = []
        for word in ("absent", "gone"):
            for frame, ids in sorted(getattr(presence, word).items()):
                earlier = set().union(*(
                    ids for at, ids in presence.in_user_mask.items() if at < frame))
                if ids := ",".join(map(str, sorted(ids & earlier & known))):
                    found.append(f"{self.clip.number(frame)}:{word}={ids}")
        return found

    def _frames(self) -> Iterator[pipeline.Frame]:
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
            yield pipeline.Frame(frame, image, None, True, None, mask)


def _sure(found: Found | None) -> dict[int, float | None] | None:
    """The confidence of each object of a predicted mask, None where it isn't visible; None
    where no mask was predicted."""
    if found is None:
        return None
    rows = (Measures.of_row(row) for row in found.measures)
    return {one.object_id: one.confidence for one in rows}


def _flags_of(cutout: str | None, form: str, formats: list[str]) -> list[str]:
    return [*(["--cutout", cutout] if cutout else []),
            *(["--cutout_format", form] if form != "png" else []),
            *(["--export", *formats] if formats else [])]


def check_page(port: int | None) -> None:
    """Raise a ValueError where no page can be opened.

    Args:
        port: None if nobody asked for a page, and it is only what is left.
    """
    if port is None and not figures.has_browser():
        raise ValueError("--mask, --box, --page: expected one of them, as there is no browser to "
                         "open a page in")
    try:
        from webapp import server  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--page: expected the package {error.name}, pip install -r "
                         "requirements.txt brings it") from error


def open_page(session: Session, masks: dict[int, np.ndarray], presence: Presence,
              port: int | None, hosts: list[str],
              names: Mapping[int, str] | None = None) -> None:
    """Work on a session in a browser until Ctrl+C; `check_page` comes first.

    Args:
        masks: (H, W) uint8 of frames, given to begin with.
        presence: objects that are not there, said to begin with.
        port: None or 0 takes a free one.
        hosts: as for `server.serve`.
        names: of objects by their ids, where the masks' files tell them.
    """
    from webapp import server  # whose packages only this needs
    try:
        for frame, mask in masks.items():
            session.edits.give(frame, mask, names)
        for word in ("absent", "gone"):
            for frame, ids in getattr(presence, word).items():
                for object_id in sorted(ids):
                    session.edits.mark(frame, object_id, word)
        server.serve(session, port or 0, figures.has_browser(), hosts)
    finally:
        session.close()
    print(f"all that was given and found is in {session.work.folder}")


def command_line(flags: dict[str, object]) -> list[str]:
    """The words of `main.py -m segment` with these flags, values by name."""
    words = ["python", "main.py", "-m", "segment"]
    for name, value in flags.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    return words
