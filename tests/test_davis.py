"""Layouts on disk, sequences, the split, and pairs of frames."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import SHAPE, write_list, write_sequence
from PIL import Image
from torch.utils.data import DataLoader

from data.samples import Clips, Pairs, PairSampler
from davis import Davis, Sequence, split
from preprocess import Augment


def names(sequences) -> list[str]:
    return [sequence.name for sequence in sequences]


def annotations(root: Path, name: str) -> Path:
    return root / "Annotations" / "480p" / name


@pytest.mark.parametrize("year, set_name, expected", [
    ("2016", "train", ["ant"]), ("2016", "val", ["dog"]), ("2016", "trainval", ["ant", "dog"]),
    ("2017", "train", ["ant", "bee"]), ("2017", "trainval", ["ant", "bee", "dog"]),
    ("all", "train", ["ant", "bee"]), ("all", "val", ["dog"]),
    ("all", "trainval", ["ant", "dog", "bee"]),  # the lists of 2016 first
])
def test_sets_of_the_2017_layout_join_without_duplicates(davis_2017, year, set_name, expected):
    assert names(Davis(davis_2017, year, set_name)) == expected


@pytest.mark.parametrize("set_name, expected", [
    ("train", ["ant", "bee", "cat"]), ("val", ["dog"]),
    ("trainval", ["ant", "bee", "cat", "dog"])])
def test_sets_of_the_2016_layout(davis_2016, set_name, expected):
    dataset = Davis(davis_2016, "2016", set_name)
    assert names(dataset) == expected
    assert len(dataset) == len(expected)
    assert [len(sequence) for sequence in dataset] == [6] * len(expected)


def test_order_is_that_of_the_lists_and_blank_lines_are_skipped(davis_2017):
    write_list(davis_2017, "2017", "train", ["dog", "", "bee", "dog"])
    write_list(davis_2017, "2017", "val", ["bee", "ant"])
    assert names(Davis(davis_2017, "2017", "trainval")) == ["dog", "bee", "ant"]


def test_names_filter_keeps_the_order_of_the_list(davis_2016):
    assert names(Davis(davis_2016, names=["cat", "ant"])) == ["ant", "cat"]


@pytest.mark.parametrize("year, ids", [("2016", [0, 1]), ("2017", [0, 1, 2]), ("all", [0, 1, 2])])
def test_2016_has_one_object_and_2017_keeps_ids(davis_2017, year, ids):
    (dog,) = Davis(davis_2017, year, "val")
    drawn = np.array(Image.open(annotations(davis_2017, "dog") / "00003.png"))
    expected = np.minimum(drawn, ids[-1])
    assert np.unique(dog.mask(3)).tolist() == ids
    np.testing.assert_array_equal(dog.mask(3), expected)


def test_frames_are_in_order_and_belong_to_their_masks(davis_2016):
    ant = Davis(davis_2016).sequences[0]
    assert [path.name for path in ant.images] == [f"{i:05d}.jpg" for i in range(6)]
    for i in range(6):
        image, mask = ant.image(i), ant.mask(i)
        assert (image.shape, image.dtype) == ((*SHAPE, 3), np.uint8)
        assert (mask.shape, mask.dtype) == (SHAPE, np.uint8)
        bright = image.mean(2) > 100  # the fixture's objects are bright, its backgrounds dark
        assert np.mean(bright != mask) < 0.01


def shrink_mask(root):
    Image.new("L", (40, 24)).save(annotations(root, "bee") / "00004.png")


def break_frame(root):
    (root / "JPEGImages" / "480p" / "bee" / "00001.jpg").write_bytes(b"no picture")


def enlarge_frame(root):
    Image.new("RGB", (96, 64)).save(root / "JPEGImages" / "480p" / "bee" / "00003.jpg")
    Image.new("L", (96, 64)).save(annotations(root, "bee") / "00003.png")


def remove_frames(root):
    for path in (root / "JPEGImages" / "480p" / "bee").iterdir():
        path.unlink()


@pytest.mark.parametrize("damage, error, words", [
    (shrink_mask, ValueError, ["bee/00004.png", "40x24", "80x48"]),
    (break_frame, OSError, ["bee/00001.jpg", "frame"]),
    (enlarge_frame, ValueError, ["bee/00003.jpg", "96x64", "80x48"]),
    (remove_frames, FileNotFoundError, ["480p/bee"]),
])
def test_damage_is_named(davis_2016, damage, error, words):
    damage(davis_2016)
    with pytest.raises(error) as caught:
        Davis(davis_2016)
    for word in words:
        assert word in str(caught.value)
    assert names(Davis(davis_2016, names=["ant"])) == ["ant"]  # the others are sound


def test_no_data_set_names_the_path_and_offers_the_demo(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        Davis(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value) and "--demo" in str(caught.value)


def test_unknown_sequence_is_named(davis_2016):
    with pytest.raises(ValueError, match="'dog'"):
        Davis(davis_2016, "2016", "train", names=["ant", "dog"])


@pytest.mark.parametrize("year", ["2017", "all"])
def test_missing_list_is_named(davis_2016, year):
    with pytest.raises(FileNotFoundError, match="2017/train.txt"):
        Davis(davis_2016, year, "train")


def sequences(count: int) -> list[Sequence]:
    return [Sequence(f"s{i}", (Path("0.jpg"),) * 2, (Path("0.png"),) * 2) for i in range(count)]


@pytest.mark.parametrize("count, share, held_out", [
    (10, 0.2, 2), (10, 0.01, 1), (2, 0.1, 1), (2, 0.99, 1), (30, 0.15, 4), (5, 0.99, 4),
    (5, 0, 0), (1, 0, 0)])
def test_split_holds_out_whole_sequences(count, share, held_out):
    every = sequences(count)
    training, validation = split(every, share, seed=3)
    assert len(validation) == held_out
    assert sorted(names(training + validation)) == sorted(names(every))  # disjoint, complete
    assert [s for s in every if s in training] == training
    assert [s for s in every if s in validation] == validation


def test_split_is_chosen_by_its_seed():
    splits = [tuple(names(split(sequences(12), 0.3, seed)[1])) for seed in range(20)]
    assert splits == [tuple(names(split(sequences(12), 0.3, seed)[1])) for seed in range(20)]
    assert len(set(splits)) > 10


@pytest.mark.parametrize("count, share, word", [
    (5, 1, "--validation_size"), (5, -0.1, "--validation_size"),
    (5, float("nan"), "--validation_size"), (1, 0.2, "two sequences"), (0, 0.2, "two sequences"),
    (0, 0, "two sequences")])
def test_split_refuses(count, share, word):
    with pytest.raises(ValueError, match=word):
        split(sequences(count), share, 0)


def as_is(image, mask):
    """In place of an augmentation."""
    return torch.from_numpy(image), torch.from_numpy(mask)


def all_equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_item_is_two_images_with_binary_masks(davis_2017):
    pairs = Pairs(Davis(davis_2017, "2017").sequences, Augment((24, 56)))
    assert len(pairs) == 12
    for frame in range(12):
        images, masks = pairs[frame, 5]
        assert (images.shape, images.dtype) == ((2, 3, 24, 56), torch.float32)
        assert (masks.shape, masks.dtype) == ((2, 24, 56), torch.uint8)
        assert set(masks.unique().tolist()) <= {0, 1}


def test_an_item_depends_on_its_index_alone(davis_2017):
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


def test_both_masks_show_the_same_one_of_several_objects(davis_2017):
    (dog,) = Davis(davis_2017, "2017", "val")
    pairs = Pairs([dog], as_is)
    drawn = []
    for seed in range(12):
        reference, test = pairs[seed % 6, seed][1]
        masks = [set(np.flatnonzero(mask.numpy().any(1))) for mask in (reference, test)]
        assert masks[0] == masks[1]  # the fixture's objects keep to their rows
        drawn.append(min(masks[0]))
    assert set(drawn) == {6, 26}


def test_reference_always_holds_the_object_though_some_masks_are_empty(tmp_path):
    write_sequence(tmp_path, "ant", frames=6)
    for i in (1, 2, 3, 5):
        Image.new("L", SHAPE[::-1]).save(annotations(tmp_path, "ant") / f"{i:05d}.png")
    write_list(tmp_path, "2016", "train", ["ant"])
    pairs = Pairs(Davis(tmp_path).sequences, Augment((24, 40)))
    for seed in range(40):
        reference, test = pairs[seed % 6, seed][1]
        assert reference.any()
        if seed % 6 in (1, 2, 3, 5):
            assert not test.any()


def test_sequence_without_any_object_is_named(tmp_path):
    write_sequence(tmp_path, "ant", value=0)
    paths = [sorted((tmp_path / kind / "480p" / "ant").iterdir())
             for kind in ("JPEGImages", "Annotations")]
    with pytest.raises(ValueError, match="ant"):
        Pairs([Sequence("ant", *map(tuple, paths))], as_is)[0, 0]


class AsIs:
    """In place of an augmentation of clips."""

    def __call__(self, image, mask):
        return as_is(image, mask)

    def clip(self, frames):
        return [as_is(*frame) for frame in frames]


def grey_sequences(root, names, frames):
    """Sequences whose frames are of a flat grey that tells sequence and frame."""
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


def test_what_is_pasted_is_another_sequences_object(tmp_path):
    sequences = grey_sequences(tmp_path, "ab", frames=6)
    clips = Clips(sequences, AsIs(), frames=3, paste=1)
    wanted = hidden = 0
    for seed in range(40):
        images, masks = clips[seed % 12, seed]
        own = seed % 12 // 6  # of frames darker or lighter than the other's
        assert masks[0].any()
        for image, mask in zip(images, masks):
            brightness = image.float().mean(2)[mask > 0]
            foreign = (brightness > 100) != bool(own)
            wanted += int(foreign.float().mean() > 0.9) if len(foreign) else 0
            hidden += int(foreign.float().mean() < 0.1) if len(foreign) else 0
    assert wanted > 20 and hidden > 20


def test_a_double_is_pasted_only_where_its_place_tells_it_apart(tmp_path):
    write_sequence(tmp_path, "ant", frames=6)
    write_list(tmp_path, "2016", "train", ["ant"])
    clips = Clips(Davis(tmp_path).sequences, AsIs(), frames=3, paste=1)
    clips.DOUBLES = 1.0
    double, pasted, in_far = 0, clips._pasted, []

    def spy(frames, own, step, far, rng):
        found = pasted(frames, own, step, far, rng)
        in_far.extend([found is not frames] if far else [])
        return found

    clips._pasted = spy
    for seed in range(40):
        images, masks = clips[seed % 6, seed]
        bright = [(image.max(2).values > 150) for image in images]
        two = [int(b.sum() > 1.3 * max(m.sum(), 1)) for b, m in zip(bright, masks)]
        double += all(two)
        # what is wanted looks like the object, whichever of the two it is
        assert all(b[m > 0].float().mean() > 0.7 for b, m in zip(bright, masks) if m.sum() > 30)
    assert double > 5
    assert len(in_far) > 5 and not any(in_far)


def test_a_clip_depends_on_its_index_alone(davis_2016):
    clips = Clips(Davis(davis_2016).sequences, Augment((24, 40)), paste=0.5)
    first = [clips[i, 7 * i] for i in range(6)]
    torch.rand(7)
    assert all(all_equal(clips[i, 7 * i], first[i]) for i in reversed(range(6)))


@pytest.mark.parametrize("frames, count", [(7, 20), (7, 7), (7, 3), (1, 4), (5, 10)])
def test_sampler_takes_every_frame_once_before_any_again(frames, count):
    sampler = PairSampler(frames, count, seed=1)
    drawn = [frame for frame, _ in sampler]
    assert len(drawn) == len(sampler) == count
    for start in range(0, count, frames):
        one_pass = drawn[start:start + frames]
        assert len(set(one_pass)) == len(one_pass)
        assert set(one_pass) <= set(range(frames))


def test_sampler_shuffles_each_pass_anew_unless_told():
    frames = [frame for frame, _ in PairSampler(20, 40)]
    assert frames[:20] != frames[20:] and frames[:20] != list(range(20))
    in_order = list(PairSampler(3, 7, shuffle=False))
    assert [frame for frame, _ in in_order] == [0, 1, 2, 0, 1, 2, 0]
    assert len({seed for _, seed in in_order}) == 7  # a frame's pairs differ between passes


def test_sampler_is_fixed_by_its_seed():
    assert list(PairSampler(9, 30, seed=4)) == list(PairSampler(9, 30, seed=4))
    assert list(PairSampler(9, 30, seed=4)) != list(PairSampler(9, 30, seed=5))
    sampler = PairSampler(9, 30)
    assert list(sampler) == list(sampler)


@pytest.fixture(scope="module")
def train(davis_dir) -> Davis:
    return Davis(davis_dir)


def test_real_train_set_has_30_sequences_with_2079_frames(train):
    assert len(train) == 30
    assert sum(len(sequence) for sequence in train) == 2079


def test_real_mask_with_alpha_channel_is_read(train):
    (bear,) = (sequence for sequence in train if sequence.name == "bear")
    path = bear.masks[77]
    assert path.name == "00077.png" and Image.open(path).mode == "LA"
    expected = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127
    assert expected.any()
    np.testing.assert_array_equal(bear.mask(77), expected.astype(np.uint8))


def test_real_sequence_with_empty_masks_yields_references_with_the_object(train):
    (bumps,) = (sequence for sequence in train if sequence.name == "bmx-bumps")
    assert not bumps.mask(65).any()
    pairs = Pairs([bumps], as_is)
    for seed in range(12):
        reference, test = pairs[65, seed][1]
        assert reference.any() and not test.any()
