"""Videos as cameras, recorders and editors write them: frames, order, rotation, times."""

import logging
import struct
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pytest

from media import frame_stack, video

SHAPE = (48, 80)
NEVER = {"g": "1000", "sc_threshold": "0"}  # no key frame but the first


def picture(i, shape=SHAPE):
    """A grey level for every number below 50, white in the upper left quarter."""
    image = np.full((*shape, 3), 5 * i, np.uint8)
    image[:shape[0] // 2, :shape[1] // 2] = 255
    return image


def number_of(image):
    """The number of a `picture`, read from its lower right corner."""
    return round(float(image[-8:, -8:].mean()) / 5)


def make(path, count=12, codec="libx264", pixels="yuv420p", options=None, rate=25, times=None,
         shape=SHAPE, draw=picture, **context):
    """A video of `draw`(0), `draw`(1), ...; times in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = shape
        stream.pix_fmt = pixels
        if codec.startswith("mpeg"):
            stream.codec_context.bit_rate = 4_000_000
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(draw(i, shape), format="rgb24")
            frame.pts, frame.time_base = ((times[i], Fraction(1, 1000)) if times else
                                          (i, 1 / Fraction(rate)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers_of(frames):
    return [number_of(image) for image in frames]


@pytest.fixture(scope="module")
def gops(tmp_path_factory):
    """40 frames with a key frame every 8 and B-frames."""
    return make(tmp_path_factory.mktemp("clips") / "gops.mp4", 40, options={"g": "8", "bf": "2"})


@pytest.mark.parametrize("suffix, codec, pixels", [
    (".mp4", "libx264", "yuv420p"), (".mov", "libx264", "yuv420p10le"),
    (".mp4", "libsvtav1", "yuv420p"), (".mp4", "libx265", "yuv420p10le"),
    (".webm", "libvpx-vp9", "yuv420p"), (".mov", "prores_ks", "yuv422p10le"),
    (".avi", "mjpeg", "yuvj420p"), (".avi", "mpeg4", "yuv420p"), (".mkv", "ffv1", "yuv444p"),
    (".mov", "qtrle", "argb"), (".ts", "mpeg2video", "yuv420p")])
def test_videos_of_any_codec_are_read(suffix, codec, pixels, tmp_path, caplog):
    shape = (80, 96)  # the least that SVT-AV1 takes is 64
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    clip = video.open_clip(make(tmp_path / f"clip{suffix}", 6, codec, pixels, options,
                                shape=shape))
    frames = list(clip.frames())
    assert numbers_of(frames) == list(range(6))
    assert clip.shape == clip.stored == shape == frames[0].shape[:2]
    assert frames[0].dtype == np.uint8 and frames[0][:30, :40].mean() > 245
    assert clip.fps == pytest.approx(25) and clip.count == 6
    assert clip.frame_name(3) == "00003" and clip.number(3) == clip.index(3) == 3
    assert numbers_of(clip.backwards(6)) == [5, 4, 3, 2, 1, 0]
    assert not caplog.records


def test_any_frame_and_any_range_can_be_read(gops):
    clip = video.open_clip(gops)
    assert numbers_of(clip.frames(13, 17)) == [13, 14, 15, 16]
    assert numbers_of(clip.frames(38)) == [38, 39]
    assert list(clip.frames(5, 5)) == list(clip.frames(40)) == []
    assert clip.has(39) and not clip.has(40) and not clip.has(10**9) and clip.count == 40


@pytest.mark.parametrize("memory", [1, 3 * 48 * 80 * 5, 10**9])
def test_reading_backward_gives_the_same_frames(memory, gops, monkeypatch):
    monkeypatch.setattr(frame_stack, "MEMORY", memory)
    forwards = list(video.open_clip(gops).frames())
    for start in (40, 17, 8, 1, 0):
        backwards = list(video.open_clip(gops).backwards(start))
        assert len(backwards) == start
        assert all((a == b).all() for a, b in zip(backwards, forwards[:start][::-1]))


def test_opening_decodes_nothing_and_seeking_decodes_from_the_key_frame(
        gops, monkeypatch):
    decoded = []
    real = video.Video._decode_from
    monkeypatch.setattr(video.Video, "_decode_from", lambda self, *rest: (
        decoded.append(1) or frame for frame in real(self, *rest)))
    clip = video.open_clip(gops)
    assert clip.count == 40 and clip.time(39) - clip.time(0) == pytest.approx(39 / 25)
    assert len(decoded) == video.CHECKED_FRAMES
    decoded.clear()
    assert number_of(next(clip.frames(37))) == 37
    assert len(decoded) <= 8


def test_threads_can_share_a_clip(gops):
    clip = video.open_clip(gops)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: numbers_of(clip.frames(n, n + 3)), range(37)))
    assert found == [[n, n + 1, n + 2] for n in range(37)]
    assert clip.count == 40


@pytest.mark.parametrize("suffix, codec, options", [
    (".webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "10"}),
    (".m2v", "mpeg2video", {"g": "8", "bf": "2"}), (".avi", "mpeg4", {"g": "8", "bf": "2"}),
    (".h264", "libx264", {"g": "8", "bf": "2"}), (".mkv", "libx265", {"g": "8", "bf": "2"})])
def test_frame_numbers_follow_the_decoder_instead_of_packets(suffix, codec, options, tmp_path):
    """Hidden frames, missing times, times in decoding order, checked against FFmpeg."""
    shape = (80, 96)
    path = make(tmp_path / f"clip{suffix}", 40, codec, options=options, shape=shape)
    with av.open(str(path)) as container:
        expected = numbers_of(f.to_ndarray(format="rgb24") for f in container.decode(video=0))
    clip = video.open_clip(path)
    assert numbers_of(clip.frames()) == expected
    count = len(expected)
    assert clip.count == count
    for start in (1, 9, 17, count - 1):
        assert numbers_of(clip.frames(start, start + 2)) == expected[start:start + 2]
    assert numbers_of(video.open_clip(path).backwards(count)) == expected[::-1]
    times = [clip.time(i) for i in range(count)]
    assert times == sorted(set(times)) and times[-1] - times[0] == pytest.approx(39 / 25, abs=0.2)


@pytest.mark.parametrize("suffix, codec, options", [
    (".avi", "mjpeg", {}), (".mp4", "libx264", {"g": "8", "bf": "2"}),
    (".mkv", "libvpx-vp9", {"g": "8"})])
def test_frame_numbers_are_kept_if_a_frame_cannot_be_decoded(suffix, codec, options, tmp_path):
    path = make(tmp_path / f"clip{suffix}", 40, codec,
                "yuvj420p" if codec == "mjpeg" else "yuv420p", options)
    with av.open(str(path)) as container:
        packet = [bytes(packet) for packet in container.demux(video=0)][10]
    data = path.read_bytes()
    assert data.count(packet) == 1
    path.write_bytes(data.replace(packet, bytes(len(packet))))
    whole = numbers_of(video.open_clip(path).frames())
    assert len(whole) == 40 and whole[20:] == list(range(20, 40))
    clip = video.open_clip(path)
    for start in (4, 12, 18, 39):
        assert numbers_of(clip.frames(start)) == whole[start:]
    assert clip.count == 40


class Counting:
    """Counts decoded packets."""

    def __init__(self, monkeypatch):
        self.count, packets = 0, video._packets

        def counted(*arguments):
            for packet in packets(*arguments):
                self.count += 1
                yield packet

        monkeypatch.setattr(video, "_packets", counted)


@pytest.mark.parametrize("options", [NEVER, {"g": "12"}])
@pytest.mark.parametrize("memory", [3 * 48 * 80 * 4, 10**9])
def test_reading_backward_takes_linear_time(options, memory, tmp_path, monkeypatch):
    """At most three packets are decoded per frame for any distance of key frames."""
    monkeypatch.setattr(frame_stack, "MEMORY", memory)
    path = make(tmp_path / "clip.mp4", 240, options=options, draw=lambda i, s: picture(i % 50, s))
    clip, packets = video.open_clip(path), Counting(monkeypatch)
    assert numbers_of(clip.backwards(240)) == [i % 50 for i in range(239, -1, -1)]
    assert packets.count < 3.2 * 240


def test_a_seek_to_the_wrong_frame_is_not_trusted(gops, monkeypatch):
    class Lost:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            self.container.__enter__()
            return self

        def __exit__(self, *exception):
            self.container.__exit__(*exception)

        def seek(self, offset, stream):
            self.container.seek(offset + 9 * 512, stream=stream)  # a group of pictures further

    opened = av.open
    monkeypatch.setattr(video.av, "open", lambda *a, **k: Lost(opened(*a, **k)))
    clip = video.open_clip(gops)
    assert len(list(clip.frames())) == 40
    assert numbers_of(clip.frames(20, 24)) == [20, 21, 22, 23]
    clip = video.open_clip(gops)
    assert numbers_of(clip.backwards(40)) == list(range(39, -1, -1))


def patched(path, kind, offset, form, *values):
    """Overwrite a field in the first box of this kind of an mp4."""
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.index(kind) + 4 + offset, *values)
    path.write_bytes(data)
    return path


TURNS = {  # display matrices, and the equivalent NumPy operation
    "0": ((1, 0, 0, 1), lambda image: image),
    "90": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "180": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "270": ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "mirrored and turned": ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_rotated_as_the_metadata_say(turn, tmp_path):
    path = make(tmp_path / "phone.mp4", 2, options={"qp": "1"})
    plain = next(video.open_clip(path).frames())
    (a, b, c, d), expected = TURNS[turn]
    patched(path, b"tkhd", 40, ">iiiiiiiii", *(v << 16 for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    clip = video.open_clip(path)
    np.testing.assert_array_equal(next(clip.frames()), expected(plain))
    assert clip.shape == clip.stored == expected(plain).shape[:2]
    if turn in ("90", "180", "270"):
        with av.open(str(path)) as container:  # FFmpeg's own reading of the matrix
            angle = next(container.decode(video=0)).rotation
        np.testing.assert_array_equal(next(clip.frames()), np.rot90(plain, angle // 90))


@pytest.mark.parametrize("aspect, shape", [("4/3", (48, 107)), ("1/2", (96, 80)), ("1/1", SHAPE),
                                           ("99/1", SHAPE)])
def test_pixels_are_made_square(aspect, shape, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    clip = video.open_clip(make(tmp_path / "clip.mkv", 3,
                                sample_aspect_ratio=Fraction(aspect)))
    frames = list(clip.frames())
    assert clip.shape == frames[0].shape[:2] == shape and clip.stored == SHAPE
    assert numbers_of(frames) == [0, 1, 2]
    assert ("not square" in caplog.text) == (shape != SHAPE)
    half = np.zeros(SHAPE, np.uint8)
    half[:, :40] = 1
    fitted = clip.fit(half)
    assert fitted.shape == shape and abs(fitted.mean() - 0.5) < 0.01
    other = np.ones((7, 9), np.uint8)
    assert clip.fit(other) is other


def test_variable_frame_rates_keep_their_times(tmp_path):
    times = [0, 40, 50, 400, 410, 2000]
    for suffix in (".mp4", ".mkv"):
        clip = video.open_clip(make(tmp_path / f"phone{suffix}", 6, times=times))
        assert numbers_of(clip.frames()) == list(range(6))  # none doubled, none dropped
        assert [clip.time(i) for i in range(6)] == pytest.approx([t / 1000 for t in times],
                                                                 abs=1e-3)


def test_a_frame_rate_that_contradicts_the_times_is_ignored(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = make(tmp_path / "clip.mkv", 12, times=[100 * i for i in range(12)])
    data = path.read_bytes()
    at = data.index(b"\x23\xe3\x83\x84") + 4  # DefaultDuration of 4 bytes, in nanoseconds
    path.write_bytes(data[:at] + struct.pack(">I", 1_000_000) + data[at + 4:])
    clip = video.open_clip(path)
    assert clip.fps == pytest.approx(10) and clip.time(11) == pytest.approx(1.1)
    assert "clip.mkv: declares" in caplog.text and "taken as 10" in caplog.text


@pytest.mark.parametrize("rate", ["66667/1000", "105611/500", "24000/1001"])
def test_odd_frame_rates_are_read(rate, tmp_path):
    clip = video.open_clip(make(tmp_path / "clip.mp4", 4, rate=Fraction(rate)))
    assert clip.fps == pytest.approx(float(Fraction(rate)), rel=1e-4)
    assert len(list(clip.frames())) == 4
    assert clip.time(3) - clip.time(0) == pytest.approx(3 / Fraction(rate), abs=1e-3)


def grey(level):
    return lambda i, shape: np.full((*shape, 3), level, np.uint8)


@pytest.mark.parametrize("name, transfer, signals", [
    # ITU-R BT.2408, table 1: signals of a grey card (26 cd/m2) and of white (203), and 1000 cd/m2
    ("PQ", 16, {0.0: 0, 0.38: 101, 0.58: 232, 0.7518: 255}),
    ("HLG", 18, {0.0: 0, 0.38: 101, 0.75: 232, 1.0: 255})])
def test_hdr_is_tone_mapped(name, transfer, signals, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for signal, expected in signals.items():
        path = make(tmp_path / "hdr.mp4", 2, "libx264", "yuv420p10le", {"crf": "4"},
                    draw=grey(round(255 * signal)), color_trc=transfer,
                    color_primaries=9, colorspace=9, color_range=1)
        image = next(video.open_clip(path).frames())
        assert abs(image.astype(int) - expected).max() <= 4
        assert f"hdr.mp4: HDR ({name})" in caplog.text


def test_tone_mapping_is_monotonic(tmp_path):
    shown = []
    for level in range(40, 256, 24):
        path = make(tmp_path / "hlg.mp4", 1, "libx264", "yuv420p10le", {"crf": "4"},
                    draw=grey(level), color_trc=18, color_primaries=9, colorspace=9)
        shown.append(next(video.open_clip(path).frames()).mean())
    assert all(b > a + 1 for a, b in zip(shown[:-1], shown[1:]))


def test_a_header_with_too_few_frames_is_not_trusted(tmp_path, caplog):
    path = make(tmp_path / "clip.avi", 20, "mjpeg", "yuvj420p")
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"avih") + 24, 5)
    struct.pack_into("<I", data, data.index(b"strh") + 40, 5)
    path.write_bytes(data)
    clip = video.open_clip(path)
    assert clip.count == 20 and clip.has(19) and not clip.has(20)
    assert numbers_of(clip.frames()) == list(range(20)) and clip.count == 20
    assert not caplog.records


def test_a_clip_cut_without_re_encoding_gives_no_warning(gops, caplog):
    """An edit list selects frames 5 to 29 of 40, as `ffmpeg -c copy` and phones write it."""
    path = gops.with_name("cut.mp4")
    path.write_bytes(gops.read_bytes())
    data = path.read_bytes()
    _, start = struct.unpack_from(">Ii", data, data.index(b"elst") + 12)
    patched(path, b"elst", 8, ">Ii", 25 * 40, start + 5 * 512)
    clip = video.open_clip(path)
    assert numbers_of(clip.frames()) == list(range(5, 30))
    assert numbers_of(clip.backwards(25)) == list(range(29, 4, -1))
    assert not caplog.records


def test_a_stream_that_starts_between_key_frames_gives_no_warning(gops, caplog):
    path = gops.with_name("cut.ts")
    with av.open(str(gops)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        out = target.add_stream_from_template(stream)
        for i, packet in enumerate(source.demux(stream)):
            if packet.size and i >= 11:
                packet.stream = out
                target.mux(packet)
    clip = video.open_clip(path)
    found = numbers_of(clip.frames())
    assert found == list(range(found[0], 40)) and found[0] <= 16
    assert numbers_of(clip.backwards(len(found))) == found[::-1]
    assert not caplog.records


@pytest.mark.parametrize("suffix, codec", [(".avi", "mjpeg"), (".mp4", "libx264")])
def test_a_truncated_file_is_read_to_its_last_frame(suffix, codec, tmp_path, caplog):
    rng = np.random.default_rng(0)
    path = make(tmp_path / f"clip{suffix}", 20, codec,
                "yuvj420p" if codec == "mjpeg" else "yuv420p",
                {"movflags": "+faststart"} if suffix == ".mp4" else {},
                draw=lambda i, shape: rng.integers(0, 255, (*shape, 3), np.uint8))
    if suffix == ".mp4":
        with av.open(str(path)) as source, av.open(str(tmp_path / "s.mp4"), "w", options={
                "movflags": "+faststart"}) as target:
            stream = source.streams.video[0]
            out = target.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.size:
                    packet.stream = out
                    target.mux(packet)
        path = tmp_path / "s.mp4"
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    clip = video.open_clip(path)
    for _ in range(2):
        assert 5 < len(list(clip.frames())) < 16
    assert len(list(clip.backwards(5))) == 5 and not clip.has(19)
    ends = [line for line in caplog.messages if "ends after" in line and "declares 20" in line]
    assert len(ends) == 1 and path.name in ends[0]


def test_frames_of_another_size_are_resized_to_the_first(tmp_path, caplog):
    data = b"".join(make(tmp_path / f"{i}.ts", 6, "mpeg2video", shape=shape).read_bytes()
                    for i, shape in enumerate((SHAPE, (96, 160))))
    (tmp_path / "both.ts").write_bytes(data)
    clip = video.open_clip(tmp_path / "both.ts")
    frames = list(clip.frames())
    assert {frame.shape for frame in frames} == {(*SHAPE, 3)}
    assert numbers_of(frames[-6:]) == list(range(6))
    assert numbers_of(clip.backwards(len(frames))) == numbers_of(frames)[::-1]
    times = [clip.time(i) for i in range(len(frames))]
    assert times == sorted(set(times)) and times[-1] - times[0] < 1
    (line,) = [line for line in caplog.messages if "size" in line]
    assert "from 80x48 to 160x96" in line


def test_frames_rotated_midway_keep_the_size_of_the_first(gops, monkeypatch, caplog):
    quarter = np.array([[0, 1], [-1, 0]]) * 65536
    monkeypatch.setattr(video, "_display_matrix",
                        lambda frame: quarter if frame.pts > 20 * 512 else None)
    frames = list(video.open_clip(gops).frames())
    assert {frame.shape for frame in frames} == {(*SHAPE, 3)} and len(frames) == 40
    (line,) = caplog.messages
    assert line.startswith(f"{gops}: ") and "90 degrees" in line


def test_a_file_with_only_sound_is_refused(tmp_path):
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 88200), np.int16), format="s16",
                                           layout="stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(OSError, match="song.m4a: expected a video.*without video"):
        video.open_clip(tmp_path / "song.m4a")


def test_a_full_disk_for_temporary_frames_is_one_line(gops, monkeypatch):
    monkeypatch.setattr(frame_stack, "MEMORY", 1)
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(frame_stack.tempfile, "TemporaryFile", lambda: full)
        with pytest.raises(OSError, match="No space left.*TMPDIR"):
            list(video.open_clip(gops).backwards(20))
