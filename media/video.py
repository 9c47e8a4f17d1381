"""Clips of one's own: video files, animated GIFs and folders of frames, read frame by frame."""

import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from media import images

log = logging.getLogger(__name__)

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
FOLDER_FPS = 24.0  # of a folder of frames, which tells none
CHUNK = 64  # frames held while a video is read backwards


def open_clip(path: str | Path) -> "Clip":
    """A video file, an animated GIF or a folder of frames.

    Raises:
        FileNotFoundError: nothing there, or a folder without images.
        ValueError: a folder with two images of one name, whose masks would get one name.
        OSError: OpenCV can't read it as a video.
    """
    path = Path(path)
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a video, an animated GIF or a "
                                "folder of frames (--video)")
    return Animation(path) if path.suffix.lower() == ".gif" else Video(path)


class Clip:
    """Frames in order. None is kept, so a clip of an hour takes the memory of one of a second.

    Attributes:
        fps: frames per second.
        count: how many frames there are said to be; 0 if unknown.
    """

    fps: float
    count: int

    def frames(self, start: int = 0) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB frames from `start` on."""
        raise NotImplementedError

    def backwards(self, start: int) -> Iterator[np.ndarray]:
        """The frames before `start`, the last of them first."""
        raise NotImplementedError

    def frame_name(self, frame: int) -> str:
        """What the frame's mask is called, without suffix."""
        return f"{frame:05d}"


class Folder(Clip):
    """Images in the order of their names, all of one size."""

    def __init__(self, path: Path):
        self.files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
        self.fps, self.count = FOLDER_FPS, len(self.files)
        if not self.files:
            raise FileNotFoundError(f"{path}: no frames there, expected images "
                                    f"({', '.join(IMAGES)})")
        for one, other in pairwise(self.files):
            if one.stem == other.stem:
                raise ValueError(f"{other}: a second frame of that name beside {one.name}, "
                                 "expected frames alone, without their masks")

    def frames(self, start: int = 0) -> Iterator[np.ndarray]:
        return map(self._read, self.files[start:])

    def backwards(self, start: int) -> Iterator[np.ndarray]:
        return map(self._read, reversed(self.files[:start]))

    def frame_name(self, frame: int) -> str:
        return self.files[frame].stem

    def _read(self, file: Path) -> np.ndarray:
        image = images.read_image(file)
        first = images.image_shape(self.files[0], "a frame")
        images.check_same_shape(self.files[0], first, file, image.shape, "a frame")
        return image


class Stream(Clip):
    """Frames that can only be decoded in order."""

    path: Path

    def _decode(self, start: int) -> Iterator[np.ndarray]:
        raise NotImplementedError

    def frames(self, start: int = 0) -> Iterator[np.ndarray]:
        end = start
        for frame in self._decode(start):
            yield frame
            end += 1
        if start < end < self.count:
            log.warning("%s: ends after %d frames, though it declares %d", self.path, end,
                        self.count)

    def backwards(self, start: int) -> Iterator[np.ndarray]:
        for end in range(start, 0, -CHUNK):
            first = max(0, end - CHUNK)
            yield from reversed([frame for frame, _ in zip(self._decode(first),
                                                           range(end - first))])


class Video(Stream):
    """A file as OpenCV decodes it: turned as its metadata say, every frame that it holds."""

    def __init__(self, path: Path):
        self.path = path
        capture = self._open()
        self.fps = capture.get(cv2.CAP_PROP_FPS) or FOLDER_FPS
        self.count = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        capture.release()

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(str(self.path))
        if not capture.isOpened():
            raise OSError(f"{self.path}: expected a video, an animated GIF or a folder of frames, "
                          "but OpenCV can't read it")
        return capture

    def _decode(self, start: int) -> Iterator[np.ndarray]:
        # frames before the first are decoded and dropped: seeking lands elsewhere in many files
        capture = self._open()
        try:
            for _ in range(start):
                capture.grab()
            while True:
                read, frame = capture.read()
                if not read:
                    return
                yield np.ascontiguousarray(frame[..., ::-1])
        finally:
            capture.release()


class Animation(Stream):
    """An animated GIF as Pillow decodes it; OpenCV reads only the first frame of some."""

    def __init__(self, path: Path):
        self.path = path
        with images.open_image(path, "an animated GIF") as image:
            self.count = getattr(image, "n_frames", 1)
            duration = image.info.get("duration", 0)  # milliseconds a frame
        self.fps = 1000 / duration if duration else FOLDER_FPS

    def _decode(self, start: int) -> Iterator[np.ndarray]:
        with images.open_image(self.path, "an animated GIF") as image:
            for frame in range(start, self.count):
                image.seek(frame)
                yield np.array(image.convert("RGB"))
