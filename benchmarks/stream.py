"""Serves a video on the loopback address in real time, as a camera's encoder does."""

import itertools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import av
import numpy as np


class StreamServer:
    """Plays a video as MPEG-TS over TCP, to one client after the other; a context manager.

    FFmpeg writes the stream, without encoding it again. Each client gets the video from its first
    frame.

    Args:
        path: the video; H.264 or another codec that MPEG-TS can hold.
        loop: start again at its end, with timestamps that go on.
        before_frame: called with the number of each frame before it is sent. It may wait, for a
            gap, or raise an OSError, to end the connection.

    Attributes:
        url: what to open.
    """

    def __init__(self, path: Path, before_frame: Callable[[int], object] = lambda _: None,
                 loop: bool = False):
        self.path, self.before_frame, self.loop = path, before_frame, loop
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            # the client may leave at any time, and a file is not closed without an error then
            with connection, suppress(OSError, av.FFmpegError):
                self._play(connection)

    def _play(self, connection: socket.socket) -> None:
        with connection.makefile("wb", buffering=0) as file, av.open(
                file, "w", format="mpegts", options={"flush_packets": "1"}) as output:
            stream, offset, began, numbers = None, 0, 0.0, itertools.count()
            while stream is None or self.loop:
                with av.open(str(self.path)) as video:
                    source = video.streams.video[0]
                    stream = stream or output.add_stream_from_template(source)
                    for packet in video.demux(source):
                        if packet.dts is None:  # the end
                            break
                        self.before_frame(next(numbers))
                        packet.dts, packet.pts = packet.dts + offset, packet.pts + offset
                        shown = float(packet.dts * packet.time_base)
                        began = began or time.monotonic() - shown
                        time.sleep(max(0.0, began + shown - time.monotonic()))
                        packet.stream = stream
                        output.mux(packet)
                    offset += source.duration

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._socket.close()


def encode(images: Sequence[np.ndarray], path: Path, fps: int) -> Path:
    """Encode (H, W, 3) uint8 RGB images, of even sides, as a camera does: each frame at once."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=fps, options={
            "preset": "superfast", "tune": "zerolatency", "g": str(fps)})
        stream.height, stream.width = images[0].shape[:2]
        for image in images:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode())
    return path
