"""Opens any clip, and reads video files frame by frame with FFmpeg (PyAV)."""

import itertools
import logging
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from media import frame_stack, hdr
from media.clip import ANIMATIONS, FOLDER_FPS, Animation, Clip, Folder

log = logging.getLogger(__name__)

EXPECTED = "expected a video, an animation (GIF, APNG, WebP) or a folder of frames"
# First frames that are decoded when a file is opened, to verify the index. More of them make
# opening slower; fewer may miss that the decoder gives other frames than the packets announce.
CHECKED_FRAMES = 8
# A declared frame rate that is off by more than this factor is replaced by the measured one.
# Recordings of browsers, for example, declare 1000 frames per second.
MAX_RATE_ERROR = 1.5
# Formats in which FFmpeg renders text files as video; any text file would be taken for a clip.
TEXT_FORMATS = {"tty", "bin", "xbin", "adf", "idf"}


def open_clip(path: str | Path, masks: Iterable[str | Path] = ()) -> Clip:
    """Open a video file, an animation, a single image, or a folder of frames.

    Args:
        masks: files in the folder that are not frames.

    Raises:
        FileNotFoundError: the path doesn't exist, or is a folder without images.
        ValueError: two images of the folder have the same stem, so their masks would collide.
        OSError: the file, or every frame of it, can't be read.
    """
    path = Path(path)
    if path.is_dir():
        return Folder(path, masks)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, {EXPECTED} (--video)")
    return Animation(path) if path.suffix.lower() in ANIMATIONS else Video(path)


