"""Masks from boxes and clicks: evidence, decoder, the simulated person, training, command line."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import SHAPE, draw_frame, write_sequence
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import bench_prompts
import main
import preprocess
import prompts
import train_prompts
from data import clicks
from data.stills import Stills
from davis import Davis
from media import images
from network.encoder import Encoder
from network.prompts import EVIDENCE, FAR, NEAR, PromptDecoder, Prompts, evidence, likeness
from tracker import Tracker
from videomatch import VideoMatch

MASKS = arrays(bool, (7, 9))


@pytest.fixture
def shown() -> VideoMatch:
    torch.manual_seed(0)
    return VideoMatch(Encoder("mobilenet"), 2.0, top_k=3, refined=True, prompts=True).eval()


def seen(model, seed=0, size=(64, 96)):
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.prompts.look(image, *model.encoder.pyramid(image))


# evidence

def test_boxes_become_depths():
    size, shape = (32, 48), (8, 12)
    boxes = [(8, 4, 16, 20), (30, 10, 12, 8)]
    found = evidence(Prompts(boxes), size, shape).numpy()
    for row in range(8):
        for column in range(12):
            x, y = 4 * column + 2, 4 * row + 2
            depths = [(min(x - u, u + w - x) / w, min(y - v, v + h - y) / h)
                      for u, v, w, h in boxes]
            deepest = [max(-1, value) for value in max(depths, key=min)]
            inside = any(u <= x <= u + w and v <= y <= v + h for u, v, w, h in boxes)
            np.testing.assert_allclose(found[:4, row, column], [1, inside, *deepest], atol=1e-6)
    assert not found[4:].any()


def test_clicks_become_nearness():
    points, off = [(3, 5), (40, 20)], [(20, 11)]
    found = evidence(Prompts(points=points, not_points=off), (32, 48), (8, 12)).numpy()
    for row in range(8):
        for column in range(12):
            for channel, given_points in ((4, points), (6, off)):
                d = min(math.dist((4 * column + 2, 4 * row + 2), (x + 0.5, y + 0.5))
                        for x, y in given_points)
                np.testing.assert_allclose(
                    found[channel:channel + 2, row, column],
                    [math.exp(-d * d / 2 / NEAR ** 2), math.exp(-d / FAR)], rtol=1e-4, atol=1e-6)
    assert not found[:4].any() and not found[8:].any()


def test_a_mask_becomes_its_share_of_each_cell_and_its_absence_is_told():
    mask = np.zeros((32, 48), bool)
    mask[8:16, 16:32] = True
    found = evidence(Prompts([(0, 0, 4, 4)], mask=mask), (32, 48), (8, 12)).numpy()
    assert (found[8] == 1).all() and found[9, 2:4, 5:7].min() > 0.8
    assert found[9].mean() == pytest.approx(mask.mean(), abs=0.01)
    empty = evidence(Prompts([(0, 0, 4, 4)], mask=0 * mask), (32, 48), (8, 12)).numpy()
    assert (empty[8] == 1).all() and not empty[9].any()


def test_likeness_is_the_cosine_with_the_most_alike_click():
    cells = torch.nn.functional.normalize(torch.randn(1, 5, 3, 4), dim=1)
    found = likeness(cells, [(0, 0), (39.4, 29.4)], (30, 40))[0, 0]
    flat = cells[0].flatten(1)
    cosines = torch.stack([flat[:, 0] @ flat, flat[:, -1] @ flat]).amax(0).view(3, 4)
    torch.testing.assert_close(found, cosines)
    assert not likeness(cells, [], (30, 40)).any()


def test_the_order_of_clicks_and_boxes_says_nothing(shown):
    one = Prompts([(5, 5, 30, 20), (50, 10, 20, 30)], [(8, 9), (60, 20)], [(1, 1), (90, 60)])
    other = Prompts(one.boxes[::-1], one.points[::-1], one.not_points[::-1])
    with torch.no_grad():
        torch.testing.assert_close(shown.prompts(seen(shown), one),
                                   shown.prompts(seen(shown), other))


# decoder

@pytest.mark.parametrize("encoder", ["mobilenet", "vgg", "resnet"])
def test_decoder_answers_at_half_the_size(encoder):
    channels = tuple(Encoder(encoder).spec.levels.values())
    sides = {"mobilenet": (4, 8, 16, 32)}.get(encoder, (4, 8))
    decoder = PromptDecoder(channels)
    image = torch.randn(1, 3, 64, 96)
    levels = [torch.randn(1, c, 64 // s, 96 // s) for c, s in zip(channels, sides)]
    logits = decoder(decoder.look(image, levels[-1], levels), Prompts(points=[(3, 4)]))
    assert logits.shape == (32, 48)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_every_channel_of_evidence_counts(shown):
    mask = np.zeros((64, 96), bool)
    base = Prompts([(5, 5, 40, 30)], [(20, 20)], [(80, 50)], mask)
    changed = [Prompts([(6, 5, 40, 30)], base.points, base.not_points, mask),
               Prompts(base.boxes, [(22, 20)], base.not_points, mask),
               Prompts(base.boxes, base.points, [(80, 40)], mask),
               Prompts(base.boxes, base.points, base.not_points, ~mask),
               Prompts(base.boxes, base.points, base.not_points)]
    view = seen(shown)
    assert shown.prompts._evidence(view, base).shape == (1, EVIDENCE, 16, 24)
    with torch.no_grad():
        answer = shown.prompts(view, base)
        assert all((shown.prompts(view, other) - answer).abs().max() > 1e-6 for other in changed)


def test_one_scene_is_learnt_and_only_the_decoder_changes(shown):
    image, mask = draw_frame(0)
    truth = np.kron(mask, np.ones((2, 2))) > 0
    picture = preprocess.to_tensor(np.kron(image, np.ones((2, 2, 1), np.uint8)))
    before = {name: value.clone() for name, value in shown.state_dict().items()}
    scene = train_prompts.begin(shown, picture, truth, Prompts([clicks.box_of(truth)]), [True])
    optimizer = torch.optim.AdamW(shown.prompts.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        scene.prompts, scene.rounds = Prompts([clicks.box_of(truth)]), [True]
        losses.append(train_prompts.step(shown, optimizer, [scene]))
    assert losses[-1] < 0.15 < 1 < losses[0]
    for name, value in shown.state_dict().items():
        if not name.startswith("prompts."):
            assert torch.equal(value, before[name]), name


# where to look

def test_prompts_in_a_part_are_where_they_were():
    image = np.zeros((100, 200, 3), np.uint8)
    image[40:60, 120:150] = 255
    given_prompts = Prompts([(120, 40, 30, 20)], [(120, 40), (149, 59)], [(119, 39)],
                            image[..., 0] > 0)
    part = slice(20, 80), slice(100, 180)
    patch, moved = prompts.part_of(image, given_prompts, part)
    assert patch.shape[0] % 32 == patch.shape[1] % 32 == 0
    assert patch.shape[0] * patch.shape[1] == pytest.approx(prompts.AREA, rel=0.15)
    tall, wide = patch.shape[0] / 60, patch.shape[1] / 80
    assert moved.boxes[0] == pytest.approx((20 * wide, 20 * tall, 30 * wide, 20 * tall))
    for (x, y), value in zip((*moved.points, *moved.not_points), (255, 255, 0)):
        assert abs(int(patch[round(y), round(x), 0]) - value) < 100  # borders are interpolated
    assert moved.mask.sum() == 600


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 79), st.integers(0, 47), st.integers(1, 80), st.integers(1, 48),
       st.floats(0, 1))
def test_what_is_looked_at_holds_what_is_shown(x, y, w, h, margin):
    w, h = min(w, 80 - x), min(h, 48 - y)
    rows, columns = prompts.around(Prompts([(x, y, w, h)], [(1, 2)], [(70, 40)]), SHAPE, margin)
    assert 0 <= rows.start <= min(y, 2) and max(y + h, 41) <= rows.stop <= 48
    assert 0 <= columns.start <= min(x, 1) and max(x + w, 71) <= columns.stop <= 80


def test_clicks_alone_look_at_the_whole_frame_first_then_at_what_was_found(shown, monkeypatch):
    looks = []

    def look(model, image, shown_prompts, part):
        looks.append((part, shown_prompts.mask))
        found = np.full(image.shape[:2], -1, np.float32)
        found[10:20, 30:40] = 1
        return found

    monkeypatch.setattr(prompts, "_look", look)
    image = np.zeros((200, 300, 3), np.uint8)
    mask = prompts.prompter(shown)(image, Prompts(points=[(35, 15)]))
    assert mask.sum() == 100 and len(looks) == 2
    assert looks[0] == ((slice(0, 200), slice(0, 300)), None)
    rows, columns = looks[1][0]
    assert rows.stop - rows.start == columns.stop - columns.start == 40
    assert (looks[1][1] == mask).all()


def test_overlap_of_parts():
    whole, half = (slice(0, 10), slice(0, 10)), (slice(0, 10), slice(5, 10))
    assert prompts.overlap(whole, whole) == 1 and prompts.overlap(whole, half) == 0.5
    assert prompts.overlap((slice(0, 2), slice(0, 2)), (slice(2, 4), slice(0, 2))) == 0


def test_what_is_meant_of_several_parts():
    found = np.zeros((40, 60), bool)
    parts = np.zeros((3, 40, 60), bool)
    for i, (x, w) in enumerate(((2, 10), (20, 20), (45, 10))):
        parts[i, 5:25, x:x + w] = True
    found = parts.any(0)

    def kept(**shown_prompts):
        mask = prompts.meant(found, Prompts(**shown_prompts))
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
    (Prompts(), "expected something of the object"),
    (Prompts(not_points=[(1, 1)]), "expected something of the object"),
    (Prompts([(-1, 0, 20, 20)]), "--box -1 0 20 20: expected a part of the frame of 80x48"),
    (Prompts([(0, 0, 500, 20)]), "--box"), (Prompts([(5, 5, 0, 9)]), "--box"),
    (Prompts(points=[(80, 0)]), "--point 80 0: expected a pixel of the frame of 80x48"),
    (Prompts(points=[(1, 1)], not_points=[(0, -1)]), "--not_point 0 -1"),
    (Prompts(mask=np.ones((4, 5), bool)), "expected a mask of 80x48 pixels, got 5x4"),
])
def test_what_is_shown_must_lie_in_the_frame(shown, wrong, message):
    with pytest.raises(ValueError, match=message):
        prompts.prompter(shown)(draw_frame(0)[0], wrong)


def test_a_model_without_the_part_says_how_to_get_it(model):
    with pytest.raises(ValueError, match="-m train --prompts"):
        prompts.prompter(model)


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 400, 3), (48, 80, 3)])
def test_frames_of_any_shape_get_a_mask_of_it(shown, shape):
    found = prompts.prompter(shown)(np.zeros(shape, np.uint8), Prompts(points=[(0, 0)]))
    assert found.shape == shape[:2] and found.dtype == bool


def test_the_surest_object_gets_a_pixel_and_others_points_are_not_its_own(shown, monkeypatch):
    asked = []

    def logits(model, image, shown_prompts):
        asked.append(shown_prompts)
        found = np.full((4, 6), -1.0, np.float32)
        found[:, :4 if len(asked) == 1 else 6] = len(asked)
        found[0] = -np.inf
        found[3, :2] = 5 - len(asked)
        return found

    monkeypatch.setattr(prompts, "logits", logits)
    mask = prompts.masks_of(shown, np.zeros((4, 6, 3), np.uint8),
                            [Prompts(points=[(0, 3)]), Prompts([(2, 0, 4, 4)], [(5, 1)])])
    np.testing.assert_array_equal(mask, [[0] * 6, [2] * 6, [2] * 6, [1, 1, 2, 2, 2, 2]])
    assert asked[0].not_points == [(5, 1)] and asked[1].not_points == [(0, 3)]


# the simulated person

def brute_depth(mask: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the nearest one outside, the frame's surroundings included."""
    height, width = mask.shape
    outside = [(y, x) for y in range(-1, height + 1) for x in range(-1, width + 1)
               if not (0 <= y < height and 0 <= x < width and mask[y, x])]
    return np.array([[min(math.dist((y, x), place) for place in outside) if mask[y, x] else 0
                      for x in range(width)] for y in range(height)])


