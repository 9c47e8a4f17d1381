"""Training pairs and clips, and the order in which they are sampled."""

import shutil
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from conftest import SHAPE, write_list, write_sequence
from PIL import Image
from torch.utils.data import DataLoader

from davis import Davis
from preprocess import Augment
from training.samples import Clips, Pairs, PairSampler, large_enough


def as_is(image, mask):
    """An augmentation that changes nothing."""
    return torch.from_numpy(image), torch.from_numpy(mask)


def all_equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_item_is_two_images_with_binary_masks(davis_2017):
    pairs = Pairs(Davis(davis_2017, "2017").sequences, Augment((24, 56)))
    assert len(pairs) == 12
    for frame in range(12):
        images, masks = pairs[frame, 5]
        assert (images.shape, images.dtype) == ((2, 3, 24, 56), torch.float32)
        assert (masks.shape, masks.dtype) == ((2, 24, 56), torch.uint8)
        assert set(masks.unique().tolist()) <= {0, 1}


def test_a_pair_depends_on_its_index_alone(davis_2017):
    pairs = Pairs(Davis(davis_2017, "2017").sequences, Augment((24, 40)))
    index = list(PairSampler(len(pairs), 8, seed=2))
    first = [pairs[i] for i in index]
    torch.rand(7)
    state = torch.get_rng_state()
    again = [pairs[i] for i in reversed(index)][::-1]
    assert torch.equal(state, torch.get_rng_state())  # nor does it disturb others' randomness
    assert all(all_equal(a, b) for a, b in zip(first, again))
    assert not all_equal(pairs[3, 0], pairs[3, 1])
    loader = DataLoader(pairs, batch_size=2, sampler=index, num_workers=2)
    batches = list(loader)
    assert len(batches) == 4
    for i, batch in enumerate(batches):
        for row in range(2):
            assert all_equal(first[2 * i + row], [tensor[row] for tensor in batch])