class Video(Clip):
    """A video file, decoded by FFmpeg with all codecs in PyAV's wheels.

    Frame n is what `ffmpeg -i CLIP -vsync 0 -start_number 0 %05d.png` writes as n.png: the frames
    as decoded, none duplicated or dropped for a constant rate. They are rotated as the metadata
    say, resized to square pixels, and tone-mapped if they are HDR (`hdr`).

    Opening a file reads its packets once, without decoding them, for the number of frames, their
    times and the key frames to seek to. Afterwards only `count` changes, and each reader opens the
    file for itself, so any number of threads may read one `Video`.
    """

    def __init__(self, path: Path):
        self.path, self.files = path, [path]
        self._warn_once = _WarnOnce(path)
        with self._open() as (container, stream):
            rate = stream.average_rate or stream.base_rate
            self.fps = float(rate or FOLDER_FPS)
            self.declared = stream.frames
            if container.format.name.startswith("mov"):  # edit lists may leave frames out
                self.declared = min(self.declared, len(stream.index_entries))
            aspect = float(stream.sample_aspect_ratio or 1)
            codec, self._unit = stream.codec_context.name, stream.time_base
            packets = [(packet.pts, packet.dts, packet.is_keyframe)
                       for packet in _packets(container, stream)
                       if packet and not packet.is_discard and _is_displayed(packet, codec)]
        checked = list(itertools.islice(self._decode_from(None), CHECKED_FRAMES))
        if not checked:
            raise OSError(f"{path}: {EXPECTED}, but no frame of this one ({codec}) can be decoded")
        self._index(packets, [frame.pts for frame in checked])
        self._converter = FrameConverter(path, checked[0], aspect)
        self.shape, self.stored = self._converter.shape, self._converter.stored

    def _index(self, packets: list[tuple[int | None, int | None, bool]],
               decoded: list[int | None]) -> None:
        """Number the frames by the packets' times, without decoding.

        Args:
            packets: presentation time, decoding time, and whether it is a key frame, in file order.
            decoded: times of the first frames from the decoder. If the packets don't agree with
                them (for example, because a frame has two fields), there is no index: reading
                always starts at the first frame and counts.
        """
        displayed = _display_order(packets)
        if displayed and decoded[0] is not None:
            # a cut may start with frames that can't be decoded
            displayed = list(itertools.dropwhile(lambda one: one[0] < decoded[0],
                                                 displayed)) or displayed
        timestamps = [timestamp for timestamp, _ in displayed]
        rising = all(a < b for a, b in itertools.pairwise(timestamps))
        self._indexed = bool(timestamps) and rising and timestamps[:len(decoded)] == decoded
        self._timestamps = timestamps if self._indexed else []
        self._keys = [0]  # frames that decoding can start from
        if self._indexed:
            self._keys += [n for n, (_, key) in enumerate(displayed) if key and n]
        self.count = len(timestamps) or len(packets)
        steps = [float((b - a) * self._unit) for a, b in itertools.pairwise(timestamps)]
        # declared rate over measured rate
        ratio = statistics.median(steps) * self.fps if rising and steps else 1.0
        if not 1 / MAX_RATE_ERROR < ratio < MAX_RATE_ERROR:
            rate = 1 / statistics.median(steps)
            log.info("%s: declares %.4g frames a second, taken as %.4g by their times", self.path,
                     self.fps, rate)
            self.fps = rate
        self._times = [float((decoded[0] or 0) * self._unit)]
        for step in steps:
            # zero or negative: joined recordings, each with times of its own
            self._times.append(self._times[-1] + (step if step > 0 else 1 / self.fps))

    def has(self, frame: int) -> bool:
        return next(self._decode(frame), None) is not None

    def start_of(self, frame: int) -> int:
        return self._keys[bisect_right(self._keys, frame) - 1]

    def time(self, frame: int) -> float:
        known = len(self._times)
        if frame < known:
            return self._times[frame]
        return self._times[-1] + (frame - known + 1) / self.fps

    def _read(self, start: int) -> Iterator[np.ndarray]:
        reformatter = VideoReformatter()
        for _, frame in self._decode(start):
            yield self._converter(frame, reformatter)

    def _decode(self, start: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield index and frame from `start` on, decoding from the last key frame before it.

        A frame that can't be decoded is replaced by the one before it, so that indices don't depend
        on where decoding starts.
        """
        index, frames = self._seek(start)
        last = None
        for frame in frames:
            place = self._frame_index(frame, index)
            if place < index:
                continue  # not in the index, or a duplicate
            for number in range(index, place):
                if last is not None and number >= start:
                    yield number, last
            if place >= start:
                yield place, frame
            index, last = place + 1, frame
        self.count = index

    def _seek(self, start: int) -> tuple[int, Iterator[av.VideoFrame]]:
        """Return the index of the last key frame up to `start`, and the frames from there on."""
        key = self.start_of(start)
        if key:
            frames = self._decode_from(self._timestamps[key])
            first = next(frames, None)
            if first is not None and first.pts == self._timestamps[key]:
                return key, itertools.chain([first], frames)
            self._keys = [0]  # seeking in this file is unreliable: decode from the start
        return 0, self._decode_from(None)

    def _frame_index(self, frame: av.VideoFrame, expected: int) -> int:
        """The index of a decoded frame, -1 if it isn't known; without times it is `expected`."""
        if not self._indexed:
            return expected
        if frame.pts is None:
            return -1
        place = bisect_left(self._timestamps, frame.pts)
        return place if self._timestamps[place:place + 1] == [frame.pts] else -1

    def _decode_from(self, timestamp: int | None) -> Iterator[av.VideoFrame]:
        """Yield the frames from the key frame with this time on (None: all), while decodable."""
        packets = damaged = frames = 0
        with self._open() as (container, stream):
            stream.thread_type = "SLICE"  # frame threads lose the last frames after damage
            if timestamp is not None:
                try:
                    container.seek(timestamp, stream=stream)
                except av.FFmpegError:
                    return
            for packet in _packets(container, stream):
                packets += packet is not None
                try:
                    decoded = stream.codec_context.decode(packet)
                except av.FFmpegError as error:
                    log.debug("%s: %s", self.path, error)
                    # errors before the first frame are normal: a cut need not be at a key frame
                    damaged += frames > 0
                    continue
                for frame in decoded:
                    if timestamp is not None and not frames and frame.pts is not None \
                            and frame.pts < timestamp:
                        continue  # displayed before the key frame, but decoded after it
                    damaged += frames > 0 and frame.is_corrupt
                    frames += 1
                    yield frame
        if damaged:
            self._warn_once("%s: damaged in %d places, where frames are wrong or missing", damaged)
        if timestamp is None and 0 < packets < self.declared:
            self._warn_once("%s: ends after %d frames, though it declares %d", frames,
                            self.declared)

    def _restart(self, end: int) -> int:
        """The key frame to decode from for reading backward from `end`.

        As early as the stack's memory allows, but at least the last key frame before `end`.
        """
        fit = max(1, frame_stack.MEMORY // (3 * self.shape[0] * self.shape[1]))
        return self._keys[min(bisect_left(self._keys, end - fit),
                              bisect_left(self._keys, end) - 1)]

    @contextmanager
    def _open(self):
        try:
            # with the prefix, FFmpeg doesn't take a name with a colon for a protocol
            container = av.open(f"file:{self.path}", metadata_errors="ignore")
        except (av.FFmpegError, OSError) as error:
            raise OSError(f"{self.path}: {EXPECTED}, but it can't be read "
                          f"({error.strerror})") from error
        with container:
            stream = container.streams.best("video")
            if stream is None or container.format.name in TEXT_FORMATS or _is_cover(stream):
                raise OSError(f"{self.path}: {EXPECTED}, found {container.format.long_name} "
                              "without video")
            if stream.codec_context is None:
                raise OSError(f"{self.path}: {EXPECTED}, but there is no decoder for its codec "
                              f"({stream.codec_tag})")
            yield container, stream


class _WarnOnce:
    """Logs each text about a clip once, as a warning; the text begins with %s for its name."""

    def __init__(self, name: str | Path):
        self.name, self.logged = name, set()

    def __call__(self, text: str, *values) -> None:
        if text not in self.logged:
            self.logged.add(text)
            log.warning(text, self.name, *values)


class FrameConverter:
    """Converts decoded frames to upright RGB images with square pixels, all of one size.

    Frames are rotated as their metadata say and tone-mapped if they are HDR (`hdr`). What changes
    is logged, each kind of change once.

    Args:
        name: of the clip, for messages.
        first: the first frame; later ones of another size are resized to it, as FFmpeg does.
        aspect: width of a pixel over its height.

    Attributes:
        shape, stored: see `Clip`.
    """

    def __init__(self, name: str | Path, first: av.VideoFrame, aspect: float):
        self._warn_once = _WarnOnce(name)
        if not 0.1 < aspect < 10:
            aspect = 1.0  # a broken header
        self._size = (round(first.width * max(1.0, aspect)), round(first.height / min(1.0, aspect)))
        self._frame_size = first.width, first.height
        matrix = _display_matrix(first)
        self.stored = _rotate(np.empty((first.height, first.width)), matrix).shape
        self.shape = _rotate(np.empty(self._size[::-1]), matrix).shape
        if self.shape != self.stored:
            log.info("%s: pixels are not square, so frames of %dx%d are resized to %dx%d",
                     name, *self.stored[::-1], *self.shape[::-1])
        if first.color_trc in hdr.NAMES:
            log.info("%s: HDR (%s), tone-mapped to standard range", name,
                     hdr.NAMES[first.color_trc])

    def __call__(self, frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
        """The image of a frame, (H, W, 3) uint8 RGB.

        Args:
            reformatter: one for each thread.
        """
        if (frame.width, frame.height) != self._frame_size:
            self._warn_once("%s: the size of its frames changes from %dx%d to %dx%d; all are "
                            "resized to the first", *self._frame_size, frame.width, frame.height)
        if frame.color_trc in hdr.NAMES:
            image = hdr.tone_down(frame, reformatter)
        else:
            image = reformatter.reformat(frame, format="rgb24").to_ndarray()
        if image.shape[1::-1] != self._size:
            image = cv2.resize(image, self._size, interpolation=cv2.INTER_LINEAR)
        image = np.ascontiguousarray(_rotate(image, _display_matrix(frame)))
        if image.shape[:2] != self.shape:  # the camera was rotated while recording
            self._warn_once("%s: frames are rotated by 90 degrees midway; all are resized to the "
                            "first")
            image = cv2.resize(image, self.shape[::-1], interpolation=cv2.INTER_LINEAR)
        return image


def _is_cover(stream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _is_displayed(packet: av.Packet, codec: str) -> bool:
    """Whether a packet contains a displayed frame; VP8 has packets with hidden reference frames."""
    return codec != "vp8" or bool(memoryview(packet)[0] & 0x10)


def _display_order(packets) -> list[tuple[int, bool]]:
    """Presentation times and key flags of packets in display order; empty if a time is missing.

    In joined recordings, whose times start again, the parts stay one after the other.
    """
    parts: list[list[tuple[int, bool]]] = [[]]
    last = None
    for timestamp, decoded, key in packets:
        if timestamp is None:
            return []
        if last is not None and decoded is not None and decoded < last:
            parts.append([])
        last = decoded if decoded is not None else last
        parts[-1].append((timestamp, key))
    return [one for part in parts for one in sorted(part)]


def _packets(container, stream) -> Iterator[av.Packet | None]:
    """Yield the packets of a stream while they can be read, then None to flush the decoder."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except av.FFmpegError as error:
        log.debug("%s: %s", container.name, error)
    yield None


def _display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """The (2, 2) display matrix of a frame; (x, y) @ matrix is the displayed position."""
    data = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2]


def _rotate(image: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Rotate (H, W, ...) by the multiple of 90 degrees nearest to the matrix, and mirror it."""
    if matrix is None:
        return image
    (right, down), (right_of_y, down_of_y) = matrix.tolist()
    if abs(right) < abs(down):  # x becomes y
        image, right, down_of_y = image.swapaxes(0, 1), right_of_y, down
    return image[::-1 if down_of_y < 0 else 1, ::-1 if right < 0 else 1]
