"""The sound of a video file as one continuous track, for any timestamps and codec.

Sound is decoded and placed sample by sample instead of being copied packet by packet: a muxer
refuses packets whose timestamps repeat or jump back, and codecs that the container doesn't take,
and it refuses the picture along with them. The price is one more lossy generation.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path

import av
import numpy as np

log = logging.getLogger(__name__)

RATE = 48000  # samples per second of every track: Opus has no 44100, and AAC and editors take both
# Seconds by which timestamps may disagree with the samples before silence is inserted or samples
# are cut. Matroska rounds to milliseconds and screen recorders jitter by tens of them, and every
# correction clicks; FFmpeg's aresample has the same limit. ITU-R BT.1359 puts the offset that
# viewers notice at 45 ms early to 125 ms late.
SLACK = 0.1
HOPELESS = 1000  # packets without a single frame, about 20 s: encrypted, and an hour would not help
# Seconds without a frame from which on timestamps are of another clock, and the gap is closed,
# here and in the picture (`writer`). Cameras that wait for motion leave minutes; MP4 can't hold a
# frame of much more than 3 hours, so a longer gap would cost the whole file.
LONGEST_GAP = 3600.0
SILENCE = np.zeros((2, RATE // 10), np.float32)  # inserted piece by piece: a gap may last for hours


def track(path: str | Path, start: float = 0.0) -> Iterator[np.ndarray]:
    """Yield the sound of a file from `start` on, without a gap, until it ends.

    Gaps are filled with silence, also one before the first sample, so that sample n is heard
    n / RATE seconds after `start`. Parts are joined whose timestamps jump back, or forward by more
    than `LONGEST_GAP`. Yields nothing for
    a file without sound, and never raises: what can't be used is left out, with a warning.

    Args:
        path: a video file; what is no file, such as a folder of frames, has no sound.
        start: seconds, on the clock of the file's timestamps.

    Yields:
        (2, n) float32 stereo samples between -1 and 1, RATE of them per second, any n above 0.
    """
    try:
        tracks = _tracks(path)
        for index in tracks:
            frames = _decoded(path, index)
            if (first := next(frames, None)) is not None:
                if len(tracks) > 1:
                    log.info("%s: has %d sound tracks, the one of stream %d is used", path,
                             len(tracks), index)
                yield from _continuous(path, chain([first], frames), start)
                return
        if tracks:
            log.warning("%s: its sound can't be decoded and is left out", path)
    except Exception as error:  # of any kind: the picture is worth more than the sound
        log.warning("%s: its sound can't be used beyond this point (%s)", path, error)


def _tracks(path: str | Path) -> list[int]:
    """The indices of the sound streams, the one that a player takes first."""
    if not Path(path).is_file():
        return []
    with av.open(f"file:{path}", metadata_errors="ignore") as file:
        best = file.streams.best("audio")
        return [] if best is None else sorted((stream.index for stream in file.streams.audio),
                                              key=lambda index: index != best.index)


def _decoded(path: str | Path, index: int) -> Iterator[av.AudioFrame]:
    """The frames of a sound stream; packets that can't be decoded are skipped."""
    with av.open(f"file:{path}", metadata_errors="ignore") as file:
        stream = file.streams[index]
        if stream.codec_context is None:  # no decoder for this codec
            return
        frames = damaged = 0
        for packet in chain(_packets(file, stream), [None]):
            try:
                for frame in stream.codec_context.decode(packet):
                    frames += 1
                    yield frame
            except av.FFmpegError as error:
                log.debug("%s: sound: %s", path, error)
                damaged += 1
                if damaged == 1 and frames:
                    log.warning("%s: its sound is damaged and partly missing", path)
                if damaged > HOPELESS and not frames:
                    return


def _packets(file: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.Packet]:
    """The packets of a stream as far as the file can be read."""
    try:
        yield from (packet for packet in file.demux(stream) if packet.size)
    except av.FFmpegError as error:
        log.debug("%s: %s", file.name, error)


def _continuous(path: str | Path, frames: Iterable[av.AudioFrame],
                start: float) -> Iterator[np.ndarray]:
    """Place frames on one clock by their timestamps, see `track`."""
    converter = _Converter(path)
    placed = 0  # samples so far, counted from `start`
    shift = end = 0.0  # seconds: what timestamps are corrected by; the end of the last frame
    before: float | None = None  # the last frame's timestamp, uncorrected
    joined = False
    for frame, following in pairwise(chain(frames, [None])):
        time, after = frame.time, following.time if following else None
        if time is not None and after is not None and time > after and before is None:
            continue  # the only sign of a wrong first timestamp
        if time is not None and after is not None and before is not None and before < after \
                and not before < time <= after:
            time = None  # a single wrong timestamp among good ones
        if time is not None and before is not None and time <= before:
            if not joined:
                log.warning("%s: timestamps of its sound repeat or jump back, parts are joined",
                            path)
            joined, shift = True, end - time
        begin = end if time is None else time + shift
        before = before if time is None else time
        end = begin + frame.samples / frame.sample_rate
        gap = round((begin - start) * RATE) - placed
        if placed and abs(gap) < SLACK * RATE:
            gap, end = 0, start + placed / RATE + frame.samples / frame.sample_rate
        elif gap > LONGEST_GAP * RATE:
            shift -= gap / RATE
            gap, end = 0, end - gap / RATE
        samples = converter.convert(frame)[:, max(0, -gap):]
        while gap > 0:
            silence = SILENCE[:, :gap]
            placed, gap = placed + silence.shape[1], gap - silence.shape[1]
            yield silence
        if samples.shape[1]:
            placed += samples.shape[1]
            yield samples
    if not placed:
        log.warning("%s: its sound ends before the first frame of the picture and is left out",
                    path)


class _Converter:
    """Converts frames to stereo at RATE, also where their format changes midway."""

    def __init__(self, path: str | Path):
        self.path = path
        self._format: tuple | None = None
        self._unmixed = False  # whether the layout can't be mixed to stereo

    def convert(self, frame: av.AudioFrame) -> np.ndarray:
        """(2, n) float32; n is 0 where the resampler holds samples back."""
        form = frame.format.name, frame.layout.name, frame.sample_rate
        if form != self._format:
            self._format, self._unmixed = form, False
            self._resampler = av.AudioResampler(format="fltp", layout="stereo", rate=RATE)
        frame.pts = None  # samples are placed by `_continuous`
        if not self._unmixed:
            try:
                return _joined(self._resampler.resample(frame))
            except av.FFmpegError:
                log.warning("%s: channels of its sound (%s) can't be mixed, the first one is used",
                            self.path, frame.layout.name)
                self._unmixed = True
                self._resampler = av.AudioResampler(format="fltp", layout="stereo", rate=RATE)
        values = frame.to_ndarray()
        if not frame.format.is_planar:
            values = values.reshape(-1, frame.layout.nb_channels).T
        stereo = av.AudioFrame.from_ndarray(values[[0, 0]], format=frame.format.planar.name,
                                            layout="stereo")
        stereo.sample_rate = frame.sample_rate
        return _joined(self._resampler.resample(stereo))


def _joined(frames: list[av.AudioFrame]) -> np.ndarray:
    return np.concatenate([np.zeros((2, 0), np.float32),
                           *(frame.to_ndarray() for frame in frames)], axis=1)
