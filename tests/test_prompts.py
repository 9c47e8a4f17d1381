"""Masks from boxes and points: input maps, prompt decoder, crops."""

import math

import numpy as np
import pytest
import torch
from conftest import SHAPE, draw_frame
from hypothesis import given, settings
from hypothesis import strategies as st

import preprocess
from media.prompts import Prompts
from network.encoder import Encoder
from network.prompt_decoder import (
    K,
    PromptDecoder,
    click_similarity,
    matching_sets,
    set_similarities,
)
from network.prompt_maps import FAR, NEAR, clicked_locations, prompt_maps
from tracking import prompting
from training import prompt_training as train_prompts
from training import simulated_user
from videomatch import VideoMatch


@pytest.fixture
def promptable() -> VideoMatch:
    torch.manual_seed(0)
    return VideoMatch(Encoder("mobilenet"), 2.0, top_k=3, refined=True, prompts=True).eval()


def seen(model, seed=0, size=(64, 96)):
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.prompts.prepare(image, *model.encoder.pyramid(image))


# maps of the prompts

def test_boxes_become_depth_maps():
    size, shape = (32, 48), (8, 12)
    boxes = [(8, 4, 16, 20), (30, 10, 12, 8)]
    found = prompt_maps(Prompts(boxes), size, shape)
    for row in range(8):
        for column in range(12):
            x, y = 4 * column + 2, 4 * row + 2
            depths = [(min(x - u, u + w - x) / w, min(y - v, v + h - y) / h)
                      for u, v, w, h in boxes]
            deepest = [max(-1, value) for value in max(depths, key=min)]
            inside = any(u <= x <= u + w and v <= y <= v + h for u, v, w, h in boxes)
            np.testing.assert_allclose(found[:4, row, column], [1, inside, *deepest], atol=1e-6)
    assert not found[4:].any()


def test_clicks_become_proximity_maps():
    points, off = [(3, 5), (40, 20)], [(20, 11)]
    found = prompt_maps(Prompts(points=points, negative_points=off), (32, 48), (8, 12))
    for row in range(8):
        for column in range(12):
            for channel, given_points in ((4, points), (6, off)):
                d = min(math.dist((4 * column + 2, 4 * row + 2), (x + 0.5, y + 0.5))
                        for x, y in given_points)
                np.testing.assert_allclose(
                    found[channel:channel + 2, row, column],
                    [math.exp(-d * d / 2 / NEAR ** 2), math.exp(-d / FAR)], rtol=1e-4, atol=1e-6)
    assert not found[:4].any() and not found[8:].any()


def test_a_mask_becomes_its_fraction_of_each_location():
    mask = np.zeros((32, 48), bool)
    mask[8:16, 16:32] = True
    found = prompt_maps(Prompts([(0, 0, 4, 4)], mask=mask), (32, 48), (8, 12))
    assert (found[8] == 1).all() and found[9, 2:4, 5:7].min() > 0.8
    assert found[9].mean() == pytest.approx(mask.mean(), abs=0.01)
    empty = prompt_maps(Prompts([(0, 0, 4, 4)], mask=0 * mask), (32, 48), (8, 12))
    assert (empty[8] == 1).all() and not empty[9].any()


def test_points_map_to_locations_and_are_clamped_to_the_image():
    points = [(0, 0), (47.4, 31.4), (-9, 16), (99, -5), (23, 8)]
    np.testing.assert_array_equal(clicked_locations(points, (32, 48), (8, 12)), [0, 95, 48, 11, 29])
    assert clicked_locations([], (32, 48), (8, 12)).shape == (0,)


def test_click_similarity_is_the_cosine_with_the_most_similar_click():
    cells = torch.nn.functional.normalize(torch.randn(1, 5, 3, 4), dim=1)
    found = click_similarity(cells, torch.tensor([0, 11]))[0, 0]
    flat = cells[0].flatten(1)
    cosines = torch.stack([flat[:, 0] @ flat, flat[:, -1] @ flat]).amax(0).view(3, 4)
    torch.testing.assert_close(found, cosines)
    assert not click_similarity(cells, torch.tensor([], dtype=torch.long)).any()


