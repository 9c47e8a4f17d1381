"""A camera or network stream as a clip without end; only the newest frame is held."""

import logging
import re
import sys
import threading
import time
from array import array
from collections.abc import Iterator

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from media.clip import FOLDER_FPS, Clip
from media.video import FrameConverter

log = logging.getLogger(__name__)

CAMERA = "camera:"
SCHEMES = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "tcp", "udp")
# Seconds without a packet after which a stream counts as broken. Encoders of cameras that watch a
# still scene may pause for some seconds; a longer wait delays the message about a dead stream.
SILENCE = 10.0
# Seconds for which a broken stream is reopened. A router or encoder that restarts takes longer
# than a few seconds; a clip that has ended for good is complete only after this time.
RETURN = 10.0
RETRY = 0.5  # seconds between attempts to reopen
# Seconds of video that FFmpeg reads before the first frame to find out what a stream contains. Its
# own default of 5 would delay the start by as much; a second stream that starts later isn't wanted.
ANALYSIS = 0.5
# Seconds by which timestamps may drift from arrival before they are aligned with it again: more
# than a network's jitter, less than the time a sender takes to restart with timestamps from 0.
MAX_DRIFT = 1.0


def is_live(source: object) -> bool:
    """Whether a source is `camera:N` or the URL of a stream, rather than a file or a folder."""
    return str(source).startswith((CAMERA, *(f"{scheme}://" for scheme in SCHEMES)))


