"""Writes videos frame by frame, with the sound of another file.

H.264 plays in browsers, notebooks and QuickTime; for transparency editors take ProRes 4444 and VP9.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from media import sound
from media.files import atomic_path

log = logging.getLogger(__name__)

# For each suffix: encoder, pixel format, encoder options, longest side that it accepts.
KINDS = {
    # superfast: encoding must not slow down segmentation; crf 18: no visible loss, at the price of
    # larger files. mbtree reads past the rows of small frames, so that files differ between runs.
    ".mp4": ("libx264", "yuv420p", {"preset": "superfast", "crf": "18", "x264-params": "mbtree=0"},
             16384),
    ".mov": ("prores_ks", "yuva444p10le", {"profile": "4444", "vendor": "apl0"}, 65535),
    # good and cpu-used 4: the slower settings take several times as long for little. Alternate
    # reference frames lose the transparency.
    ".webm": ("libvpx-vp9", "yuva420p", {"crf": "24", "b": "0", "deadline": "good",
                                         "cpu-used": "4", "row-mt": "1", "auto-alt-ref": "0"},
              65535),
}
# Encoder of the sound and its bits per second. AAC and Opus because each is the one codec that
# every player of the container knows, at rates above which hardly anybody hears a difference;
# editors get samples as they are, since they encode again.
SOUND = {".mp4": ("aac", 192_000), ".mov": ("pcm_s16le", 0), ".webm": ("libopus", 128_000)}
# Written into the file, because players guess the colours of untagged files by their size.
BT709 = 1  # matrix, primaries and transfer characteristics (ITU-T H.273)
LIMITED = 1  # luma from 16 to 235


class VideoWriter:
    """Writes RGB or RGBA frames to a video: .mp4 (H.264), or .mov and .webm with transparency.

    Use as a context manager. The file is created at once, under a temporary name, so that a folder
    that can't be written to fails before there is work to lose. It gets its name on exit, if any
    frame was written and there was no error.

    Args:
        path: the video to write; its suffix selects the codec.
        fps: frames per second where `write` is given no times; 24 is used in place of a rate that
            is no positive number.
        sound: a video whose sound is added, from the time of the first frame written. A file
            without sound, or that is no video, leaves the result silent.

    Raises:
        ValueError: the suffix is none of these.
        OSError: the file can't be written or the disk is full; the error names `path`.
    """

    def __init__(self, path: str | Path, fps: float = 24, sound: str | Path | None = None):
        self.path = Path(path)
        if self.path.suffix not in KINDS:
            raise ValueError(f"{path}: expected one of {', '.join(KINDS)}")
        rate = Fraction(fps if 1e-3 < fps < 1e5 else 24).limit_denominator(1001)
        # the time base: 1/90000 s or finer, and a whole number of units per frame at a constant
        # rate, since rounding would make playback jitter
        self._unit = 1 / (rate.numerator * Fraction(math.ceil(90000 / rate.numerator)))
        self._rate, self._sound_of = rate, sound
        self._stream: av.VideoStream | None = None
        self._last = -1  # in units
        self._cut = 0  # units that were taken out of the clip's times
        with ExitStack() as files:
            temporary = files.enter_context(atomic_path(path))
            temporary.touch()  # av.open creates it only at the first frame
            # the index in front lets a browser play the file before all of it is loaded
            options = {"movflags": "+faststart"} if self.path.suffix != ".webm" else {}
            self._container = av.open(f"file:{temporary}", "w", options=options)
            files.push(self._close)
            self._files = files.pop_all()

    def write(self, image: np.ndarray, time: float | None = None) -> None:
        """Append a frame.

        Args:
            image: (H, W, 3) RGB or (H, W, 4) RGBA uint8, the same shape for all frames. For H.264
                odd sides are padded by a row or column and sides over 16384 pixels scaled down.
            time: when the frame is shown, in seconds from any origin; defaults to one frame
                duration after the last one. A gap of more than `sound.LONGEST_GAP` is closed.
        """
        with self._telling():
            if self._stream is None:
                self._start(image, time)
            units = (self._last + self._step if time is None
                     else round((time - self._first) / self._unit) - self._cut)
            if self._last >= 0 and units - self._last > sound.LONGEST_GAP / self._unit:
                if not self._cut:
                    log.warning("%s: the clip's timestamps leave a gap of %.0f s, which is closed",
                                self.path, (units - self._last) * self._unit)
                self._cut += units - self._last - self._step
                units = self._last + self._step
            self._last = max(units, self._last + 1) if self._last >= 0 else 0
            frame = av.VideoFrame.from_ndarray(self._fit(image),
                                               format="rgba" if image.shape[2] == 4 else "rgb24")
            frame = self._reformatter.reformat(frame, format=self._stream.pix_fmt,
                                               dst_colorspace="itu709")
            frame.pts, frame.time_base = self._last, self._unit
            self._container.mux(self._stream.encode(frame))
            self._write_sound(self._last)

    def _start(self, image: np.ndarray, time: float | None) -> None:
        codec, pixels, options, self._side = KINDS[self.path.suffix]
        self._stream = self._container.add_stream(codec, rate=self._rate, options=options)
        context = self._stream.codec_context
        image = self._fit(image)
        context.height, context.width = image.shape[:2]
        context.pix_fmt = pixels
        context.time_base = self._unit
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        self._reformatter = VideoReformatter()
        self._first, self._step = time or 0.0, round(1 / self._rate / self._unit)
        self._track = sound.track(self._sound_of, self._first) if self._sound_of else iter(())
        self._samples, self._heard, self._sound = next(self._track, None), 0, None
        if self._samples is not None:
            codec, rate = SOUND[self.path.suffix]
            self._sound = self._container.add_stream(codec, rate=sound.RATE, layout="stereo")
            if rate:
                self._sound.codec_context.bit_rate = rate

    def _fit(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        if max(height, width) > self._side:
            scale = self._side / max(height, width)
            image = cv2.resize(image, (max(1, int(width * scale)), max(1, int(height * scale))),
                               interpolation=cv2.INTER_AREA)
            height, width = image.shape[:2]
        if self.path.suffix == ".mp4" and (height % 2 or width % 2):
            image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        return np.ascontiguousarray(image)

    def _write_sound(self, until: int) -> None:
        """Encode the sound up to `until`, in units of the picture."""
        until = round(until * self._unit * sound.RATE)
        while self._samples is not None and self._heard < until:
            part = self._samples[:, :until - self._heard]
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), format="fltp",
                                               layout="stereo")
            frame.sample_rate, frame.time_base = sound.RATE, Fraction(1, sound.RATE)
            frame.pts = self._heard
            self._container.mux(self._sound.encode(frame))
            self._heard += part.shape[1]
            rest = self._samples[:, part.shape[1]:]
            self._samples = rest if rest.shape[1] else next(self._track, None)

    def _close(self, kind, *_) -> None:
        if kind is None:
            with self._telling():
                try:
                    self._container.mux(self._stream.encode())
                    self._write_sound(self._last + self._step)
                    if self._sound:
                        self._container.mux(self._sound.encode())
                finally:
                    self._container.close()
        else:  # errors that follow from the first one must not hide it
            with suppress(av.FFmpegError, OSError):
                self._container.close()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._stream is None and exception[0] is None:
            exception = (_NothingWritten, _NothingWritten(), None)
        self._files.__exit__(*exception)


class _NothingWritten(Exception):
    """Raised inside to discard the temporary file."""
