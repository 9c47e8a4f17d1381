"""Object tokens and the decoder's level of stride 2: object memory, gradients, loss, export."""

import copy
import io

import numpy as np
import pytest
import torch
from conftest import SHAPE, draw_frame

import preprocess
from network import object_tokens
from network.decoder import Decoder
from network.losses import cross_entropy, dice, grouping
from network.object_tokens import ObjectTokens
from network.reader import with_union
from tracking.tracker import Tracker
from videomatch import SHIPPED, VideoMatch

# Feature map of H x W locations, feature channels, channels of the memory readout
H, W, C, E = 6, 9, 20, 12


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    module = ObjectTokens(C, E).eval()
    torch.nn.init.normal_(module.correction.weight, std=0.1)
    return module


def frame(objects, seed=0):
    """Random inputs of `ObjectTokens`.

    Returns:
        Features, shares of two memory frames, memory readout, and shares of the previous frame.
    """
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(H * W, C, generator=generator), dim=1)
    shares = torch.randn(3, objects + 1, H * W, generator=generator).mul(2).softmax(1)
    own = torch.randn(objects, E, H, W, generator=generator)
    return unit, shares[:2], with_union(own), shares[2, 1:]


@pytest.mark.slow
@pytest.mark.parametrize("objects", [1, 2])
def test_extending_a_network_does_not_change_its_masks(objects):
    frames = [draw_frame(i, tuple(range(1, objects + 1))) for i in range(4)]
    before = VideoMatch.load(SHIPPED["mobilenet"]).eval()
    before.object_tokens = before.edges = False  # like older checkpoints
    before.reader.tokens = before.decoder.edges = None
    after = copy.deepcopy(before)
    after.extend()
    after.eval()
    trackers = Tracker(before), Tracker(after)
    for i, (image, mask) in enumerate(frames):
        one, other = (tracker.step(preprocess.to_tensor(image), None if i else mask, SHAPE)
                      for tracker in trackers)
        # not equal, as the extended network enlarges its logits in two steps instead of one
        assert (one.mask != other.mask).mean() < 0.02
    # without the level of stride 2, only object tokens remain, whose correction is 0
    assert after.decoder.edges is not None
    after.edges, after.decoder.edges = False, None
    tracker = Tracker(after)
    for i, (image, mask) in enumerate(frames):
        step = tracker.step(preprocess.to_tensor(image), None if i else mask, SHAPE)
    np.testing.assert_array_equal(step.mask, one.mask)


def test_an_extended_network_can_be_saved_and_loaded(tmp_path):
    model = VideoMatch.load(SHIPPED["mobilenet"])
    model.extend()
    model.save(tmp_path / "extended.pth")
    loaded = VideoMatch.load(tmp_path / "extended.pth")
    assert loaded.digest() == model.digest() and loaded.object_tokens and loaded.edges
    loaded.extend()  # nothing to add
    assert loaded.digest() == model.digest()


def test_object_memory_is_linear_in_the_masks_and_equals_a_loop(tokens):
    unit, (first, second), *_ = frame(3)
    of_mean = tokens.sums(unit, (first + second) / 2)
    torch.testing.assert_close(of_mean, (tokens.sums(unit, first) + tokens.sums(unit, second)) / 2)
    projected = tokens.normal(tokens.see(unit))
    weights = tokens.weights(projected).sigmoid()
    sums = tokens.sums(unit, first).unflatten(1, (object_tokens.TOKENS, -1))
    for i in range(4):
        for q in range(object_tokens.TOKENS):
            share = first[i] * weights[:, q] / len(unit)
            torch.testing.assert_close(sums[i, q, -1], share.sum())
            torch.testing.assert_close(sums[i, q, :-1], (share[:, None] * projected).sum(0))


