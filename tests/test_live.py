"""Live clips: streams that FFmpeg serves on this machine, tracking while they play, the page."""

import errno
import http.server
import io
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue

import av
import numpy as np
import pytest
from conftest import ROOT, TOKEN, bright, do, draw_frame, overlap, truth
from PIL import Image

import main
from benchmarks.stream import StreamServer, encode
from datasets import demo
from masks.read import read_mask
from media import live as media_live
from media.live import LiveClip, is_live
from media.video import open_clip
from tracking import live
from tracking.pipeline import Options, Sink
from webapp.live import KEPT_FRAMES, LiveSession
from webapp.server import application

FRAMES, FPS = 30, 50


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """0.6 s of a demo clip, as a camera's encoder writes it."""
    images = itertools.islice(demo.draw(demo.SCENES["val"]["stroll"], FRAMES), FRAMES)
    return encode([np.ascontiguousarray(image[::2, ::2]) for image, _ in images],
                  tmp_path_factory.mktemp("video") / "stroll.mp4", FPS)


@pytest.fixture(scope="module")
def frames(video):
    """The decoded frames of the file."""
    return list(open_clip(video).frames())


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(media_live, "RETURN", 0.4)
    monkeypatch.setattr(media_live, "RETRY", 0.05)
    monkeypatch.setattr(media_live, "ANALYSIS", 0.05)


@contextmanager
def once(video, before_frame=lambda _: None):
    """Serve a video to one client, then refuse connections."""
    def last(number):
        before_frame(number)
        if number == FRAMES - 1:
            server.__exit__()

    with StreamServer(video, last) as server:
        yield server.url


def number_of(image, frames):
    """The index of an image among the frames."""
    return [np.array_equal(image, frame) for frame in frames].index(True)


# the clip

@pytest.mark.parametrize("source, expected", [
    ("camera:0", True), ("camera:Front", True), ("rtsp://a/b", True), ("http://a/b.mp4", True),
    ("https://a", True), ("udp://@:5000", True), ("tcp://a:1", True), ("clip.mp4", False),
    ("/a/http:/b", False), ("file:///a.mp4", False), ("C:/clip.mp4", False), ("camera.mp4", False)])
def test_live_sources_are_recognised(source, expected):
    assert is_live(source) == expected


def test_a_reader_that_keeps_up_gets_the_frames_in_order_with_their_times(video, frames):
    with once(video) as url, LiveClip(url) as clip:
        assert clip.shape == clip.stored == (180, 320) and clip.fps == FPS
        numbers = [number_of(image, frames) for image in clip.frames()]
    assert numbers == sorted(set(numbers)) and numbers[-1] == FRAMES - 1 and len(numbers) > 9
    assert clip.count == len(numbers) and clip.skipped == FRAMES - len(numbers)
    times = [clip.time(i) for i in range(clip.count)]
    # evenly spaced, as the timestamps are, however irregularly the frames arrived
    np.testing.assert_allclose(np.diff(times), np.diff(numbers) / FPS, atol=1e-3)
    assert clip.frame_name(1) == f"00001_{times[1]:.3f}s"


def test_a_slow_reader_gets_the_newest_frame(video, frames):
    with once(video) as url, LiveClip(url) as clip:
        numbers, ages = [], []
        for image in clip.frames():
            numbers.append(number_of(image, frames))
            ages.append(time.monotonic() - clip.arrived)
            time.sleep(0.2)
    assert len(numbers) < 8 and numbers[-1] == FRAMES - 1
    assert clip.skipped == FRAMES - len(numbers)
    assert ages[1] < 0.2, "the frame before the pause was kept instead of the newest"


def test_a_gap_is_waited_out_and_kept_in_the_times(video):
    def pause(number):
        if number == 15:
            time.sleep(1.3)

    with once(video, pause) as url, LiveClip(url) as clip:
        for _ in clip.frames():
            pass
    steps = np.diff([clip.time(i) for i in range(clip.count)])
    assert (steps > 0).all() and sorted(steps > 1.0)[-2:] == [False, True]


