"""Clips of one's own: what a path holds, and video files, read frame by frame by FFmpeg (PyAV)."""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from media import hdr, spool
from media.clip import ANIMATIONS, FOLDER_FPS, Animation, Clip, Folder

log = logging.getLogger(__name__)

EXPECTED = "expected a video, an animation (GIF, APNG, WebP) or a folder of frames"
TEXT = {"tty", "bin", "xbin", "adf", "idf"}  # formats in which FFmpeg draws text files as video


def open_clip(path: str | Path, masks: Iterable[str | Path] = ()) -> Clip:
    """A video file, an animation, one picture, or a folder of frames.

    Args:
        masks: files that are no frames though they lie among them.

    Raises:
        FileNotFoundError: nothing there, or a folder without images.
        ValueError: a folder with two images of one name, whose masks would get one name.
        OSError: it can't be read, or no frame of it can.
    """
    path = Path(path)
    if path.is_dir():
        return Folder(path, masks)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, {EXPECTED} (--video)")
    return Animation(path) if path.suffix.lower() in ANIMATIONS else Video(path)


class Video(Clip):
    """A file as FFmpeg decodes it, with every codec that PyAV's wheels bring.

    Frame n is what `ffmpeg -i CLIP -vsync 0 -start_number 0 %05d.png` writes as n.png: the frames
    that the decoder gives, none doubled or dropped for the sake of a constant rate. They are
    turned as the metadata say, their pixels made square, HDR is toned down (`hdr`).
    """

    def __init__(self, path: Path):
        self.path = path
        self._stamps: list[int | None] = []  # of the frames read so far, in the stream's unit
        self._seconds: list[float] = []
        self._keys = [0]  # frames that decoding can start from
        self._rising = True  # whether each frame so far has a time, after the one before
        self._said: set[str] = set()
        with self._open() as (container, stream):
            rate = stream.average_rate or stream.base_rate
            self.fps = float(rate or FOLDER_FPS)
            self.declared = stream.frames
            if container.format.name.startswith("mov"):  # its list of edits may leave some out
                self.declared = min(self.declared, len(stream.index_entries))
            self.count = stream.frames or int((container.duration or 0) / 1e6 * self.fps)
            aspect = float(stream.sample_aspect_ratio or 1)
            codec = stream.codec_context.name
        _, frame = next(self._decode(0), (0, None))
        if frame is None:
            raise OSError(f"{path}: {EXPECTED}, but no frame of this one ({codec}) can be decoded")
        if not 0.1 < aspect < 10:
            aspect = 1.0  # nonsense
        # frames of another size are brought to that of the first, as FFmpeg does
        self._size = (round(frame.width * max(1.0, aspect)), round(frame.height / min(1.0, aspect)))
        self._frame_size = frame.width, frame.height
        matrix = _matrix(frame)
        self.stored = _turn(np.empty((frame.height, frame.width)), matrix).shape
        self.shape = _turn(np.empty(self._size[::-1]), matrix).shape
        if self.shape != self.stored:
            log.info("%s: pixels are not square, frames of %dx%d are shown and segmented at %dx%d",
                     path, *self.stored[::-1], *self.shape[::-1])
        if frame.color_trc in hdr.NAMES:
            log.info("%s: HDR (%s), toned down to an ordinary range of brightness", path,
                     hdr.NAMES[frame.color_trc])

    def has(self, frame: int) -> bool:
        return next(self._decode(frame), None) is not None

    def time(self, frame: int) -> float:
        return self._seconds[frame]

    def _read(self, start: int) -> Iterator[np.ndarray]:
        reformatter = VideoReformatter()
        for _, frame in self._decode(start):
            yield self._picture(frame, reformatter)

    def _picture(self, frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
        if (frame.width, frame.height) != self._frame_size:
            self._say("%s: the size of its frames changes, from %dx%d to %dx%d; all are brought to "
                      "the first", *self._frame_size, frame.width, frame.height)
        if frame.color_trc in hdr.NAMES:
            image = hdr.tone_down(frame, reformatter)
        else:
            image = reformatter.reformat(frame, format="rgb24").to_ndarray()
        if image.shape[1::-1] != self._size:
            image = cv2.resize(image, self._size, interpolation=cv2.INTER_LINEAR)
        image = np.ascontiguousarray(_turn(image, _matrix(frame)))
        if image.shape[:2] != self.shape:  # the camera was turned while it recorded
            self._say("%s: frames are turned by 90 degrees midway, and brought to the first's size")
            image = cv2.resize(image, self.shape[::-1], interpolation=cv2.INTER_LINEAR)
        return image

    def _decode(self, start: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Number and frame from `start` on; begins at the nearest key frame that is known."""
        key = self._keys[bisect_right(self._keys, start) - 1]
        index = key
        try:
            for frame in self._decode_from(key):
                if index == len(self._stamps):
                    self._note(index, frame)
                elif key and frame.pts != self._stamps[index]:
                    raise self._mistrust()
                if index >= start:
                    yield index, frame
                index += 1
            if not key or index >= len(self._stamps):
                self.count = index
                return
            raise self._mistrust()
        except _Again:
            pass
        yield from self._decode(max(start, index))

    def _mistrust(self) -> "_Again":
        """Seeking led elsewhere than to the frame that was seen there before: not in this file."""
        self._keys, self._rising = [0], False
        return _Again()

    def _note(self, index: int, frame: av.VideoFrame) -> None:
        """Keep the time of a frame that is read for the first time."""
        stamp, before = frame.pts, self._stamps[-1] if index else None
        rises = stamp is not None and (not index or before is not None and stamp > before)
        if rises and index:
            seconds = self._seconds[-1] + float((stamp - before) * self._unit)
        else:  # the first; or none is told, or parts with times of their own follow each other
            seconds = (self._seconds[-1] + 1 / self.fps if index
                       else float((stamp or 0) * self._unit))
        self._stamps.append(stamp)
        self._seconds.append(seconds)
        self._rising &= rises
        if index and frame.key_frame and self._rising:
            self._keys.append(index)

    def _decode_from(self, key: int) -> Iterator[av.VideoFrame]:
        """The frames from a key frame on, as far as they can be decoded."""
        packets = damaged = frames = 0
        with self._open() as (container, stream):
            self._unit = stream.time_base
            stream.thread_type = "SLICE"  # of the others, the last frames after damage are lost
            if key:
                try:
                    container.seek(self._stamps[key], stream=stream)
                except av.FFmpegError:
                    raise self._mistrust() from None
            for packet in _packets(container, stream):
                packets += packet is not None
                try:
                    decoded = stream.codec_context.decode(packet)
                except av.FFmpegError as error:
                    log.debug("%s: %s", self.path, error)
                    # before the first frame nothing is lost: a cut need not lie at a key frame
                    damaged += frames > 0
                    continue
                for frame in decoded:
                    if key and not frames and frame.pts is not None \
                            and frame.pts < self._stamps[key]:
                        continue  # shown before the key frame, but decoded after it
                    damaged += frames > 0 and frame.is_corrupt
                    frames += 1
                    yield frame
        if damaged:
            self._say("%s: damaged in %d places, frames there are wrong or missing", damaged)
        if not key and 0 < packets < self.declared:
            self._say("%s: ends after %d frames, though it declares %d", frames, self.declared)

    def _restart(self, end: int) -> int:
        """The key frame from which the frames before `end` fill the memory; at least the last."""
        if len(self._stamps) < end:
            self.has(end)
        fit = max(1, spool.MEMORY // (3 * self.shape[0] * self.shape[1]))
        return self._keys[min(bisect_left(self._keys, end - fit),
                              bisect_left(self._keys, end) - 1)]

    def _say(self, text: str, *values) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning(text, self.path, *values)

    @contextmanager
    def _open(self):
        try:
            # the prefix: a colon in a name would make it a protocol
            container = av.open(f"file:{self.path}", metadata_errors="ignore")
        except (av.FFmpegError, OSError) as error:
            raise OSError(f"{self.path}: {EXPECTED}, but it can't be read "
                          f"({error.strerror})") from error
        with container:
            stream = container.streams.best("video")
            if stream is None or container.format.name in TEXT or _is_cover(stream):
                raise OSError(f"{self.path}: {EXPECTED}, found {container.format.long_name} "
                              "without moving pictures")
            if stream.codec_context is None:
                raise OSError(f"{self.path}: {EXPECTED}, but there is no decoder for its codec "
                              f"({stream.codec_tag})")
            yield container, stream


class _Again(Exception):
    """What was decoded is to be decoded again, from the start."""


def _is_cover(stream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _packets(container, stream) -> Iterator[av.Packet | None]:
    """What the file holds of a stream, as far as it can be read, then None."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except av.FFmpegError as error:
        log.debug("%s: %s", container.name, error)
    yield None


def _matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """How a frame is to be turned: the display matrix of MP4, (x, y) @ it gives its place."""
    data = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2]


def _turn(image: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """(H, W, ...) turned by quarters and mirrored as the matrix says, to the nearest of them."""
    if matrix is None:
        return image
    (right, down), (right_of_y, down_of_y) = matrix.tolist()
    if abs(right) < abs(down):  # x becomes y
        image, right, down_of_y = image.swapaxes(0, 1), right_of_y, down
    return image[::-1 if down_of_y < 0 else 1, ::-1 if right < 0 else 1]
