"""Mask files as programs write them: a disk stays one object, ids ids, 255 means one thing."""

import logging

import cv2
import numpy as np
import pytest
from conftest import draw_frame
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw

from media import images
from media.coding import Coding
from media.drawing import PALETTE
from media.masks import concern, is_empty, read_mask, read_masks

GRID = np.array([[0, 1, 2], [0, 0, 1]], np.uint8)
ONE = (GRID > 0).astype(np.uint8)
VOID = np.array([[0, 1, 2], [255, 0, 255]], np.uint8)
SIZE = 160, 96
BLACK, WHITE, RED, GREEN, BLUE = (0, 0, 0), (255,) * 3, (255, 0, 0), (0, 255, 0), (0, 0, 255)


def grey(values) -> Image.Image:
    return Image.fromarray(np.array(values, np.uint8))


def palette(values, *colours) -> Image.Image:
    image = grey(values)
    image.putpalette([c for colour in colours or (BLACK, (200, 0, 0), (0, 200, 0))
                      for c in colour] + [90] * 3 * (256 - len(colours or (1,) * 3)))
    return image


def davis(values) -> Image.Image:
    image = grey(values)
    image.putpalette(PALETTE.tobytes())
    return image


def with_alpha(values, alpha=255) -> Image.Image:
    return Image.merge("LA", [grey(values), grey(np.broadcast_to(alpha, np.shape(values)))])


KINDS = {  # image, its mode in the file, the mask
    "1 bit": (grey(ONE * 255).convert("1"), "1", ONE),
    "grey 0/1": (grey(ONE), "L", ONE),
    "grey 0/255": (grey(ONE * 255), "L", ONE),
    "grey ids": (grey(GRID), "L", GRID),
    "grey ids with void": (grey(VOID), "L", np.where(VOID == 255, 0, VOID)),
    "grey, all object": (grey(np.full((2, 3), 255)), "L", np.ones((2, 3), np.uint8)),
    "grey, empty": (grey(np.zeros((2, 3))), "L", np.zeros((2, 3), np.uint8)),
    "grey 0/255, opaque": (with_alpha(ONE * 255), "LA", ONE),
    "grey ids, opaque": (with_alpha(GRID), "LA", GRID),
    "palette ids": (palette(GRID), "P", GRID),
    "palette ids with void": (davis(VOID), "P", np.where(VOID == 255, 0, VOID)),
    "palette 0/255": (palette(ONE * 255), "P", ONE),
    "16 bits, ids": (Image.fromarray(GRID.astype(np.uint16)), "I;16", GRID),
    "16 bits, 0/65535": (Image.fromarray(ONE.astype(np.uint16) * 65535), "I;16", ONE),
    "16 bits, large numbers": (Image.fromarray(np.kron(GRID, np.ones((4, 4))).astype(np.uint16)
                                               * 1000), "I;16", np.kron(GRID, np.ones((4, 4)))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [False, True])
def test_every_kind_of_mask_is_read(tmp_path, kind, own):
    image, mode, expected = KINDS[kind]
    path = tmp_path / "mask.png"
    image.save(path)
    assert Image.open(path).mode == mode
    if own and kind == "grey ids with void":
        expected = np.where(VOID == 255, 0, VOID)  # 255 fills nothing: an outline, not an object
    mask = read_mask(path, own=own)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_single_object_makes_every_value_one(tmp_path, kind):
    image, _, expected = KINDS[kind]
    image.save(tmp_path / "mask.png")
    if "void" in kind:
        expected = VOID  # DAVIS-2016 knows no void
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", single_object=True),
                                  (expected > 0).astype(np.uint8))


SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)
MASKS = st.sets(st.integers(0, 255), min_size=1, max_size=4).flatmap(
    lambda ids: hnp.arrays(np.uint8, SHAPES, elements=st.sampled_from(sorted(ids))))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(MASKS)
