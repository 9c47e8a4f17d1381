"""How sure a mask is: known answers, and the file that keeps them."""

import numpy as np
import pytest
import torch

from confidence import Confidence, Measures, measure, read, unsure
from segment import Frame
from tracker import Step


def step(probability, ids=(1,)):
    """Of one object with a (H, W) probability, decided at a half."""
    p = np.asarray(probability, np.float32)
    return Step((p > 0.5).astype(np.uint8), torch.from_numpy(np.stack([1 - p, p])), ids)


def test_measures_have_known_values():
    p = np.zeros((10, 10))
    p[2:6, 2:7] = 0.9  # 20 pixels
    p[6, 2:6] = 0.4  # 4 in doubt
    one, = measure(3, step(p), {1: 0.25})
    assert (one.frame, one.object_id, one.present) == (3, 1, True)
    assert one.probability == pytest.approx(0.9) and one.doubt == pytest.approx(4 / 20)
    assert one.area == 0.2 and one.change == pytest.approx(0.2 / 0.25)
    assert one.confidence == pytest.approx(0.9 * 0.8 * 0.8 ** 0.5, abs=1e-5)


def test_similarity_is_the_mean_score_over_the_mask():
    mask = np.zeros((8, 12), np.uint8)
    mask[:4, :4], mask[4:, 8:], mask[:2, 4:8] = 1, 1, 2  # of six cells of 4x4 two, and half of one
    scores = torch.zeros(4, 2, 3)
    scores[1] = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.5]])
    scores[2] = torch.tensor([[0.0, 0.8, 0.0], [0.0, 0.0, 0.0]])
    known = Step(mask, torch.zeros(4, 8, 12), (1, 2, 3), scores)
    assert known.similarity() == pytest.approx({1: 0.7, 2: 0.8, 3: 0.0})
    assert Step(mask, torch.zeros(4, 8, 12), (1, 2, 3)).similarity() == {1: 1, 2: 1, 3: 1}


def test_what_vanished_is_not_present_and_not_sure():
    one, = measure(0, step(np.zeros((8, 8))), {1: 0.1})
    assert not one.present and one.confidence == one.probability == one.change == 0


def test_a_file_is_read_back_and_gone_on_with(tmp_path):
    rng = np.random.default_rng(0)
    path, image = tmp_path / "c.csv", np.zeros((12, 9, 3), np.uint8)
    frames = [Frame(i, image, step(rng.random((12, 9))), True, None) for i in range(6)]
    with Confidence(path) as whole:
        for frame in frames:
            whole.write(frame)
    assert read(path) == whole.measures and len(whole.measures) == 6
    content = path.read_bytes()
    for start, goes_on in ((0, False), (3, True)):
        with Confidence(path, goes_on) as part:
            for frame in frames[start:3 if start == 0 else 6]:
                part.write(frame)
    assert path.read_bytes() == content
    path.write_text("frame,area\n1,x\n")
    with pytest.raises(ValueError, match="c.csv: not a table"):
        read(path)


def test_stretches_are_joined_and_the_least_sure_comes_first():
    sure = {1: [0.9, 0.5, 0.9, 0.4, 0.9, 0.9, 0.9, 0.9, 0.55], 2: [0.9] * 8 + [0.1]}
    measures = [Measures(i, k, True, 1.0, 0.0, 0.1, 1.0, 1.0, c)
                for k, values in sure.items() for i, c in enumerate(values)]
    assert [str(stretch) for stretch in unsure(measures)] == [
        "frame 8 of object 2", "frames 1 to 3 of object 1", "frame 8 of object 1"]
