"""DAVIS: layouts on disk, sequences, and the held-out split."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import SHAPE, write_list
from PIL import Image

from davis import Davis, Sequence, hold_out


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
def test_sets_of_2017_are_merged_without_duplicates(davis_2017, year, set_name, expected):
    assert names(Davis(davis_2017, year, set_name)) == expected


@pytest.mark.parametrize("set_name, expected", [
    ("train", ["ant", "bee", "cat"]), ("val", ["dog"]),
    ("trainval", ["ant", "bee", "cat", "dog"])])
def test_sets_of_2016_are_read(davis_2016, set_name, expected):
    dataset = Davis(davis_2016, "2016", set_name)
    assert names(dataset) == expected
    assert len(dataset) == len(expected)
    assert [len(sequence) for sequence in dataset] == [6] * len(expected)


def test_sequences_keep_the_order_of_the_lists(davis_2017):
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
def test_damaged_files_are_named(davis_2016, damage, error, words):
    damage(davis_2016)
    with pytest.raises(error) as caught:
        Davis(davis_2016)
    for word in words:
        assert word in str(caught.value)
    assert names(Davis(davis_2016, names=["ant"])) == ["ant"]  # the others are sound


def test_a_missing_data_set_is_named_and_the_demo_suggested(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        Davis(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value) and "--demo" in str(caught.value)


def test_an_unknown_sequence_is_named(davis_2016):
    with pytest.raises(ValueError, match="'dog'"):
        Davis(davis_2016, "2016", "train", names=["ant", "dog"])


@pytest.mark.parametrize("year", ["2017", "all"])
def test_a_missing_list_is_named(davis_2016, year):
    with pytest.raises(FileNotFoundError, match="2017/train.txt"):
        Davis(davis_2016, year, "train")


def sequences(count: int) -> list[Sequence]:
    return [Sequence(f"s{i}", (Path("0.jpg"),) * 2, (Path("0.png"),) * 2) for i in range(count)]


@pytest.mark.parametrize("count, share, held_out", [
    (10, 0.2, 2), (10, 0.01, 1), (2, 0.1, 1), (2, 0.99, 1), (30, 0.15, 4), (5, 0.99, 4),
    (5, 0, 0), (1, 0, 0)])
def test_whole_sequences_are_held_out_for_validation(count, share, held_out):
    every = sequences(count)
    training, validation = hold_out(every, share, seed=3)
    assert len(validation) == held_out
    assert sorted(names(training + validation)) == sorted(names(every))  # disjoint, complete
    assert [s for s in every if s in training] == training
    assert [s for s in every if s in validation] == validation


def test_the_seed_chooses_the_held_out_sequences():
    splits = [tuple(names(hold_out(sequences(12), 0.3, seed)[1])) for seed in range(20)]
    assert splits == [tuple(names(hold_out(sequences(12), 0.3, seed)[1])) for seed in range(20)]
    assert len(set(splits)) > 10


@pytest.mark.parametrize("count, share, word", [
    (5, 1, "--validation_size"), (5, -0.1, "--validation_size"),
    (5, float("nan"), "--validation_size"), (1, 0.2, "two sequences"), (0, 0.2, "two sequences"),
    (0, 0, "two sequences")])
def test_an_impossible_hold_out_is_refused(count, share, word):
    with pytest.raises(ValueError, match=word):
        hold_out(sequences(count), share, 0)


@pytest.fixture(scope="module")
def train(davis_dir) -> Davis:
    return Davis(davis_dir)


def test_the_real_training_set_has_30_sequences_with_2079_frames(train):
    assert len(train) == 30
    assert sum(len(sequence) for sequence in train) == 2079


def test_a_real_mask_with_alpha_channel_is_read(train):
    (bear,) = (sequence for sequence in train if sequence.name == "bear")
    path = bear.masks[77]
    assert path.name == "00077.png" and Image.open(path).mode == "LA"
    expected = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127
    assert expected.any()
    np.testing.assert_array_equal(bear.mask(77), expected.astype(np.uint8))