class LiveClip(Clip):
    """The frames of a camera or stream as they arrive; a context manager.

    A thread receives and decodes. `frames` yields the newest frame and waits for one if there is
    none; frames that arrive while the caller is busy are skipped. A stream that breaks is reopened
    for `RETURN` seconds; if it doesn't return, `frames` ends, as at the end of a file.

    Args:
        source: `camera:N`, `camera:NAME`, or a URL with one of `SCHEMES`.
        seconds: end this long after the first frame; None for no limit.

    Attributes:
        name: the source without password and query, for messages.
        count: the number of frames yielded so far.
        skipped: the number of frames that were decoded but not yielded.
        arrived: `time.monotonic` when the frame yielded last was received, before it was decoded.

    Raises:
        OSError: there is no such camera or stream, it is busy, has no video, or sends no frame
            within `SILENCE` seconds.
    """

    def __init__(self, source: str, seconds: float | None = None):
        self.source, self.seconds = source, seconds
        self.name = re.sub(r"(?<=//)[^/]*@", "", source).partition("?")[0]
        self.path, self.files = None, []  # a stream has no file, for example to take the sound from
        self.count = self.skipped = 0
        self.arrived = 0.0
        self._changed = threading.Condition()  # guards the following
        self._newest: tuple[av.VideoFrame, float, float] | None = None  # with its time and arrival
        self._began: float | None = None  # arrival of the first frame
        self._last = 0.0  # arrival of the newest frame
        self._ended, self._error = False, ""
        self._aspect = 1.0
        self._closing = threading.Event()
        self._clock = _Clock()
        # 8 bytes a frame: 17 MB for a day at 25 frames a second
        self._times = array("d")
        self._reformatter = VideoReformatter()
        threading.Thread(target=self._receive, name=self.name, daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._newest or self._ended)
            if self._newest is None:
                raise OSError(f"{self.name}: {self._error} (--video)")
            self._converter: FrameConverter = FrameConverter(self.name, self._newest[0],
                                                             self._aspect)
        self.shape, self.stored = self._converter.shape, self._converter.stored

    def time(self, frame: int) -> float:
        """Seconds from the first frame received to a frame that was yielded before."""
        return self._times[frame]

    def frame_name(self, frame: int) -> str:
        """The frame's number and its time, such as 00042_3.480s."""
        return f"{frame:05d}_{self.time(frame):.3f}s"

    def close(self) -> None:
        """Stop receiving; `frames` ends. The connection closes when its next packet arrives."""
        self._closing.set()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _read(self, start: int) -> Iterator[np.ndarray]:
        while True:
            with self._changed:
                left = (None if self.seconds is None
                        else self._began + self.seconds - time.monotonic())
                self._changed.wait_for(lambda: self._newest or self._ended, left)
                if self._newest is None or self._closing.is_set() or left is not None and left <= 0:
                    return
                frame, when, self.arrived = self._newest
                self._newest = None
            self._times.append(when)
            self.count += 1
            yield self._converter(frame, self._reformatter)

    def _receive(self) -> None:
        """Receive frames until the clip is closed or the stream ends; run by the thread."""
        broke = 0.0  # when the last connection that gave frames ended
        try:
            while not self._closing.is_set():
                finished, error, before = False, None, self._last
                try:
                    finished = self._receive_connection()
                except (av.FFmpegError, OSError, ValueError) as caught:
                    error = caught
                    log.debug("%s: %s", self.name, caught)
                if self._began is None:
                    self._error = _explained(error, self.source.startswith(CAMERA))
                    return
                if self._last != before:
                    broke = time.monotonic()
                if self._closing.is_set():
                    return
                if finished or time.monotonic() - broke > RETURN:
                    log.info("%s: the stream has ended", self.name)
                    return
                self._closing.wait(RETRY)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _receive_connection(self) -> bool:
        """Receive frames until the connection ends; whether that was the end of a recording."""
        address, form, options = _address(self.source)
        with av.open(address, format=form, timeout=(SILENCE, SILENCE), options=options,
                     metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise ValueError(f"found {container.format.long_name} without video that can be "
                                 "decoded")
            stream.thread_type = "SLICE"  # frame threads would delay each frame by several others
            self.fps = float(stream.average_rate or FOLDER_FPS)
            connected, self._clock.offset, opened = False, None, time.monotonic()
            for packet in container.demux(stream):
                arrived = time.monotonic()
                if self._closing.is_set():
                    return True
                if not connected and arrived - opened > SILENCE:
                    raise ValueError(_silent())
                for frame in _decoded(packet):
                    if not connected:  # earlier the decoder may not know it
                        self._aspect = float(stream.codec_context.sample_aspect_ratio or 1)
                    self._put(frame, arrived, connected)
                    connected = True
            # An HTTP server would play a file from its beginning again.
            return container.duration is not None

    def _put(self, frame: av.VideoFrame, arrived: float, connected: bool) -> None:
        """Make a frame the newest one."""
        with self._changed:
            if self._began is None:
                self._began = arrived
            elif not connected:
                log.info("%s: the stream is back after %.1f s", self.name, arrived - self._last)
            self._last = arrived
            self.skipped += self._newest is not None
            self._newest = frame, self._clock(frame.time, arrived - self._began), arrived
            self._changed.notify_all()


class _Clock:
    """The times of frames: evenly spaced as their timestamps are, aligned with their arrival.

    Attributes:
        offset: what has to be added to timestamps; None if it is unknown, as in a new connection.
    """

    def __init__(self):
        self.offset, self._last = None, -1.0

    def __call__(self, timestamp: float | None, arrived: float) -> float:
        """A frame's time in seconds, later than that of the frame before.

        Args:
            timestamp: in seconds from any origin; None if the frame has none.
            arrived: in seconds since the first frame.
        """
        if timestamp is None:
            when = arrived
        else:
            if self.offset is None or abs(timestamp + self.offset - arrived) > MAX_DRIFT:
                self.offset = arrived - timestamp
            when = timestamp + self.offset
        self._last = max(when, self._last + 0.001)  # a millisecond, as file names show it
        return self._last


def _decoded(packet: av.Packet) -> list[av.VideoFrame]:
    """The frames that a packet completes; none if it can't be decoded, as before a key frame."""
    try:
        return packet.decode()
    except av.FFmpegError as error:
        log.debug("%s", error)
        return []


def _address(source: str) -> tuple[str, str | None, dict[str, str]]:
    """What FFmpeg opens for a source, the input format of a camera, and options.

    Raises:
        ValueError: Windows has no camera of this number.
    """
    if not source.startswith(CAMERA):
        return source, None, {"analyzeduration": str(round(ANALYSIS * 1e6))}
    which = source.removeprefix(CAMERA)
    if sys.platform == "darwin":
        return which, "avfoundation", {"framerate": "30"}  # its default fits hardly any camera
    if sys.platform == "win32":
        if which.isdecimal():
            names = [device.name for device in av.enumerate_input_devices("dshow")
                     if "video" in device.media_types]
            if int(which) >= len(names):
                raise ValueError(f"there is no such camera, found {', '.join(names) or 'none'}")
            which = names[int(which)]
        return f"video={which}", "dshow", {}
    return f"/dev/video{which}" if which.isdecimal() else which, "v4l2", {}


def _explained(error: Exception | None, camera: bool) -> str:
    """Why a source has no frame."""
    if camera and isinstance(error, FileNotFoundError):
        reason = "there is no such camera"
    elif error is None or isinstance(error, av.error.ExitError):
        reason = _silent()
    else:
        reason = getattr(error, "strerror", None) or str(error)
    return f"{reason}, expected a camera or a stream that is running"


def _silent() -> str:
    return f"no frame within {SILENCE:.0f} s"
