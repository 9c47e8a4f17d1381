"""The network: probabilities, batches, checkpoints, statelessness."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHAPE, draw_frame
from PIL import Image

import preprocess
import videomatch
from network import reader, views
from network.encoder import Encoder
from network.views import around, labels_of
from videomatch import VideoMatch


def frame(step, ids=(1,), scale=1):
    image, mask = (x.repeat(scale, 0).repeat(scale, 1) for x in draw_frame(step, ids))
    return preprocess.to_tensor(image), mask


def ids_of(mask):
    return [i for i in np.unique(mask).tolist() if i]


def reference(model, image, mask):
    """The state of a video with this reference frame."""
    return model.add_reference(None, image[None], np.asarray(mask), ids_of(mask))


def predict(model, state, image, shape=None):
    return model.predict(state, model.encode(image[None]), shape or tuple(image.shape[1:]))


@pytest.mark.parametrize("ids", [(1,), (1, 2), (3, 200)])
def test_probabilities_sum_to_one(model, ids):
    state = reference(model, *frame(0, ids))
    probabilities = predict(model, state, frame(1)[0], (30, 50))
    assert probabilities.shape == (len(ids) + 1, 30, 50)
    torch.testing.assert_close(probabilities.sum(0), torch.ones(30, 50))


def test_probability_is_the_softmax_of_scores_over_the_temperature(model, monkeypatch):
    monkeypatch.setattr(videomatch, "soft_match",
                        lambda query, *_: torch.tensor([0.5, 0.7]).view(2, 1, 1).expand(
                            2, *query.shape))
    foreground = predict(model, reference(model, *frame(0)), frame(1)[0])[1]
    expected = 1 / (1 + np.exp(-(0.7 - 0.5) / 0.05))  # 0.982: not shut in below 0.88
    torch.testing.assert_close(foreground, torch.full(SHAPE, expected, dtype=torch.float32))


def catmull_rom(before: int, after: int) -> np.ndarray:
    """(after, before) float64 matrix: cubic convolution with a = -1/2 (Keys, 1981, equation 15).

    Outside of the samples the kernel is cut off, and what is left is normalised.
    """
    distance = abs((np.arange(after)[:, None] + 0.5) * before / after - 0.5 - np.arange(before))
    near = 1.5 * distance ** 3 - 2.5 * distance ** 2 + 1
    far = -0.5 * distance ** 3 + 2.5 * distance ** 2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("shape", [(20, 34), (23, 31)])
def test_decoded_logits_are_enlarged_by_cubic_convolution(shape):
    logits = np.random.default_rng(0).normal(size=(3, 6, 9))
    logits[0] = 0
    rows, columns = (catmull_rom(*sides) for sides in zip(logits.shape[1:], shape))
    odds = np.exp(rows @ logits @ columns.T)
    found = VideoMatch.to_probabilities(torch.from_numpy(logits), shape, decoded=True)
    np.testing.assert_allclose(found, odds / odds.sum(0), atol=1e-12)


def test_a_diagonal_line_as_thin_as_a_location_stays_connected():
    logits = torch.stack([torch.zeros(9, 9), 2.7 * torch.eye(9) - 1.5])
    parts = []
    for decoded in (False, True):
        probabilities = VideoMatch.to_probabilities(logits, (36, 36), decoded)
        line = (probabilities[1] > 0.5).numpy().astype(np.uint8)
        parts.append(cv2.connectedComponents(line)[0] - 1)
    assert parts == [9, 1]


@pytest.mark.parametrize("refined", [False, True])
def test_a_batch_equals_single_frames(refined, model):
    if refined:
        torch.manual_seed(0)
        model = VideoMatch(Encoder("mobilenet"), 2.0, refined=True).eval()
    (image, mask), (first, _), (second, _) = frame(0), frame(3), frame(5)
    with torch.no_grad():
        state = reference(model, image, mask)
        batch = model.encode(torch.stack([first, second]))
        for i, test in enumerate((first, second)):
            together, alone = batch.frame(i), model.encode(test[None])
            torch.testing.assert_close(model.predict(state, together, SHAPE),
                                       model.predict(state, alone, SHAPE), atol=1e-4, rtol=1e-4)
            scores, expected = (model.step(state, one)[1] if refined else model.match(one, state)
                                for one in (together, alone))
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


def test_bad_arguments_raise_named_errors(model):
    with pytest.raises(RuntimeError, match="add a reference frame first"):
        predict(model, None, frame(0)[0])
    for arguments in ({"top_k": 0}, {"temperature": 0.0}, {"dilation": -1},
                      {"upsample_factor": 0}, {"upsample_factor": float("nan")}):
        with pytest.raises(ValueError):
            VideoMatch(model.encoder, **arguments)


def test_labels_are_nearest_and_keep_tiny_objects():
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 7
    mask[3, 3] = 2  # no location's middle
    mask[50:, 33:] = 9  # of no object that is asked for
    labels = labels_of(mask, (4, 4), [2, 7])
    expected = np.array([[0, 0, 2, 2]] * 4)
    expected[0, 0], expected[3, 2:] = 1, -1
    np.testing.assert_array_equal(labels, expected)


def test_tiny_objects_in_one_location_both_get_one():
    mask = np.zeros((64, 64), np.uint8)
    mask[17:19, 17:20] = 1
    mask[28:30, 29:32] = 2  # both in location (1, 1), the latter near (1, 2)
    expected = np.zeros((4, 4), int)
    expected[1, 1:3] = 1, 2
    np.testing.assert_array_equal(labels_of(mask, (4, 4), [1, 2]), expected)


def test_a_checkpoint_restores_configuration_and_weights(model, tmp_path):
    model.top_k, model.temperature, model.dilation = 7, 0.1, 33
    model.save(tmp_path / "new" / "vm.pth", held_out_iou=0.5, held_out=["bear"])
    loaded = VideoMatch.load(tmp_path / "new" / "vm.pth").eval()
    assert (loaded.top_k, loaded.temperature, loaded.dilation) == (7, 0.1, 33)
    assert (loaded.encoder.name, loaded.upsample_factor) == ("mobilenet", 2.0)
    assert loaded.metadata == {"held_out_iou": 0.5, "held_out": ["bear"]}
    first, second = (predict(m, reference(m, *frame(0)), frame(1)[0]) for m in (model, loaded))
    assert torch.equal(first, second)


class Malicious:
    def __reduce__(self):
        return (open, ("ran_code", "w"))


@pytest.mark.parametrize("content", [b"", b"text", {"model": {}}, [1], Malicious(),
                                     {"config": {"encoder": "vgg"}, "model": {}, "facts": {}}])
def test_bad_checkpoints_are_named_and_never_executed(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="bad.pth: not a checkpoint") as caught:
        VideoMatch.load(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran_code").exists()


def test_a_checkpoint_of_an_earlier_memory_is_refused(model, tmp_path):
    path = tmp_path / "old.pth"
    model.save(path)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["config"]["refined"]
    checkpoint["config"]["recent"] = 0  # it never had any
    torch.save(checkpoint, path)
    assert VideoMatch.load(path).method == "matching"
    checkpoint["config"]["recent"] = 3
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"old\.pth.*earlier version.*train again"):
        VideoMatch.load(path)


def test_parts_of_an_earlier_version_that_changed_no_mask_are_ignored(tmp_path, caplog):
    model = VideoMatch(Encoder("mobilenet"), 2.0, refined=True)
    model.save(tmp_path / "old.pth")
    checkpoint = torch.load(tmp_path / "old.pth", weights_only=True)
    checkpoint["config"] |= {"object_tokens": True, "edges": True}
    for name in ("reader.tokens.mask.weight", "decoder.edges.score.bias"):
        checkpoint["model"][name] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "old.pth")
    with caplog.at_level("INFO"):
        loaded = VideoMatch.load(tmp_path / "old.pth")
    assert "no such parts: object_tokens, edges" in caplog.text
    assert loaded.digest() == model.digest()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        VideoMatch.load(tmp_path / "none.pth")


def script(*arguments, cwd):
    return subprocess.run([sys.executable, str(ROOT / "videomatch.py"), *map(str, arguments)],
                          cwd=cwd, capture_output=True, text=True,
                          env={"PATH": "", "MPLBACKEND": "agg", "HOME": str(cwd)})


@pytest.mark.slow
def test_the_script_saves_figures(davis_2016, model, tmp_path):
    images, masks = (davis_2016 / kind / "480p" / "ant" for kind in ("JPEGImages", "Annotations"))
    model.save(tmp_path / "vm.pth")
    run = script(images / "00000.jpg", masks / "00000.png", images / "00001.jpg",
                 images / "00002.jpg", "-o", tmp_path / "vm.pth", "--save", tmp_path / "figures",
                 cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for name in ("00001_probabilities.png", "00002_probabilities.png"):
        assert name in run.stdout
        picture = np.array(Image.open(tmp_path / "figures" / name).convert("RGB"))
        assert picture.std() > 20 and min(picture.shape[:2]) > 300


@pytest.mark.slow
def test_without_a_display_the_script_saves_figures_and_prints_where(davis_2016, model, tmp_path):
    model.save(tmp_path / "vm.pth")
    image = davis_2016 / "JPEGImages/480p/ant/00000.jpg"
    mask = davis_2016 / "Annotations/480p/ant/00000.png"
    run = script(image, mask, image, "-o", tmp_path / "vm.pth", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "no display" in run.stdout and (tmp_path / "00000_probabilities.png").is_file()


@pytest.mark.slow
def test_the_script_names_bad_input_in_one_line(davis_2016, model, tmp_path):
    model.save(tmp_path / "vm.pth")
    image = davis_2016 / "JPEGImages/480p/ant/00000.jpg"
    run = script(image, tmp_path / "none.png", image, "-o", tmp_path / "vm.pth", cwd=tmp_path)
    assert run.returncode == 2 and "none.png" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.slow
def test_the_script_names_a_test_frame_of_another_size(davis_2016, tmp_path):
    image = davis_2016 / "JPEGImages/480p/ant/00000.jpg"
    mask = davis_2016 / "Annotations/480p/ant/00000.png"
    Image.open(image).resize((200, 90)).save(tmp_path / "wide.jpg")
    run = script(image, mask, image, tmp_path / "wide.jpg", "--save", tmp_path, cwd=tmp_path)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "wide.jpg: image: expected the size of the reference frame" in run.stderr


def test_zoom_enlarges_frames_only_at_inference():
    torch.manual_seed(0)
    model = VideoMatch(Encoder("mobilenet"), 1.0, top_k=3).eval()
    images = torch.randn(2, 3, 64, 96)
    mask = torch.zeros(64, 96, dtype=torch.uint8)
    mask[20:40, 30:60] = 1
    larger = F.interpolate(images, scale_factor=1.5, mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = predict(model, reference(model, larger[0], mask), larger[1], (64, 96))
        model.zoom = 1.5
        found = predict(model, reference(model, images[0], mask), images[1])
        torch.testing.assert_close(found, expected)
        model.train()
        assert model.encode(images[:1]).matched.shape[2:] == (4, 6)


@pytest.mark.parametrize("box", [(20, 40, 30, 60), (0, 3, 90, 96), (0, 64, 0, 96), (63, 64, 0, 1)])
@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0, 100.0])
def test_a_closer_view_is_centred_on_the_object(box, scale):
    top, bottom, left, right = box
    mask = np.zeros((64, 96), bool)
    mask[top:bottom, left:right] = True
    rows, columns = around(mask, scale)
    assert rows.stop - rows.start == max(1, round(64 / scale))
    assert columns.stop - columns.start == max(1, round(96 / scale))
    for part, start, end, side in ((rows, top, bottom, 64), (columns, left, right, 96)):
        assert part.start >= 0 and part.stop <= side
        off = (part.start + part.stop) / 2 - (start + end) / 2
        assert abs(off) <= 1 or (off > 0 and part.start == 0) or (off < 0 and part.stop == side)


def test_an_object_that_comes_closer_matches_the_closer_views(monkeypatch):
    torch.manual_seed(0)
    model = VideoMatch(Encoder("mobilenet"), 1.0, refined=True).eval()
    image = torch.randn(3, 96, 128)
    image = F.interpolate(F.avg_pool2d(image, 8)[None], size=(96, 128), mode="bilinear")[0] * 5
    mask = np.zeros((96, 128), np.uint8)
    mask[40:60, 50:80] = 1
    middle = np.s_[26:74, 33:97]  # half the height and width, around the object
    closer = F.interpolate(image[None, :, *middle], size=(96, 128), mode="bilinear")[0]
    labels = torch.from_numpy(labels_of(mask[middle], (6, 8), [1]))
    monkeypatch.setattr(reader, "K_SET", 1)
    found = []
    for scales in ((2.0,), ()):
        monkeypatch.setattr(views, "CLOSER", scales)
        with torch.no_grad():
            state = reference(model, image, mask)
            scores = model.step(state, model.encode(closer[None]))[1]
        found.append(scores[1][labels == 1])
    # the object's locations find themselves
    torch.testing.assert_close(found[0], torch.ones_like(found[0]), atol=1e-4, rtol=0)
    assert found[1].mean() < 0.99
