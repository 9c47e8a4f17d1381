"""Written videos, read back by OpenCV and by FFmpeg's decoders."""

import logging
import resource
from fractions import Fraction
from itertools import islice

import av
import cv2
import numpy as np
import pytest
from conftest import draw_frame
from PIL import Image

from media import sound
from media.writer import VideoWriter

COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 200, 20), (120, 120, 120)]


def flat(colour, shape=(48, 80)):
    return np.full((*shape, len(colour)), colour, np.uint8)


def write(path, count=5, shape=(48, 80), times=None, **options):
    with VideoWriter(path, **options) as video:
        for i in range(count):
            video.write(flat(COLOURS[i % 5], shape), times[i] if times else None)
    return path


def read_by_opencv(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


def colours_of(path):
    """Frames as players show them; OpenCV 4 ignores the colour space in the file."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def stream_of(path):
    """Codec, pixels, average rate, and the times of the frames of a file, in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [frame.time for frame in container.decode(stream)]
        return stream.codec_context.name, stream.pix_fmt, stream.average_rate, times


@pytest.mark.parametrize("height, width", [(48, 80), (49, 80), (48, 81), (51, 83), (1, 1)])
def test_browser_videos_are_read_back(tmp_path, height, width):
    path = write(tmp_path / "video.mp4", shape=(height, width), fps=10)
    assert stream_of(path)[:3] == ("h264", "yuv420p", 10)
    frames, fps = read_by_opencv(path)
    assert fps == pytest.approx(10) and len(frames) == 5
    # odd sides are padded with border pixels
    assert {frame.shape for frame in frames} == {(height + height % 2, width + width % 2, 3)}
    for frame, colour in zip(colours_of(path), COLOURS, strict=True):
        assert np.abs(frame.mean((0, 1)) - colour).max() < 12
        assert np.abs(frame[-1, -1].astype(int) - colour).max() < 20
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before it is loaded to the end


def test_videos_stay_upright(tmp_path):
    frame = np.zeros((65, 97, 3), np.uint8)
    frame[:32, :48] = 255
    with VideoWriter(tmp_path / "video.mp4") as video:
        video.write(frame)
    (found,), _ = read_by_opencv(tmp_path / "video.mp4")
    assert np.abs(found[:65, :97].astype(int) - frame).mean() < 10


@pytest.mark.parametrize("fps", [66.667, 211.222, 30000 / 1001, 23.976, 0.5, 12345.678, 240])
def test_any_frame_rate_is_written(fps, tmp_path):
    *_, rate, times = stream_of(write(tmp_path / "video.mp4", fps=fps))
    assert float(rate) == pytest.approx(fps, rel=1e-4)
    assert times == pytest.approx([i / fps for i in range(5)], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("fps", [0, float("nan"), float("inf"), -3])
def test_an_invalid_frame_rate_becomes_24(fps, tmp_path):
    assert stream_of(write(tmp_path / "video.mp4", fps=fps))[2] == 24


@pytest.mark.parametrize("shape, expected", [((8200, 16), (8200, 16)), ((2, 9001), (2, 9002)),
                                             ((16500, 33), (16384, 32))])
def test_any_frame_size_is_written(shape, expected, tmp_path):
    path = write(tmp_path / "video.mp4", 2, shape)
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert [(frame.height, frame.width) for frame in frames] == [expected] * 2


def test_frame_times_are_kept(tmp_path):
    times = [7.5, 7.54, 7.55, 9, 9.1]
    found = stream_of(write(tmp_path / "video.mp4", fps=2.5, times=times))[3]
    assert found == pytest.approx([time - 7.5 for time in times], abs=1e-4)
    found = stream_of(write(tmp_path / "other.mp4", times=[1, 1, 0.5, 2, 2]))[3]
    assert found == sorted(set(found)) and len(found) == 5 and found[3] == pytest.approx(1)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm"])
def test_a_gap_that_no_player_would_wait_for_is_closed(suffix, tmp_path, caplog):
    """A damaged timestamp, or recordings of several days in one file."""
    times = [0, 0.04, 60, 1e6, 1e6 + 0.04, 1e12]
    path = write(tmp_path / f"video{suffix}", 6, times=times, fps=25)
    found = stream_of(path)[3]
    assert found == pytest.approx([0, 0.04, 60, 60.04, 60.08, 60.12], abs=1e-3)
    (line,) = caplog.messages
    assert "gap of 999940 s" in line


@pytest.mark.parametrize("suffix, decoder", [(".mov", "prores"), (".webm", "libvpx-vp9")])
@pytest.mark.parametrize("shape", [(48, 80), (49, 81)])
def test_transparent_videos_keep_their_alpha(suffix, decoder, shape, tmp_path):
    image = np.zeros((*shape, 4), np.uint8)
    image[8:24, 16:48], image[24:40, 16:48] = (220, 40, 30, 255), (30, 200, 40, 128)
    path = tmp_path / f"cutout{suffix}"
    with VideoWriter(path, fps=25) as video:
        for _ in range(3):
            video.write(image)
    with av.open(str(path)) as container:
        stream, frames = container.streams.video[0], []
        context = av.CodecContext.create(decoder, "r")  # FFmpeg's own for VP9 ignores alpha
        context.extradata = stream.codec_context.extradata
        context.width, context.height = stream.width, stream.height
        for packet in container.demux(stream):
            frames += context.decode(packet if packet.size else None)
        assert suffix == ".mov" or stream.metadata["alpha_mode"] == "1"
    assert len(frames) == 3
    found = frames[1].to_ndarray(format="rgba").astype(int)
    assert found.shape == image.shape
    inside = np.s_[12:20, 20:44], np.s_[28:36, 20:44], np.s_[:4, :8]
    for part in inside:
        assert np.abs(found[part] - image[part]).max() < 12


def with_sound(path, video, audio, rate=48000, seconds=2, layout="stereo", tracks=1):
    """A video of 25 frames per second with a tone from 1 s on."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream(video, rate=25)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        sounds = [container.add_stream(audio, rate=rate, layout=layout) for _ in range(tracks)]
        if audio == "wmav2":  # refuses the default
            sounds[0].codec_context.bit_rate = 128_000
        for i in range(25 * seconds):
            frame = av.VideoFrame.from_ndarray(flat((5 * i,) * 3, (48, 64)), format="rgb24")
            container.mux(pictures.encode(frame))
        time = np.arange(rate * seconds) / rate
        tone = (20000 * np.sin(2 * np.pi * 440 * time) * (time >= 1)).astype(np.int16)
        channels = av.AudioLayout(layout).nb_channels
        for track in sounds:
            frame = av.AudioFrame.from_ndarray(tone.repeat(channels)[None], format="s16",
                                               layout=layout)
            frame.sample_rate = rate
            container.mux(track.encode(frame))
        for stream in (pictures, *sounds):
            container.mux(stream.encode())
    return path


def sound_of(path):
    """Codec, where the tone begins and where the sound ends, in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        loud, end = [], 0
        for frame in container.decode(stream):
            values = np.abs(frame.to_ndarray().astype(float)).max()
            end = frame.time + frame.samples / frame.sample_rate
            if values > (0.2 if frame.format.name.startswith(("flt", "dbl")) else 3000):
                loud.append(frame.time)
        return stream.codec_context.codec.canonical_name, loud[0], end


@pytest.mark.parametrize("name, video, audio, suffix, expected", [
    ("phone.mp4", "libx264", "aac", ".mp4", "aac"), ("camera.mov", "libx264", "pcm_s16le", ".mp4",
                                                     "aac"),
    ("browser.webm", "libvpx-vp9", "libopus", ".webm", "opus"), ("old.avi", "mpeg4", "libmp3lame",
                                                                 ".mp4", "aac"),
    ("phone.mp4", "libx264", "aac", ".webm", "opus"), ("camera.mov", "libx264", "pcm_s16le",
                                                       ".mov", "pcm_s16le"),
    ("tv.ts", "libx264", "mp2", ".mp4", "aac"), ("stream.ts", "libx264", "aac", ".mp4", "aac")])
@pytest.mark.parametrize("start", [0, 20])
def test_sound_is_copied(name, video, audio, suffix, expected, start, tmp_path, caplog):
    source = with_sound(tmp_path / name, video, audio)
    times = stream_of(source)[3][start:]
    path = write(tmp_path / f"out{suffix}", len(times), times=times, fps=25, sound=source)
    codec, tone, end = sound_of(path)
    assert codec == expected
    assert tone == pytest.approx(1 - start / 25, abs=0.08)
    assert end == pytest.approx(2 - start / 25, abs=0.12)
    assert len(stream_of(path)[3]) == len(times) and not caplog.records


def test_sound_ends_with_the_frames(tmp_path):
    source = with_sound(tmp_path / "phone.mp4", "libx264", "aac")
    path = write(tmp_path / "out.mp4", 30, fps=25, sound=source)
    assert sound_of(path)[2] == pytest.approx(30 / 25, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name, video, audio, rate, layout", [
    ("camera.avi", "mpeg4", "pcm_u8", 11025, "mono"), ("disc.mkv", "libx264", "ac3", 44100, "5.1"),
    ("studio.mkv", "libx264", "pcm_s24le", 96000, "7.1"),
    ("old.wmv", "wmv2", "wmav2", 44100, "stereo"),
    ("recorder.mov", "libx264", "pcm_s16le", 48000, "hexadecagonal"),
    ("phone.mp4", "libx264", "alac", 44100, "stereo"), ("voice.avi", "mpeg4", "adpcm_ms", 8000,
                                                        "mono"),
    ("archive.mkv", "ffv1", "libmp3lame", 12000, "mono")])
def test_sound_of_any_codec_rate_and_layout_is_written(name, video, audio, rate, layout,
                                                       tmp_path, caplog):
    source = with_sound(tmp_path / name, video, audio, rate, layout=layout)
    for suffix in (".mp4", ".mov", ".webm"):
        path = write(tmp_path / f"out{suffix}", 50, fps=25, sound=source)
        _, tone, end = sound_of(path)
        assert tone == pytest.approx(1, abs=0.12) and end == pytest.approx(2, abs=0.12)
        assert len(stream_of(path)[3]) == 50
    assert not caplog.records


PIECE = 4800  # samples at 48 kHz, 0.1 s


def played(times, monkeypatch, start=0.0):
    """The number of the tone in each 0.1 s, 0 for silence.

    Piece n is constant and n / 100 loud, and its timestamp is the nth of `times`, in seconds.
    """
    def frames(*_):
        for i, time in enumerate(times):
            frame = av.AudioFrame.from_ndarray(np.full((2, PIECE), (i + 1) / 100, np.float32),
                                               format="fltp", layout="stereo")
            frame.sample_rate, frame.time_base = 48000, Fraction(1, 1000)
            frame.pts = None if time is None else round(1000 * time)
            yield frame

    monkeypatch.setattr(sound, "_tracks", lambda _: [0])
    monkeypatch.setattr(sound, "_decoded", frames)
    pieces = islice(sound.track("clip.mp4", start), 99)
    samples = np.concatenate([np.zeros((2, 0)), *pieces], axis=1)
    return [round(100 * float(value)) for value in samples[0, PIECE // 2::PIECE]]


@pytest.mark.parametrize("times, start, expected, warning", [
    ([0, 0.1, 0.2, 0.3], 0, [1, 2, 3, 4], None),
    ([None] * 4, 0, [1, 2, 3, 4], None),
    ([0, None, 0.2, None, None, 0.6], 0, [1, 2, 3, 4, 5, 0, 6], None),
    ([1.5, 1.6, 1.7], 1.5, [1, 2, 3], None),
    ([0.5, 0.6], 0.2, [0, 0, 0, 1, 2], None),  # begins late
    ([0, 0.1, 0.2, 0.3], 0.2, [3, 4], None),  # begins early
    ([-0.2, -0.1, 0, 0.1], 0, [3, 4], None),
    ([0, 0.1, 0.4, 0.5], 0, [1, 2, 0, 0, 3, 4], None),  # a gap
    ([0, 0.13, 0.17, 0.31, 0.42, 0.49], 0, [1, 2, 3, 4, 5, 6], None),  # jitter
    ([0, 0.1, 0.2, 0, 0.1, 0.2], 0, [1, 2, 3, 4, 5, 6], "jump back"),  # parts joined
    ([5, 5.1, 0, 0.1, 3, 3.1], 5.1, [2, 3, 4, *[0] * 28, 5, 6], "jump back"),
    ([0, 0.1, 0.1, 0.3], 0, [1, 2, 3, 4], None),
    ([0, 0, 0.2, 0.2, 0.4, 0.4], 0, [1, 2, 3, 4, 5, 6], "repeat"),
    ([0] * 5, 0, [1, 2, 3, 4, 5], "repeat"),
    ([0, 0.1, 999, 0.3, 0.4], 0, [1, 2, 3, 4, 5], None),  # a single wrong one
    ([0, 0.1, -999, 0.3, 0.4], 0, [1, 2, 3, 4, 5], None),
    ([999, 0.1, 0.2], 0, [0, 2, 3], None),
    ([0, 0.1, 0.2, 900], 0.1, [2, 3, *[0] * 38], None),
    ([0, 0.1, 1e9, 1e9 + 0.1], 0, [1, 2, 3, 4], None),  # another clock
    ([1e6, 1e6 + 0.1, 1e6 + 0.3], 5, [1, 2, 0, 3], None),
    ([0, 0.1], 7, [], "ends before the first frame")])
def test_sound_of_any_timestamps_is_continuous(times, start, expected, warning, monkeypatch,
                                               caplog):
    caplog.set_level(logging.WARNING)
    assert played(times, monkeypatch, start)[:40] == expected
    assert len(caplog.records) == (warning is not None) and (warning or "") in caplog.text


def test_sound_that_runs_slower_than_its_timestamps_stays_in_step(monkeypatch):
    heard = played([0.05 * i for i in range(40)], monkeypatch)
    assert len(heard) == pytest.approx(0.05 * 40 / 0.1, abs=2)
    assert heard == sorted(heard) and abs(heard[10] - 20) <= 2


@pytest.mark.parametrize("rates", [(48000, 48000), (32000, 48000)])
def test_concatenated_files_keep_picture_and_sound(rates, tmp_path, caplog):
    """In joined .ts files of cameras, timestamps restart and the rate changes."""
    for i, rate in enumerate(rates):
        with_sound(tmp_path / f"{i}.ts", "mpeg2video", "mp2", rate)
    source = tmp_path / "joined.ts"
    source.write_bytes(b"".join((tmp_path / f"{i}.ts").read_bytes() for i in range(2)))
    first = stream_of(source)[3][0]
    for suffix in (".mp4", ".mov", ".webm"):
        path = write(tmp_path / f"out{suffix}", 100, fps=25, sound=source, times=[
            first + i / 25 for i in range(100)])
        _, tone, end = sound_of(path)
        assert tone == pytest.approx(1, abs=0.12) and end == pytest.approx(4, abs=0.2)
        assert len(stream_of(path)[3]) == 100
    assert len(caplog.records) == 3 and "jump back" in caplog.text


def test_repeated_timestamps_keep_picture_and_sound(tmp_path):
    """Matroska allows equal ones, MP4 doesn't."""
    source = tmp_path / "twice.mkv"
    whole = with_sound(tmp_path / "whole.mkv", "libx264", "libmp3lame")
    with av.open(str(whole)) as file, av.open(str(source), "w") as out:
        copies = {stream: out.add_stream_from_template(stream) for stream in file.streams}
        last = 0
        for i, packet in enumerate(packet for packet in file.demux() if packet.size):
            if packet.stream.type == "audio":
                if i % 5 == 0:
                    packet.pts = packet.dts = last
                last = packet.pts
            packet.stream = copies[packet.stream]
            out.mux(packet)
    path = write(tmp_path / "out.mp4", 50, fps=25, sound=source)
    assert len(stream_of(path)[3]) == 50 and sound_of(path)[1] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("name, audio, known, unknown", [
    ("camera.mkv", "ac3", b"A_AC3", b"A_XYZ"), ("phone.mp4", "ac3", b"ac-3", b"zzzz")])
@pytest.mark.parametrize("tracks", [1, 2])
def test_undecodable_sound_is_replaced_or_dropped(name, audio, known, unknown, tracks, tmp_path,
                                                  caplog):
    """Without another track, one warning is logged."""
    source = with_sound(tmp_path / name, "libx264", audio, tracks=tracks)
    data = source.read_bytes()
    place = data.index(known)
    source.write_bytes(data[:place] + unknown + data[place + len(known):])
    path = write(tmp_path / "out.mp4", 50, fps=25, sound=source)
    assert len(stream_of(path)[3]) == 50
    with av.open(str(path)) as container:
        assert len(container.streams.audio) == tracks - 1
    assert [("can't be decoded" in text) for text in caplog.messages] == [True] * (2 - tracks)


def test_only_the_first_of_unmixable_channels_is_used(tmp_path, caplog):
    """360-degree cameras record ambisonic sound; its first channel has all directions."""
    values = np.linspace(-0.5, 0.5, 4 * 4800, dtype=np.float32).reshape(4, 4800)
    for form, array in (("fltp", values), ("flt", values.T.reshape(1, -1))):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(array), format=form,
                                           layout="ambisonic 1")
        frame.sample_rate = 48000
        samples = sound._Converter("clip.mp4").convert(frame)
        np.testing.assert_allclose(samples, values[[0, 0]], atol=1e-6)
        assert "(ambisonic 1) can't be mixed" in caplog.text


@pytest.mark.parametrize("suffix", [".webp", ".tif", ".png"])
def test_image_folders_have_no_sound_and_no_warning(suffix, tmp_path, caplog):
    path = tmp_path / f"clip{suffix}"
    images = [Image.fromarray(flat(colour)) for colour in COLOURS]
    images[0].save(path, save_all=True, append_images=images[1:])
    assert len(stream_of(write(tmp_path / "out.mp4", sound=path))[3]) == 5
    assert not caplog.records


@pytest.mark.parametrize("source", ["silent.mp4", "broken.mp4", "nowhere.mp4", "."])
def test_a_silent_clip_stays_silent(source, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    write(tmp_path / "silent.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"hello")
    path = write(tmp_path / "out.mp4", sound=tmp_path / source)
    with av.open(str(path)) as container:
        assert not container.streams.audio
    assert len(stream_of(path)[3]) == 5
    assert ("broken.mp4: its sound" in caplog.text) == (source == "broken.mp4")


def test_damaged_sound_does_not_cost_the_video(tmp_path):
    source = with_sound(tmp_path / "camera.mkv", "libx264", "aac")
    data = bytearray(source.read_bytes())
    data[len(data) // 2:] = bytes(len(data) - len(data) // 2)
    source.write_bytes(data)
    for suffix in (".mp4", ".webm"):
        assert len(stream_of(write(tmp_path / f"out{suffix}", 50, fps=25, sound=source))[3]) == 50


def test_an_unwritable_video_fails_at_once_and_is_named(tmp_path):
    path = tmp_path / "a folder.mp4"
    (path / "with something").mkdir(parents=True)
    with pytest.raises(OSError, match="a folder.mp4"), VideoWriter(path) as video:
        video.write(draw_frame(0)[0])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        VideoWriter(tmp_path / "file" / "video.mp4")
    with pytest.raises(OSError, match="/proc/video.mp4"):
        VideoWriter("/proc/video.mp4")
    with pytest.raises(ValueError, match=r"video.xyz: expected one of .mp4, .mov, .webm"):
        VideoWriter(tmp_path / "video.xyz")


def test_without_frames_no_file_is_written(tmp_path):
    with VideoWriter(tmp_path / "video.mp4"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_video_is_written_completely_or_not_at_all(tmp_path):
    write(tmp_path / "video.mp4", 2)
    before = (tmp_path / "video.mp4").read_bytes()
    with pytest.raises(KeyError), VideoWriter(tmp_path / "video.mp4") as video:
        for i in range(5):
            video.write(draw_frame(i)[0])
        assert (tmp_path / "video.mp4").read_bytes() == before
        raise KeyError
    assert (tmp_path / "video.mp4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


@pytest.fixture
def full_disk():
    """Limits files to 20 KB, which fails like a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm"])
def test_a_full_disk_is_named(suffix, tmp_path, full_disk):
    path, rng = tmp_path / f"out{suffix}", np.random.default_rng(0)
    with pytest.raises(OSError) as found, VideoWriter(path) as video:
        for _ in range(40):
            video.write(rng.integers(0, 255, (96, 128, 3), np.uint8))
    assert (found.value.filename, found.value.strerror) == (str(path), "File too large")
    assert list(tmp_path.iterdir()) == []


def test_a_constant_frame_rate_has_no_jitter(tmp_path):
    path = write(tmp_path / "video.mp4", 50, fps=30000 / 1001,
                 times=[i * 1001 / 30000 + 3 for i in range(50)])
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stamps = [frame.pts * stream.time_base for frame in container.decode(stream)]
    assert {b - a for a, b in zip(stamps[:-1], stamps[1:])} == {Fraction(1001, 30000)}
