"""Masks from boxes and clicks: training, the benchmark, the command line."""

import json

import numpy as np
import pytest
import torch
from conftest import draw_frame, write_sequence
from PIL import Image

import main
import preprocess
from benchmarks import prompts as prompt_bench
from davis import Davis
from masks.read import read_mask
from media import images
from media.prompts import Prompts
from network.encoder import Encoder
from tracking import prompting
from tracking.tracker import Tracker
from training import prompt_training as train_prompts
from training.static_images import find_static_images
from videomatch import VideoMatch


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


@pytest.mark.slow
def test_training_changes_the_prompt_decoder_only_and_resumes(davis_2016, stills_dir, checkpoint,
                                                        tmp_path):
    whole, halves = tmp_path / "whole.pth", tmp_path / "halves.pth"
    assert train(davis_2016, stills_dir, checkpoint, whole, "-i", "4") == 0
    before, after = VideoMatch.load(checkpoint), VideoMatch.load(whole)
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value), name
    assert after.prompts is not None and after.metadata["held_out_iou"] == 0.7
    assert 0 <= after.metadata["prompts"]["held_out_iou"] <= 1
    assert before.digest() != after.digest()
    lines = [json.loads(line) for line in whole.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 2, 4]
    # a run that ends after its first report, as one that was killed there
    original = train_prompts.training_steps

    def killed(*args):
        if args[5]:
            raise MemoryError
        yield from original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_prompts, "training_steps", killed)
        assert train(davis_2016, stills_dir, checkpoint, halves, "-i", "4") == 2
    assert train(davis_2016, stills_dir, checkpoint, halves, "-i", "4", "--resume") == 0
    states = [torch.load(path.with_suffix(".state"), weights_only=True) for path in (whole, halves)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


def test_the_prompt_decoder_does_not_change_tracking(checkpoint):
    bare, prompted = VideoMatch.load(checkpoint).eval(), VideoMatch.load(checkpoint).eval()
    train_prompts.add_prompt_decoder(prompted)
    steps = []
    for model in (bare, prompted):
        tracker = Tracker(model)
        for i in range(3):
            image, mask = draw_frame(i)
            steps.append(tracker.step(preprocess.to_tensor(image), None if i else mask).mask)
    for one, other in zip(steps[:3], steps[3:]):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_samples_depend_on_seed_and_index_alone(davis_2016, stills_dir):
    sources = Davis(davis_2016).sequences, find_static_images(stills_dir)
    samples = train_prompts.PromptSamples(*sources, seed=3)
    first = [samples[i] for i in range(30)]
    torch.manual_seed(5)
    for i in reversed(range(30)):
        image, truth, prompts, rounds = samples[i]
        assert torch.equal(image, first[i][0]) and (truth == first[i][1]).all()
        assert prompts.boxes == first[i][2].boxes
        assert prompts.points == first[i][2].points
        assert image.shape[1:] == truth.shape and 1 <= len(rounds) <= 8 and rounds == first[i][3]
        size = truth.shape
        for x, y in (*prompts.points, *prompts.negative_points):
            assert -0.5 <= x < size[1] and -0.5 <= y < size[0]
        if prompts.mask is None:
            # nearest neighbour moves a border by less than a pixel of what was enlarged
            assert all(truth[max(0, round(y)), max(0, round(x))] for x, y in prompts.points)
    kinds = {(bool(p.boxes), p.mask is not None) for _, _, p, _ in first}
    assert kinds == {(True, False), (False, False), (False, True)}


def test_samples_fail_without_a_large_enough_object(stills_dir):
    """The search for one must not run forever."""
    static_images = find_static_images(stills_dir)
    for static_image in static_images:
        mask = np.zeros((48, 80), np.uint8)
        mask[10:17, 20:27] = 1  # 49 pixels
        images.write_mask(static_image.masks[0], mask)
    with pytest.raises(ValueError, match="60 pixels"):
        train_prompts.PromptSamples([], static_images)[0]
    mask[10:20, 20:27] = 1
    images.write_mask(static_image.masks[0], mask)
    assert all(train_prompts.PromptSamples([], static_images)[i][1].any() for i in range(3))


def test_held_out_static_images_are_not_trained_on():
    static_images = [object() for _ in range(10)]
    training, apart = train_prompts.split_static_images(static_images, 0.3, 0)
    assert len(apart) == 3 and {*training, *apart} == {*static_images} and len(training) == 7


@pytest.mark.slow
def test_the_benchmark_prints_the_j_of_prompted_masks(davis_2017, checkpoint, tmp_path, monkeypatch,
                                                    capsys):
    model = VideoMatch.load(checkpoint)
    train_prompts.add_prompt_decoder(model)
    model.save(tmp_path / "shown.pth")
    truths = [draw_frame(0, (1, 2))[1] == i for i in (1, 2)]

    def prompt(model, image, prompts):  # the object, but for a part that clicks bring back
        target = truths[1 if max(y for _, y in [*prompts.points, (0, 0)]) > 24
                        or any(y > 20 for _, y, _, _ in prompts.boxes) else 0].copy()
        if len(prompts.points) < 3:
            target[:, 20:] = False
        return target

    monkeypatch.setattr(prompting, "predict_mask", prompt)
    monkeypatch.setattr("sys.argv", [
        "prompts", "-d", str(davis_2017), "-y", "2017", "-o",
        str(tmp_path / "shown.pth"), "--repeats", "1", "-c", "cpu", "--json",
        str(tmp_path / "b.json")])
    assert prompt_bench.main() == 0
    figures = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in figures["rows"]] == ["dog_1", "dog_2"]
    assert figures["mean"] == pytest.approx({"true box": 0.6, "jittered box": 0.6, "1 clicks": 0.6,
                                             "3 clicks": 1, "8 clicks": 1})
    assert "mean J" in capsys.readouterr().out and figures["seconds"] > 0


