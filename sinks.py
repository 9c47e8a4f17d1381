"""What becomes of the masks of a clip: files, drawings, videos. Frames are handed in as they come.

Nothing here knows how a mask was found.
"""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np

from media import drawing, images
from media.video import Clip
from media.writer import VideoWriter
from segment import Frame, Sink


class Masks(Sink):
    """A palette PNG for each frame, named as the clip names it."""

    def __init__(self, folder: Path, clip: Clip):
        self.folder, self.clip = folder, clip
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, frame: Frame) -> None:
        if frame.step is not None:
            images.write_mask(self.folder / f"{self.clip.frame_name(frame.index)}.png", frame.mask)


class Pictures(Sink):
    """An image file for each frame, of what `draw` makes of it and its mask."""

    def __init__(self, folder: Path, clip: Clip, draw: Callable):
        self.folder, self.clip, self.draw = folder, clip, draw
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, frame: Frame) -> None:
        images.write_image(self.folder / f"{self.clip.frame_name(frame.index)}.png",
                           self.draw(frame.image, frame.mask))


class Film(Sink):
    """A video of what `draw` makes of each frame and its mask.

    Frames before the first mask come last to first, and a video is written first to last. So what
    was drawn of them waits in a file, as JPEG, which the video's own loss hides.
    """

    QUALITY = 97

    def __init__(self, path: Path, clip: Clip, draw: Callable):
        self.draw, self.video = draw, VideoWriter(path, clip.fps)
        self.waiting: list[tuple[int, int]] = []  # where in the file, and how long
        self.file = tempfile.TemporaryFile()  # noqa: SIM115

    def write(self, frame: Frame) -> None:
        picture = self.draw(frame.image, frame.mask)
        if frame.forwards:
            self._flush()
            self.video.write(picture)
            return
        _, data = cv2.imencode(".jpg", picture[..., ::-1],
                               [cv2.IMWRITE_JPEG_QUALITY, self.QUALITY])
        self.waiting.append((self.file.tell(), len(data)))
        self.file.write(data.tobytes())

    def _flush(self) -> None:
        while self.waiting:
            place, length = self.waiting.pop()
            self.file.seek(place)
            data = np.frombuffer(self.file.read(length), np.uint8)
            self.video.write(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])

    def __exit__(self, *exception):
        self.file.close()
        self.video.__exit__(*exception)


def cutout_name(how: str) -> str:
    """Of the folder or file that a cut-out goes to."""
    return "cutout" if how == "transparent" else "cutout.mp4"


def clear(folder: Path, inputs: set[Path]) -> None:
    """Take away what an earlier run left, which a shorter clip wouldn't replace.

    Args:
        inputs: files that stay, as they are read: resolved.
    """
    for old in (*folder.glob("masks/*.png"), *folder.glob("cutout/*.png"),
                *folder.glob("labels/*.txt"), folder / "overlay.mp4", folder / "cutout.mp4",
                folder / "confidence.csv", folder / "annotations.json"):
        if old.is_file() and old.resolve() not in inputs:
            old.unlink()
    for name in ("cutout", "labels"):
        with suppress(OSError):
            (folder / name).rmdir()


def of_a_clip(folder: Path, clip: Clip, cutout: str | None = None) -> list[Sink]:
    """What `-m segment` writes into a results folder.

    Args:
        cutout: "transparent", "blur" or "#rrggbb"; None: no cut-out.
    """
    found: list[Sink] = [Masks(folder / "masks", clip),
                         Film(folder / "overlay.mp4", clip, drawing.overlay)]
    if cutout == "transparent":
        found.append(Pictures(folder / cutout_name(cutout), clip, drawing.transparent))
    elif cutout:
        found.append(Film(folder / cutout_name(cutout), clip, lambda image, mask:
                          drawing.replace_background(image, mask, cutout)))
    return found
