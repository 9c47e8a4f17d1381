"""Several mask files: of a sequence, and the user's own; sizes, orientation, bit depth."""

import logging

import numpy as np
import pytest
from conftest import draw_frame
from PIL import Image
from test_masks import BALL, BLACK, DISK, GREEN, GRID, ONE, RED, alike, davis, flat, grey, painted

from masks.encoding import MaskEncoding
from masks.read import is_empty, mask_warning, read_mask, read_masks
from media import images

# -- a sequence

def saved(folder, masks) -> list:
    for i, mask in enumerate(masks):
        (mask if isinstance(mask, Image.Image) else grey(mask)).save(folder / f"{i:05d}.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("values, meaning", [
    ([(0, 1, 255), (0, 255), (0, 255)], 0), ([(0, 255), (0, 255), (0, 1)], 0),
    ([(0,), (0, 255), (0, 1, 255)], 0), ([(0, 255), (0,), (0, 255)], 1)])
def test_255_has_the_same_meaning_throughout_a_sequence(values, meaning, tmp_path):
    paths = saved(tmp_path, [np.array(value, np.uint8).repeat(9)[None] for value in values])
    coding = MaskEncoding.detect(paths)
    for path, value in zip(paths, values):
        expected = np.array([meaning if v == 255 else v for v in value], np.uint8).repeat(9)[None]
        np.testing.assert_array_equal(coding.read(path), expected)


def test_hard_and_soft_masks_of_a_sequence_are_read_alike(tmp_path):
    """Predicted masks often start with the user's hard mask; all share one threshold."""
    hard = (DISK >= 0.5) * 255
    paths = saved(tmp_path, [hard, DISK * 255, DISK * 100])
    coding = MaskEncoding.detect(paths)
    np.testing.assert_array_equal(coding.read(paths[0]), DISK >= 0.5)
    np.testing.assert_array_equal(coding.read(paths[1]), (DISK * 255).astype(np.uint8) >= 128)
    assert not coding.read(paths[2]).any()


def test_davis_colours_may_be_mixed_with_ids(tmp_path):
    paths = saved(tmp_path, [davis(GRID), davis(GRID).convert("RGB")])
    coding = MaskEncoding.detect(paths)
    np.testing.assert_array_equal(coding.read(paths[1]), GRID)
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"2.png: holds the colour \(1, 2, 3\)"):
        coding.read(tmp_path / "2.png")


def test_empty_masks_do_not_affect_the_encoding(tmp_path):
    first, truth = flat(BLACK, RED)
    paths = saved(tmp_path, [np.zeros((96, 160)), first])
    np.testing.assert_array_equal(MaskEncoding.detect(paths).read(paths[1]), truth)
    assert is_empty(paths[0]) and not is_empty(paths[1])


# -- a person's own files

def files(folder, **masks) -> list:
    for name, mask in masks.items():
        (mask if isinstance(mask, Image.Image) else grey(mask)).save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in masks]