def brute_parts(mask: np.ndarray) -> list[np.ndarray]:
    """Parts that hang together, by corners too."""
    left, parts = {(int(y), int(x)) for y, x in zip(*mask.nonzero())}, []
    while left:
        part, border = set(), {left.pop()}
        while border:
            part |= border
            border = {(y + i, x + j) for y, x in border for i in (-1, 0, 1)
                      for j in (-1, 0, 1)} & left
            left -= border
        parts.append(np.zeros_like(mask))
        parts[-1][tuple(zip(*part))] = True
    return parts


@settings(max_examples=40, deadline=None)
@given(MASKS)
def test_depth_is_the_distance_to_the_nearest_pixel_outside(mask):
    np.testing.assert_allclose(clicks.depth(mask), brute_depth(mask), atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(MASKS, MASKS)
def test_the_next_click_is_the_middle_of_the_largest_error(found, truth):
    click = clicks.next_click(found, truth)
    parts = [(part, wanted) for wanted, wrong in ((True, truth & ~found), (False, found & ~truth))
             for part in brute_parts(wrong)]
    if not parts:
        assert click is None
        return
    (x, y), wanted = click
    area = max(part.sum() for part, _ in parts)
    holding = [part for part, kind in parts if kind == wanted and part[y, x]]
    assert len(holding) == 1 and holding[0].sum() == area
    depths = brute_depth(holding[0])
    assert depths[y, x] == pytest.approx(depths.max(), abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(MASKS.filter(np.any), st.integers(0, 99))
def test_the_first_click_is_well_inside(mask, seed):
    x, y = clicks.first_click(mask, np.random.default_rng(seed))
    depths = brute_depth(mask)
    assert mask[y, x] and depths[y, x] >= 0.5 * depths.max() - 1e-4


@settings(max_examples=40, deadline=None)
@given(MASKS.filter(np.any), st.floats(0, 0.5), st.integers(0, 99))
def test_boxes_are_moved_by_no_more_than_a_share(mask, share, seed):
    x, y, w, h = clicks.box_of(mask)
    rows, columns = mask.nonzero()
    assert (x, y, x + w - 1, y + h - 1) == (columns.min(), rows.min(), columns.max(), rows.max())
    u, v, a, b = clicks.jittered((x, y, w, h), share, mask.shape, np.random.default_rng(seed))
    assert 0 <= u < u + a <= 9 and 0 <= v < v + b <= 7
    assert abs(u - x) <= share * w + 0.5 and abs(v - y) <= share * h + 0.5
    assert abs(u + a - x - w) <= share * w + 1 and abs(v + b - y - h) <= share * h + 1


def test_a_person_clicks_until_nothing_is_wrong():
    image, mask = draw_frame(0)
    truth, asked = mask > 0, []

    def prompt(image, shown_prompts):
        asked.append(shown_prompts)
        return truth if len(asked) == 3 else np.roll(truth, 3 - len(asked), axis=1)

    found = list(clicks.clicking(prompt, image, truth, 5, np.random.default_rng(0)))
    assert len(found) == 5 and len(asked) == 3 and (found[4] == truth).all()
    assert [len(p.points) + len(p.not_points) for p in asked] == [1, 2, 3]
    assert asked[0].mask is None and (asked[2].mask == found[1]).all()
    assert all(truth[y, x] for p in asked for x, y in p.points)
    assert not any(truth[y, x] for p in asked for x, y in p.not_points)


# training

@pytest.fixture
def stills_dir(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "stills" / kind).mkdir(parents=True)
    for i in range(4):
        image, mask = draw_frame(i, (1, 2))
        Image.fromarray(image).save(tmp_path / f"stills/images/{i}.jpg")
        images.write_mask(tmp_path / f"stills/masks/{i}.png", mask)
    return tmp_path / "stills"


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "before.pth"
    VideoMatch(Encoder("mobilenet"), 2.0, top_k=3, refined=True).save(path, held_out_iou=0.7)
    return path


def train(davis, stills, checkpoint, out, *more) -> int:
    return main.main(["-m", "train", "--prompts", "-d", str(davis), "--stills", str(stills), "-o",
                      str(checkpoint), "-s", str(out), "-r", "2", "--workers", "0", "-vs", "0.3",
                      "-b", "2", "-c", "cpu", *more])


def test_training_changes_the_new_part_only_and_goes_on(davis_2016, stills_dir, checkpoint,
                                                        tmp_path):
    whole, halves = tmp_path / "whole.pth", tmp_path / "halves.pth"
    assert train(davis_2016, stills_dir, checkpoint, whole, "-i", "4") == 0
    before, after = VideoMatch.load(checkpoint), VideoMatch.load(whole)
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value), name
    assert after.prompts is not None and after.facts["held_out_iou"] == 0.7
    assert 0 <= after.facts["prompts"]["held_out_iou"] <= 1
    assert before.digest() != after.digest()
    lines = [json.loads(line) for line in whole.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 2, 4]
    # a run that ends after its first report, as one that was killed there
    original = train_prompts.rounds

    def killed(*args):
        if args[5]:
            raise MemoryError
        yield from original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_prompts, "rounds", killed)
        assert train(davis_2016, stills_dir, checkpoint, halves, "-i", "4") == 2
    assert train(davis_2016, stills_dir, checkpoint, halves, "-i", "4", "--resume") == 0
    states = [torch.load(path.with_suffix(".state"), weights_only=True) for path in (whole, halves)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


def test_the_road_of_a_video_doesnt_know_the_new_part(checkpoint):
    bare, shown = VideoMatch.load(checkpoint).eval(), VideoMatch.load(checkpoint).eval()
    prompts.add(shown)
    steps = []
    for model in (bare, shown):
        tracker = Tracker(model)
        for i in range(3):
            image, mask = draw_frame(i)
            steps.append(tracker.step(preprocess.to_tensor(image), None if i else mask).mask)
    for one, other in zip(steps[:3], steps[3:]):
        np.testing.assert_array_equal(one, other)


def test_scenes_depend_on_seed_and_index_alone(davis_2016, stills_dir):
    sources = Davis(davis_2016).sequences, Stills(stills_dir).stills
    scenes = train_prompts.Scenes(*sources, seed=3)
    first = [scenes[i] for i in range(30)]
    torch.manual_seed(5)
    for i in reversed(range(30)):
        image, truth, shown_prompts, rounds = scenes[i]
        assert torch.equal(image, first[i][0]) and (truth == first[i][1]).all()
        assert shown_prompts.boxes == first[i][2].boxes
        assert shown_prompts.points == first[i][2].points
        assert image.shape[1:] == truth.shape and 1 <= len(rounds) <= 8 and rounds == first[i][3]
        size = truth.shape
        for x, y in (*shown_prompts.points, *shown_prompts.not_points):
            assert -0.5 <= x < size[1] and -0.5 <= y < size[0]
        if shown_prompts.mask is None:
            # nearest neighbour moves a border by less than a pixel of what was enlarged
            assert all(truth[max(0, round(y)), max(0, round(x))] for x, y in shown_prompts.points)
    kinds = {(bool(p.boxes), p.mask is not None) for _, _, p, _ in first}
    assert kinds == {(True, False), (False, False), (False, True)}


def test_held_out_stills_are_apart():
    stills = [object() for _ in range(10)]
    training, apart = train_prompts.split_stills(stills, 0.3, 0)
    assert len(apart) == 3 and {*training, *apart} == {*stills} and len(training) == 7


def test_the_bench_prints_what_a_person_would_reach(davis_2017, checkpoint, tmp_path, monkeypatch,
                                                    capsys):
    model = VideoMatch.load(checkpoint)
    prompts.add(model)
    model.save(tmp_path / "shown.pth")
    truths = [draw_frame(0, (1, 2))[1] == i for i in (1, 2)]

    def prompt(model, image, shown_prompts):  # the object, but for a part that clicks bring back
        wanted = truths[1 if max(y for _, y in [*shown_prompts.points, (0, 0)]) > 24
                        or any(y > 20 for _, y, _, _ in shown_prompts.boxes) else 0].copy()
        if len(shown_prompts.points) < 3:
            wanted[:, 20:] = False
        return wanted

    monkeypatch.setattr(prompts, "prompt", prompt)
    monkeypatch.setattr("sys.argv", ["bench_prompts.py", "-d", str(davis_2017), "-y", "2017", "-o",
                                     str(tmp_path / "shown.pth"), "--repeats", "1", "-c", "cpu",
                                     "--json", str(tmp_path / "b.json")])
    assert bench_prompts.main() == 0
    figures = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in figures["rows"]] == ["dog_1", "dog_2"]
    assert figures["mean"] == pytest.approx({"true box": 0.6, "moved box": 0.6, "1 clicks": 0.6,
                                             "3 clicks": 1, "8 clicks": 1})
    assert "mean J" in capsys.readouterr().out and figures["seconds"] > 0