# command line

@pytest.fixture
def clip_dir(tmp_path):
    write_sequence(tmp_path, "ant", frames=3)
    return tmp_path / "JPEGImages/480p/ant"


def test_boxes_and_points_become_objects_in_order(clip_dir, checkpoint, tmp_path, monkeypatch,
                                                     capsys):
    model = VideoMatch.load(checkpoint)
    train_prompts.add_prompt_decoder(model)
    model.save(tmp_path / "shown.pth")
    asked = []

    def masks_of(model, image, objects):
        asked.extend(objects)
        return draw_frame(0, (1, 2))[1]

    monkeypatch.setattr(prompting, "predict_masks", masks_of)
    out = tmp_path / "out"
    assert main.main(["-m", "segment", "--video", str(clip_dir), "-o", str(tmp_path / "shown.pth"),
                      "--box", "8", "6", "20", "16", "--point", "9", "9", "10", "10", "--point",
                      "12", "30", "--negative_point", "1", "1", "-j", str(out), "-c", "cpu"]) == 0
    assert asked == [Prompts([(8, 6, 20, 16)], [(9, 9), (10, 10)], [(1, 1)]),
                     Prompts([], [(12, 30)], [])]
    kept = read_mask(out / "mask_00000.png")
    np.testing.assert_array_equal(kept, draw_frame(0, (1, 2))[1])
    assert f"--mask 0:{out / 'mask_00000.png'}" in capsys.readouterr().out


def test_an_empty_mask_is_reported_in_one_line(clip_dir, checkpoint, tmp_path, capsys):
    model = VideoMatch.load(checkpoint)
    torch.nn.init.constant_(train_prompts.add_prompt_decoder(model).score.bias, -100)
    model.save(tmp_path / "shown.pth")
    assert main.main(["-m", "segment", "--video", str(clip_dir), "-o", str(tmp_path / "shown.pth"),
                      "--box", "8", "6", "20", "16", "-c", "cpu"]) == 2
    assert "nothing was found of object 1" in capsys.readouterr().err


@pytest.mark.slow
def test_training_the_tracker_further_keeps_the_prompt_decoder_working(davis_2016, stills_dir,
                                                                    checkpoint, tmp_path, caplog,
                                                                    capsys):
    shown, further = tmp_path / "shown.pth", tmp_path / "further.pth"
    assert train(davis_2016, stills_dir, checkpoint, shown, "-i", "2") == 0
    command = ["-m", "train", "-d", str(davis_2016), "-o", str(shown), "-s", str(further), "-i",
               "2", "-r", "2", "--workers", "0", "-vs", "0", "-c", "cpu", "-p", "96", "160"]
    with caplog.at_level("INFO"):
        assert main.main(command) == 0
    assert "encoder stays frozen" in caplog.text
    before, after = VideoMatch.load(shown), VideoMatch.load(further)
    changed = {name.split(".")[0] for name, value in before.state_dict().items()
               if not torch.equal(after.state_dict()[name], value)}
    assert changed == {"reader", "decoder"}
    assert after.metadata["prompts"] == before.metadata["prompts"]
    assert main.main([*command, "--method", "matching", "--overwrite"]) == 2
    assert "trains the encoder only" in capsys.readouterr().err