def test_order_of_objects_does_not_matter(tokens):
    unit, shares, readout, previous = frame(3)
    order = [2, 0, 1]
    sums = tokens.sums(unit, shares.mean(0))
    corrected, coarse = tokens(unit, sums, readout, previous)
    other, other_coarse = tokens(unit, sums[[0, *(1 + i for i in order)]],
                                 readout[[*order, 3]], previous[order])
    assert corrected.shape == readout.shape and coarse.shape == (3, H, W)
    torch.testing.assert_close(other, corrected[[*order, 3]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other_coarse, coarse[order], atol=1e-4, rtol=1e-4)


def test_distractors_are_distinguished_by_position(tokens):
    """Two objects of equal memory and readout, at different positions in the previous frame."""
    unit, shares, readout, previous = frame(2)
    sums = tokens.sums(unit, shares.mean(0))
    sums[2] = sums[1]
    readout[1] = readout[0]
    previous = torch.zeros(2, H, W)
    previous[0, :, :3], previous[1, :, -3:] = 1, 1
    corrected, _ = tokens(unit, sums, readout, previous.flatten(1))
    assert (corrected[0] - corrected[1]).abs().max() > 0.01
    previous[1] = previous[0]
    corrected, _ = tokens(unit, sums, readout, previous.flatten(1))
    torch.testing.assert_close(corrected[0], corrected[1])


def test_absent_objects_give_finite_outputs(tokens):
    unit, shares, readout, previous = frame(2)
    for absent in (0 * previous, previous * torch.tensor([[0.0], [1]])):
        for output in tokens(unit, 0 * tokens.sums(unit, shares[0]), readout, absent):
            assert output.isfinite().all()


def test_gradients_reach_all_weights(tokens):
    unit, shares, readout, previous = frame(2)
    corrected, coarse = tokens(unit, tokens.sums(unit, shares.mean(0)), readout, previous)
    (corrected.square().sum() + coarse.square().sum()).backward()
    for name, parameter in tokens.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_untrained_edges_enlarge_the_logits_and_receive_gradients():
    torch.manual_seed(0)
    channels, sides = (4, 8, 16, 20), (24, 12, 6, 3)
    without, with_edges = (Decoder(6, channels, 2, stem) for stem in (0, 5))
    with_edges.load_state_dict(without.state_dict(), strict=False)
    levels = [torch.randn(1, c, s, s + 1) for c, s in zip((5, *channels), (48, *sides))]
    readout, previous = torch.randn(3, 6, 6, 7), torch.rand(3, 2, 24, 25)
    small, large = without(readout, previous, levels[1:]), with_edges(readout, previous, levels)
    expected = torch.nn.functional.interpolate(small[:, None], size=levels[0].shape[2:],
                                               mode="bilinear")[:, 0]
    torch.testing.assert_close(large, expected)
    torch.nn.init.normal_(with_edges.edges.score.weight)
    with_edges(readout, previous, levels).sum().backward()
    assert all(p.grad is not None for p in with_edges.edges.parameters())


def test_grouping_loss_by_hand():
    truth = torch.tensor([[0, 1, 1, 2]])
    probabilities = torch.tensor([[0.7, 0.2, 0.1, 0.2], [0.2, 0.6, 0.7, 0.2],
                                  [0.1, 0.2, 0.2, 0.6]])[:, None]
    foreground = torch.stack([probabilities[0], 1 - probabilities[0]])
    # per object, the mean cross-entropy of its identity given the foreground, over its pixels
    mean = -(np.log(0.6 / 0.8) + np.log(0.7 / 0.9)) / 2, -np.log(0.6 / 0.8)
    expected = dice(foreground, (truth > 0).long()) + sum(mean) / 2
    assert grouping(probabilities, truth).item() == pytest.approx(expected.item(), abs=1e-5)
    assert grouping(foreground, (truth > 0).long()) == 0
    assert grouping(probabilities, 0 * truth).isfinite()
    assert cross_entropy(probabilities, truth) > 0


class Exported(torch.nn.Module):
    """One step of object tokens and decoder, with tensors as inputs and outputs."""

    def __init__(self, tokens, decoder):
        super().__init__()
        self.tokens, self.decoder = tokens, decoder

    def forward(self, unit, shares, readout, before, previous, *levels):
        sums = self.tokens.sums(unit, shares)
        readout, coarse = self.tokens(unit, sums, readout, before)
        return self.decoder(readout, previous, list(levels)), coarse


@pytest.mark.slow
def test_export_for_any_number_of_objects_and_any_size(tokens):
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(1)
    decoder = Decoder(E, (4, 8, 16, 20), 2, 5).eval()
    torch.nn.init.normal_(decoder.edges.score.weight)

    def inputs(objects, h, w):
        unit, shares = torch.randn(h * w, C), torch.rand(objects + 1, h * w)
        channels = objects + (objects > 1)  # with more than one object, also their union
        levels = [torch.randn(1, c, round(h * s), round(w * s))
                  for c, s in zip((5, 4, 8, 16, 20), (8, 4, 2, 1, 0.5))]
        return (unit, shares, torch.randn(channels, E, h, w), torch.rand(objects, h * w),
                torch.rand(channels, 2, 4 * h, 4 * w), *levels)

    graph, file = Exported(tokens, decoder), io.BytesIO()
    names = ["unit", "shares", "readout", "before", "previous", *(f"level{i}" for i in range(5))]
    traced = inputs(2, 6, 10)
    # in inputs of four axes, the channels and the leading 1 of the levels are fixed
    axes = {name: {i: f"{name}_{i}" for i in range(x.dim()) if x.dim() < 4 or i != 1 and (
        i or name in ("readout", "previous"))} for name, x in zip(names, traced)}
    torch.onnx.export(graph, traced, file, dynamo=False, opset_version=18, input_names=names,
                      output_names=["logits", "coarse"], dynamic_axes=axes)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for objects, h, w in ((2, 6, 10), (1, 6, 10), (4, 4, 8)):
        arguments = inputs(objects, h, w)
        outputs = session.run(None, {name: x.numpy() for name, x in zip(names, arguments)})
        with torch.no_grad():
            for expected, output in zip(graph(*arguments), outputs):
                np.testing.assert_allclose(output, expected.numpy(), atol=2e-3)