def test_similarity_is_the_mean_cosine_with_the_k_most_similar_others_of_a_set():
    cells = torch.nn.functional.normalize(torch.randn(1, 6, 5, 7), dim=1)
    large = torch.zeros(1, 1, 5, 7)
    large.view(-1)[torch.randperm(35)[:12]] = 1
    small = torch.zeros(1, 1, 5, 7)
    small[..., 2, :K] = 1
    found, too_few = set_similarities(cells, large, small)
    flat = cells[0].flatten(1).double().numpy()
    for i in range(35):
        others = [j for j in range(35) if large.view(-1)[j] and j != i]
        best = np.sort(flat[:, i] @ flat[:, others])[-K:]
        assert found.view(-1)[i].item() == pytest.approx(best.mean(), abs=1e-5)
    assert not too_few.any()


def test_sets_come_from_the_previous_mask_or_else_the_box():
    mask = np.zeros((32, 48), bool)
    mask[8:16, 16:32] = True
    box = Prompts([(16, 8, 20, 20)])
    for one in (box, Prompts(box.boxes, mask=mask), Prompts(points=[(20, 12)])):
        inside, outside = (x[0, 0].numpy() > 0.5 for x in matching_sets(
            torch.from_numpy(prompt_maps(one, (32, 48), (8, 12)))[None]))
        assert not (inside & outside).any()
        assert inside.any() == outside.any() == bool(one.boxes)
        if one.mask is not None:
            np.testing.assert_array_equal(inside, mask[::4, ::4])
        elif one.boxes:  # locations near the box's border are in neither set
            assert inside[3:6, 5:8].all() and inside.sum() == 9
            assert (~outside).sum() == 25


def test_the_order_of_clicks_and_boxes_does_not_matter(promptable):
    one = Prompts([(5, 5, 30, 20), (50, 10, 20, 30)], [(8, 9), (60, 20)], [(1, 1), (90, 60)])
    other = Prompts(one.boxes[::-1], one.points[::-1], one.negative_points[::-1])
    with torch.no_grad():
        torch.testing.assert_close(promptable.prompts(seen(promptable), one),
                                   promptable.prompts(seen(promptable), other))


# decoder

