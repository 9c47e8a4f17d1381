"""Clips as sequences of frames: folders of images, animations and stacks; `video` reads videos."""

import logging
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from media import frame_stack, images

log = logging.getLogger(__name__)

ANIMATIONS = (*images.SUFFIXES, ".gif", ".apng", ".avif")  # what Pillow reads; a single picture too
FOLDER_FPS = 24.0  # frames per second of a clip without timestamps, the usual rate of film


class Clip:
    """Frames in order, counted from 0, read as they are needed: memory doesn't grow with length.

    Attributes:
        path: the file or folder.
        files: the files that hold the frames, without others in the same folder.
        fps: frames per second, the average if it varies.
        count: the number of frames; only an estimate until the clip was read to its end, 0 if
            there is none.
        shape: (H, W) of the frames that are yielded: upright, with square pixels.
        stored: (H, W) before pixels are made square, the size at which FFmpeg exports frames.
        numbers: the numbers in the files' names, ascending; None: frames are counted from 0.
    """

    path: Path
    files: list[Path]
    fps: float
    count: int
    shape: tuple[int, int]
    stored: tuple[int, int]
    numbers: Sequence[int] | None = None

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield the frames from `start` to before `stop` (None: the end) as (H, W, 3) uint8 RGB."""
        return islice(self._read(start), None if stop is None else max(0, stop - start))

    def backwards(self, start: int) -> Iterator[np.ndarray]:
        """Yield the frames before `start`, last to first."""
        end = start
        while end > 0:
            first = self._restart(end)
            with frame_stack.FrameStack() as stack:
                for image in self.frames(first, end):
                    stack.push(image)
                while (image := stack.pop()) is not None:
                    yield image
            end = first

    def has(self, frame: int) -> bool:
        """Whether there is such a frame; decodes up to it, since headers may be wrong."""
        return next(self.frames(frame), None) is not None

    def frame_name(self, frame: int) -> str:
        """The file name of the frame's mask, without suffix."""
        return f"{frame:05d}"

    def number(self, frame: int) -> int:
        """The frame's number as a person reads and types it: the one in its file's name."""
        return self.numbers[frame] if self.numbers else frame

    def index(self, number: int) -> int:
        """The frame with this number.

        Raises:
            ValueError: the files are numbered otherwise. Of a video any number is taken.
        """
        place = self.first_from(number)
        if self.numbers and [*self.numbers[place:place + 1]] != [number]:
            raise ValueError(f"{self.path}: there is no frame {number}, the clip has {self.count} "
                             f"frames, numbered {self.numbers[0]} to {self.numbers[-1]}"
                             f"{' as their files' if self.numbers[-1] >= self.count else ''}")
        return place

    def first_from(self, number: int) -> int:
        """The first frame with this number or a higher one; `count` where there is none."""
        return bisect_left(self.numbers, number) if self.numbers else number

    def time(self, frame: int) -> float:
        """When a frame that was read before is shown, in seconds; rises from frame to frame."""
        return frame / self.fps

    def fit(self, mask: np.ndarray) -> np.ndarray:
        """Resize an (H, W) mask of the `stored` size to `shape`; return any other unchanged."""
        return images.resize_mask(mask, self.shape) if mask.shape == self.stored else mask

    def start_of(self, frame: int) -> int:
        """The last frame up to this one that decoding can start from."""
        return 0

    def _read(self, start: int) -> Iterator[np.ndarray]:
        raise NotImplementedError

    def _restart(self, end: int) -> int:
        """A frame before `end` at which decoding can start, for reading backwards."""
        raise NotImplementedError