# command line

@pytest.fixture
def clip_dir(tmp_path):
    write_sequence(tmp_path, "ant", frames=3)
    return tmp_path / "JPEGImages/480p/ant"


def test_boxes_and_points_are_objects_in_their_order(clip_dir, checkpoint, tmp_path, monkeypatch,
                                                     capsys):
    model = VideoMatch.load(checkpoint)
    prompts.add(model)
    model.save(tmp_path / "shown.pth")
    asked = []

    def masks_of(model, image, objects):
        asked.extend(objects)
        return draw_frame(0, (1, 2))[1]

    monkeypatch.setattr(prompts, "masks_of", masks_of)
    out = tmp_path / "out"
    assert main.main(["-m", "segment", "--video", str(clip_dir), "-o", str(tmp_path / "shown.pth"),
                      "--box", "8", "6", "20", "16", "--point", "9", "9", "10", "10", "--point",
                      "12", "30", "--not_point", "1", "1", "-j", str(out), "-c", "cpu"]) == 0
    assert asked == [Prompts([(8, 6, 20, 16)], [(9, 9), (10, 10)], [(1, 1)]),
                     Prompts([], [(12, 30)], [])]
    kept = images.read_mask(out / "mask_00000.png")
    np.testing.assert_array_equal(kept, draw_frame(0, (1, 2))[1])
    assert f"--mask 0:{out / 'mask_00000.png'}" in capsys.readouterr().out


def test_nothing_found_is_one_line(clip_dir, checkpoint, tmp_path, capsys):
    model = VideoMatch.load(checkpoint)
    torch.nn.init.constant_(prompts.add(model).score.bias, -100)
    model.save(tmp_path / "shown.pth")
    assert main.main(["-m", "segment", "--video", str(clip_dir), "-o", str(tmp_path / "shown.pth"),
                      "--box", "8", "6", "20", "16", "-c", "cpu"]) == 2
    assert "nothing was found of object 1" in capsys.readouterr().err
