"""Mask files as programs write them: soft edges, ids, colours, palettes, alpha."""

import logging

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw

from masks.encoding import MaskEncoding
from masks.read import is_empty, read_mask, read_masks
from media import images
from media.drawing import PALETTE

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
    mask = read_mask(path, user_drawn=own)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_single_object_maps_every_value_to_1(tmp_path, kind):
    image, _, expected = KINDS[kind]
    image.save(tmp_path / "mask.png")
    if "void" in kind:
        expected = VOID  # DAVIS-2016 knows no void
    found = MaskEncoding.detect([tmp_path / "mask.png"], True).read(tmp_path / "mask.png")
    np.testing.assert_array_equal(found, (expected > 0).astype(np.uint8))


SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)
MASKS = st.sets(st.integers(0, 255), min_size=1, max_size=4).flatmap(
    lambda ids: hnp.arrays(np.uint8, SHAPES, elements=st.sampled_from(sorted(ids))))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(MASKS)
def test_a_written_mask_is_read_back(tmp_path_factory, mask):
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
    """The lowest IoU of the objects under any numbering; 0 if their number differs."""
    ids, wanted = (np.unique(m[m > 0]) for m in (mask, truth))
    if len(ids) != len(wanted):
        return 0.0
    return min(max(np.sum((mask == i) & (truth == t)) / np.sum((mask == i) | (truth == t))
                   for i in ids) for t in wanted)


SAVED = {
    "png": lambda image: image,
    "quantised to 8": lambda image: image.quantize(8),
    "quantised to 64": lambda image: image.quantize(64),
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
    assert alike(read_mask(tmp_path / "mask.png", user_drawn=True), truth) > (
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
def test_smooth_objects_in_colour_are_separated(tmp_path, background, saved):
    image, truth = painted(background, (DISK, RED), (BALL, GREEN), (TOUCHING, BLUE))
    path = tmp_path / f"mask.{'jpg' if saved == 'jpg' else 'png'}"
    SAVED.get(saved, SAVED["png"])(image).save(path, quality=92)
    assert alike(read_mask(path, user_drawn=True), truth) > 0.93


def test_smooth_objects_in_grey_are_separated(tmp_path):
    """The edge of the bright one passes through the value of the dark one."""
    image, truth = painted(BLACK, (DISK, (128,) * 3), (BALL, WHITE))
    image.convert("L").save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), truth)


@pytest.mark.parametrize("values", [(1, 2), (80, 160), (255,), (1, 2, 3), (7, 8, 9, 10)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("width", [9, 2, 1])
def test_ids_are_kept(values, mode, width, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    mask = np.zeros((40, 70), np.uint8)
    for i, value in enumerate(values):
        mask[5:20, 15 * i + 3:15 * i + 3 + width] = value
    Image.fromarray(mask).convert(mode).save(tmp_path / "ids.png")
    found = read_mask(tmp_path / "ids.png", user_drawn=True)
    np.testing.assert_array_equal(found, mask if values != (255,) else mask > 0)
    assert not caplog.text


def test_a_thin_object_between_two_others_is_kept(tmp_path):
    """A leash, one pixel wide, in a palette of ids and among small numbers."""
    mask = np.zeros((40, 70), np.uint8)
    mask[5:30, 5:20], mask[5:30, 20], mask[5:30, 21:40] = 1, 2, 3
    for image in (grey(mask), davis(mask)):
        image.save(tmp_path / "ids.png")
        np.testing.assert_array_equal(read_mask(tmp_path / "ids.png"), mask)


def test_254_tiny_objects_are_kept_apart(tmp_path):
    mask = np.zeros((160, 160), np.uint8)
    for i in range(254):
        mask[10 * (i // 16):10 * (i // 16) + 6, 10 * (i % 16):10 * (i % 16) + 6] = i + 1
    grey(mask).save(tmp_path / "ids.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "ids.png", user_drawn=True), mask)


def test_white_next_to_other_ids_is_refused(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 3:12], mask[5:20, 20:30] = 128, 255
    Image.fromarray(mask).save(tmp_path / "two.png")
    with pytest.raises(ValueError, match="two.png: 255 .* 128"):
        read_mask(tmp_path / "two.png", user_drawn=True)


@pytest.mark.parametrize("save", [
    lambda image, path: image.save(path), lambda image, path: image.convert("L").save(path),
    lambda image, path: image.quantize(64).save(path)])
def test_a_photo_is_refused_as_a_mask(tmp_path, save):
    noise = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    picture = cv2.resize(noise, SIZE, interpolation=cv2.INTER_CUBIC)
    save(Image.fromarray(picture), tmp_path / "frame.png")
    with pytest.raises(ValueError, match="frame.png: expected a mask.*found a picture"):
        read_mask(tmp_path / "frame.png", user_drawn=True)


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
    """As CVAT and labelme export them: DAVIS colours keep their ids, others are numbered."""
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
    """Also if each file has its own palette, as converters write it."""
    first, truth = flat(BLACK, RED, BLUE)
    second, other = flat(BLACK, GREEN, RED)
    for name, image in (("0.png", first), ("1.png", second)):
        image.quantize(8).save(tmp_path / name)
    coding = MaskEncoding.detect([tmp_path / "0.png", tmp_path / "1.png"])
    np.testing.assert_array_equal(coding.read(tmp_path / "0.png"), truth)
    np.testing.assert_array_equal(coding.read(tmp_path / "1.png"),
                                  np.array([0, 3, 1], np.uint8)[other])
    found = read_masks({0: [tmp_path / "0.png"], 7: [tmp_path / "1.png"]})
    np.testing.assert_array_equal(found[7], np.array([0, 3, 1], np.uint8)[other])


@pytest.mark.parametrize("index, colours", [(1, (WHITE, BLACK)), (1, (RED, (9, 9, 9))),
                                            (2, (RED, GREEN, WHITE)), (2, (GREEN, RED, BLACK))])
def test_the_background_need_not_be_the_first_palette_entry(index, colours, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    truth = (DISK >= 0.5).astype(np.uint8)
    if len(colours) > 2:
        truth[BALL >= 0.5] = 2
    indices = np.array([index, *(i for i in range(len(colours)) if i != index)], np.uint8)[truth]
    palette(indices, *colours).save(tmp_path / "mask.png")
    assert alike(read_mask(tmp_path / "mask.png", user_drawn=True), truth) == 1
    assert "mask.png" in caplog.text


def test_objects_along_the_whole_border_are_logged(tmp_path, caplog):
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
def test_a_mask_in_the_alpha_channel_is_read(colours, opacity, suffix, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    alpha = (DISK * opacity).round()
    path = tmp_path / f"cutout.{suffix}"
    Image.fromarray(np.dstack([colours, alpha]).astype(np.uint8)).save(path, lossless=True,
                                                                         exact=True)
    assert not is_empty(path)
    assert alike(read_mask(path, user_drawn=True), DISK >= 0.5) > 0.97
    assert f"cutout.{suffix}: the mask is in the alpha channel" in caplog.text


def test_alpha_in_grey_and_palette_images_is_read(tmp_path):
    with_alpha(np.full(DISK.shape, 255), (DISK * 255).round()).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "la.png"), DISK >= 0.5)
    for transparent in (0, 1):
        indices = (DISK >= 0.5) != (transparent == 1)
        palette(indices, *[WHITE] * 2).save(tmp_path / "p.png", transparency=transparent)
        np.testing.assert_array_equal(read_mask(tmp_path / "p.png", user_drawn=True), DISK >= 0.5)
