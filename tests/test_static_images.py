"""Static images: their layout on disk, and the clips made from them."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from preprocess import Augment, to_image
from training.samples import Clips, Pairs, PairSampler
from training.static_images import find_static_images

SHAPE = (64, 112)
COLOURS = ((230, 40, 40), (40, 220, 40), (60, 60, 240))


def write_still(root: Path, name: str, ids: int = 1, size: tuple[int, int] = (90, 120),
                image: str = ".jpg", mask: str = ".png") -> None:
    """Write discs on a dim ramp; the mask of one is grey 0/255, that of several a palette."""
    height, width = size
    picture = np.zeros((*size, 3), np.uint8)
    picture[:] = np.linspace(20, 100, width)[None, :, None]
    drawn = np.zeros(size, np.uint8)
    for i in range(ids):
        center = (width * (2 * i + 1) // (2 * ids), height // 2)
        for canvas, value in ((picture, COLOURS[i]), (drawn, i + 1)):
            cv2.circle(canvas, center, 14, value, -1)
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(root / "images" / f"{name}{image}", quality=100)
    saved = Image.fromarray(drawn if ids > 1 else drawn * 255)
    if ids > 1:
        saved.putpalette([0, 0, 0, *np.ravel(COLOURS).tolist()])
    saved.save(root / "masks" / f"{name}{mask}")


@pytest.fixture
def root(tmp_path) -> Path:
    write_still(tmp_path, "ant")
    write_still(tmp_path, "bee", ids=3, size=(100, 160), image=".PNG")
    write_still(tmp_path, "cat", ids=2, size=(120, 80), image=".webp", mask=".bmp")
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"")
    (tmp_path / "masks" / "notes.txt").write_text("")
    return tmp_path


def test_images_and_masks_match_by_stem_in_the_order_of_their_names(root):
    images = find_static_images(root)
    assert [static_image.name for static_image in images] == ["ant", "bee", "cat"]
    for static_image, count in zip(images, (1, 3, 2)):
        image, mask = static_image.image(0), static_image.mask(0)
        assert len(static_image) == 1 and image.shape[:2] == mask.shape and mask.dtype == np.uint8
        assert np.unique(mask).tolist() == list(range(count + 1))
        for i in range(count):
            inside = image[cv2.erode((mask == i + 1).astype(np.uint8), np.ones((5, 5))) > 0]
            assert np.abs(inside.mean(0) - COLOURS[i]).max() < 12


@pytest.mark.parametrize("values, expected", [
    ([0, 255], [0, 1]), ([0, 1], [0, 1]), ([0, 1, 4], [0, 1, 4]),  # as in other masks
    ([0, 3, 100, 124, 126, 250], [0, 0, 0, 0, 1, 1])])  # soft edges
def test_grey_masks_are_ids_or_one_soft_object(tmp_path, values, expected):
    write_still(tmp_path, "ant", size=(20, 30))
    grey = np.zeros((20, 30), np.uint8)
    grey[5, :len(values)] = values
    for mode in ("L", "LA"):
        Image.fromarray(grey).convert(mode).save(tmp_path / "masks" / "ant.png")
        assert find_static_images(tmp_path)[0].mask(0)[5, :len(values)].tolist() == expected


def test_a_mask_may_be_a_jpeg(tmp_path):
    write_still(tmp_path / "exact", "ant")
    write_still(tmp_path / "lossy", "ant", mask=".jpg")
    exact, lossy = (find_static_images(tmp_path / name)[0].mask(0) for name in ("exact", "lossy"))
    assert exact.any() and (exact != lossy).mean() < 0.002


def test_255_in_a_palette_means_unlabelled(tmp_path):
    write_still(tmp_path, "cat", ids=2)
    path = tmp_path / "masks" / "cat.png"
    mask = np.array(Image.open(path))
    mask[0] = 255
    image = Image.fromarray(mask)
    image.putpalette(bytes(range(256)) * 3)
    image.save(path)
    found = find_static_images(tmp_path)[0].mask(0)
    assert not found[0].any() and np.unique(found).tolist() == [0, 1, 2]


def remove_mask(root):
    (root / "masks/bee.png").unlink()


def remove_image(root):
    (root / "images/ant.jpg").unlink()


def remove_folder(root):
    for path in (root / "masks").iterdir():
        path.unlink()
    (root / "masks").rmdir()


def empty_folders(root):
    for path in [*(root / "images").iterdir(), *(root / "masks").iterdir()]:
        path.unlink()


def shrink_mask(root):
    Image.new("L", (40, 24)).save(root / "masks/ant.png")


def break_image(root):
    (root / "images/cat.webp").write_bytes(b"no picture")


def same_stem(root):
    Image.new("RGB", (120, 90)).save(root / "images/ant.bmp")


@pytest.mark.parametrize("damage, error, words", [
    (remove_mask, FileNotFoundError, ["masks/bee", "images/bee.PNG"]),
    (remove_image, FileNotFoundError, ["images/ant", "masks/ant.png"]),
    (remove_folder, FileNotFoundError, ["/masks", "images/", "--stills"]),
    (empty_folders, FileNotFoundError, ["/images", ".jpg"]),
    (shrink_mask, ValueError, ["masks/ant.png", "40x24", "120x90"]),
    (break_image, OSError, ["images/cat.webp"]),
    (same_stem, ValueError, ["images/ant.jpg", "images/ant.bmp"]),
])
def test_damaged_files_are_named_at_the_start(root, damage, error, words):
    damage(root)
    with pytest.raises(error) as caught:
        find_static_images(root)
    for word in words:
        assert word in str(caught.value)


def clips_of(root, **options) -> Clips:
    return Clips([], Augment(SHAPE), static_images=find_static_images(root), **options)


@pytest.mark.slow
def test_a_clip_of_a_static_image_has_the_shape_of_all_clips(root):
    clips = clips_of(root)
    assert clips.parts == [0, 3] and len(clips) == 3
    counts, ids_of_red = set(), set()
    for seed in range(60):
        images, masks = clips[seed % 3, seed]
        assert (images.shape, images.dtype) == ((4, 3, *SHAPE), torch.float32)
        assert (masks.shape, masks.dtype) == ((4, *SHAPE), torch.uint8)
        known = masks[0].unique().tolist()
        assert known[-1] <= 6 and set(known) - {0} == set(range(1, known[-1] + 1))
        assert set(masks.unique().tolist()) == set(known)
        assert masks[1:].any()
        counts.add(known[-1])
        red = (images[0, 0] - images[0, 1] > 1.5) & (masks[0] > 0)
        ids_of_red |= set(masks[0][red].unique().tolist())
    assert counts >= {1, 2, 3} and ids_of_red >= {1, 2, 3}


def test_masks_follow_the_moving_objects(root):
    """The discs are saturated and the rest is grey, so colours tell what the masks should be."""
    clips = clips_of(root)
    clips.DISTRACTORS, clips.MIN_SHARE, clips.MORE = 0, 0, 0
    scores = []
    for seed in range(30):
        images, masks = clips[seed % 3, seed]
        for image, mask in zip(images, masks.numpy() > 0):
            picture = to_image(image).astype(int)
            coloured = picture.max(2) - picture.min(2) > 40
            if mask.sum() > 150:
                scores.append((coloured & mask).sum() / mask.sum())
    assert len(scores) > 60 and np.mean(np.array(scores) > 0.85) > 0.9


def test_objects_move_bend_and_change_lighting(root):
    clips = clips_of(root, paste=0, objects=1)
    moved, areas, light = [], [], []
    for seed in range(30):
        images, masks = clips[0, seed]
        for a, b in zip(masks[1:], masks[2:]):
            if a.any() and b.any():
                centers = [m.nonzero().float().mean(0) for m in (a, b)]
                moved.append((centers[0] - centers[1]).norm().item())
                areas.append((a.count_nonzero() / b.count_nonzero()).log().abs().item())
        light.append((images[1:].mean((1, 2, 3)).max() - images[1:].mean((1, 2, 3)).min()).item())
    assert 1 < np.median(moved) < 15 and 0.01 < np.median(areas) < 0.3
    assert np.median(light) > 0.03


@pytest.mark.slow
def test_a_sample_depends_on_its_index_alone_in_any_worker(root):
    clips = clips_of(root)
    index = list(PairSampler(clips.parts, 8, seed=2, shares=[0, 1]))
    state = torch.get_rng_state()
    first = [clips[i] for i in index]
    assert torch.equal(state, torch.get_rng_state())  # nor does it disturb others' randomness
    loader = DataLoader(clips, batch_size=2, sampler=index[::-1], num_workers=2)
    again = [row for batch in loader for row in zip(*batch)][::-1]
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_an_image_without_objects_serves_as_background(root):
    Image.new("L", (120, 90)).save(root / "masks/ant.png")
    clips = clips_of(root, paste=1)
    for seed in range(10):
        assert clips[0, seed][1][0].any()
    alone = find_static_images(root)[:1]
    with pytest.raises(ValueError, match="ant.png"):
        Clips([], Augment(SHAPE), static_images=alone)[0, 0]


def test_a_single_static_image_gets_duplicates(tmp_path):
    write_still(tmp_path, "ant")
    clips = clips_of(tmp_path, paste=1)
    assert max(int(clips[0, seed][1].max()) for seed in range(20)) >= 2


def test_a_mask_may_use_any_ids(tmp_path):
    write_still(tmp_path, "cat", ids=2)
    path = tmp_path / "masks/cat.png"
    image = Image.fromarray(np.array([0, 254, 7], np.uint8)[np.array(Image.open(path))])
    image.putpalette(bytes(range(256)) * 3)
    image.save(path)
    clips = clips_of(tmp_path, paste=1)
    assert max(int(clips[0, seed][1].max()) for seed in range(20)) in (2, 3, 4, 5, 6)


def test_a_pair_shows_two_views_of_a_static_image(root):
    images, masks = Pairs(find_static_images(root), Augment(SHAPE))[0, 3]
    assert images.shape == (2, 3, *SHAPE) and masks.flatten(1).any(1).all()
    assert not torch.equal(images[0], images[1])


def test_the_sampler_draws_parts_in_proportion_without_repeating_frames():
    drawn = [i for i, _ in PairSampler([30, 5], 600, seed=1, shares=[1, 3])]
    static = [i for i in drawn if i >= 30]
    assert 0.7 < len(static) / 600 < 0.8
    for start in range(0, len(static) - 5, 5):
        assert sorted(static[start:start + 5]) == list(range(30, 35))
    others = [i for i in drawn if i < 30]
    assert sorted(others[:30]) == list(range(30))
    assert [i for i, _ in PairSampler([30, 5], 50, seed=1, shares=[0, 1])][:2] != [0, 0]
    alike = [i for i, _ in PairSampler([30, 5], 35, seed=1)]
    assert sorted(alike) == list(range(35))  # without shares they are one part
    whole = list(PairSampler([30, 5], 60, seed=4, shares=[1, 1]))
    parts = [list(PairSampler([30, 5], 60, seed=4, shares=[1, 1], skip=10, rank=r, ranks=2))
             for r in range(2)]
    assert [i for pair in zip(*parts) for i in pair] == whole[10:]


@pytest.mark.parametrize("parts, shares", [([0, 5], [1, 1]), ([3, 4], [1]), ([3, 4], [-1, 2])])
def test_the_sampler_refuses_shares_of_empty_parts(parts, shares):
    with pytest.raises(ValueError, match="share"):
        PairSampler(parts, 10, shares=shares)
