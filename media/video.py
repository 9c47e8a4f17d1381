"""Clips of one's own: what a path holds, and video files, read frame by frame by FFmpeg (PyAV)."""

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
CHECKED = 8  # first frames that the index is compared with; it costs their decoding at opening
# a declared rate that is off by this factor is not believed, such as the 1000 frames a second of
# what browsers record
WRONG = 1.5
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

    Opening a file reads its packets once, without decoding them: that gives the number of frames,
    their times, and the key frames to seek to. Nothing but `count` changes afterwards, and each
    reader opens the file for itself, so any number of threads may read one `Video`.
    """

    def __init__(self, path: Path):
        self.path, self.files = path, [path]
        self._said: set[str] = set()
        with self._open() as (container, stream):
            rate = stream.average_rate or stream.base_rate
            self.fps = float(rate or FOLDER_FPS)
            self.declared = stream.frames
            if container.format.name.startswith("mov"):  # its list of edits may leave some out
                self.declared = min(self.declared, len(stream.index_entries))
            aspect = float(stream.sample_aspect_ratio or 1)
            codec, self._unit = stream.codec_context.name, stream.time_base
            packets = [(packet.pts, packet.dts, packet.is_keyframe)
                       for packet in _packets(container, stream)
                       if packet and not packet.is_discard and _is_shown(packet, codec)]
        checked = list(itertools.islice(self._decode_from(None), CHECKED))
        if not checked:
            raise OSError(f"{path}: {EXPECTED}, but no frame of this one ({codec}) can be decoded")
        self._index(packets, [frame.pts for frame in checked])
        frame = checked[0]
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

    def _index(self, packets: list[tuple[int | None, int | None, bool]],
               decoded: list[int | None]) -> None:
        """Number the frames, from the packets' times alone.

        Args:
            packets: presentation time, decoding time, and whether it is a key frame, in the order
                of the file.
            decoded: the times of the first frames as the decoder gives them. If the packets say
                otherwise (two fields to a frame, say), frames are only counted, from the first on.
        """
        shown = _in_order(packets)
        if shown and decoded[0] is not None:  # a cut may begin with frames that can't be decoded
            shown = list(itertools.dropwhile(lambda one: one[0] < decoded[0], shown)) or shown
        stamps = [stamp for stamp, _ in shown]
        rising = all(a < b for a, b in itertools.pairwise(stamps))
        self._indexed = bool(stamps) and rising and stamps[:len(decoded)] == decoded
        self._stamps = stamps if self._indexed else []
        self._keys = [0]  # frames that decoding can start from
        if self._indexed:
            self._keys += [n for n, (_, key) in enumerate(shown) if key and n]
        self.count = len(stamps) or len(packets)
        steps = [float((b - a) * self._unit) for a, b in itertools.pairwise(stamps)]
        if rising and steps and not 1 / WRONG < statistics.median(steps) * self.fps < WRONG:
            rate = 1 / statistics.median(steps)
            log.info("%s: declares %.4g frames a second, taken as %.4g by their times", self.path,
                     self.fps, rate)
            self.fps = rate
        self._seconds = [float((decoded[0] or 0) * self._unit)]
        for step in steps:
            # 0 or back: parts with times of their own follow each other
            self._seconds.append(self._seconds[-1] + (step if step > 0 else 1 / self.fps))

    def has(self, frame: int) -> bool:
        return next(self._decode(frame), None) is not None

    def start_of(self, frame: int) -> int:
        return self._keys[bisect_right(self._keys, frame) - 1]

    def time(self, frame: int) -> float:
        known = len(self._seconds)
        if frame < known:
            return self._seconds[frame]
        return self._seconds[-1] + (frame - known + 1) / self.fps

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
        """Number and frame from `start` on, decoded from the last key frame before it.

        A frame that can't be decoded is the one before it again, so that numbers stay those of
        the index wherever decoding starts.
        """
        index, frames = self._seek(start)
        last = None
        for frame in frames:
            place = self._place(frame, index)
            if place < index:
                continue  # not in the index, or there before
            for number in range(index, place):
                if last is not None and number >= start:
                    yield number, last
            if place >= start:
                yield place, frame
            index, last = place + 1, frame
        self.count = index

    def _seek(self, start: int) -> tuple[int, Iterator[av.VideoFrame]]:
        """The last key frame up to `start`, and the frames from it on."""
        key = self.start_of(start)
        if key:
            frames = self._decode_from(self._stamps[key])
            first = next(frames, None)
            if first is not None and first.pts == self._stamps[key]:
                return key, itertools.chain([first], frames)
            self._keys = [0]  # seeking leads elsewhere in this file
        return 0, self._decode_from(None)

    def _place(self, frame: av.VideoFrame, index: int) -> int:
        """The number of a decoded frame, of which `index` is expected; -1 of an unknown one."""
        if not self._indexed:
            return index
        if frame.pts is None:
            return -1
        place = bisect_left(self._stamps, frame.pts)
        return place if self._stamps[place:place + 1] == [frame.pts] else -1

    def _decode_from(self, stamp: int | None) -> Iterator[av.VideoFrame]:
        """The frames from the key frame with this time on (None: all), as far as they go."""
        packets = damaged = frames = 0
        with self._open() as (container, stream):
            stream.thread_type = "SLICE"  # of the others, the last frames after damage are lost
            if stamp is not None:
                try:
                    container.seek(stamp, stream=stream)
                except av.FFmpegError:
                    return
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
                    if stamp is not None and not frames and frame.pts is not None \
                            and frame.pts < stamp:
                        continue  # shown before the key frame, but decoded after it
                    damaged += frames > 0 and frame.is_corrupt
                    frames += 1
                    yield frame
        if damaged:
            self._say("%s: damaged in %d places, frames there are wrong or missing", damaged)
        if stamp is None and 0 < packets < self.declared:
            self._say("%s: ends after %d frames, though it declares %d", frames, self.declared)

    def _restart(self, end: int) -> int:
        """The key frame from which the frames before `end` fill the memory; at least the last."""
        fit = max(1, frame_stack.MEMORY // (3 * self.shape[0] * self.shape[1]))
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


def _is_cover(stream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _is_shown(packet: av.Packet, codec: str) -> bool:
    """Whether a packet gives a frame: VP8 puts frames that are only referred to in their own."""
    return codec != "vp8" or bool(memoryview(packet)[0] & 0x10)


def _in_order(packets) -> list[tuple[int, bool]]:
    """Packets' presentation times and key flags in the order of presentation.

    Parts that begin with an earlier time, as in recordings that were joined, stay one after the
    other. Empty where any packet has no time.
    """
    parts: list[list[tuple[int, bool]]] = [[]]
    last = None
    for stamp, decoded, key in packets:
        if stamp is None:
            return []
        if last is not None and decoded is not None and decoded < last:
            parts.append([])
        last = decoded if decoded is not None else last
        parts[-1].append((stamp, key))
    return [one for part in parts for one in sorted(part)]


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