def test_a_stream_that_returns_is_resumed_and_one_that_does_not_ends(video, caplog):
    connections = []

    def break_once(number):
        connections.append(number == 0)
        if number == 15 and sum(connections) == 1:
            raise OSError
        if number == FRAMES - 1:
            server.__exit__()

    caplog.set_level("INFO")
    with StreamServer(video, break_once) as server, LiveClip(server.url) as clip:
        shapes = {image.shape for image in clip.frames()}
    assert shapes == {(180, 320, 3)} and clip.count + clip.skipped == 15 + FRAMES
    assert (np.diff([clip.time(i) for i in range(clip.count)]) > 0).all()
    back, ended = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(rf"{clip.name}: the stream is back after \d\.\d s", back)
    assert ended == f"{clip.name}: the stream has ended"


def test_a_stream_that_falls_silent_is_reopened(video, monkeypatch, caplog):
    monkeypatch.setattr(media_live, "SILENCE", 1)
    monkeypatch.setattr(media_live, "RETURN", 1)  # counted from the end of the silence
    caplog.set_level("INFO")
    pauses = [1.3]

    def pause_once(number):
        if number == 15 and pauses:
            time.sleep(pauses.pop())

    with StreamServer(video, pause_once, loop=True) as server, LiveClip(server.url, 20) as clip:
        for _ in clip.frames():
            if "the stream is back after" in caplog.text:
                break
        else:
            pytest.fail("it was not reopened")


def test_a_recording_behind_a_url_is_read_once(video, frames):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=video.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with LiveClip(f"{address}/{video.name}") as clip:
            *_, last = clip.frames()
        assert number_of(last, frames) == FRAMES - 1 and clip.count + clip.skipped == FRAMES
        with pytest.raises(OSError, match=f"{address}/none: Server returned 404 Not Found, expec"):
            LiveClip(f"{address}/none")
        server.shutdown()


def test_a_time_limit_and_closing_end_the_clip(video):
    def stall(number):
        if number == 15:
            time.sleep(5)

    with once(video, stall) as url, LiveClip(url, seconds=0.5) as clip:
        began = time.monotonic()
        for _ in clip.frames():
            pass
    assert 0.3 < time.monotonic() - began < 4 and clip.count
    with once(video) as url, LiveClip(url) as clip:
        for _ in clip.frames():
            clip.close()
        assert clip.count == 1


def test_a_stream_without_frames_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(media_live, "SILENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, \
            pytest.raises(OSError, match=": no frame within 0 s, expected a camera or a stream"):
        LiveClip(f"tcp://127.0.0.1:{silent.getsockname()[1]}")
    with av.open(str(tmp_path / "sound.mp4"), "w") as output:
        stream = output.add_stream("aac", rate=48000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), "fltp", "mono")
        sound.sample_rate = 48000
        output.mux([*stream.encode(sound), *stream.encode()])
    monkeypatch.setattr(media_live, "_address", lambda source: (
        str(tmp_path / "sound.mp4"), None, {}))
    with pytest.raises(OSError, match=r"camera:0: found QuickTime / MOV without video"):
        LiveClip("camera:0")


def test_addresses_that_lead_nowhere_are_errors_without_their_passwords():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(OSError) as refused:
        LiveClip(f"http://me:secret@127.0.0.1:{port}/a?key=secret")
    assert str(refused.value) == (f"http://127.0.0.1:{port}/a: Connection refused, expected a "
                                  "camera or a stream that is running (--video)")


@pytest.fixture
def camera_error(monkeypatch):
    """Makes cameras fail with an error of the system."""
    def set_error(code):
        def refuse(*_, **__):
            raise OSError(code, os.strerror(code), "/dev/video0")
        monkeypatch.setattr(media_live.av, "open", refuse)
    return set_error


@pytest.mark.parametrize("code, reason", [
    (errno.ENOENT, "there is no such camera"), (errno.EACCES, "Permission denied")])
