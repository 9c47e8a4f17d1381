"""Video files, written frame by frame."""

from pathlib import Path

import cv2
import numpy as np

from media.files import whole


class VideoWriter:
    """Write RGB frames to an mp4; opened at the first frame, which gives the size.

    Use as a context manager. A video codec wants even sides: odd frames lose a row or column.

    Raises:
        OSError: OpenCV can't write there, or the disk is full.
    """

    def __init__(self, path: str | Path, fps: float = 24):
        self.path, self.fps, self._file = Path(path), fps, whole(path)
        self._writer: cv2.VideoWriter | None = None

    def write(self, image: np.ndarray) -> None:
        """Append an (H, W, 3) uint8 RGB frame."""
        height, width = (side - side % 2 for side in image.shape[:2])
        if self._writer is None:
            self._beside = str(self._file.__enter__())
            self._writer = cv2.VideoWriter(self._beside, cv2.VideoWriter.fourcc(*"mp4v"),
                                           self.fps, (width, height))
            if not self._writer.isOpened():
                raise OSError(f"{self.path}: OpenCV can't write a video there")
        self._writer.write(np.ascontiguousarray(image[:height, :width, ::-1]))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._writer is None:
            return
        self._writer.release()
        # OpenCV doesn't tell when it could not write
        if exception[0] or cv2.VideoCapture(self._beside).isOpened():
            self._file.__exit__(*exception)
        else:
            error = OSError(f"{self.path}: OpenCV could not write it all, is the disk full?")
            self._file.__exit__(OSError, error, None)
            raise error
