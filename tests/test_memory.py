"""Recent and past frames against dense float64 versions; the online update; the decoder."""

import pytest
import torch
import torch.nn.functional as F

from network.decoder import Decoder
from network.matching import Grid, soft_match
from network.memory import TEMPERATURE, Past, Recent, Sets


def draw(seed, frames, channels=6, h=5, w=7, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [Grid(torch.randn(channels, h, w, generator=generator), factor) for _ in range(frames)]


def dense_labels(query, grids, labels, k, radius):
    """For each position the softmax-weighted labels of the k best of every frame's window."""
    height, width = query.shape
    unit = [F.normalize(g.features.double().flatten(1), dim=0) for g in (query, *grids)]
    soft = torch.zeros(len(labels[0]), height, width, dtype=torch.double)
    for y in range(height):
        for x in range(width):
            found = []
            for other, label in zip(unit[1:], labels):
                for v in range(max(0, y - radius), min(height, y + radius + 1)):
                    for u in range(max(0, x - radius), min(width, x + radius + 1)):
                        similarity = unit[0][:, y * width + x] @ other[:, v * width + u]
                        found.append((similarity, label[:, v, u].double()))
            found = sorted(found, key=lambda pair: -pair[0])[:k]
            weights = (torch.stack([f[0] for f in found]) / TEMPERATURE).softmax(0)
            soft[:, y, x] = sum(weight * f[1] for weight, f in zip(weights, found))
    return soft


@pytest.mark.parametrize("frames, k, radius", [(1, 3, 1), (2, 5, 2), (3, 4, 10)])
def test_labels_propagate_as_in_the_dense_version(frames, k, radius):
    query, *grids = draw(1, frames + 1)
    labels = torch.rand(frames, 2, 5, 7, generator=torch.Generator().manual_seed(1))
    recent = Recent(frames, k, radius)
    for grid, label in zip(grids, labels):
        recent.add(grid, label)
    soft, similarity = recent.propagate(query)
    expected = dense_labels(query, grids, labels, k, radius)
    torch.testing.assert_close(soft.double(), expected, atol=1e-5, rtol=0)
    assert similarity.shape == (5, 7) and similarity.max() <= 1.0001


def test_a_frame_that_comes_again_gets_its_labels_back():
    (frame,) = draw(2, 1, channels=40, factor=2.0)
    labels = (torch.rand(1, *frame.shape, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    recent = Recent(frames=2, k=1)
    recent.add(frame, labels)
    soft, similarity = recent.propagate(frame)
    torch.testing.assert_close(soft, labels)
    torch.testing.assert_close(similarity, torch.ones(frame.shape))


def test_only_the_last_frames_are_kept():
    recent = Recent(frames=2, k=1)
    grids = draw(4, 5, channels=40)
    for i, grid in enumerate(grids):
        recent.add(grid, torch.full((1, 5, 7), float(i)))
    assert len(recent.grids) == len(recent.labels) == 2
    assert set(recent.propagate(grids[0])[0].unique().tolist()) <= {3.0, 4.0}


def test_gradients_reach_features_and_labels():
    query, grid = draw(5, 2)
    query.features.requires_grad_()
    grid.features.requires_grad_()
    labels = torch.rand(2, 5, 7, requires_grad=True)
    recent = Recent(1)
    recent.add(grid, labels)
    recent.propagate(query)[0][0].square().sum().backward()
    for tensor in (query.features, grid.features, labels):
        assert tensor.grad.abs().sum() > 0


def test_past_frames_are_searched_everywhere():
    query, *grids = draw(8, 3)
    labels = torch.rand(2, 2, 5, 7, generator=torch.Generator().manual_seed(2))
    past = Past(every=1, k=4)
    past.add(grids[0].features, labels[0], given=True)
    past.add(grids[1].features, labels[1])
    expected = dense_labels(query, grids, labels, k=4, radius=99)
    found = past.propagate(query.features)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_past_frames_are_few_and_never_without_the_reference():
    past, frames = Past(frames=2, every=3, k=1), draw(9, 13, channels=40)
    for i, frame in enumerate(frames):
        past.add(frame.features, torch.full((1, 5, 7), float(i)), given=i == 0)
    kept = {past.propagate(frame.features).round().unique().tolist()[0] for frame in frames}
    assert len(past.given) == 1 and len(past.later) == 2
    assert {0.0, 8.0, 11.0} <= kept


def test_a_new_object_is_in_no_frame_so_far():
    (frame,) = draw(10, 1)
    for memory, seen in ((Past(every=1), frame.features), (Recent(), frame)):
        memory.add(seen, torch.ones(2, 5, 7))
        memory.widen(3)
        found = memory.propagate(seen)
        found = found[0] if isinstance(memory, Recent) else found
        assert found.shape == (3, 5, 7)
        torch.testing.assert_close(found[:2], torch.ones(2, 5, 7))
        assert not found[2].any()


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_an_update_equals_matching_with_the_larger_sets(factor):
    reference, first, second, third, query = draw(6, 5, channels=12, factor=factor)
    labels = torch.randint(-1, 2, (4, *query.shape), generator=torch.Generator().manual_seed(1))
    sets = Sets([(reference, labels[0])], 2, frames=2)
    for grid, label in zip((first, second, third), labels[1:]):
        sets.update(grid, label)
    # the first of the later frames has left, the reference frame never does
    features = [F.normalize(F.interpolate(g.features[None].double(), size=query.shape,
                                          mode="bilinear")[0].flatten(1), dim=0)
                for g in (reference, second, third, query)]
    members = torch.cat(features[:3], 1)
    chosen = labels[[0, 2, 3]].flatten()
    for i in (0, 1):
        similarity = features[3].T @ members[:, chosen == i]
        expected = similarity.topk(4, dim=1).values.mean(1).view(query.shape)
        found = soft_match(query, sets.reference, 4)[i].double()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_update_that_is_sure_of_nothing_changes_nothing():
    reference, later = draw(7, 2)
    sets = Sets([(reference, torch.zeros(5, 7).long())], 1)
    before = sets.reference
    sets.update(later, torch.full((5, 7), -1))
    assert sets.reference is before and not sets.later


def test_decoder_scores_the_finest_level():
    decoder = Decoder(6, (4, 8, 16, 20))
    levels = [torch.randn(2, 4, 24, 40), torch.randn(2, 8, 12, 20), torch.randn(2, 16, 6, 10),
              torch.randn(2, 20, 3, 5)]
    evidence = torch.randn(2, 3, 6, 12, 20, requires_grad=True)
    logits = decoder(evidence, levels)
    assert logits.shape == (2, 3, 24, 40)
    alone = decoder(evidence[1:, 2:], [level[1:] for level in levels])
    torch.testing.assert_close(alone[0, 0], logits[1, 2], atol=1e-5, rtol=1e-4)
    logits.sum().backward()
    assert evidence.grad.abs().sum() > 0
    assert all(p.grad is not None for p in decoder.parameters())
