"""Animations and folders of frames, named and damaged as users have them."""

import logging

import numpy as np
import pytest
from PIL import Image
from test_video import SHAPE, make, numbers_of, picture

from masks.read import is_empty
from media import images, video


def pictures(count=5):
    return [Image.fromarray(picture(i)) for i in range(count)]


@pytest.mark.parametrize("name", ["clip.gif", "clip.png", "clip.webp"])
def test_animations_keep_their_durations(name, tmp_path, caplog):
    first, *others = pictures()
    first.save(tmp_path / name, save_all=True, append_images=others,
               duration=[50, 100, 400, 30, 70], lossless=True)
    clip = video.open_clip(tmp_path / name)
    assert clip.count == 5 and clip.fps == 20 and clip.shape == SHAPE
    assert numbers_of(clip.frames()) == list(range(5))
    assert [clip.time(i) for i in range(5)] == pytest.approx([0, 0.05, 0.15, 0.55, 0.58])
    assert numbers_of(clip.backwards(4)) == [3, 2, 1, 0] and numbers_of(clip.frames(3)) == [3, 4]
    assert clip.has(4) and not clip.has(5)
    assert not caplog.records


def test_a_truncated_animation_is_read_to_its_last_frame(tmp_path, caplog):
    rng = np.random.default_rng(0)
    first, *others = [Image.fromarray(rng.integers(0, 255, (*SHAPE, 3), np.uint8))
                      for _ in range(6)]
    path = tmp_path / "clip.png"
    first.save(path, save_all=True, append_images=others, duration=50)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    clip = video.open_clip(path)
    frames = list(clip.frames())
    assert 0 < len(frames) < 6 and clip.count == len(frames)
    assert "clip.png: ends after" in caplog.text and "declares 6" in caplog.text


def deep(i):
    """A 16-bit image, as microscopes and thermal cameras write it."""
    return Image.fromarray(picture(i)[..., 0].astype(np.uint16) * 257)


def test_a_tiff_of_16_bits_is_read_the_same_in_either_byte_order(tmp_path):
    """Also a dark one, which is not taken for one of 8 bits."""
    values = np.arange(200, dtype=np.uint16).reshape(10, 20)
    for order in "<>":
        path = tmp_path / f"{order}.tif"
        mode = "I;16" if order == "<" else "I;16B"
        Image.frombytes(mode, (20, 10), values.astype(f"{order}u2").tobytes()).save(path)
        assert images.read_image(path).max() == 1
        assert not is_empty(path)


@pytest.mark.parametrize("page", [lambda i: Image.fromarray(picture(i)),
                                  lambda i: Image.fromarray(picture(i)[..., 0]),
                                  lambda i: Image.fromarray(picture(i)).convert("CMYK"), deep])