def test_mask_round_trip(tmp_path_factory, mask):
    """Ids below 255 come back; 255 is object 1 if it is the only one, else void."""
    path = tmp_path_factory.getbasetemp() / "round_trip.png"
    images.write_mask(path, mask)
    lonely = all(value in (0, 255) for value in mask.flat)
    expected = [[(1 if lonely else 0) if value == 255 else value for value in row]
                for row in mask.tolist()]
    np.testing.assert_array_equal(read_mask(path), expected)


# What follows is drawn large and reduced, as drawing programs smooth edges: `cover` tells how much
# of each pixel a shape covers, and a pixel belongs to it from half on.

def cover(kind: str, box) -> np.ndarray:
    large = Image.new("L", (SIZE[0] * 8, SIZE[1] * 8))
    box = [8 * side for side in box]
    getattr(ImageDraw.Draw(large), kind)(box, fill=255, **({"width": 24} if kind == "line" else {}))
    return np.asarray(large.resize(SIZE, Image.Resampling.BOX)) / 255


DISK, BALL = cover("ellipse", (20, 30, 56, 66)), cover("ellipse", (120, 70, 140, 90))
TOUCHING, LINE = cover("ellipse", (54, 30, 90, 66)), cover("line", (10, 10, 120, 80))
DOT = cover("ellipse", (60, 40, 65, 45))


def painted(background, *shapes) -> tuple[Image.Image, np.ndarray]:
    """Shapes with smooth edges, and the true ids, 1 the first."""
    picture = np.broadcast_to(np.array(background, float), (*DISK.shape, 3))
    truth = np.zeros(DISK.shape, np.uint8)
    for i, (share, colour) in enumerate(shapes, start=1):
        picture = picture * (1 - share[..., None]) + np.array(colour) * share[..., None]
        truth[share >= 0.5] = i
    return Image.fromarray(picture.round().astype(np.uint8)), truth


def alike(mask, truth) -> float:
    """The least IoU of the objects, whatever their numbers; 0 where there are more or fewer."""
    ids, wanted = (np.unique(m[m > 0]) for m in (mask, truth))
    if len(ids) != len(wanted):
        return 0.0
    return min(max(np.sum((mask == i) & (truth == t)) / np.sum((mask == i) | (truth == t))
                   for i in ids) for t in wanted)


SAVED = {
    "png": lambda image: image,
    "quantised to 8": lambda image: image.quantize(8),
    "quantised to 64": lambda image: image.quantize(64),
    "web palette": lambda image: image.convert("P", palette=Image.Palette.WEB),
    "web palette, not dithered": lambda image: image.convert(
        "P", palette=Image.Palette.WEB, dither=Image.Dither.NONE),
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("shape", [DISK, BALL, LINE, DOT], ids=["disk", "ball", "line", "dot"])
@pytest.mark.parametrize("background, colour", [
    (BLACK, WHITE), (BLACK, (220, 20, 30)), (BLACK, (128, 0, 0)), (WHITE, (220, 20, 30)),
    ((30, 30, 30), (90, 200, 90))])
def test_a_smooth_shape_is_one_object(tmp_path, saved, shape, background, colour):
    image, truth = painted(background, (shape, colour))
    SAVED[saved](image).save(tmp_path / "mask.png")
    # a palette of 216 colours has few steps for an edge
    assert alike(read_mask(tmp_path / "mask.png", own=True), truth) > (
        0.6 if "web" in saved else 0.85)


@pytest.mark.parametrize("values", [255, 200, 64])
@pytest.mark.parametrize("blur", [0, 1, 3, 8])
def test_a_feathered_grey_shape_is_cut_at_half(tmp_path, values, blur, caplog):
    caplog.set_level(logging.INFO)
    soft = cv2.GaussianBlur(DISK, (0, 0), blur) if blur else DISK
    soft = (soft / soft.max() * values).round().astype(np.uint8)
    Image.fromarray(soft).save(tmp_path / "soft.png")
    assert alike(read_mask(tmp_path / "soft.png"), 2 * soft.astype(int) >= values) > 0.97
    assert "soft.png: soft edges" in caplog.text
    Image.fromarray(soft).convert("RGB").save(tmp_path / "soft.jpg", quality=90)
    assert alike(read_mask(tmp_path / "soft.jpg"), (2 * soft.astype(int) >= values)) > 0.93


@pytest.mark.parametrize("background", [BLACK, WHITE])
@pytest.mark.parametrize("saved", ["png", "quantised to 64", "jpg"])
def test_several_smooth_objects_in_colour(tmp_path, background, saved):
    image, truth = painted(background, (DISK, RED), (BALL, GREEN), (TOUCHING, BLUE))
    path = tmp_path / f"mask.{'jpg' if saved == 'jpg' else 'png'}"
    SAVED.get(saved, SAVED["png"])(image).save(path, quality=92)
    assert alike(read_mask(path, own=True), truth) > 0.93


def test_several_smooth_objects_in_grey(tmp_path):
    """The edge of the bright one passes through the value of the dark one."""
    image, truth = painted(BLACK, (DISK, (128,) * 3), (BALL, WHITE))
    image.convert("L").save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), truth)


