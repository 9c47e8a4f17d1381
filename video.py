"""Clips of one's own: video files, animated GIFs and folders of frames, read frame by frame."""

import logging
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

import preprocess

log = logging.getLogger(__name__)

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
FOLDER_FPS = 24.0  # of a folder of frames, which tells none
CHUNK = 64  # frames held while a video is read backwards


def open_clip(path: str | Path) -> "Clip":
    """A video file, an animated GIF or a folder of frames.

    Raises:
        FileNotFoundError: nothing there, or a folder without images.
        OSError: OpenCV can't read it as a video.
    """
    path = Path(path)
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a video, an animated GIF or a "
                                "folder of frames (--video)")
    return Video(path)


class Clip:
    """Frames in order. None is kept, so a clip of an hour takes the memory of one of a second.

    Attributes:
        fps: frames per second.
    """

    fps: float

    def frames(self, start: int = 0) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB frames from `start` on."""
        raise NotImplementedError

    def backwards(self, start: int) -> Iterator[np.ndarray]:
        """The frames before `start`, the last of them first."""
        raise NotImplementedError

    def name(self, frame: int) -> str:
        """What the frame's mask is called, without suffix."""
        return f"{frame:05d}"


class Folder(Clip):
    """Images in the order of their names, all of one size."""

    def __init__(self, path: Path):
        self.files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
        self.fps = FOLDER_FPS
        if not self.files:
            raise FileNotFoundError(f"{path}: no frames there, expected images "
                                    f"({', '.join(IMAGES)})")

    def frames(self, start: int = 0) -> Iterator[np.ndarray]:
        return map(self._read, self.files[start:])

    def backwards(self, start: int) -> Iterator[np.ndarray]:
        return map(self._read, reversed(self.files[:start]))

    def name(self, frame: int) -> str:
        return self.files[frame].stem

    def _read(self, file: Path) -> np.ndarray:
        image = preprocess.read_image(file)
        first = preprocess.image_shape(self.files[0], "a frame")
        preprocess.check_same_shape(self.files[0], first, file, image.shape, "a frame")
        return image


class Video(Clip):
    """A file as OpenCV decodes it: turned as its metadata say, every frame that it holds."""

    def __init__(self, path: Path):
        self.path = path
        capture = self._open()
        self.fps = capture.get(cv2.CAP_PROP_FPS) or FOLDER_FPS
        self.declared = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.release()

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(str(self.path))
        if not capture.isOpened():
            raise OSError(f"{self.path}: expected a video, an animated GIF or a folder of frames, "
                          "but OpenCV can't read it")
        return capture

    def frames(self, start: int = 0) -> Iterator[np.ndarray]:
        count = start
        for frame in self._decode(start):
            yield frame
            count += 1
        if count < self.declared:
            log.warning("%s: holds %d frames, though it declares %d", self.path, count,
                        self.declared)

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

    def backwards(self, start: int) -> Iterator[np.ndarray]:
        for end in range(start, 0, -CHUNK):
            first = max(0, end - CHUNK)
            yield from reversed([frame for frame, _ in zip(self._decode(first),
                                                           range(end - first))])
