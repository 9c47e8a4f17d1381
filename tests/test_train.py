"""Losses against values computed by hand; the training loop on a small drawn data set."""

import json
import math
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHAPE
from PIL import Image

import train
from davis import Davis, hold_out
from network import losses
from preprocess import Augment
from system import version
from training import report, samples
from training.samples import Clips, Pairs
from videomatch import SHIPPED, VideoMatch

ONE = torch.tensor([[0.9, 0.2], [0.4, 0.6]])  # of an object
P = torch.stack([1 - ONE, ONE])
T = torch.tensor([[1, 0], [0, 1]])


def test_dice_matches_values_by_hand():
    intersection, total = 0.9 + 0.6, (0.9 + 0.2 + 0.4 + 0.6) + 2
    assert losses.dice(P, T).item() == pytest.approx(1 - (2 * intersection + 1) / (total + 1))


def test_dice_is_averaged_over_the_objects():
    two = torch.cat([P, torch.zeros(1, 2, 2)])  # the second is neither there nor found
    assert losses.dice(two, T).item() == pytest.approx(losses.dice(P, T).item() / 2)


def test_cross_entropy_matches_values_by_hand():
    by_hand = -(math.log(0.9) + math.log(0.8) + math.log(0.6) + math.log(0.6)) / 4
    assert losses.cross_entropy(P, T).item() == pytest.approx(by_hand)
    three = torch.tensor([0.2, 0.3, 0.5])[:, None, None].expand(3, 2, 2)
    by_hand = -(math.log(0.2) + math.log(0.3) + 2 * math.log(0.5)) / 4
    found = losses.cross_entropy(three, torch.tensor([[0, 1], [2, 2]]))
    assert found.item() == pytest.approx(by_hand)


def test_balanced_cross_entropy_matches_values_by_hand():
    target = torch.tensor([[1, 0], [0, 0]])  # a quarter is foreground
    by_hand = -(0.75 * math.log(0.9) + 0.25 * (math.log(0.8) + math.log(0.6) + math.log(0.4))) / 4
    assert losses.balanced(P, target).item() == pytest.approx(by_hand)


def test_grouping_matches_values_by_hand():
    truth = torch.tensor([[0, 1, 1, 2]])
    probabilities = torch.tensor([[0.7, 0.2, 0.1, 0.2], [0.2, 0.6, 0.7, 0.2],
                                  [0.1, 0.2, 0.2, 0.6]])[:, None]
    foreground = torch.stack([probabilities[0], 1 - probabilities[0]])
    # per object, the mean cross-entropy of its identity given the foreground, over its pixels
    mean = -(np.log(0.6 / 0.8) + np.log(0.7 / 0.9)) / 2, -np.log(0.6 / 0.8)
    expected = losses.dice(foreground, (truth > 0).long()) + sum(mean) / 2
    assert losses.grouping(probabilities, truth).item() == pytest.approx(expected.item(), abs=1e-5)
    assert losses.grouping(foreground, (truth > 0).long()) == 0
    assert losses.grouping(probabilities, 0 * truth).isfinite()
    assert losses.cross_entropy(probabilities, truth) > 0


@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_stay_finite_at_certainty(name):
    one = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    probability = torch.stack([1 - one, one]).requires_grad_()
    loss = losses.LOSSES[name](probability, T)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(probability.grad).all()


@pytest.fixture
def options(tmp_path):
    return train.Options(save=tmp_path / "out" / "vm.pth", shape=(96, 160), iterations=4,
                         report=2, workers=0, learning_rate=1e-3)


@pytest.fixture
def sequences(davis_2016):
    return hold_out(Davis(davis_2016).sequences, 0.3, seed=0)