@pytest.mark.parametrize("encoder", ["mobilenet", "vgg", "resnet"])
def test_the_decoder_predicts_at_half_the_image_size(encoder):
    channels = tuple(Encoder(encoder).spec.levels.values())
    sides = {"mobilenet": (4, 8, 16, 32)}.get(encoder, (4, 8))
    decoder = PromptDecoder(channels)
    image = torch.randn(1, 3, 64, 96)
    levels = [torch.randn(1, c, 64 // s, 96 // s) for c, s in zip(channels, sides)]
    logits = decoder(decoder.prepare(image, levels[-1], levels), Prompts(points=[(3, 4)]))
    assert logits.shape == (32, 48)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_every_channel_of_the_prompt_maps_affects_the_prediction(promptable):
    mask = np.zeros((64, 96), bool)
    base = Prompts([(5, 5, 40, 30)], [(20, 20)], [(80, 50)], mask)
    changed = [Prompts([(6, 5, 40, 30)], base.points, base.negative_points, mask),
               Prompts(base.boxes, [(22, 20)], base.negative_points, mask),
               Prompts(base.boxes, base.points, [(80, 40)], mask),
               Prompts(base.boxes, base.points, base.negative_points, ~mask),
               Prompts(base.boxes, base.points, base.negative_points)]
    view = seen(promptable)
    with torch.no_grad():
        answer = promptable.prompts(view, base)
        assert all((promptable.prompts(view, other) - answer).abs().max() > 1e-6
                   for other in changed)


@pytest.mark.slow
def test_training_fits_one_scene_and_changes_only_the_decoder(promptable):
    image, mask = draw_frame(0)
    truth = np.kron(mask, np.ones((2, 2))) > 0
    picture = preprocess.to_tensor(np.kron(image, np.ones((2, 2, 1), np.uint8)))
    before = {name: value.clone() for name, value in promptable.state_dict().items()}
    box = Prompts([simulated_user.bounding_box(truth)])
    scene = train_prompts.start_sample(promptable, picture, truth, box, [True])
    optimizer = torch.optim.AdamW(promptable.prompts.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        scene.prompts, scene.rounds = Prompts([simulated_user.bounding_box(truth)]), [True]
        losses.append(train_prompts.training_step(promptable, optimizer, [scene]))
    assert losses[-1] < 0.15 < 1 < losses[0]
    for name, value in promptable.state_dict().items():
        if not name.startswith("prompts."):
            assert torch.equal(value, before[name]), name


# crops

def test_prompts_move_with_the_crop():
    image = np.zeros((100, 200, 3), np.uint8)
    image[40:60, 120:150] = 255
    given_prompts = Prompts([(120, 40, 30, 20)], [(120, 40), (149, 59)], [(119, 39)],
                            image[..., 0] > 0)
    part = slice(20, 80), slice(100, 180)
    patch, moved = prompting.resize_crop(image, given_prompts, part)
    assert patch.shape[0] % 32 == patch.shape[1] % 32 == 0
    assert patch.shape[0] * patch.shape[1] == pytest.approx(prompting.CROP_AREA, rel=0.15)
    tall, wide = patch.shape[0] / 60, patch.shape[1] / 80
    assert moved.boxes[0] == pytest.approx((20 * wide, 20 * tall, 30 * wide, 20 * tall))
    for (x, y), value in zip((*moved.points, *moved.negative_points), (255, 255, 0)):
        assert abs(int(patch[round(y), round(x), 0]) - value) < 100  # borders are interpolated
    assert moved.mask.sum() == 600


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 79), st.integers(0, 47), st.integers(1, 80), st.integers(1, 48),
       st.floats(0, 1))
def test_a_crop_contains_the_prompts(x, y, w, h, margin):
    w, h = min(w, 80 - x), min(h, 48 - y)
    prompts = Prompts([(x, y, w, h)], [(1, 2)], [(70, 40)])
    rows, columns = prompting.crop_around(prompts, SHAPE, margin)
    assert 0 <= rows.start <= min(y, 2) and max(y + h, 41) <= rows.stop <= 48
    assert 0 <= columns.start <= min(x, 1) and max(x + w, 71) <= columns.stop <= 80


def test_points_alone_start_with_the_whole_frame_then_crop(promptable, monkeypatch):
    crops = []

    def predict_crop(model, image, prompts_in_frame, part):
        crops.append((part, prompts_in_frame.mask))
        found = np.full(image.shape[:2], -1, np.float32)
        found[10:20, 30:40] = 1
        return found

    monkeypatch.setattr(prompting, "_predict_crop", predict_crop)
    image = np.zeros((200, 300, 3), np.uint8)
    mask = prompting.predict_mask(promptable, image, Prompts(points=[(35, 15)]))
    assert mask.sum() == 100 and len(crops) == 2
    assert crops[0] == ((slice(0, 200), slice(0, 300)), None)
    rows, columns = crops[1][0]
    assert rows.stop - rows.start == columns.stop - columns.start == 40
    assert (crops[1][1] == mask).all()


def test_iou_of_crops():
    whole, half = (slice(0, 10), slice(0, 10)), (slice(0, 10), slice(5, 10))
    assert prompting.crop_iou(whole, whole) == 1 and prompting.crop_iou(whole, half) == 0.5
    assert prompting.crop_iou((slice(0, 2), slice(0, 2)), (slice(2, 4), slice(0, 2))) == 0


def test_components_are_selected_by_points_and_boxes():
    found = np.zeros((40, 60), bool)
    parts = np.zeros((3, 40, 60), bool)
    for i, (x, w) in enumerate(((2, 10), (20, 20), (45, 10))):
        parts[i, 5:25, x:x + w] = True
    found = parts.any(0)

    def kept(**prompts_in_frame):
        mask = prompting.select_components(found, Prompts(**prompts_in_frame))
        assert not (mask & ~found).any()
        return [float((mask & part).sum() / part.sum()) for part in parts]

    assert kept(points=[(5, 10)]) == [1, 0, 0]
    assert kept(points=[(5, 10), (50, 10)]) == [1, 0, 1]
    assert kept(points=[(5, 10)], mask=parts[1]) == [1, 1, 0]
    assert kept(points=[(5, 10)], mask=parts[1] & (np.arange(60) < 28)) == [1, 0, 0]
    assert kept(points=[(1, 1)]) == [1, 1, 1]  # nothing was found there
    assert kept(boxes=[(20, 5, 20, 20)]) == [0, 1, 0]
    assert kept(boxes=[(10, 5, 20, 20)]) == pytest.approx([0.4, 0.6, 0])
    assert kept(boxes=[(10, 5, 20, 20)], points=[(25, 10)]) == pytest.approx([0, 0.6, 0])
    assert kept(boxes=[(0, 0, 15, 30), (44, 0, 15, 30)]) == [1, 0, 1]


@pytest.mark.parametrize("wrong, message", [
    (Prompts(), "expected a box or a point on the object"),
    (Prompts(negative_points=[(1, 1)]), "expected a box or a point on the object"),
    (Prompts([(-1, 0, 20, 20)]), "--box -1 0 20 20: expected a part of the frame of 80x48"),
    (Prompts([(0, 0, 500, 20)]), "--box"), (Prompts([(5, 5, 0, 9)]), "--box"),
    (Prompts(points=[(80, 0)]), "--point 80 0: expected a pixel of the frame of 80x48"),
    (Prompts(points=[(1, 1)], negative_points=[(0, -1)]), "--negative_point 0 -1"),
    (Prompts(mask=np.ones((4, 5), bool)), "expected a mask of 80x48 pixels, got 5x4"),
])
def test_prompts_must_lie_in_the_frame(promptable, wrong, message):
    with pytest.raises(ValueError, match=message):
        prompting.predict_mask(promptable, draw_frame(0)[0], wrong)


def test_a_model_without_prompt_decoder_names_the_flag_that_adds_it(model):
    with pytest.raises(ValueError, match="-m train --prompts"):
        prompting.predict_mask(model, np.zeros((48, 80, 3), np.uint8), Prompts([(8, 8, 20, 20)]))


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 400, 3), (48, 80, 3)])
def test_the_mask_has_the_shape_of_the_frame(promptable, shape):
    found = prompting.predict_mask(promptable, np.zeros(shape, np.uint8), Prompts(points=[(0, 0)]))
    assert found.shape == shape[:2] and found.dtype == bool


