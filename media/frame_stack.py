"""A stack of frames that spills to a temporary file.

A decoder only runs forward. To read backwards, the frames between two key frames are decoded once,
pushed here and popped in reverse, which takes linear time however far apart key frames are.
"""

import tempfile
from collections import deque
from contextlib import suppress

import cv2
import numpy as np

# Bytes of frames held in memory: 40 frames of 1080p, and little next to what the network takes.
# Further frames cost a PNG that is written and read.
MEMORY = 256 * 2**20


class FrameStack:
    """A stack of (H, W, 3) uint8 images; use as a context manager.

    Raises:
        OSError: the disk with the temporary files is full; the error names the folder.
    """

    def __init__(self):
        self._in_memory: deque[np.ndarray] = deque()
        self._bytes = 0
        self._sizes: list[int] = []  # bytes of each image in the file, which holds the oldest
        self._file = None

    def push(self, image: np.ndarray) -> None:
        """Add an image of the clip's size."""
        self._in_memory.append(image)
        self._bytes += image.nbytes
        while self._bytes > MEMORY and len(self._in_memory) > 1:
            self._write_oldest(self._in_memory.popleft())

    def pop(self) -> np.ndarray | None:
        """Remove and return the image pushed last; None if the stack is empty."""
        if self._in_memory:
            image = self._in_memory.pop()
            self._bytes -= image.nbytes
            return image
        if not self._sizes:
            return None
        self._file.seek(-self._sizes[-1], 2)
        data = self._file.read(self._sizes[-1])
        self._file.seek(-self._sizes.pop(), 2)
        self._file.truncate()
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)

    def _write_oldest(self, image: np.ndarray) -> None:
        """Append an image to the temporary file."""
        self._bytes -= image.nbytes
        # OpenCV swaps RGB and BGR here and when it decodes, so the channels end in the same order
        data = cv2.imencode(".png", image)[1].tobytes()
        try:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}, temporary frames are written there (set "
                          "TMPDIR to another folder)", tempfile.gettempdir()) from error
        self._sizes.append(len(data))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file:
            with suppress(OSError):  # a full disk was reported when writing
                self._file.close()