def test_a_camera_that_cannot_be_opened_is_an_error(code, reason, camera_error):
    camera_error(code)
    with pytest.raises(OSError, match=f"^camera:0: {reason}, expected a camera or a stream that"):
        LiveClip("camera:0")


def test_a_busy_camera_is_one_line(camera_error, monkeypatch, capsys, tmp_path):
    camera_error(errno.EBUSY)
    monkeypatch.chdir(tmp_path)
    assert main.main(["-m", "segment", "--video", "camera:0", "-f", "warn", "--point", "1",
                      "1"]) == 2
    assert capsys.readouterr().err == ("main.py: error: camera:0: Device or resource busy, "
                                       "expected a camera or a stream that is running (--video)\n")


@pytest.mark.parametrize("platform, source, expected", [
    ("linux", "camera:2", ("/dev/video2", "v4l2", {})),
    ("linux", "camera:/dev/front", ("/dev/front", "v4l2", {})),
    ("darwin", "camera:1", ("1", "avfoundation", {"framerate": "30"})),
    ("win32", "camera:1", ("video=Rear", "dshow", {})),
    ("win32", "camera:Front", ("video=Front", "dshow", {}))])
def test_each_platform_has_its_camera_backend(platform, source, expected, monkeypatch):
    devices = [av.DeviceInfo(name, name, False, [kind]) for name, kind in (
        ("Microphone", "audio"), ("Front", "video"), ("Rear", "video"))]
    monkeypatch.setattr(media_live.av, "enumerate_input_devices", lambda form: devices)
    monkeypatch.setattr(media_live.sys, "platform", platform)
    assert media_live._address(source) == expected


def test_a_device_of_ffmpeg_is_read(monkeypatch):
    """The test picture, in place of a camera."""
    monkeypatch.setattr(media_live, "_address", lambda source: (
        "testsrc=size=64x48:rate=50", "lavfi", {}))
    with LiveClip("camera:0") as clip:
        images = list(clip.frames(0, 3))
    assert [image.shape for image in images] == [(48, 64, 3)] * 3 and images[0].std() > 20


# tracking

class Scripted:
    """A clip whose frames are drawn, each when the test asks for it or at once."""

    name, fps, shape, skipped, arrived = "a stream", 25, (96, 160), 5, 0

    def __init__(self, count, before_frame=lambda _: None, ids=(1,)):
        self.total, self.before_frame, self.ids, self.count = count, before_frame, ids, 0
        self.closed = threading.Event()

    def frames(self):
        for step in range(self.total):
            self.before_frame(step)
            if self.closed.is_set():
                return
            self.count += 1
            yield image(step, self.ids)

    def close(self):
        self.closed.set()


def image(step, ids=(1,)):
    """Return the frame whose mask `truth` returns."""
    return draw_frame(step, ids)[0].repeat(2, 0).repeat(2, 1)


def test_objects_are_added_on_earlier_frames_and_ended(shipped):
    both, changes = (1, 2), SimpleQueue()

    def user(step):
        if step == 3:  # drawn on frame 1, while two more frames came
            changes.put(live.Reference(1, image(1, both), np.where(truth(1, both) == 1, 1, 0)
                                       .astype(np.uint8)))
        if step == 6:
            changes.put(live.Reference(5, image(5, both), np.where(truth(5, both) == 2, 2, 0)
                                       .astype(np.uint8)))
        if step == 9:
            changes.put(live.Removal(1))
            changes.put(live.Removal(7))  # ended in another tab

    results = list(live.track(shipped, Scripted(12, user, both), changes, Options()))
    assert [frame.index for frame in results] == [0, 1, 2, 1, *range(3, 12)]
    assert [frame.step is None for frame in results[:4]] == [True, True, True, False]
    assert not any(frame.mask.any() for frame in results[:3])
    for frame in results[3:]:
        expected = {1} if frame.index < 6 else {1, 2} if frame.index < 9 else {2}
        assert {*np.unique(frame.mask)} - {0} == expected, frame.index
        for i in expected:
            assert overlap(frame.mask == i, truth(frame.index, both) == i) > 0.8