def test_the_best_object_wins_a_pixel_and_points_of_others_are_negative(promptable, monkeypatch):
    asked = []

    def logits(model, image, prompts_in_frame):
        asked.append(prompts_in_frame)
        found = np.full((4, 6), -1.0, np.float32)
        found[:, :4 if len(asked) == 1 else 6] = len(asked)
        found[0] = -np.inf
        found[3, :2] = 5 - len(asked)
        return found

    monkeypatch.setattr(prompting, "predict_logits", logits)
    mask = prompting.predict_masks(promptable, np.zeros((4, 6, 3), np.uint8),
                            [Prompts(points=[(0, 3)]), Prompts([(2, 0, 4, 4)], [(5, 1)])])
    np.testing.assert_array_equal(mask, [[0] * 6, [2] * 6, [2] * 6, [1, 1, 2, 2, 2, 2]])
    assert asked[0].negative_points == [(5, 1)] and asked[1].negative_points == [(0, 3)]


def test_a_checkpoint_with_another_decoder_is_refused_as_another_version(promptable, tmp_path):
    promptable.save(tmp_path / "model.pth")
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    content["model"] = {name: value for name, value in content["model"].items()
                        if "attention" not in name}
    torch.save(content, tmp_path / "old.pth")
    with pytest.raises(ValueError, match=r"old.pth: not a checkpoint .* \(of another version"):
        VideoMatch.load(tmp_path / "old.pth")
