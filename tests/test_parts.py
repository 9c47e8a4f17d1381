"""Ranges of frames and cut-outs: soft edges, videos with alpha."""

import csv
import re

import av
import cv2
import numpy as np
import pytest
from conftest import draw_frame
from PIL import Image

import main
from masks.read import read_mask
from media import drawing, images

FRAMES = 10


@pytest.fixture
def clip(tmp_path):
    """Arguments that segment 160x96 frames numbered from 5, from the mask of frame 8."""
    for i in range(FRAMES):
        image, mask = (x.repeat(2, 0).repeat(2, 1) for x in draw_frame(i))
        images.write_image(tmp_path / "clip" / f"{i + 5:05d}.png", image)
        images.write_mask(tmp_path / f"{i + 5}.png", mask)
    return ["-m", "segment", "--video", str(tmp_path / "clip"), "--mask",
            f"8:{tmp_path / '8.png'}", "-c", "cpu", "-j", str(tmp_path / "out")]


def written(folder):
    return [int(path.stem) for path in sorted(folder.glob("*.png"))]


def numbers(path):
    with path.open(newline="") as file:
        return [int(row["frame"]) for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("part, expected", [
    ("7:11", [7, 8, 9, 10]), ("8:9", [8]), ("12:", None), (":8", None), (":10", [5, 6, 7, 8, 9]),
    ("8:", list(range(8, 15))), ("6:15", list(range(6, 15))), ("0:9", [5, 6, 7, 8]),
    ("13:50", None)])
def test_a_part_of_a_clip_is_segmented(part, expected, clip, tmp_path, capsys):
    status = main.main([*clip, "--frames", part, "--cutout", "transparent"])
    if expected is None:
        assert status == 2 and "frame 8 is not in --frames" in capsys.readouterr().err
        return
    assert status == 0
    assert written(tmp_path / "out" / "masks") == written(tmp_path / "out" / "cutout") == expected
    assert numbers(tmp_path / "out" / "confidence.csv") == expected
    with av.open(str(tmp_path / "out" / "overlay.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == len(expected)
    assert main.main([*clip, "--frames", part, "--cutout", "transparent"]) == 0
    assert f"{len(expected)} frames were already finished" in capsys.readouterr().out


@pytest.mark.slow
def test_frames_to_review_are_named_by_their_numbers(clip, tmp_path, capsys):
    for number in range(11, 15):  # where the object is gone
        image = images.read_image(tmp_path / "clip" / f"{number:05d}.png")
        images.write_image(tmp_path / "clip" / f"{number:05d}.png", np.minimum(image, 59))
    assert main.main(clip) == 0
    found = re.search(r"--mask 8:FIRST.png (\d+):CORRECTED.png", said := capsys.readouterr().out)
    assert found and 5 <= int(found[1]) <= 14 and int(found[1]) != 8, said
    assert "frame 8 of" not in said
    report = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r"frames? 1\d( to 14)? of object 1 \((not visible|\d+ % sure)\)", report)


@pytest.mark.parametrize("part", ["", ":", "5", "9:9", "9:7", "a:b", "-3:5", "1:2:3"])
def test_an_invalid_range_is_refused(part, clip, capsys):
    assert main.main([*clip, f"--frames={part}"]) == 2
    assert "--frames" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["3:5", "15:16", "15:"])
def test_a_range_outside_the_clip_is_refused(part, clip, capsys):
    assert main.main([*clip, "--frames", part]) == 2
    assert "numbered 5 to 14" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("form, codec, pixels", [
    ("mov", "prores", "yuva444p"), ("webm", "vp9", "yuv")])
def test_a_cutout_video_has_the_alpha_of_the_images(form, codec, pixels, clip, tmp_path):
    assert main.main([*clip, "--cutout", "transparent"]) == 0
    assert main.main([*clip[:-1], str(tmp_path / "film"), "--cutout", "transparent",
                      "--cutout_format", form]) == 0
    pictures = [np.array(Image.open(path))
                for path in sorted((tmp_path / "out" / "cutout").iterdir())]
    with av.open(str(tmp_path / "film" / f"cutout.{form}")) as film:
        stream = film.streams.video[0]
        if form == "webm":  # FFmpeg's own decoder leaves the alpha out
            decoder = av.CodecContext.create("libvpx-vp9", "r")
            frames = [frame for packet in film.demux(stream) for frame in decoder.decode(packet)]
        else:
            frames = list(film.decode(stream))
        assert stream.codec_context.codec.canonical_name == codec
    assert len(frames) == len(pictures) and frames[0].format.name.startswith(pixels)
    for frame, picture in zip(frames, pictures):
        alpha = frame.to_ndarray(format="rgba")[..., 3].astype(int)
        assert abs(alpha - picture[..., 3]).mean() < 2


def test_edges_come_from_the_probabilities():
    ramp = np.tile(np.linspace(0, 1, 21, dtype=np.float32), (9, 1))
    alpha = drawing.soft(ramp >= 0.5, ramp)
    # a ramp of width 0.6 around 0.5, at most 2 pixels outside the mask
    expected = np.clip((ramp[0] - 0.5) / 0.6 + 0.5, 0, 1) * 255
    expected[:8] = 0
    np.testing.assert_allclose(alpha, np.tile(expected, (9, 1)), atol=1)


def test_alpha_agrees_with_the_mask_for_any_probabilities():
    rng = np.random.default_rng(0)
    mask, probability = rng.random((40, 50)) > 0.7, rng.random((40, 50), dtype=np.float32)
    for alpha in (drawing.soft(mask), drawing.soft(mask, probability),
                  drawing.soft(mask, probability, 0.9)):
        np.testing.assert_array_equal(alpha >= 128, mask)
    assert not drawing.soft(np.zeros((4, 5))).any()


@pytest.mark.slow
def test_cutout_edges_are_soft_and_hide_the_background(clip, tmp_path):
    assert main.main([*clip, "--cutout", "transparent"]) == 0
    for number in (5, 8, 14):
        picture = np.array(Image.open(tmp_path / "out" / "cutout" / f"{number:05d}.png"))
        mask = read_mask(tmp_path / "out" / "masks" / f"{number:05d}.png")
        alpha = picture[..., 3]
        np.testing.assert_array_equal(alpha >= 128, mask > 0)
        np.testing.assert_array_equal(alpha > 0, mask > 0)
        soft = (alpha > 0) & (alpha < 255)
        assert soft.any() and not picture[alpha == 0].any()
        band = cv2.dilate((mask > 0).astype(np.uint8), np.ones((9, 9))) > 0
        assert not soft[~band].any()
