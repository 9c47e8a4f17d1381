"""Object tokens and the level of stride 2: no effect untrained, sums, order of objects, export."""

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

H, W, C, E = 6, 9, 20, 12


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    module = ObjectTokens(C, E).eval()
    torch.nn.init.normal_(module.correction.weight, std=0.1)
    return module


def frame(objects, seed=0):
    """Inputs of `ObjectTokens`: features, shares of two memory frames, evidence, shares before."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(H * W, C, generator=generator), dim=1)
    shares = torch.randn(3, objects + 1, H * W, generator=generator).mul(2).softmax(1)
    own = torch.randn(objects, E, H, W, generator=generator)
    return unit, shares[:2], with_union(own), shares[2, 1:]


@pytest.mark.slow
@pytest.mark.parametrize("objects", [1, 2])
def test_a_model_that_was_extended_finds_what_it_found(objects):
    frames = [draw_frame(i, tuple(range(1, objects + 1))) for i in range(4)]
    before = VideoMatch.load(SHIPPED["mobilenet"]).eval()
    before.object_tokens = before.edges = False  # as checkpoints were before there were these
    before.reader.tokens = before.decoder.edges = None
    after = copy.deepcopy(before)
    after.extend()
    after.eval()
    trackers = Tracker(before), Tracker(after)
    for i, (image, mask) in enumerate(frames):
        one, other = (tracker.step(preprocess.to_tensor(image), None if i else mask, SHAPE)
                      for tracker in trackers)
        # enlarged in two steps instead of one
        assert (one.mask != other.mask).mean() < 0.02
    after.edges = False
    edges, after.decoder.edges = after.decoder.edges, None
    exact = Tracker(after)
    for i, (image, mask) in enumerate(frames):
        found = exact.step(preprocess.to_tensor(image), None if i else mask, SHAPE)
    np.testing.assert_array_equal(found.mask, one.mask)
    assert edges is not None


def test_an_extended_model_is_loaded_as_it_was_saved(tmp_path):
    model = VideoMatch.load(SHIPPED["mobilenet"])
    model.extend()
    model.save(tmp_path / "extended.pth")
    again = VideoMatch.load(tmp_path / "extended.pth")
    assert again.digest() == model.digest() and again.object_tokens and again.edges
    again.extend()  # nothing to add
    assert again.digest() == model.digest()


def test_sums_are_linear_in_the_masks(tokens):
    unit, (first, second), *_ = frame(3)
    together = tokens.sums(unit, (first + second) / 2)
    torch.testing.assert_close(together, (tokens.sums(unit, first) + tokens.sums(unit, second)) / 2)
    # of the weighed mean of features under each mask, against a loop
    seen = tokens.normal(tokens.see(unit))
    weights = tokens.weights(seen).sigmoid()
    sums = tokens.sums(unit, first).unflatten(1, (object_tokens.TOKENS, -1))
    for i in range(4):
        for q in range(object_tokens.TOKENS):
            share = first[i] * weights[:, q] / len(unit)
            torch.testing.assert_close(sums[i, q, -1], share.sum())
            torch.testing.assert_close(sums[i, q, :-1], (share[:, None] * seen).sum(0))


def test_objects_are_read_whatever_their_order(tokens):
    unit, shares, evidence, before = frame(3)
    order = [2, 0, 1]
    sums = tokens.sums(unit, shares.mean(0))
    found, coarse = tokens(unit, sums, evidence, before)
    other, other_coarse = tokens(unit, sums[[0, *(1 + i for i in order)]],
                                 evidence[[*order, 3]], before[order])
    assert found.shape == evidence.shape and coarse.shape == (3, H, W)
    torch.testing.assert_close(other, found[[*order, 3]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other_coarse, coarse[order], atol=1e-4, rtol=1e-4)


def test_look_alikes_are_told_apart_by_place(tokens):
    """Two objects with the same memory and the same readout, in different places before."""
    unit, shares, evidence, before = frame(2)
    sums = tokens.sums(unit, shares.mean(0))
    sums[2] = sums[1]
    evidence[1] = evidence[0]
    before = torch.zeros(2, H, W)
    before[0, :, :3], before[1, :, -3:] = 1, 1
    found, _ = tokens(unit, sums, evidence, before.flatten(1))
    assert (found[0] - found[1]).abs().max() > 0.01
    before[1] = before[0]
    found, _ = tokens(unit, sums, evidence, before.flatten(1))
    torch.testing.assert_close(found[0], found[1])


def test_objects_that_are_nowhere_give_numbers(tokens):
    unit, shares, evidence, before = frame(2)
    for nowhere in (0 * before, before * torch.tensor([[0.0], [1]])):
        for output in tokens(unit, 0 * tokens.sums(unit, shares[0]), evidence, nowhere):
            assert output.isfinite().all()


def test_gradients_reach_all_weights(tokens):
    unit, shares, evidence, before = frame(2)
    found, coarse = tokens(unit, tokens.sums(unit, shares.mean(0)), evidence, before)
    (found.square().sum() + coarse.square().sum()).backward()
    for name, parameter in tokens.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_edges_start_as_enlargement_and_learn_from_the_stem():
    torch.manual_seed(0)
    channels, sides = (4, 8, 16, 20), (24, 12, 6, 3)
    plain, fine = (Decoder(6, channels, 2, stem) for stem in (0, 5))
    fine.load_state_dict(plain.state_dict(), strict=False)
    levels = [torch.randn(1, c, s, s + 1) for c, s in zip((5, *channels), (48, *sides))]
    evidence, previous = torch.randn(3, 6, 6, 7), torch.rand(3, 2, 24, 25)
    below, found = plain(evidence, previous, levels[1:]), fine(evidence, previous, levels)
    expected = torch.nn.functional.interpolate(below[:, None], size=levels[0].shape[2:],
                                               mode="bilinear")[:, 0]
    torch.testing.assert_close(found, expected)
    torch.nn.init.normal_(fine.edges.score.weight)
    fine(evidence, previous, levels).sum().backward()
    assert all(p.grad is not None for p in fine.edges.parameters())


def test_the_loss_of_groups_by_hand():
    truth = torch.tensor([[0, 1, 1, 2]])
    found = torch.tensor([[0.7, 0.2, 0.1, 0.2], [0.2, 0.6, 0.7, 0.2],
                          [0.1, 0.2, 0.2, 0.6]])[:, None]
    foreground = torch.stack([found[0], 1 - found[0]])
    mean = -(np.log(0.6 / 0.8) + np.log(0.7 / 0.9)) / 2, -np.log(0.6 / 0.8)
    expected = dice(foreground, (truth > 0).long()) + sum(mean) / 2
    assert grouping(found, truth).item() == pytest.approx(expected.item(), abs=1e-5)
    assert grouping(foreground, (truth > 0).long()) == 0
    assert grouping(found, 0 * truth).isfinite()
    assert cross_entropy(found, truth) > 0


class Exported(torch.nn.Module):
    """One step of tokens and decoder, as a graph of tensors."""

    def __init__(self, tokens, decoder):
        super().__init__()
        self.tokens, self.decoder = tokens, decoder

    def forward(self, unit, shares, evidence, before, previous, *levels):
        sums = self.tokens.sums(unit, shares)
        evidence, coarse = self.tokens(unit, sums, evidence, before)
        return self.decoder(evidence, previous, list(levels)), coarse


@pytest.mark.slow
def test_both_can_be_exported_for_any_number_of_objects_and_any_size(tokens):
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(1)
    decoder = Decoder(E, (4, 8, 16, 20), 2, 5).eval()
    torch.nn.init.normal_(decoder.edges.score.weight)

    def inputs(objects, h, w):
        unit, shares = torch.randn(h * w, C), torch.rand(objects + 1, h * w)
        several = objects + (objects > 1)
        levels = [torch.randn(1, c, round(h * s), round(w * s))
                  for c, s in zip((5, 4, 8, 16, 20), (8, 4, 2, 1, 0.5))]
        return (unit, shares, torch.randn(several, E, h, w), torch.rand(objects, h * w),
                torch.rand(several, 2, 4 * h, 4 * w), *levels)

    graph, content = Exported(tokens, decoder), io.BytesIO()
    names = ["unit", "shares", "evidence", "before", "previous", *(f"level{i}" for i in range(5))]
    traced = inputs(2, 6, 10)
    axes = {name: {i: f"{name}_{i}" for i in range(x.dim()) if x.dim() < 4 or i != 1 and (
        i or name in ("evidence", "previous"))} for name, x in zip(names, traced)}
    torch.onnx.export(graph, traced, content, dynamo=False, opset_version=18, input_names=names,
                      output_names=["logits", "coarse"], dynamic_axes=axes)
    session = runtime.InferenceSession(content.getvalue(), providers=["CPUExecutionProvider"])
    for objects, h, w in ((2, 6, 10), (1, 6, 10), (4, 4, 8)):
        given = inputs(objects, h, w)
        found = session.run(None, {name: x.numpy() for name, x in zip(names, given)})
        with torch.no_grad():
            for one, other in zip(graph(*given), found):
                np.testing.assert_allclose(other, one.numpy(), atol=2e-3)
