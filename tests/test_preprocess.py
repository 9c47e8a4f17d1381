"""Reading and writing masks, tensors, augmentation, and the preview command."""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, draw_frame
from PIL import Image

import preprocess
from masks.read import read_mask
from media import images
from media.images import resize_mask, write_mask
from preprocess import Augment, to_image, to_tensor

GRID = np.array([[0, 1, 2], [0, 0, 1]], np.uint8)


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise if path.suffix == ".jpg" else noise[..., 0]).save(path)
    path.write_bytes(path.read_bytes()[:1500])


@pytest.mark.parametrize("name", ["broken.png", "broken.jpg"])
@pytest.mark.parametrize("damage, error", [
    (truncated, OSError), (lambda path: path.write_text("words"), OSError),
    (lambda path: path.touch(), OSError), (lambda path: path.mkdir(), OSError),
    (lambda path: None, FileNotFoundError)])
@pytest.mark.parametrize("read", [images.read_image, read_mask])
def test_an_unreadable_file_is_named(tmp_path, name, damage, error, read):
    damage(tmp_path / name)
    with pytest.raises(error) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_read_image_is_rgb_for_any_file(tmp_path, mode):
    colour = Image.new("RGB", (4, 2), (255, 0, 0)).convert(mode)
    colour.save(tmp_path / "image.png")
    image = images.read_image(tmp_path / "image.png")
    assert (image.shape, image.dtype) == ((2, 4, 3), np.uint8)
    np.testing.assert_array_equal(image, np.array(colour.convert("RGB")))


def test_written_image_is_rgb_and_nearly_the_same(tmp_path):
    image = np.full((16, 24, 3), (220, 120, 20), np.uint8)
    images.write_image(tmp_path / "image.jpg", image)
    bgr = cv2.imread(str(tmp_path / "image.jpg"))
    assert np.abs(bgr[..., ::-1].astype(int) - image).max() <= 4


def test_written_mask_has_the_davis_palette(tmp_path):
    write_mask(tmp_path / "mask.png", GRID)
    image = Image.open(tmp_path / "mask.png")
    assert image.mode == "P"
    assert image.getpalette()[:15] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]
    np.testing.assert_array_equal(np.array(image), GRID)


@pytest.mark.parametrize("pixel, expected", [
    ((0, 0, 0), (-2.117904, -2.035714, -1.804444)),
    ((255, 255, 255), (2.248908, 2.428571, 2.640000)),
    ((51, 102, 204), (-1.244541, -0.250000, 1.751111)),  # 0.2, 0.4, 0.8
])
def test_to_tensor_matches_values_by_hand(pixel, expected):
    tensor = to_tensor(np.array([[pixel, pixel]], np.uint8))
    assert (tensor.shape, tensor.dtype) == ((3, 1, 2), torch.float32)
    np.testing.assert_allclose(tensor[:, 0, 1], expected, atol=1e-5)


def test_to_image_inverts_to_tensor_for_every_value():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    image[..., 1] = 255 - image[..., 1]
    np.testing.assert_array_equal(to_image(to_tensor(image)), image)


@pytest.mark.parametrize("shape", [(24, 40), (20, 61), (96, 160), (48, 80)])
def test_to_tensor_resizes_as_pillow_does(shape):
    image, _ = draw_frame(0)
    expected = np.array(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR))
    found = to_image(to_tensor(image, shape))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_resize_mask_matches_values_by_hand():
    np.testing.assert_array_equal(resize_mask(GRID, (4, 6)), np.kron(GRID, np.ones((2, 2))))
    large = np.random.default_rng(0).integers(0, 5, (9, 15), dtype=np.uint8)
    np.testing.assert_array_equal(resize_mask(large, (3, 5)), large[1::3, 1::3])  # the middles
    np.testing.assert_array_equal(resize_mask(large, (9, 15)), large)


@pytest.mark.parametrize("shape", [(17, 23), (60, 33), (101, 200), (48, 20)])
def test_resize_mask_keeps_the_ids(shape):
    mask = draw_frame(0, (3, 200))[1]
    resized = resize_mask(mask, shape)
    assert (resized.shape, resized.dtype) == (shape, np.uint8)
    assert set(resized.flat) == {0, 3, 200}


