"""Confidence measures against known values, and confidence.csv."""

from pathlib import Path

import numpy as np
import pytest
import torch

from media.clip import Clip
from tracking.confidence import (
    ConfidenceSink,
    Measures,
    frames_to_review,
    measure_objects,
    read,
    write,
)
from tracking.pipeline import Frame
from tracking.tracker import Step


def step(probability, ids=(1,)):
    """A step of one object with an (H, W) probability and threshold 0.5."""
    p = np.asarray(probability, np.float32)
    return Step((p > 0.5).astype(np.uint8), torch.from_numpy(np.stack([1 - p, p])), ids)


def test_measures_have_the_expected_values():
    p = np.zeros((10, 10))
    p[2:6, 2:7] = 0.9  # 20 pixels
    p[6, 2:6] = 0.4  # 4 in doubt
    one, = measure_objects(3, step(p), {1: 0.25})
    assert (one.frame, one.object_id, one.present) == (3, 1, True)
    assert one.probability == pytest.approx(0.9) and one.doubt == pytest.approx(4 / 20)
    assert one.area == 0.2 and one.change == pytest.approx(0.2 / 0.25)
    assert one.confidence == pytest.approx(0.9 * 0.8 * 0.8 ** 0.5, abs=1e-5)


class Numbered(Clip):
    """A clip numbered like a folder with gaps."""

    path, count, numbers = Path("clip"), 6, [5, 6, 7, 20, 21, 22]


def test_an_invisible_object_has_no_confidence_instead_of_zero(tmp_path):
    one, = gone = measure_objects(0, step(np.zeros((8, 8))), {1: 0.1})
    assert not one.present and one.area == 0
    assert one.confidence is one.probability is one.doubt is one.change is None
    write(tmp_path / "c.csv", gone, Numbered())
    assert (tmp_path / "c.csv").read_text().splitlines() == [
        "frame,object_id,present,probability,doubt,area,change,confidence", "5,1,0,,,0.0,,"]
    assert read(tmp_path / "c.csv", Numbered()) == gone


def test_rows_of_earlier_versions_are_read(tmp_path):
    assert Measures.of_row([3, 1, True, 0.9, 0.1, 0.2, 0.8, 0.7, 0.6]) == Measures(
        3, 1, True, 0.9, 0.1, 0.2, 0.8, 0.6)
    assert Measures.of_row([3, 1, False, 0, 1.0, 0, 0, 0, 0]).confidence is None


def test_the_file_uses_frame_numbers_and_can_be_resumed(tmp_path):
    rng = np.random.default_rng(0)
    path, image, clip = tmp_path / "c.csv", np.zeros((12, 9, 3), np.uint8), Numbered()
    frames = [Frame(i, image, step(rng.random((12, 9))), True, None) for i in range(6)]
    with ConfidenceSink(path, clip) as whole:
        for frame in frames:
            whole.write(frame)
    assert read(path, clip) == whole.measures and len(whole.measures) == 6
    assert [line.partition(",")[0] for line in path.read_text().splitlines()[1:]] == [
        "5", "6", "7", "20", "21", "22"]
    content = path.read_bytes()
    for start, resume in ((0, False), (3, True)):
        with ConfidenceSink(path, clip, resume) as part:
            for frame in frames[start:3 if start == 0 else 6]:
                part.write(frame)
    assert path.read_bytes() == content
    path.write_text("frame,area\n1,x\n")
    with pytest.raises(ValueError, match="c.csv: not a table"):
        read(path, clip)


def sure_by(values):
    """Measures from the confidence of each object in each frame; None: not visible."""
    return [Measures(i, k, c is not None, c, c, 0.1, c, c)
            for k, row in values.items() for i, c in enumerate(row)]


def test_stretches_are_joined_and_the_lowest_confidence_comes_first():
    found = frames_to_review(sure_by(
        {1: [0.9, 0.5, 0.9, 0.4, 0.9, 0.9, 0.9, 0.9, 0.55], 2: [0.99] * 8 + [0.1]}))
    assert [stretch.text(Clip()) for stretch in found] == [
        "frame 8 of object 2 (10 % sure)", "frames 1 to 3 of object 1 (40 % sure)",
        "frame 8 of object 1 (55 % sure)"]


def test_invisible_objects_come_last():
    found = frames_to_review(sure_by({1: [0.99, 0.98, 0.3, None, None, None]}))
    assert [stretch.text(Numbered()) for stretch in found] == [
        "frame 7 of object 1 (30 % sure)", "frames 20 to 22 of object 1 (not visible)"]


def test_the_least_confident_tenth_is_always_reviewed():
    sure = [0.94] * 60
    sure[5:8], sure[20:23] = [0.8, 0.7, 0.8], [0.9, 0.65, 0.8]
    found = frames_to_review(sure_by({1: sure}))
    assert [(one.first, one.last) for one in found] == [(20, 22), (5, 7)]
    assert not frames_to_review([]) and not frames_to_review(sure_by({1: [0.97, 0.96]}))