def test_a_multi_page_tiff_is_a_clip(page, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first, *others = map(page, range(5))
    first.save(tmp_path / "stack.tif", save_all=True, append_images=others)
    clip = video.open_clip(tmp_path / "stack.tif")
    assert clip.count == 5 and clip.fps == 24 and clip.shape == SHAPE
    assert numbers_of(clip.frames()) == list(range(5)) and numbers_of(clip.frames(3)) == [3, 4]
    assert numbers_of(clip.backwards(4)) == [3, 2, 1, 0] and clip.time(2) == 2 / 24
    assert clip.has(4) and not clip.has(5)
    assert not caplog.records


@pytest.mark.parametrize("suffix", [".webp", ".png", ".tif"])
def test_exif_orientation_is_applied_to_animations(suffix, tmp_path):
    first, *others = pictures()
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    path = tmp_path / f"phone{suffix}"
    first.save(path, save_all=True, append_images=others, exif=exif, lossless=True)
    clip = video.open_clip(path)
    frames = list(clip.frames())
    assert clip.shape == SHAPE[::-1] and clip.count == 5
    for i, frame in enumerate(frames):
        np.testing.assert_array_equal(frame, np.rot90(picture(i), -1))


def test_a_damaged_page_ends_the_clip_and_is_named(tmp_path, caplog):
    first, *others = pictures()
    path = tmp_path / "stack.tif"
    first.save(path, save_all=True, append_images=others)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    clip = video.open_clip(path)
    assert numbers_of(clip.frames()) == [0, 1] and clip.count == 2
    assert "stack.tif: ends after 2 frames" in caplog.text


@pytest.mark.parametrize("name, form", [("pyramid.tif", "TIFF"), ("photo.jpg", "MPO")])
def test_resolutions_of_one_picture_are_one_frame_and_logged_once(name, form, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first, second = (Image.fromarray(picture(3, shape)) for shape in (SHAPE, (24, 40)))
    first.save(tmp_path / name, format=form, save_all=True, append_images=[second])
    clip = video.open_clip(tmp_path / name)
    assert clip.count == 1 and numbers_of(clip.frames()) == [3]
    assert numbers_of(video.open_clip(tmp_path).frames()) == [3]  # as a frame among others
    (line,) = caplog.messages
    assert f"{name}: holds 2 pictures ({form}), only the first is used" in line


def test_an_unreadable_animation_is_named(tmp_path, monkeypatch):
    first, *others = pictures()
    first.save(tmp_path / "clip.webp", save_all=True, append_images=others)
    monkeypatch.setattr(images, "rgb", lambda _: 1 / 0)
    with pytest.raises(OSError, match="clip.webp: expected a picture or an animation"):
        video.open_clip(tmp_path / "clip.webp")


def test_a_single_file_of_a_series_is_one_frame(tmp_path):
    for i, image in enumerate(pictures(3)):
        image.save(tmp_path / f"{i:05d}.png")
    clip = video.open_clip(tmp_path / "00001.png")
    assert clip.count == 1 and numbers_of(clip.frames()) == [1]
    assert list(clip.frames(1)) == [] and not clip.has(1)


def folder(path, names):
    path.mkdir()
    for i, name in enumerate(names):
        Image.fromarray(picture(i)).save(path / name)
    return path


def test_folders_are_sorted_naturally(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    names = [f"frame_{i}.png" for i in range(12)]
    clip = video.open_clip(folder(tmp_path / "clip", names))
    assert numbers_of(clip.frames()) == list(range(12))
    assert numbers_of(clip.backwards(12)) == list(range(11, -1, -1))
    assert clip.frame_name(10) == "frame_10" and clip.number(10) == clip.index(10) == 10
    assert "natural order, frame_0.png to frame_11.png" in caplog.text


@pytest.mark.parametrize("names, numbers", [
    (["00005.png", "00006.png", "00007.png"], [5, 6, 7]),
    (["shot2_1001.jpg", "shot2_1002.jpg", "shot2_1005.jpg"], [1001, 1002, 1005]),
    (["frame_1.png", "frame_2.png", "frame_10.png"], [1, 2, 10]),
    (["0.png", "1.png"], [0, 1]),
    (["a.png", "b2.png", "b10.png"], [0, 1, 2]),
    (["1.png", "2.png", "last.png"], [0, 1, 2]),
    (["1.png", "01.jpg", "2.png"], [0, 1, 2]),
    (["a1.png", "b1.png"], [0, 1]),
    (["t_0.25.png", "t_0.5.png", "t_0.75.png"], [0, 1, 2]),
    (["v1.8.png", "v1.9.png", "v1.10.png"], [8, 9, 10]),
    (["photo7.png"], [0])])
def test_frame_numbers_come_from_file_names(names, numbers, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    clip = video.open_clip(folder(tmp_path / "clip", names))
    assert [clip.number(i) for i in range(clip.count)] == numbers
    assert [clip.index(number) for number in numbers] == list(range(len(names)))
    logged = f"(frame {numbers[0]})" in caplog.text
    assert logged == (numbers != list(range(len(names))))
    with pytest.raises(ValueError, match=f"no frame {numbers[-1] + 1}, .* {len(names)} frames, "
                                         f"numbered {numbers[0]} to {numbers[-1]}"):
        clip.index(numbers[-1] + 1)


@pytest.mark.parametrize("names", [
    ["t_0.25.png", "t_0.5.png", "t_1.0.png", "t_9.75.png", "t_10.125.png"],
    ["v2.1.png", "v2.2.png", "v2.9.png", "v2.10.png", "v2.11.png"],  # takes of version 2
    ["2024.9.1.png", "2024.9.2.png", "2024.11.1.png"]])
def test_decimal_numbers_are_distinguished_from_counters_and_dates(names, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    clip = video.open_clip(folder(tmp_path / "clip", names))
    assert numbers_of(clip.frames()) == list(range(len(names)))
    assert ("decimal numbers" in caplog.text) == (names[0] == "t_0.25.png")


def test_a_number_in_a_gap_means_the_next_frame(tmp_path):
    clip = video.open_clip(folder(tmp_path / "clip", ["0.png", "5.png", "10.png"]))
    assert [clip.first_from(number) for number in (0, 1, 5, 6, 10, 50)] == [0, 1, 1, 2, 2, 3]


def test_files_that_are_not_frames_are_skipped(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = folder(tmp_path / "clip", ["0.png", "1.png", "2.png", "mask_00001.png", "first.png"])
    for name in ("._0.png", "._mask.png", "Thumbs.db", "notes.txt", ".DS_Store"):
        (path / name).write_bytes(b"no image")
    (path / "masks").mkdir()
    clip = video.open_clip(path, [path / "masks" / ".." / "first.png"])
    assert [clip.frame_name(i) for i in range(clip.count)] == ["0", "1", "2"]
    assert "masks, not frames: first.png, mask_00001.png" in caplog.text


def test_frames_may_have_mask_in_their_names(tmp_path):
    clip = video.open_clip(folder(tmp_path / "clip", ["mask_00000.png", "mask_00001.png"]))
    assert numbers_of(clip.frames()) == [0, 1]


def test_folders_without_a_clip_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="empty: no frames there"):
        video.open_clip(folder(tmp_path / "empty", []))
    with pytest.raises(ValueError, match="a.png: a second frame of that name, next to a.jpg"):
        video.open_clip(folder(tmp_path / "twins", ["a.jpg", "a.png"]))
    path = folder(tmp_path / "sizes", ["0.png", "1.png"])
    images.write_image(path / "1.png", picture(0, (40, 60)))
    with pytest.raises(ValueError, match="1.png: a frame of 60x40 pixels, expected 80x48"):
        video.open_clip(path)  # before any work, whichever frame it is
    (path / "1.png").write_bytes(b"")
    with pytest.raises(OSError, match="1.png: expected a frame"):
        video.open_clip(path)
    with pytest.raises(FileNotFoundError, match="nowhere.mp4: no such file"):
        video.open_clip("nowhere.mp4")


@pytest.mark.parametrize("name, data", [
    ("empty.mp4", b""), ("empty.gif", b""), ("text.mp4", b"hello"), ("text.txt", b"hello\n" * 999),
    ("text.nfo", b"hello\n" * 999), ("noise.mkv", bytes(range(256)) * 9),
    ("cut.gif", b"GIF89a"), ("cut.png", b"\x89PNG\r\n\x1a\n")])
def test_a_path_that_is_not_a_clip_is_named(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(OSError, match=rf"{name}: expected .*(video|animation)") as found:
        video.open_clip(tmp_path / name)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["2024-11-14T22:57:44.mp4", "clip%03d.mp4", "-x.mp4", "a#b?c.mp4",
                                  "my clip 😀.mp4", "[x]*.mp4"])
def test_odd_file_names_are_opened(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "clip.mp4", 3).rename(tmp_path / name)
    assert numbers_of(video.open_clip(name).frames(0, 2)) == [0, 1]