def scene() -> tuple[np.ndarray, np.ndarray]:
    """An L and a bar with ids 2 and 5, and an image with a red L and a green bar."""
    mask = np.zeros((72, 120), np.uint8)
    mask[10:60, 15:35] = mask[40:60, 15:70] = 2
    mask[8:30, 60:110] = 5
    return np.stack([mask == 2, mask == 5, mask == 0], 2).astype(np.uint8) * 255, mask


def inside(mask: np.ndarray, object_id: int) -> np.ndarray:
    return cv2.erode((mask == object_id).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0


@pytest.mark.parametrize("shape", [(72, 120), (48, 80), (90, 90), (144, 240)])
def test_augment_moves_image_and_mask_together(monkeypatch, shape):
    image, mask = scene()
    augment = Augment(shape)
    monkeypatch.setattr(augment, "colour", lambda image: image)
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        new_image, new_mask = augment(image, mask)
        assert (new_image.shape, new_image.dtype) == ((3, *shape), torch.float32)
        assert (new_mask.shape, new_mask.dtype) == (shape, torch.uint8)
        assert set(new_mask.unique().tolist()) <= {0, 2, 5}
        decoded, new_mask = to_image(new_image), new_mask.numpy()
        for channel, object_id in enumerate((2, 5, 0)):
            where = inside(new_mask, object_id)
            assert (decoded[where][:, channel] > 200).all()
            outside = inside((new_mask != object_id).astype(np.uint8), 1)
            assert (decoded[outside][:, channel] < 55).all()
        seen.add(new_mask.tobytes())
    assert len(seen) == 20  # each call draws new values


def test_augment_flips_and_zooms():
    """The L's stem and foot begin in the same column unless flipped; crops enlarge it."""
    image, mask = scene()
    mask = (mask == 2).astype(np.uint8)
    torch.manual_seed(0)
    flipped, areas = [], []
    for _ in range(40):
        found = Augment(mask.shape)(image, mask)[1].numpy()
        areas.append(found.mean() / mask.mean())
        top, bottom = np.flatnonzero(found.any(1))[[0, -1]]
        flipped.append(np.flatnonzero(found[top])[0] > np.flatnonzero(found[bottom])[0])
    assert 8 < sum(flipped) < 32
    assert max(areas) > 1.5 and min(areas) >= Augment.KEEP


@pytest.mark.parametrize("shape", [(48, 80), (24, 40), (96, 160)])
def test_augment_without_randomness_only_resizes(shape):
    image, mask = draw_frame(0, (1, 2))
    new_image, new_mask = Augment(shape, random=False)(image, mask)
    again = Augment(shape, random=False)(image, mask)
    assert torch.equal(new_image, again[0]) and torch.equal(new_mask, again[1])
    expected = np.array(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR))
    assert np.abs(to_image(new_image).astype(int) - expected).max() <= 1
    resized = np.array(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST))
    for object_id in (0, 1, 2):
        assert (new_mask.numpy()[inside(resized, object_id)] == object_id).all()


@pytest.mark.parametrize("factor", [3, 5])
def test_augment_samples_masks_at_pixel_centres(factor):
    """Otherwise a downscaled mask is up to half a pixel off its image."""
    mask = np.random.default_rng(0).integers(0, 4, (12 * factor, 20 * factor), dtype=np.uint8)
    image = np.zeros((*mask.shape, 3), np.uint8)
    _, shrunk = Augment((12, 20), random=False)(image, mask)
    np.testing.assert_array_equal(shrunk, mask[factor // 2::factor, factor // 2::factor])


@pytest.mark.parametrize("keep, kept", [(Augment.KEEP, True), (0, False)])
def test_augment_keeps_a_tiny_object_in_a_corner(monkeypatch, keep, kept):
    """Crops are chosen so that they contain the object."""
    mask = np.zeros((72, 120), np.uint8)
    mask[-4:, -4:] = 3
    augment = Augment(mask.shape)
    monkeypatch.setattr(augment, "KEEP", keep)
    torch.manual_seed(0)
    image = np.zeros((*mask.shape, 3), np.uint8)
    pixels = [int((augment(image, mask)[1] == 3).sum()) for _ in range(40)]
    # rounding may cost a pixel
    assert all(count >= Augment.KEEP * 16 - 1 for count in pixels) == kept


def test_colour_augmentation_changes_only_the_image(monkeypatch):
    image, mask = draw_frame(0, (1, 2))
    augment = Augment(mask.shape)
    monkeypatch.setattr(augment, "_box", lambda mask: (0, 0, *mask.shape[1:]))  # flips only
    torch.manual_seed(0)
    means = []
    for _ in range(6):
        new_image, new_mask = augment(image, mask)
        assert any(np.array_equal(new_mask, side) for side in (mask, mask[:, ::-1]))
        means.append(to_image(new_image).mean())
    assert np.ptp(means) > 5
    assert all(abs(mean - image.mean()) < 0.5 * image.mean() for mean in means)


@pytest.fixture
def frame_and_mask(tmp_path):
    image, mask = draw_frame(0, (1, 2))
    Image.fromarray(image).save(tmp_path / "frame.jpg")
    write_mask(tmp_path / "mask.png", mask)
    return tmp_path / "frame.jpg", tmp_path / "mask.png"


def preview(folder, *arguments, backend="Agg") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "preprocess.py", *arguments], cwd=folder,
                          env=os.environ | {"MPLBACKEND": backend}, capture_output=True, text=True)