def test_white_files_of_one_frame_are_separate_objects(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    a, b, c, d = files(tmp_path, a=(DISK >= 0.5) * 255, b=(BALL >= 0.5) * 255,
                       c=(DISK >= 0.5) * 255, d=(BALL >= 0.5) * 255)
    truth = painted(BLACK, (DISK, RED), (BALL, GREEN))[1]
    found = read_masks({0: [a, b], 5: [c, d]})
    assert list(found) == [0, 5]
    for mask in found.values():
        np.testing.assert_array_equal(mask, truth)
    assert "frame 0: objects a.png 1, b.png 2" in caplog.text


def test_ids_of_several_files_are_kept_if_free(tmp_path):
    a, b = files(tmp_path, a=(DISK >= 0.5) * 2, b=(BALL >= 0.5) * 5)
    assert set(np.unique(read_masks({3: [a, b]})[3])) == {0, 2, 5}
    assert set(np.unique(read_masks({3: [a, a, b]})[3])) == {0, 1, 5}  # a covers a


def test_overlapping_files_are_logged(tmp_path, caplog):
    a, b = files(tmp_path, a=np.array([[255, 255, 0]]), b=np.array([[0, 255, 255]]))
    np.testing.assert_array_equal(read_masks({0: [a, b]})[0], [[1, 2, 2]])
    assert "b.png: overlaps the other masks of frame 0 in 1 pixels" in caplog.text


def test_white_in_several_frames_is_one_object_and_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    a, b = files(tmp_path, a=(DISK >= 0.5) * 255, b=(BALL >= 0.5) * 255)
    found = read_masks({0: [a], 5: [b]})
    assert np.unique(found[5]).tolist() == [0, 1]
    assert "a.png, b.png: white is object 1 in each of them, the same object" in caplog.text


def test_a_later_id_joins_a_white_first_mask(tmp_path):
    """The later one may be a corrected mask of the toolkit."""
    a, b = files(tmp_path, a=(DISK >= 0.5) * 255, b=davis((DISK >= 0.5) * 1))
    found = read_masks({0: [a], 57: [b]})
    np.testing.assert_array_equal(found[0], found[57])


def test_an_empty_mask_is_refused_first_and_allowed_later(tmp_path):
    empty, full = files(tmp_path, empty=np.zeros((96, 160)), full=(DISK >= 0.5) * 255)
    with pytest.raises(ValueError, match="empty.png: the mask holds no object.*frame 2"):
        read_masks({2: [empty], 4: [full]})
    assert not read_masks({2: [full], 4: [empty]})[4].any()


@pytest.mark.parametrize("form", [np.uint8, np.uint16, np.float32])
def test_pages_of_a_tiff_are_masks_of_consecutive_frames(form, tmp_path, caplog):
    """As napari and ImageJ export labels; pages without labels are empty."""
    caplog.set_level(logging.INFO)
    pages = [Image.fromarray((GRID * (i in (1, 3))).astype(form)) for i in range(5)]
    path = tmp_path / "labels.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    masks = read_masks({10: [path]})
    assert list(masks) == [11, 13]
    for mask in masks.values():
        np.testing.assert_array_equal(mask, GRID)
    assert "labels.tif: its pages are the masks" in caplog.text and "frames 11, 13" in caplog.text
    pages[0].save(path, save_all=True, append_images=[pages[0]])
    with pytest.raises(ValueError, match="labels.tif: no page of it holds an object"):
        read_masks({0: [path]})


def test_a_stack_may_accompany_another_mask(tmp_path):
    Image.fromarray(ONE).save(tmp_path / "first.png")
    Image.fromarray(0 * GRID).save(tmp_path / "labels.tif", save_all=True,
                                   append_images=[Image.fromarray(GRID)])
    masks = read_masks({0: [tmp_path / "first.png", tmp_path / "labels.tif"]})
    np.testing.assert_array_equal(masks[0], ONE)
    np.testing.assert_array_equal(masks[1], GRID)


def test_an_animated_mask_is_its_first_frame_and_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first, second = (Image.fromarray(grid * 255) for grid in (ONE, ONE[::-1].copy()))
    first.save(tmp_path / "mask.gif", save_all=True, append_images=[second])
    np.testing.assert_array_equal(read_masks({0: [tmp_path / "mask.gif"]})[0], ONE)
    assert "mask.gif: holds 2 pictures (GIF), only the first is used" in caplog.text


@pytest.mark.parametrize("shape", [None, (96, 160)])
def test_masks_of_another_size_are_named(tmp_path, shape):
    full, small, turned = files(tmp_path, full=(DISK >= 0.5) * 255, small=np.full((9, 9), 255),
                                turned=((DISK >= 0.5) * 255).T)
    with pytest.raises(ValueError, match="small.png: a mask of 9x9 pixels, expected 160x96"):
        read_masks({0: [full], 3: [small]}, shape)
    with pytest.raises(ValueError, match="turned.png.*turned by 90 degrees"):
        read_masks({0: [full], 3: [turned]}, shape)


@pytest.mark.parametrize("side, cell, words", [
    (20, 8, None), (6, 8, ["object 1", "8 pixels", "--size"]), (6, 4, None)])
def test_small_objects_are_logged(side, cell, words):
    mask = np.zeros((96, 160), np.uint8)
    mask[5:5 + side, 5:5 + side] = 1
    found = mask_warning(mask, cell)
    assert found is None if words is None else all(word in found for word in words)


def test_many_objects_are_logged():
    mask = np.zeros((160, 160), np.uint8)
    for i in range(254):
        mask[10 * (i // 16):10 * (i // 16) + 6, 10 * (i % 16):10 * (i % 16) + 6] = i + 1
    found = mask_warning(mask, 8)
    assert "254 objects" in found and "-p" in found and "1, 2, 3, 4, 5, 6, 7, 8 ..." in found


# -- orientation and depth, of frames and masks

@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied_to_frames_and_masks(orientation, turns, suffix, tmp_path):
    frame, mask = draw_frame(3)
    path = tmp_path / f"file.{suffix}"
    for read, array in ((images.read_image, frame), (read_mask, mask * 255)):
        if suffix == "tif" and array.ndim == 2:
            continue  # Pillow 13.0 mixes their pixels up
        image = Image.fromarray(array)
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(path, exif=exif, quality=95)
        shown = np.rot90(array, turns)
        assert images.image_shape(path, "a frame") == shown.shape[:2]
        found = read(path)
        if array.ndim == 2:
            assert alike(found, shown > 0) > 0.97
        else:
            assert np.abs(found.astype(int) - shown).mean() < 12


def test_frames_of_16_bits_are_scaled(tmp_path):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    expected = np.arange(256).reshape(16, 16)
    np.testing.assert_array_equal(images.read_image(tmp_path / "deep.png"),
                                  np.repeat(expected[..., None], 3, 2))
    Image.fromarray((expected / 255).astype(np.float32)).save(tmp_path / "deep.tif")
    np.testing.assert_array_equal(images.read_image(tmp_path / "deep.tif")[..., 0], expected)
