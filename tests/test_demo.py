"""The demo data: reproducible, readable, complete, with objects behind trees."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from datasets import demo
from davis import Davis

SCENES = {name: scene for scenes in demo.SCENES.values() for name, scene in scenes.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return demo.make(tmp_path_factory.mktemp("demo") / "d")


@pytest.fixture
def one_scene(monkeypatch):
    monkeypatch.setattr(demo, "SCENES", {"train": {"forest": SCENES["forest"]}, "val": {}})


@pytest.fixture
def four_frames(monkeypatch, one_scene):
    monkeypatch.setattr(demo, "draw", partial(demo.draw, frames=4))


def files(root, part: str = "") -> dict:
    return {path.relative_to(root): path for path in sorted((root / part).rglob("*"))
            if path.is_file()}


@pytest.mark.slow
def test_drawing_is_deterministic(root, tmp_path, one_scene):
    again = demo.make(tmp_path / "elsewhere")
    for part in ("JPEGImages/480p/forest", "Annotations/480p/forest"):
        first, second = files(root, part), files(again, part)
        assert len(first) == demo.FRAMES and first.keys() == second.keys()
        for name in first:
            assert first[name].read_bytes() == second[name].read_bytes()


def test_an_existing_data_set_is_not_drawn_again(tmp_path, four_frames):
    root = demo.make(tmp_path / "d")
    before = {path: path.stat().st_mtime_ns for path in files(root).values()}
    (root / "JPEGImages" / "480p" / "forest" / "00003.jpg").write_bytes(b"changed")
    assert demo.make(root) == root
    after = {path: path.stat().st_mtime_ns for path in files(root).values()}
    assert [path.name for path in after if after[path] != before[path]] == ["00003.jpg"]


@pytest.mark.parametrize("stamp", ["0", None])
def test_an_older_or_unfinished_data_set_is_drawn_again(tmp_path, four_frames, stamp):
    root = demo.make(tmp_path / "d")
    image = root / "JPEGImages" / "480p" / "forest" / "00003.jpg"
    whole = image.read_bytes()
    image.write_bytes(b"half")
    if stamp is None:
        (root / "VERSION").unlink()
    else:
        (root / "VERSION").write_text(stamp)
    demo.make(root)
    assert image.read_bytes() == whole


@pytest.mark.parametrize("year", ["2016", "2017"])
@pytest.mark.parametrize("set_name", ["train", "val"])
def test_davis_reads_four_sequences(root, year, set_name):
    dataset = Davis(root, year, set_name)
    assert [sequence.name for sequence in dataset] == list(demo.SCENES[set_name])
    assert [len(sequence) for sequence in dataset] == [24] * 4
    many = []
    for sequence in dataset:
        assert sequence.image(0).shape == (360, 640, 3)
        ids = np.unique(sequence.mask(0)).tolist()
        assert ids in ([0, 1], [0, 1, 2])
        many.append(ids[-1] == 2)
    assert sum(many) == (1 if year == "2017" else 0)


def test_training_and_validation_sequences_are_disjoint():
    assert not set(demo.SCENES["train"]) & set(demo.SCENES["val"])


@pytest.mark.parametrize("name", SCENES)
def test_every_object_is_visible_in_every_frame(root, name):
    (sequence,) = Davis(root, "2017", "trainval", names=[name])
    areas = np.array([np.bincount(sequence.mask(i).flat, minlength=3)[1:]
                      for i in range(len(sequence))])
    objects = SCENES[name].creatures
    assert (areas[:, :objects] > 0.01 * 360 * 640).all()
    assert (areas[:, objects:] == 0).all()
    assert (areas[0, :objects] > 0.02 * 360 * 640).all()


@pytest.mark.parametrize("name", [name for name, scene in SCENES.items() if scene.trees])
def test_trees_occlude_the_objects(name):
    frames = zip(demo.draw(SCENES[name], 5), demo.draw(replace(SCENES[name], trees=0), 5))
    hidden = []
    for (image, mask), (open_image, open_mask) in frames:
        gone = mask != open_mask
        assert not mask[gone].any()  # to the background, never to another object
        hidden.append(gone.sum() / (open_mask > 0).sum())
        if gone.any():  # and the picture shows a trunk there
            assert np.abs(image[gone].astype(int) - open_image[gone]).mean() > 20
    assert 0.15 < max(hidden) < 0.6


def test_objects_move_and_differ_from_the_background(root):
    for sequence in Davis(root, "2016", "trainval"):
        masks = [sequence.mask(i) for i in (0, 12, 23)]
        columns = [np.flatnonzero(mask.any(0)).mean() for mask in masks]
        assert sequence.name in ("passing", "meeting") or columns[2] - columns[0] > 200
        assert all(np.mean(a != b) > 0.02 for a, b in zip(masks, masks[1:]))
        image = sequence.image(0).astype(int)
        colours = [image[masks[0] == value].mean(0) for value in (0, 1)]
        assert np.abs(colours[0] - colours[1]).max() > 25
