"""The examples run on the demo data and predict its masks; each stays short."""

import importlib.util
import itertools
import re
from contextlib import closing

import cv2
import nbformat
import numpy as np
import pytest
from conftest import ROOT, overlap
from PIL import Image

from datasets import demo
from masks.read import read_mask
from media import images
from videomatch import load_tracker

FILES = sorted((ROOT / "examples").glob("*.py"))


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def clip():
    """Four frames and masks of a demo clip with one object."""
    return list(itertools.islice(demo.draw(demo.SCENES["val"]["stroll"]), 4))


def box_of(mask):
    rows, columns = mask.nonzero()
    return (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_examples_have_fewer_than_40_lines(path):
    assert len(path.read_text().splitlines()) < 40


def test_track_clip_tracks_a_clip(clip, tmp_path, capsys):
    for i, (image, _) in enumerate(clip):
        images.write_image(tmp_path / "clip" / f"{i:05d}.png", image)
    images.write_mask(tmp_path / "first.png", clip[0][1])
    example("track_clip").main(str(tmp_path / "clip"), str(tmp_path / "first.png"),
                               str(tmp_path / "out"))
    for i, (_, truth) in enumerate(clip):
        assert overlap(read_mask(tmp_path / "out" / f"{i:05d}.png") > 0, truth > 0) > 0.95
    assert capsys.readouterr().out.count("\n") == 4


def test_prompt_image_segments_from_a_box(clip, tmp_path):
    image, truth = clip[0]
    images.write_image(tmp_path / "image.png", image)
    example("prompt_image").main(str(tmp_path / "image.png"), *map(str, box_of(truth)),
                                 str(tmp_path / "mask.png"))
    assert overlap(read_mask(tmp_path / "mask.png") > 0, truth > 0) > 0.8


def test_camera_tracks_the_boxed_object(clip, monkeypatch):
    windows, camera = [], example("camera")

    class Camera:
        def __init__(self, source):
            assert source == "camera:0"

        def frames(self):
            return iter([image for image, _ in clip])

        def close(self):
            windows.append(None)

    monkeypatch.setattr(camera, "LiveClip", lambda source: closing(Camera(source)))
    monkeypatch.setattr(cv2, "selectROI", lambda *_: box_of(clip[0][1]))
    monkeypatch.setattr(cv2, "waitKey", lambda _: -1)
    monkeypatch.setattr(cv2, "imshow", lambda _, frame: windows.append(frame))
    camera.main()
    assert windows.pop() is None and len(windows) == len(clip) - 1
    changed = [np.abs(window.astype(int) - image[..., ::-1]).sum(-1) > 20
               for window, (image, _) in zip(windows, clip[1:])]
    for tinted, (_, truth) in zip(changed, clip[1:]):
        assert overlap(tinted, truth > 0) > 0.7


def test_opencv_and_pillow_images_are_tracked_alike(clip):
    masks = []
    for convert in (lambda image: image, lambda image: image[..., ::-1].copy()[..., ::-1],
                    Image.fromarray):
        tracker = load_tracker(size=240)
        tracker.step(convert(clip[0][0]), clip[0][1])
        masks.append(tracker.step(convert(clip[3][0])).mask)
    assert masks[0].shape == clip[0][1].shape and overlap(masks[0] > 0, clip[3][1] > 0) > 0.9
    assert all(np.array_equal(mask, masks[0]) for mask in masks[1:])


NOTEBOOK = ROOT / "examples" / "demo_clip.ipynb"


def test_the_notebook_is_stored_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.slow
def test_the_notebook_tracks_both_objects_and_shows_them():
    from nbclient import NotebookClient
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300,
                   resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    scores = re.findall(r"object \d: J (0\.\d+)", outputs[-1].text)
    assert len(scores) == 2 and min(map(float, scores)) > 0.95
    assert not [output for output in outputs if output.get("name") == "stderr"]