def lines_of(options):
    return [json.loads(line) for line in
            options.save.with_suffix(".jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_steps_lower_the_loss(batch_size, sequences):
    model = VideoMatch.load(SHIPPED["mobilenet"])
    pairs = Pairs(sequences[0], Augment((96, 160), random=False))
    batch = [torch.stack(x) for x in zip(*(pairs[i, i] for i in range(batch_size)))]
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    found = [train.step(model, optimizer, batch, ("dice", "bce")) for _ in range(8)]
    assert found[-1] < 0.7 * found[0]


@pytest.mark.slow
def test_steps_on_clips_lower_the_loss(sequences):
    torch.manual_seed(0)
    model = VideoMatch(VideoMatch.load(SHIPPED["mobilenet"]).encoder, 2, 5, refined=True)
    clips = Clips(sequences[0], Augment((96, 160), random=False), frames=3, paste=0)
    batch = [torch.stack(x) for x in zip(*(clips[i, i] for i in range(2)))]
    optimizer, _ = train.make_optimizer(model, train.Options(Path("x"), (96, 160), 100))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    found = [train.step(model, optimizer, batch, ("dice", "bce")) for _ in range(12)]
    assert found[-1] < 0.6 * found[0]
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_the_memory_method_trains_and_saves_all_unfrozen_weights(sequences, options):
    torch.manual_seed(0)
    model = VideoMatch(VideoMatch.load(SHIPPED["mobilenet"]).encoder, 2, 5, refined=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    options.iterations, options.report = 2, -1
    best = train.train(model, *sequences, options)
    # all but MobileNetV2's first layers
    kept = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert kept == {name for name in before
                    if name.startswith(tuple(f"encoder.backbone.{i}." for i in range(4)))}
    loaded = VideoMatch.load(options.save)
    assert (loaded.method, loaded.refined) == ("memory", True)
    if loaded.metadata["iteration"] == 2:
        assert np.mean(report.validate(loaded, sequences[1], options.shape)) == pytest.approx(best)


@pytest.mark.parametrize("iterations", [1, 2, 18, 19, 20, 400])
def test_the_learning_rate_rises_and_decays_to_zero(iterations, model):
    options = train.Options(Path("x"), (96, 160), iterations, learning_rate=1e-3)
    optimizer, schedule = train.make_optimizer(model, options)
    rates = []
    for _ in range(iterations):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(4e-5) and max(rates) <= 1e-3
    assert schedule.get_last_lr()[0] < 1e-7
    if iterations > 1:
        assert max(rates[1:5 + iterations // 10]) > 7e-4


@pytest.mark.slow
def test_the_best_weights_are_saved_with_log_and_curves(model, sequences, options):
    options.plot = True
    best = train.train(model, *sequences, options)
    lines = lines_of(options)
    assert [line["iteration"] for line in lines] == [0, 2, 4]
    assert best == max(line["held_out_iou"] for line in lines)
    assert lines[0]["loss"] is None and lines[1]["loss"] > 0
    loaded = VideoMatch.load(options.save)
    assert loaded.metadata["held_out_iou"] == best
    assert loaded.metadata["held_out"] == [s.name for s in sequences[1]]
    assert np.mean(report.validate(loaded, sequences[1], options.shape)) == pytest.approx(best)
    with Image.open(options.save.with_suffix(".png")) as curves:
        assert curves.size[0] > 300


@pytest.mark.slow
def test_without_held_out_sequences_the_last_weights_are_saved(model, sequences, options):
    options.plot, options.patience = True, 1
    assert np.isnan(train.train(model, sum(sequences, []), [], options))
    assert [line["held_out_iou"] for line in lines_of(options)] == [None] * 3
    loaded = VideoMatch.load(options.save)
    assert loaded.metadata == {"iteration": 4, "held_out": [], "version": version.__version__}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("fact, value", [("seed", "1"), ("processes", "2")])
def test_a_state_of_another_run_is_not_resumed(fact, value, model, sequences, options):
    options.iterations, options.report = 1, 1
    train.train(model, *sequences, options)
    state = torch.load(options.save.with_suffix(".state"), weights_only=True)
    state["run"][fact] = value
    torch.save(state, options.save.with_suffix(".state"))
    options.resume = True
    with pytest.raises(ValueError, match=f"another {fact}"):
        train.train(model, *sequences, options)


def test_a_state_of_another_network_is_not_resumed(model, sequences, options):
    options.iterations, options.report = 1, 1
    train.train(model, *sequences, options)
    state = torch.load(options.save.with_suffix(".state"), weights_only=True)
    state["model"].popitem()
    torch.save(state, options.save.with_suffix(".state"))
    options.resume = True
    with pytest.raises(ValueError, match="vm.state is of another version"):
        train.train(model, *sequences, options)


def test_validation_can_be_limited_to_the_end(model, sequences, options):
    options.report = -1
    train.train(model, *sequences, options)
    assert [line["iteration"] for line in lines_of(options)] == [0, 4]


@pytest.mark.slow
def test_training_stops_early_without_improvement(model, sequences, options, monkeypatch):
    scores = iter([0.5, 0.4, 0.6, 0.6, 0.3, 0.9])
    monkeypatch.setattr(report, "validate", lambda *_: [next(scores)])
    options.iterations, options.report, options.patience = 20, 1, 2
    assert train.train(model, *sequences, options) == 0.6
    assert [line["iteration"] for line in lines_of(options)] == [0, 1, 2, 3, 4]
    assert VideoMatch.load(options.save).metadata["iteration"] == 2


def test_an_interrupt_finishes_the_iteration_and_saves(model, sequences, options, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    step = train.step

    def interrupted_step(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(train, "step", interrupted_step)
    options.iterations, options.report = 50, 25
    train.train(model, *sequences, options)
    assert [line["iteration"] for line in lines_of(options)] == [0, 1]
    assert options.save.is_file()
    assert signal.getsignal(signal.SIGINT) is before
    assert threading.current_thread() is threading.main_thread()


def test_the_same_seed_gives_the_same_weights(model, sequences, options):
    def run(workers):
        torch.manual_seed(0)
        fresh = VideoMatch(type(model.encoder)("mobilenet"), top_k=3)
        options.workers, options.iterations, options.overwrite = workers, 2, True
        train.train(fresh, *sequences, options)
        return fresh.state_dict()

    first, second = run(workers=0), run(workers=2)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_training_raises_the_held_out_iou(sequences, options):
    torch.manual_seed(0)
    model = VideoMatch.load(SHIPPED["mobilenet"])
    with torch.no_grad():
        for weight in model.encoder.parameters():  # spoil the trained features
            weight += 0.4 * weight.std() * torch.randn_like(weight) * (weight.ndim == 4)
    options.learning_rate, options.iterations, options.report = 3e-4, 30, -1
    train.train(model, *sequences, options)
    before, after = (line["held_out_iou"] for line in lines_of(options))
    assert after > before + 0.05


class Counted(Pairs):
    """Returns the frame and the clip length it was asked for, instead of a sample."""

    def __getitem__(self, index):
        return torch.tensor([index[0], self.length])


class CountedClips(Counted, Clips):
    pass


@pytest.mark.parametrize("first", [0, 9, 33])
def test_static_images_come_first_and_longer_clips_last(first, sequences, options, monkeypatch):
    monkeypatch.setattr(samples, "Clips", CountedClips)
    static_images = [SimpleNamespace(labelled=(0,))] * 7  # of one frame each
    options.iterations, options.batch_size = 40, 25
    every, drawn = ([batch for batch in samples.batches(
        CountedClips, sequences[0], static_images, None, options, range(start, 40))]
        for start in (0, first))
    assert all(torch.equal(a, b) for a, b in zip(every[first:], drawn, strict=True))
    frames = sum(len(s) for s in sequences[0])
    for part, share, length in ((every[:12], 0.5, 6), (every[12:], 0.35, 8)):
        indices, lengths = torch.cat(part).T
        assert set(lengths.tolist()) == {length}
        assert (indices >= frames).float().mean().item() == pytest.approx(share, abs=0.08)


def shrunk(sequence, side):
    """Write masks in which the object is a square with sides of `side` pixels."""
    for path in sequence.masks:
        mask = np.zeros(SHAPE, np.uint8)
        mask[20:20 + side, 30:30 + side] = 255
        Image.fromarray(mask).save(path)


@pytest.mark.slow
def test_a_sequence_of_small_objects_is_skipped_with_one_warning(sequences, options, caplog):
    training, held_out = sequences
    shrunk(training[0], 1)  # 4 pixels of 96x160, 27 in the closest crop
    options.iterations, options.augment = 1, False
    torch.manual_seed(0)
    model = VideoMatch(VideoMatch.load(SHIPPED["mobilenet"]).encoder, 2, 5, refined=True)
    train.train(model, training, [], options)
    warning, = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert training[0].name in warning and training[1].name not in warning


def test_if_all_objects_are_small_the_error_says_what_helps(sequences, options, model):
    for sequence in sequences[0]:
        shrunk(sequence, 1)
    options.augment = False
    with pytest.raises(ValueError, match="too small.*--input_image_shape"):
        train.train(model, *sequences, options)
    assert not options.save.parent.exists()


def test_static_images_need_the_memory_method(model, sequences, options):
    with pytest.raises(ValueError, match="--stills.*--method memory"):
        train.train(model, *sequences, options, static_images=sequences[0])


def test_all_objects_of_a_clip_are_tracked_at_once():
    torch.manual_seed(0)
    model = VideoMatch(VideoMatch.load(SHIPPED["mobilenet"]).encoder, 2, 5, refined=True).train()
    images, masks = torch.randn(3, 3, 64, 96), torch.zeros(3, 64, 96).long()
    masks[:, 10:30, 10:40], masks[:, 35:60, 50:90] = 1, 2
    loss = train.loss_of(model, images, masks, ("dice", "bce"))
    swapped = torch.tensor([0, 2, 1])[masks]
    torch.testing.assert_close(train.loss_of(model, images, swapped, ("dice", "bce")), loss,
                               atol=1e-4, rtol=1e-4)
    assert loss > train.loss_of(model, images, masks, ("dice",)) > 0