def test_both_frames_are_of_one_sequence_and_the_index_is_the_test_frame(tmp_path):
    for level, name in enumerate("abc"):
        write_sequence(tmp_path, name, frames=4)
        for i in range(4):  # a flat grey that tells sequence and frame
            grey = Image.new("RGB", SHAPE[::-1], (80 * level + 16 * i + 8,) * 3)
            grey.save(tmp_path / "JPEGImages" / "480p" / name / f"{i:05d}.jpg", quality=100)
    write_list(tmp_path, "2016", "train", list("abc"))
    pairs = Pairs(Davis(tmp_path).sequences, as_is)
    references = set()
    for frame in range(12):
        for seed in range(10 * frame, 10 * frame + 10):
            reference, test = pairs[frame, seed][0]
            code, reference_code = (int(image.float().mean()) // 16 for image in (test, reference))
            assert code == 5 * (frame // 4) + frame % 4
            assert reference_code // 5 == frame // 4
            references.add(reference_code)
    assert len(references) == 12  # any frame can be a reference


def test_both_masks_show_the_same_object(davis_2017):
    (dog,) = Davis(davis_2017, "2017", "val")
    pairs = Pairs([dog], as_is)
    drawn = []
    for seed in range(12):
        reference, test = pairs[seed % 6, seed][1]
        masks = [set(np.flatnonzero(mask.numpy().any(1))) for mask in (reference, test)]
        assert masks[0] == masks[1]  # the fixture's objects keep to their rows
        drawn.append(min(masks[0]))
    assert set(drawn) == {6, 26}


def test_the_reference_always_contains_the_object(tmp_path):
    write_sequence(tmp_path, "ant", frames=6)
    for i in (1, 2, 3, 5):
        Image.new("L", SHAPE[::-1]).save((tmp_path / "Annotations/480p/ant") / f"{i:05d}.png")
    write_list(tmp_path, "2016", "train", ["ant"])
    pairs = Pairs(Davis(tmp_path).sequences, Augment((24, 40)))
    for seed in range(40):
        reference, test = pairs[seed % 6, seed][1]
        assert reference.any()
        if seed % 6 in (1, 2, 3, 5):
            assert not test.any()


def test_a_sequence_without_objects_is_named(tmp_path):
    write_sequence(tmp_path, "ant", value=0)
    write_list(tmp_path, "2016", "train", ["ant"])
    with pytest.raises(ValueError, match="ant"):
        Pairs(Davis(tmp_path).sequences, as_is)[0, 0]


def test_a_reference_whose_object_vanishes_by_resizing_is_drawn_again(tmp_path):
    write_sequence(tmp_path, "ant", frames=3)
    folder = tmp_path / "Annotations/480p/ant"
    for i in (1, 2):
        tiny = np.zeros(SHAPE, np.uint8)
        tiny[0, 0] = 255
        Image.fromarray(tiny).save(folder / f"{i:05d}.png")
    write_list(tmp_path, "2016", "train", ["ant"])
    pairs = Pairs(Davis(tmp_path).sequences, Augment((24, 40), random=False))
    for seed in range(12):
        assert pairs[seed % 3, seed][1][0].any()
    shutil.copy(folder / "00001.png", folder / "00000.png")
    with pytest.raises(ValueError, match="ant: no object in any mask that is large"):
        Pairs(Davis(tmp_path).sequences, Augment((24, 40), random=False))[0, 0]


class AsIs:
    """An augmentation of clips that changes nothing."""

    def __call__(self, image, mask):
        return as_is(image, mask)

    def clip(self, frames):
        return [as_is(*frame) for frame in frames]


def grey_sequences(root, names, frames):
    """Sequences whose frames are flat grey; the value encodes sequence and frame."""
    for level, name in enumerate(names):
        write_sequence(root, name, frames=frames)
        for i in range(frames):
            grey = Image.new("RGB", SHAPE[::-1], (120 * level + 8 * i + 4,) * 3)
            grey.save(root / "JPEGImages" / "480p" / name / f"{i:05d}.jpg", quality=100)
    write_list(root, "2016", "train", list(names))
    return Davis(root).sequences


def test_a_clip_runs_evenly_through_one_sequence(tmp_path):
    clips = Clips(grey_sequences(tmp_path, "ab", frames=12), AsIs(), frames=4, gap=2, paste=0)
    steps, adjacent = set(), 0
    for seed in range(80):
        images, masks = clips[seed % 24, seed]
        assert len(images) == len(masks) == 4 and masks[0].any()
        codes = [int(image.float().mean()) // 8 for image in images]
        assert {code // 15 for code in codes} == {seed % 24 // 12}
        frames = [code % 15 for code in codes]
        first, *others = (b - a for a, b in zip(frames, frames[1:]))
        assert all(abs(step) <= 2 for step in others)
        if others[0] == others[1]:  # not mirrored at an end
            steps.add(others[0])
            adjacent += first == others[0]
    assert steps >= {-2, -1, 1, 2}
    assert 20 < adjacent < 70  # about half, the others start anywhere


@pytest.mark.slow
def test_each_id_is_one_object_native_or_pasted(tmp_path):
    sequences = grey_sequences(tmp_path, "ab", frames=6)
    clips = Clips(sequences, AsIs(), frames=3, paste=1)
    clips.SWARM = clips.LINES = clips.CROSSES = clips.ALONE = 0
    clips.MORE, counts = 0.3, Counter()
    for seed in range(160):
        images, masks = clips[seed % 12, seed]
        own = [0, 0]
        assert set(masks.unique().tolist()) == set(masks[0].unique().tolist())
        for i in range(1, int(masks.max()) + 1):
            inside = torch.from_numpy(np.array([cv2.erode(m, np.ones((5, 5), np.uint8))
                                                for m in (masks == i).byte().numpy()])) > 0
            # frames of one sequence are darker than those of the other
            foreign = (images[inside].float().mean(1) > 100) != bool(seed % 12 // 6)
            if len(foreign) > 90:  # small objects consist mostly of edges
                share = foreign.float().mean()
                assert share < 0.1 or share > 0.9  # edges are mixed
                own[int(share > 0.5)] += 1
        counts[tuple(own)] += 1
    # own alone with a pasted one as distractor, the pasted one alone, both, three
    assert min(counts[1, 0], counts[0, 1], counts[1, 1], counts[1, 2]) > 3


def test_all_objects_are_tracked_under_any_id(davis_2017):
    (dog,) = Davis(davis_2017, "2017", "val")
    clips, found = Clips([dog], AsIs(), frames=3, paste=0), set()
    for seed in range(30):
        images, masks = clips[seed % 6, seed]
        for i in masks.unique().tolist()[1:]:
            colours = images[masks == i].float()
            assert colours[:, 1].std() < 12  # in the fixture each object has one green
            found.add((int(masks.max()), i, bool(colours[:, 1].mean() > 140)))
    # the first or the second object alone, or both, either way round
    assert found == {(n, i, first) for n in (1, 2) for i in range(1, n + 1)
                     for first in (False, True)}
    alone = Clips([dog], AsIs(), frames=3, paste=0, objects=1)
    assert {int(alone[seed % 6, seed][1].max()) for seed in range(10)} == {1}


def test_a_clip_of_one_frame_is_refused():
    with pytest.raises(ValueError, match="two frames"):
        Clips([], AsIs(), frames=1)


def write_square(root, name, side, frames=4, shape=(200, 300)):
    """A sequence of a square of `side` pixels that moves right."""
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p" / name).mkdir(parents=True)
    for i in range(frames):
        mask = np.zeros(shape, np.uint8)
        mask[80:80 + side, 100 + 3 * i:100 + 3 * i + side] = 1
        Image.fromarray(np.where(mask > 0, 230, 40).astype(np.uint8).repeat(3, 1).reshape(
            *shape, 3)).save(root / "JPEGImages" / "480p" / name / f"{i:05d}.jpg")
        Image.fromarray(mask).save(root / "Annotations" / "480p" / name / f"{i:05d}.png")


@pytest.fixture
def squares(tmp_path):
    """Sequences with objects of 1, 5 x 5 and 40 x 40 pixels in frames of 200 x 300."""
    for name, side in (("dot", 1), ("small", 5), ("whole", 40)):
        write_square(tmp_path, name, side)
    write_list(tmp_path, "2016", "train", ["dot", "small", "whole"])
    return Davis(tmp_path).sequences


def test_an_object_below_the_usual_minimum_area_still_yields_a_clip(squares):
    dot, small, whole = squares
    clips = Clips([small], Augment((200, 300), random=False), paste=0)
    assert Clips.MIN_SHARE * 200 * 300 > 25
    images, masks = clips[0, 1]
    assert (masks[0] == 1).sum() == 25 and masks[1:].any()


@pytest.mark.slow
def test_a_sequence_that_yields_no_clip_is_replaced_by_another(squares):
    dot, small, whole = squares
    clips = Clips([dot, whole], Augment((200, 300), random=False), paste=0)
    for seed in range(3):
        assert (clips[0, seed][1][0] > 0).sum() == 1600
    with pytest.raises(ValueError, match="dot.*--input_image_shape"):
        Clips([dot], Augment((200, 300), random=False), paste=0)[0, 0]


def test_sequences_with_too_small_objects_are_named_once(squares, caplog):
    assert [s.name for s in large_enough(squares, 16)] == ["small", "whole"]
    assert [s.name for s in large_enough(squares, 16, (100, 150))] == ["whole"]  # 25 / 4 pixels
    first, second = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert "dot" in first and "small." not in first and "-p" in first
    assert "dot, small" in second


def test_an_object_must_appear_in_two_masks(squares):
    dot, small, whole = squares
    for path in whole.masks[1:]:
        Image.fromarray(np.zeros((200, 300), np.uint8)).save(path)
    assert large_enough([whole], 16) == [] and large_enough([whole], 16, masks=1) == [whole]


def test_the_sampler_refuses_an_empty_set():
    with pytest.raises(ValueError, match="no frame"):
        list(PairSampler(0, 3))


def test_duplicates_are_pasted_only_into_clips_without_a_jump(tmp_path):
    write_sequence(tmp_path, "ant", frames=6)
    write_list(tmp_path, "2016", "train", ["ant"])
    clips = Clips(Davis(tmp_path).sequences, AsIs(), frames=3, paste=1)
    clips.DUPLICATES, clips.JUMPS, clips.SWARM, clips.LINES = 1.0, 0.5, 0, 0
    duplicates, pasted, after_jump = 0, clips._pasted_layers, []

    def spy(own, masks, poses, shape, step, jump, *others):
        layers = pasted(own, masks, poses, shape, step, jump, *others)
        after_jump.extend([bool(layers)] if jump else [])
        return layers

    clips._pasted_layers = spy
    for seed in range(40):
        images, masks = clips[seed % 6, seed]
        bright = [(image.max(2).values > 150) for image in images]
        two = [int(b.sum() > 1.3 * (m == 1).sum() > 0) for b, m in zip(bright, masks)]
        duplicates += all(two)
        # a target looks like the object, whether original or duplicate
        assert all(b[m > 0].float().mean() > 0.7 for b, m in zip(bright, masks) if m.sum() > 30)
    assert duplicates > 5
    assert len(after_jump) > 5 and not any(after_jump)


def test_swarms_are_tracked_and_never_combined_with_a_jump(tmp_path):
    write_sequence(tmp_path, "ant", frames=6)
    write_list(tmp_path, "2016", "train", ["ant"])
    clips = Clips(Davis(tmp_path).sequences, AsIs(), frames=5, paste=1, objects=9)
    clips.SWARM, clips.JUMPS, clips.DISTRACTORS, clips.MIN_SHARE = 1, 0, 0, 0
    counts = [int(clips[i % 6, i][1][0].max()) for i in range(12)]
    assert max(counts) > 4
    clips.JUMPS, clips.MORE, clips.DUPLICATES = 1, 0, 0
    assert max(int(clips[i % 6, i][1][0].max()) for i in range(12)) <= 2


def test_a_clip_depends_on_its_index_alone(davis_2016):
    clips = Clips(Davis(davis_2016).sequences, Augment((24, 40)), paste=0.5)
    first = [clips[i, 7 * i] for i in range(6)]
    torch.rand(7)
    assert all(all_equal(clips[i, 7 * i], first[i]) for i in reversed(range(6)))


@pytest.mark.parametrize("frames, count", [(7, 20), (7, 7), (7, 3), (1, 4), (5, 10)])
def test_the_sampler_draws_every_frame_once_before_repeating(frames, count):
    sampler = PairSampler(frames, count, seed=1)
    drawn = [frame for frame, _ in sampler]
    assert len(drawn) == len(sampler) == count
    for start in range(0, count, frames):
        one_pass = drawn[start:start + frames]
        assert len(set(one_pass)) == len(one_pass)
        assert set(one_pass) <= set(range(frames))


def test_the_sampler_shuffles_each_epoch_differently_unless_disabled():
    frames = [frame for frame, _ in PairSampler(20, 40)]
    assert frames[:20] != frames[20:] and frames[:20] != list(range(20))
    in_order = list(PairSampler(3, 7, shuffle=False))
    assert [frame for frame, _ in in_order] == [0, 1, 2, 0, 1, 2, 0]
    assert len({seed for _, seed in in_order}) == 7  # a frame's pairs differ between passes


def test_the_sampler_depends_on_its_seed():
    assert list(PairSampler(9, 30, seed=4)) == list(PairSampler(9, 30, seed=4))
    assert list(PairSampler(9, 30, seed=4)) != list(PairSampler(9, 30, seed=5))
    sampler = PairSampler(9, 30)
    assert list(sampler) == list(sampler)


def test_references_of_a_real_sequence_contain_the_object(davis_dir):
    (bumps,) = (sequence for sequence in Davis(davis_dir) if sequence.name == "bmx-bumps")
    assert not bumps.mask(65).any()
    pairs = Pairs([bumps], as_is)
    for seed in range(12):
        reference, test = pairs[65, seed][1]
        assert reference.any() and not test.any()