@pytest.mark.slow
def test_a_missing_matplotlib_backend_is_ignored(tmp_path, frame_and_mask):
    result = preview(tmp_path, *frame_and_mask, "--save", "figure.png",
                     backend="module://not_installed.backend")
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "figure.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("save", ["figures/preview.png", None])
def test_preview_is_saved_to_the_given_or_default_file(tmp_path, frame_and_mask, save):
    result = preview(tmp_path, *frame_and_mask, *(["--save", save] if save else []))
    assert (result.returncode, result.stderr) == (0, "")
    name = save or "augmentation.png"
    assert f"saved {name}" in result.stdout
    assert ("no display" in result.stdout) == (save is None)
    figure = np.array(Image.open(tmp_path / name).convert("RGB"))
    assert min(figure.shape[:2]) > 300
    colours, counts = np.unique(figure.reshape(-1, 3), axis=0, return_counts=True)
    assert len(colours) > 1000 and counts.max() < 0.6 * counts.sum()


@pytest.mark.slow
def test_preview_of_bad_input_ends_with_one_error_line(tmp_path, frame_and_mask):
    result = preview(tmp_path, frame_and_mask[0], "missing.png")
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    (error,) = [line for line in result.stderr.splitlines() if "error:" in line]
    assert "missing.png" in error


@pytest.mark.parametrize("arguments, words", [
    (("frame.jpg", "small.png"), ["small.png", "4x2", "80x48"]),
    (("frame.jpg", "frame.jpg"), ["frame.jpg", "picture"]),
    (("nothing.jpg", "mask.png"), ["nothing.jpg"]),
    (("frame.jpg", "."), ["."]),
    (("frame.jpg",), ["mask"]),
    (("frame.jpg", "mask.png", "--save", "figure.xyz"), ["xyz"]),
    (("frame.jpg", "mask.png", "--save", "frame.jpg/figure.png"), ["frame.jpg"]),
])
def test_bad_arguments_are_named(tmp_path, frame_and_mask, monkeypatch, capsys, arguments, words):
    write_mask(tmp_path / "small.png", np.ones((2, 4), np.uint8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(sys, "argv", ["preprocess.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        preprocess.main()
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    for word in words:
        assert word in message


def test_a_clip_zooms_at_a_constant_rate():
    frame = np.zeros((200, 320, 3), np.uint8)
    mask = cv2.circle(np.zeros((200, 320), np.uint8), (160, 100), 22, 1, -1)
    augment = Augment((100, 160))
    augment.SCALE = (0.25, 0.3)
    growths = []
    for seed in range(30):
        torch.manual_seed(seed)
        masks = [found for _, found in augment.clip([(frame, mask)] * 4)]
        inside = all(not edge.any() for m in masks for edge in (m[0], m[-1], m[:, 0], m[:, -1]))
        if inside:
            areas = torch.tensor([m.sum() for m in masks]).double().log()
            steps = areas.diff()
            torch.testing.assert_close(steps, steps.mean().expand(3), atol=0.06, rtol=0)
            assert abs(steps.mean()) < 2 * Augment.ZOOM + 0.02
            growths.append(steps.mean().item())
    assert len(growths) > 5 and min(growths) < -0.08 and max(growths) > 0.08
