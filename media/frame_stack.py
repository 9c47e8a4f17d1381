"""Frames put aside, to be taken back last first: in memory, and beyond that in a file.

A decoder goes forwards only. What lies between two key frames is decoded once, put here, and
taken out backwards, so that reading backwards costs linear time however far key frames lie apart.
"""

import tempfile
from collections import deque
from contextlib import suppress

import cv2
import numpy as np

MEMORY = 256 * 2**20  # bytes of frames that are held


class Spool:
    """A stack of (H, W, 3) uint8 images; use as a context manager.

    Raises:
        OSError: the disk is full where temporary files lie; it names the place.
    """

    def __init__(self):
        self._held: deque[np.ndarray] = deque()
        self._bytes = 0
        self._sizes: list[int] = []  # of the images in the file, which are the oldest
        self._file = None

    def push(self, image: np.ndarray) -> None:
        self._held.append(image)
        self._bytes += image.nbytes
        while self._bytes > MEMORY and len(self._held) > 1:
            self._put_away(self._held.popleft())

    def pop(self) -> np.ndarray | None:
        """The image that was pushed last; None where there is none."""
        if self._held:
            image = self._held.pop()
            self._bytes -= image.nbytes
            return image
        if not self._sizes:
            return None
        self._file.seek(-self._sizes[-1], 2)
        data = self._file.read(self._sizes[-1])
        self._file.seek(-self._sizes.pop(), 2)
        self._file.truncate()
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)

    def _put_away(self, image: np.ndarray) -> None:
        self._bytes -= image.nbytes
        data = cv2.imencode(".png", image)[1].tobytes()  # channels keep their order, whatever it is
        try:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}, frames are put aside there (TMPDIR "
                          "names another place)", tempfile.gettempdir()) from error
        self._sizes.append(len(data))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file:
            with suppress(OSError):  # of a full disk, which was said
                self._file.close()