def test_what_is_asked_for_during_the_last_frame_is_done(shipped):
    changes = SimpleQueue()
    tracked = live.track(shipped, Scripted(2), changes, Options())
    assert [next(tracked).index, next(tracked).index] == [0, 1]
    changes.put(live.Reference(1, image(1), truth(1)))
    last, = tracked
    assert last.index == 1 and np.array_equal(last.mask, truth(1))


@pytest.mark.slow
def test_a_correction_of_one_object_leaves_the_others(shipped):
    both, changes = (1, 2), SimpleQueue()
    changes.put(live.Reference(0, image(0, both), truth(0, both)))
    first = next(live.track(shipped, Scripted(1, ids=both), changes, Options()))
    assert first.index == 0 and np.array_equal(first.mask, truth(0, both))

    def correct(step):
        if step == 4:
            changes.put(live.Reference(2, image(2, both), np.where(truth(2, both) == 2, 2, 0)
                                       .astype(np.uint8)))

    changes.put(live.Reference(0, image(0, both), truth(0, both)))
    *_, last = live.track(shipped, Scripted(6, correct, both), changes, Options())
    for i in both:
        assert overlap(last.mask == i, truth(5, both) == i) > 0.8


# the page

class Collected(Sink):
    def __init__(self):
        self.frames = []

    def write(self, frame):
        self.frames.append((frame.index, frame.mask))


@pytest.fixture
def page(shipped, tmp_path):
    """A client of the page of a live clip; `page.show(n)` makes the next n frames arrive."""
    from starlette.testclient import TestClient
    allowed, sink = threading.Semaphore(0), Collected()
    clip = Scripted(100, lambda _: allowed.acquire(), (1, 2))
    session = LiveSession(shipped, clip, tmp_path / "out", Options(), bright, [sink])
    client = TestClient(application(session, TOKEN), base_url="http://127.0.0.1:8000",
                        headers={"X-Token": TOKEN}, raise_server_exceptions=False)
    client.session, client.sink = session, sink
    tracking = threading.Thread(target=session.run)
    tracking.start()

    def show(count):
        wanted = clip.count + count
        for _ in range(count):
            allowed.release()
        end = time.monotonic() + 60
        while max(session._recent, default=-1) < wanted - 1:
            assert time.monotonic() < end
            time.sleep(0.005)

    def end():
        clip.close()
        allowed.release()
        tracking.join()

    client.show, client.end = show, end
    yield client
    end()


def pixels(client, kind, frame):
    return np.array(Image.open(io.BytesIO(client.get(f"/{kind}/{frame}").content)))


def test_a_box_and_points_are_tracked_and_an_object_is_ended(page):
    page.show(3)
    assert page.get("/state/0").json()["live"]["written"] == 0
    assert np.abs(pixels(page, "frame", 1).astype(int) - image(1, (1, 2))).mean() < 8
    assert not pixels(page, "mask", 1).any()
    assert do(page, "add").json() == {"object": 1} and do(page, "add").json() == {"object": 2}
    assert do(page, "hold", frame=1).status_code == 200
    assert do(page, "box", frame=1, object=1, corners=[[22, 10], [68, 46]]).status_code == 200
    page.show(1)
    assert {*np.unique(pixels(page, "mask", 3))} == {0, 1}
    assert do(page, "point", frame=3, object=2, points=[[50, 70]]).status_code == 200
    page.show(1)
    state = page.get("/state/0").json()
    assert {*np.unique(pixels(page, "mask", 4))} == {0, 1, 2}
    assert state["live"] | {"rate": 0, "delay": 0} == {
        "name": "a stream", "frame": 4, "rate": 0, "delay": 0, "received": 10, "skipped": 5,
        "written": 3, "folder": str(page.session.folder), "ended": False}
    assert {*state["frames"]["4"]["confidence"]} == {"1", "2"}
    assert do(page, "rename", object=2, name="cup").status_code == 200
    assert do(page, "delete", object=1).status_code == 200
    page.show(1)
    assert {*np.unique(pixels(page, "mask", 5))} == {0, 2}
    assert [obj["name"] for obj in page.get("/state/0").json()["objects"]] == ["cup"]
    page.end()
    assert page.get("/state/0").json()["live"]["ended"]
    assert [index for index, _ in page.sink.frames] == [1, 3, 4, 5]
    for index, mask in page.sink.frames:
        for i in {1: (1,), 3: (1,), 4: (1, 2), 5: (2,)}[index]:
            assert overlap(mask == i, truth(index, (1, 2)) == i) > 0.8


