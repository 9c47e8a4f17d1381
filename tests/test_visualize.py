"""Overlays and figures."""

import cv2
import numpy as np
import pytest
from conftest import draw_frame
from PIL import Image

from media import drawing, figures


def test_the_palette_matches_values_by_hand():
    """PASCAL VOC's colours of ids 0-8, 21 and 255."""
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128),
                (0, 128, 128), (128, 128, 128), (64, 0, 0), (128, 64, 128), (224, 224, 192)]
    found = drawing.PALETTE[[0, 1, 2, 3, 4, 5, 6, 7, 8, 21, 255]]
    np.testing.assert_array_equal(found, expected)
    assert drawing.PALETTE.shape == (256, 3) and len(np.unique(drawing.PALETTE, axis=0)) == 256


def objects() -> tuple[np.ndarray, np.ndarray]:
    """Two squares, a ring, and objects of one pixel and along the border."""
    image, mask = draw_frame(0, (1, 2))
    mask[5:20, 50:65] = 3
    mask[9:15, 54:60] = 0
    mask[30, 70] = 4
    mask[40:, 60:] = 7
    return image, mask


def test_overlay_changes_neither_background_nor_arguments():
    image, mask = objects()
    copies = image.copy(), mask.copy()
    result = drawing.overlay(image, mask)
    assert (result.shape, result.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(result[mask == 0], image[mask == 0])
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(mask, copies[1])


@pytest.mark.parametrize("opacity", [0.0, 0.5, 0.8])
def test_overlay_blends_the_inside_and_outlines_it_in_white(opacity):
    image, mask = objects()
    result = drawing.overlay(image, mask, opacity).astype(int)
    for object_id in (1, 2, 3, 7):
        own = (mask == object_id).astype(np.uint8)
        inner = cv2.erode(own, np.ones((3, 3), np.uint8), borderValue=0) > 0
        blend = image[inner] * (1 - opacity) + drawing.PALETTE[object_id] * opacity
        assert np.abs(result[inner] - blend).max() <= 1
        cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
        edge = (own > 0) & (cv2.erode(own, cross, borderValue=0) == 0)
        assert (result[edge] == 255).all()


def test_overlay_of_an_empty_mask_is_the_image():
    image, mask = draw_frame(1)
    np.testing.assert_array_equal(drawing.overlay(image, np.zeros_like(mask)), image)


@pytest.fixture
def no_display(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")


def count_colour(path, colour: tuple[int, int, int]) -> int:
    """Pixels nearly of a colour."""
    pixels = np.array(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(2) < 10).sum())


BLUE, GREEN = (31, 119, 180), (44, 160, 44)  # of matplotlib's first line, and its tab:green


@pytest.mark.parametrize("losses, drawn", [([None, 0.7, 0.4, 0.3], True), ([None], False)])
def test_curves_show_loss_and_iou(tmp_path, no_display, losses, drawn):
    history = [{"iteration": 100 * i, "loss": loss, "held_out_iou": 0.3 + 0.1 * i}
               for i, loss in enumerate(losses)]
    figures.curves(tmp_path / "curves.png", history)
    assert Image.open(tmp_path / "curves.png").format == "PNG"
    assert (count_colour(tmp_path / "curves.png", BLUE) > 0) == drawn
    assert count_colour(tmp_path / "curves.png", GREEN) > 0
    assert history[0]["loss"] is None


def test_grid_shows_each_panel_under_its_title(no_display):
    image, mask = draw_frame(0)
    panels = [("frame", image), ("overlay", drawing.overlay(image, mask)),
              ("probability", mask * 0.5)]
    figure = figures.grid(panels, columns=2)
    shown = {axis.get_title(): axis.get_images()[0] for axis in figure.axes if axis.get_title()}
    assert list(shown) == ["frame", "overlay", "probability"]
    for title, picture in panels:
        np.testing.assert_array_equal(shown[title].get_array(), picture)
    assert shown["probability"].get_clim() == (0, 1)
    assert len(figure.axes) == 5  # a place left empty, and one colour bar


@pytest.mark.parametrize("name", ["deep/er/figure.png", None])
def test_a_figure_is_saved_to_the_given_file_or_by_default_without_a_display(
        tmp_path, no_display, capsys, name):
    path = tmp_path / (name or "default.png")
    panels = [("red", np.full((20, 30, 3), (200, 10, 10), np.uint8))]
    figures.show_or_save(panels, 1, path if name else None, tmp_path / "default.png")
    assert f"saved {path}" in capsys.readouterr().out
    assert count_colour(path, (200, 10, 10)) > 10000
    assert list(tmp_path.rglob("*.png")) == [path]


@pytest.mark.parametrize("environment, expected", [
    ({}, False), ({"DISPLAY": ":0"}, True), ({"WAYLAND_DISPLAY": "wayland-0"}, True),
    ({"DISPLAY": ":0", "MPLBACKEND": "Agg"}, False)])
def test_a_display_is_detected_from_the_environment(monkeypatch, environment, expected):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert figures.has_display() == expected