class Folder(Clip):
    """Images in the natural order of their names (2 before 10), all of one size."""

    def __init__(self, path: Path, masks: Iterable[str | Path] = ()):
        self.path, self.fps = path, FOLDER_FPS
        self.files = _frame_files(path, masks)
        self.count = len(self.files)
        if not self.files:
            raise FileNotFoundError(f"{path}: no frames there, expected images "
                                    f"({', '.join(images.SUFFIXES)})")
        names: dict[str, Path] = {}
        first = images.image_shape(self.files[0], "a frame")
        for file in self.files:
            if (other := names.setdefault(file.stem, file)) != file:
                raise ValueError(f"{file}: a second frame of that name, next to {other.name}, "
                                 "expected frames alone, without their masks")
            # before the work, not in the middle of it: 0.03 ms a file, 3 s for an hour of frames
            images.check_same_shape(self.files[0], first, file,
                                    images.image_shape(file, "a frame"), "a frame")
        self.shape = self.stored = first
        self.numbers = file_numbers(self.files)
        if self.numbers != list(range(self.count)):
            log.info("%s: %d frames in natural order, %s (frame %d) to %s (frame %d)", path,
                     self.count, self.files[0].name, self.numbers[0], self.files[-1].name,
                     self.numbers[-1])
        elif images.has_decimals(self.files):
            log.info("%s: %d frames in the order of the decimal numbers in their names, %s to %s, "
                     "counted from 0", path, self.count, self.files[0].name, self.files[-1].name)
        elif self.files != sorted(self.files):
            log.info("%s: %d frames in natural order, %s to %s", path, self.count,
                     self.files[0].name, self.files[-1].name)

    def has(self, frame: int) -> bool:
        return frame < self.count

    def frame_name(self, frame: int) -> str:
        return self.files[frame].stem

    def _read(self, start: int) -> Iterator[np.ndarray]:
        for file in self.files[start:]:
            image = images.read_image(file)
            images.check_same_shape(self.files[0], self.shape, file, image.shape, "a frame")
            yield image

    def start_of(self, frame: int) -> int:
        return frame

    def _restart(self, end: int) -> int:
        return end - 1


def _frame_files(path: Path, masks: Iterable[str | Path]) -> list[Path]:
    """The images of a folder that are frames; those left out as masks are logged."""
    named = {Path(mask).resolve() for mask in masks}
    files = images.files_in(path)
    # masks that the toolkit wrote for a box or point, unless the folder holds nothing else
    made = {file for file in files if re.fullmatch(r"mask_\d{5,}\.png", file.name)}
    left_out = {file for file in files if file.resolve() in named}
    if len(made) < len(files):
        left_out |= made
    if left_out:
        log.info("%s: masks, not frames: %s", path,
                 ", ".join(sorted(file.name for file in left_out)))
    return [file for file in files if file not in left_out]


def file_numbers(files: Sequence[Path]) -> list[int]:
    """The last number in each name, where names differ in nothing else; else 0, 1, 2, ..."""
    parts = [re.fullmatch("(.*?)([0-9]+)([^0-9]*)", file.stem) for file in files]
    if len(files) > 1 and all(parts) and len({(part[1], part[3]) for part in parts}) == 1:
        numbers = [int(part[2]) for part in parts]
        if all(low < high for low, high in pairwise(numbers)):  # not so for decimals
            return numbers
    return list(range(len(files)))


class Animation(Clip):
    """A GIF, an APNG, an animated WebP or a multi-page TIFF; a single picture is one frame."""

    def __init__(self, path: Path):
        self.path, self.files, self._starts = path, [path], {0: 0.0}  # each reader adds the same
        with images.open_pictures(path, "a picture or an animation") as image:
            self.count = images.pictures(image)
            duration = image.info.get("duration", 0)  # milliseconds a frame
        self.fps = 1000 / duration if duration else FOLDER_FPS
        first = next(self._read(0), None)
        if first is None:
            raise OSError(f"{path}: expected a picture or an animation, but none of it can be read")
        self.shape = self.stored = first.shape[:2]

    def time(self, frame: int) -> float:
        return self._starts[frame]

    def _read(self, start: int) -> Iterator[np.ndarray]:
        if self.count == 1:
            yield from [images.read_image(self.path)][start:]
            return
        with images.open_pictures(self.path, "an animation") as image:
            for frame in range(self.count):
                try:
                    image.seek(frame)
                    picture = images.rgb(images.upright(image)) if frame >= start else None
                except Exception as error:  # Pillow raises many kinds for damaged files
                    log.warning("%s: ends after %d frames, though it declares %d (%s)", self.path,
                                frame, self.count, error)
                    self.count = frame
                    return
                duration = image.info.get("duration", 0) / 1000 or 1 / self.fps
                self._starts[frame + 1] = self._starts[frame] + duration
                if picture is not None:
                    yield picture

    def _restart(self, end: int) -> int:
        return 0