@pytest.mark.parametrize("values", [(1, 2), (80, 160), (255,), (1, 2, 3), (7, 8, 9, 10)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("width", [9, 2, 1])
def test_ids_stay_ids(values, mode, width, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    mask = np.zeros((40, 70), np.uint8)
    for i, value in enumerate(values):
        mask[5:20, 15 * i + 3:15 * i + 3 + width] = value
    Image.fromarray(mask).convert(mode).save(tmp_path / "ids.png")
    found = read_mask(tmp_path / "ids.png", own=True)
    np.testing.assert_array_equal(found, mask if values != (255,) else mask > 0)
    assert not caplog.text


def test_a_thin_object_between_two_others_stays_one(tmp_path):
    """In a palette of ids, and among small numbers: a leash, one pixel wide."""
    mask = np.zeros((40, 70), np.uint8)
    mask[5:30, 5:20], mask[5:30, 20], mask[5:30, 21:40] = 1, 2, 3
    for image in (grey(mask), davis(mask)):
        image.save(tmp_path / "ids.png")
        np.testing.assert_array_equal(read_mask(tmp_path / "ids.png"), mask)


def test_254_tiny_objects_stay_apart(tmp_path):
    mask = np.zeros((160, 160), np.uint8)
    for i in range(254):
        mask[10 * (i // 16):10 * (i // 16) + 6, 10 * (i % 16):10 * (i % 16) + 6] = i + 1
    grey(mask).save(tmp_path / "ids.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "ids.png", own=True), mask)


def test_white_beside_other_objects_is_refused(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 3:12], mask[5:20, 20:30] = 128, 255
    Image.fromarray(mask).save(tmp_path / "two.png")
    with pytest.raises(ValueError, match="two.png: 255 beside 128"):
        read_mask(tmp_path / "two.png", own=True)


@pytest.mark.parametrize("save", [
    lambda image, path: image.save(path), lambda image, path: image.convert("L").save(path),
    lambda image, path: image.quantize(64).save(path)])
def test_a_picture_is_no_mask(tmp_path, save):
    noise = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    picture = cv2.resize(noise, SIZE, interpolation=cv2.INTER_CUBIC)
    save(Image.fromarray(picture), tmp_path / "frame.png")
    with pytest.raises(ValueError, match="frame.png: expected a mask.*found a picture"):
        read_mask(tmp_path / "frame.png", own=True)


def flat(*colours) -> tuple[Image.Image, np.ndarray]:
    """Squares of flat colours, from the top down, and ids in this order; colours[0] around."""
    picture = np.full((96, 160, 3), colours[0], np.uint8)
    truth = np.zeros((96, 160), np.uint8)
    for i, colour in enumerate(colours[1:]):
        place = slice(8 + 24 * i, 24 + 24 * i), slice(20, 60)
        picture[place], truth[place] = colour, i + 1
    return Image.fromarray(picture), truth


@pytest.mark.parametrize("colours, ids, words", [
    ((BLACK, (250, 50, 83), (61, 245, 61)), (1, 2), "(250, 50, 83) is 1, (61, 245, 61) is 2"),
    ((BLACK, (0, 128, 0), (128, 0, 0)), (2, 1), "(0, 128, 0) is 2, (128, 0, 0) is 1"),
    ((BLACK, (64, 0, 0), (128, 0, 0)), (8, 1), "(64, 0, 0) is 8"),
    ((BLACK, (10, 200, 90), (128, 0, 0)), (2, 1), "(10, 200, 90) is 2"),
    ((WHITE, (250, 50, 83), (61, 245, 61)), (1, 2), "the background"),
    ((BLACK, (224, 224, 192), (128, 0, 0)), (0, 1), "(224, 224, 192) is 0"),  # VOC's void
])
@pytest.mark.parametrize("kind", ["RGB", "RGBA", "P"])
def test_flat_colours_are_ids(colours, ids, words, kind, tmp_path, caplog):
    """As CVAT and labelme export them: DAVIS' colours their own ids, others in order."""
    caplog.set_level(logging.INFO)
    image, truth = flat(*colours)
    if kind == "P":  # with the background last, so that indices mean nothing
        order = [*colours[1:], colours[0]]
        indices = np.array([len(colours) - 1, *range(len(colours) - 1)], np.uint8)[truth]
        image = palette(indices, *order)
    else:
        image = image.convert(kind)
    image.save(tmp_path / "mask.png")
    expected = np.array([0, *ids], np.uint8)[truth]
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), expected)
    assert words in caplog.text and "mask.png" in caplog.text


def test_colours_keep_their_ids_from_file_to_file(tmp_path):
    """Also where each file has a palette of its own, as converters make them."""
    first, truth = flat(BLACK, RED, BLUE)
    second, other = flat(BLACK, GREEN, RED)
    for name, image in (("0.png", first), ("1.png", second)):
        image.quantize(8).save(tmp_path / name)
    coding = Coding.of([tmp_path / "0.png", tmp_path / "1.png"])
    np.testing.assert_array_equal(coding.read(tmp_path / "0.png"), truth)
    np.testing.assert_array_equal(coding.read(tmp_path / "1.png"),
                                  np.array([0, 3, 1], np.uint8)[other])
    found = read_masks({0: [tmp_path / "0.png"], 7: [tmp_path / "1.png"]})
    np.testing.assert_array_equal(found[7], np.array([0, 3, 1], np.uint8)[other])


@pytest.mark.parametrize("index, colours", [(1, (WHITE, BLACK)), (1, (RED, (9, 9, 9))),
                                            (2, (RED, GREEN, WHITE)), (2, (GREEN, RED, BLACK))])
def test_a_palette_whose_background_is_not_the_first_entry(index, colours, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    truth = (DISK >= 0.5).astype(np.uint8)
    if len(colours) > 2:
        truth[BALL >= 0.5] = 2
    indices = np.array([index, *(i for i in range(len(colours)) if i != index)], np.uint8)[truth]
    palette(indices, *colours).save(tmp_path / "mask.png")
    assert alike(read_mask(tmp_path / "mask.png", own=True), truth) == 1
    assert "mask.png" in caplog.text


def test_objects_all_around_the_frame_are_said(tmp_path, caplog):
    grey(np.where(DISK >= 0.5, 0, 255)).save(tmp_path / "inverted.png")
    assert read_masks({0: [tmp_path / "inverted.png"]})[0][0, 0] == 1
    assert "inverted.png: objects cover the border" in caplog.text


def picture() -> np.ndarray:
    noise = np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    return cv2.resize(noise, SIZE, interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("colours", [
    picture(), picture() * (DISK > 0)[..., None].astype(np.uint8), np.full((96, 160, 3), 255),
    np.zeros((96, 160, 3)), np.full((96, 160, 3), RED)],
    ids=["cut-out", "cut-out, black below", "white", "black", "red"])
@pytest.mark.parametrize("opacity", [255, 128])
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_mask_in_the_alpha_channel(colours, opacity, suffix, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    alpha = (DISK * opacity).round()
    path = tmp_path / f"cutout.{suffix}"
    Image.fromarray(np.dstack([colours, alpha]).astype(np.uint8)).save(path, lossless=True,
                                                                         exact=True)
    assert not is_empty(path)
    assert alike(read_mask(path, own=True), DISK >= 0.5) > 0.97
    assert f"cutout.{suffix}: the mask is in the alpha channel" in caplog.text


def test_grey_with_alpha_and_a_transparent_palette_entry(tmp_path):
    with_alpha(np.full(DISK.shape, 255), (DISK * 255).round()).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "la.png"), DISK >= 0.5)
    for transparent in (0, 1):
        indices = (DISK >= 0.5) != (transparent == 1)
        palette(indices, *[WHITE] * 2).save(tmp_path / "p.png", transparency=transparent)
        np.testing.assert_array_equal(read_mask(tmp_path / "p.png", own=True), DISK >= 0.5)


# -- a sequence

def saved(folder, masks) -> list:
    for i, mask in enumerate(masks):
        (mask if isinstance(mask, Image.Image) else grey(mask)).save(folder / f"{i:05d}.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("values, meaning", [
    ([(0, 1, 255), (0, 255), (0, 255)], 0), ([(0, 255), (0, 255), (0, 1)], 0),
    ([(0,), (0, 255), (0, 1, 255)], 0), ([(0, 255), (0,), (0, 255)], 1)])
def test_255_means_one_thing_in_a_sequence(values, meaning, tmp_path):
    paths = saved(tmp_path, [np.array(value, np.uint8).repeat(9)[None] for value in values])
    coding = Coding.of(paths)
    for path, value in zip(paths, values):
        expected = np.array([meaning if v == 255 else v for v in value], np.uint8).repeat(9)[None]
        np.testing.assert_array_equal(coding.read(path), expected)


def test_a_hard_mask_before_soft_ones(tmp_path):
    """Found masks often begin with the given one; one threshold holds for all of them."""
    hard = (DISK >= 0.5) * 255
    paths = saved(tmp_path, [hard, DISK * 255, DISK * 100])
    coding = Coding.of(paths)
    np.testing.assert_array_equal(coding.read(paths[0]), DISK >= 0.5)
    np.testing.assert_array_equal(coding.read(paths[1]), (DISK * 255).astype(np.uint8) >= 128)
    assert not coding.read(paths[2]).any()


def test_colours_of_davis_among_ids(tmp_path):
    paths = saved(tmp_path, [davis(GRID), davis(GRID).convert("RGB")])
    coding = Coding.of(paths)
    np.testing.assert_array_equal(coding.read(paths[1]), GRID)
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"2.png: holds the colour \(1, 2, 3\)"):
        coding.read(tmp_path / "2.png")


def test_empty_masks_tell_nothing(tmp_path):
    first, truth = flat(BLACK, RED)
    paths = saved(tmp_path, [np.zeros((96, 160)), first])
    np.testing.assert_array_equal(Coding.of(paths).read(paths[1]), truth)
    assert is_empty(paths[0]) and not is_empty(paths[1])


# -- a person's own files

def files(folder, **masks) -> list:
    for name, mask in masks.items():
        (mask if isinstance(mask, Image.Image) else grey(mask)).save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in masks]


def test_one_white_file_for_each_object_of_a_frame(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    a, b, c, d = files(tmp_path, a=(DISK >= 0.5) * 255, b=(BALL >= 0.5) * 255,
                       c=(DISK >= 0.5) * 255, d=(BALL >= 0.5) * 255)
    truth = painted(BLACK, (DISK, RED), (BALL, GREEN))[1]
    found = read_masks({0: [a, b], 5: [c, d]})
    assert list(found) == [0, 5]
    for mask in found.values():
        np.testing.assert_array_equal(mask, truth)
    assert "frame 0: objects a.png 1, b.png 2" in caplog.text


def test_ids_of_several_files_are_kept_where_they_are_free(tmp_path):
    a, b = files(tmp_path, a=(DISK >= 0.5) * 2, b=(BALL >= 0.5) * 5)
    assert set(np.unique(read_masks({3: [a, b]})[3])) == {0, 2, 5}
    assert set(np.unique(read_masks({3: [a, a, b]})[3])) == {0, 1, 5}  # a lies under itself


def test_overlapping_files_are_said(tmp_path, caplog):
    a, b = files(tmp_path, a=np.array([[255, 255, 0]]), b=np.array([[0, 255, 255]]))
    np.testing.assert_array_equal(read_masks({0: [a, b]})[0], [[1, 2, 2]])
    assert "b.png: overlaps the other masks of frame 0 in 1 pixels" in caplog.text


def test_white_in_several_frames_is_one_object_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    a, b = files(tmp_path, a=(DISK >= 0.5) * 255, b=(BALL >= 0.5) * 255)
    found = read_masks({0: [a], 5: [b]})
    assert np.unique(found[5]).tolist() == [0, 1]
    assert "a.png, b.png: white is object 1 in each of them, the same object" in caplog.text


def test_a_white_first_mask_and_an_id_in_a_later_one(tmp_path):
    """The later one may be a mask that the toolkit wrote, mended."""
    a, b = files(tmp_path, a=(DISK >= 0.5) * 255, b=davis((DISK >= 0.5) * 1))
    found = read_masks({0: [a], 57: [b]})
    np.testing.assert_array_equal(found[0], found[57])


def test_an_empty_mask_is_refused_first_and_allowed_later(tmp_path):
    empty, full = files(tmp_path, empty=np.zeros((96, 160)), full=(DISK >= 0.5) * 255)
    with pytest.raises(ValueError, match="empty.png: the mask holds no object.*frame 2"):
        read_masks({2: [empty], 4: [full]})
    assert not read_masks({2: [full], 4: [empty]})[4].any()


@pytest.mark.parametrize("shape", [None, (96, 160)])
def test_masks_of_another_size_are_named(tmp_path, shape):
    full, small, turned = files(tmp_path, full=(DISK >= 0.5) * 255, small=np.full((9, 9), 255),
                                turned=((DISK >= 0.5) * 255).T)
    with pytest.raises(ValueError, match="small.png: a mask of 9x9 pixels, expected 160x96"):
        read_masks({0: [full], 3: [small]}, shape)
    with pytest.raises(ValueError, match="turned.png.*turned by 90 degrees"):
        read_masks({0: [full], 3: [turned]}, shape)


@pytest.mark.parametrize("side, cell, words", [
    (20, 8, None), (6, 8, ["object 1", "8 pixels", "--upsample_factor"]), (6, 4, None)])
def test_small_objects_are_said(side, cell, words):
    mask = np.zeros((96, 160), np.uint8)
    mask[5:5 + side, 5:5 + side] = 1
    found = concern(mask, cell)
    assert found is None if words is None else all(word in found for word in words)


def test_very_many_objects_are_said():
    mask = np.zeros((160, 160), np.uint8)
    for i in range(254):
        mask[10 * (i // 16):10 * (i // 16) + 6, 10 * (i % 16):10 * (i % 16) + 6] = i + 1
    found = concern(mask, 8)
    assert "254 objects" in found and "-p" in found and "1, 2, 3, 4, 5, 6, 7, 8 ..." in found


# -- orientation and depth, of frames and masks

@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_frames_and_masks_are_turned_as_a_viewer_shows_them(orientation, turns, suffix, tmp_path):
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