def test_a_new_box_restarts_its_object(page):
    page.show(1)
    do(page, "add")
    do(page, "point", frame=0, object=1, points=[[30, 70]])  # on the other square
    page.show(1)
    assert overlap(pixels(page, "mask", 1) == 1, truth(1, (1, 2)) == 2) > 0.8
    do(page, "box", frame=1, object=1, corners=[[22, 10], [68, 46]])
    page.show(1)
    assert overlap(pixels(page, "mask", 2) == 1, truth(2, (1, 2)) == 1) > 0.8


def test_a_frame_is_kept_while_a_user_draws_on_it(page, monkeypatch):
    monkeypatch.setattr("webapp.live.KEPT_BYTES", 0)
    page.show(1)
    do(page, "add")
    do(page, "hold", frame=0)
    page.show(KEPT_FRAMES + 1)
    assert page.get("/frame/0").status_code == 200
    assert do(page, "box", frame=0, object=1, corners=[[14, 10], [60, 46]]).status_code == 200
    for answer in (page.get("/frame/1"), page.get("/mask/1"), do(page, "hold", frame=1),
                   do(page, "point", frame=1, object=1, points=[[30, 30]])):
        assert answer.status_code == 400
        assert answer.json()["error"] == "the picture has moved on: draw again"


def test_actions_that_need_a_recorded_clip_are_refused(page):
    page.show(1)
    do(page, "add")
    assert do(page, "point", frame=0, object=1, points=[[150, 4]]).json()["error"].startswith(
        "nothing was found there")
    assert do(page, "point", frame=0, object=9, points=[[30, 30]]).json() == {
        "error": "there is no object 9"}
    for action in ("undo", "segment", "export", "stroke", "absent", "remove_mask", "gone"):
        assert do(page, action, frame=0, object=1).status_code == 404
    assert page.get("/thumbnail/0").status_code == 404
    assert page.put("/mask/0", content=b"").status_code == 405
    assert page.get("/frame/0", params={"session": re.search(
        'data-session="(.+?)"', page.get("/").text)[1]}).headers["cache-control"] == "no-store"


# the command line

@pytest.mark.parametrize("flags, message", [
    ("--video camera:0 --frames 0:9 --point 1 1", "--frames: expected --seconds for a live"),
    ("--video camera:0 --mask_frame 3 --point 1 1", "--mask_frame: expected no live --video"),
    ("--video camera:0 --export coco --point 1 1", "--export: expected no live --video"),
    ("--video camera:0 --page --point 1 1", "--page: expected no mask, box or point with it"),
    ("--video a.mp4 --seconds 3 --point 1 1", "--seconds: expected a camera or a stream"),
    ("--video camera:0 --seconds 0 --point 1 1", "argument --seconds: expected a number above 0")])
def test_flags_that_contradict_a_live_clip_are_refused(flags, message, capsys):
    assert main.main(["-m", "segment", *flags.split()]) == 2
    assert capsys.readouterr().err.startswith(f"main.py: error: {message}")


@pytest.fixture(scope="module")
def slow_video(tmp_path_factory):
    """4 s of a square that moves half a pixel a frame, so that skipped frames do no harm."""
    images = [np.full((96, 160, 3), 40, np.uint8) for _ in range(100)]
    for i, one in enumerate(images):
        one[30:66, 20 + i // 2:56 + i // 2] = (230, 200, 40)
    return encode(images, tmp_path_factory.mktemp("video") / "square.mp4", 25)


@pytest.mark.slow
def test_a_stream_is_segmented_until_its_end(slow_video, tmp_path, capsys):
    with StreamServer(slow_video) as server:
        def stop(number):
            if number == 99:
                server.__exit__()
        server.before_frame = stop
        assert main.main(["-m", "segment", "--video", server.url, "--box", "18", "28", "50", "40",
                          "--cutout", "transparent", "-j", str(tmp_path / "out")]) == 0
    names = sorted(path.stem for path in (tmp_path / "out/masks").iterdir())
    numbers, times = zip(*(re.fullmatch(r"(\d{5})_(\d+\.\d{3})s", name).groups()
                           for name in names))
    assert [*map(int, numbers)] == [*range(len(names))] and len(names) > 3
    assert sorted(path.stem for path in (tmp_path / "out/cutout").iterdir()) == names
    for name in names:
        mask = read_mask(tmp_path / "out/masks" / f"{name}.png")
        assert mask.any(0).nonzero()[0].size in range(30, 42)
    with av.open(str(tmp_path / "out/overlay.mp4")) as overlay:
        shown = sorted(packet.pts * packet.time_base for packet in overlay.demux(video=0)
                       if packet.pts is not None)
    np.testing.assert_allclose(np.array(shown, float), np.array(times, float) - float(times[0]),
                               atol=0.002)
    assert f"{len(names)} frames: masks, overlay.mp4 and cut-out" in capsys.readouterr().out
    # a live clip can't be resumed
    with StreamServer(slow_video) as server:
        assert main.main(["-m", "segment", "--video", server.url, "--point", "30", "40",
                          "-j", str(tmp_path / "out")]) == 2
    assert "holds results of other data" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows can't send Ctrl+C to one process")
def test_ctrl_c_completes_the_results(slow_video, tmp_path):
    with StreamServer(slow_video) as server:
        process = subprocess.Popen(
            [sys.executable, ROOT / "main.py", "-m", "segment", "--video", server.url, "--point",
             "40", "50", "-j", tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        masks, end = tmp_path / "out/masks", time.monotonic() + 120
        while not (masks.is_dir() and len([*masks.glob("*.png")]) > 2):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert len(list(open_clip(tmp_path / "out/overlay.mp4").frames())) == len([*masks.iterdir()])
    assert f"{len([*masks.iterdir()])} frames: masks, overlay.mp4 in" in output


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromedriver"), reason="no chromium and chromium-driver")
def test_the_page_tracks_a_live_clip(slow_video, tmp_path):
    from test_browser import Server, Tab
    with StreamServer(slow_video) as server:
        run = Server(server.url, tmp_path / "out")
        tab = Tab(run.address, tmp_path / "profile")
        try:
            tab.wait("clip.live.received > 5")
            assert not tab.find("#timeline").is_displayed()
            before = tab.ask("view.shown")
            tab.wait(f"view.shown > {before}")
            tab.draw((10, 20), (140, 80), answered="clip.live.written > 0")  # wherever it is
            tab.wait("frames.get(view.frame)?.confidence?.[1] > 0.5")
            tab.wait("at('stage').dataset.shown.split(' ')[0] == view.frame")
            assert re.fullmatch(r"\d+ frames recorded in .*out", tab.find("#written").text)
            tab.click(".object button[title^=End]")
            tab.wait("!clip.objects.length && !frames.get(view.frame).confidence?.[1]")
            tab.click("#finish")
            tab.wait("clip.live.ended")
            output, _ = run.process.communicate(timeout=60)  # without Ctrl+C
        finally:
            tab.driver.quit()
            run.process.kill()
    assert run.process.returncode == 0 and "frames: masks, overlay.mp4" in output
    assert any(read_mask(path).any() for path in (tmp_path / "out/masks").iterdir())
