"""The paper's foreground and background sets, and their online update."""

import pytest
import torch
import torch.nn.functional as F

from network.matching import Grid, soft_match
from network.sets import Sets


def draw(seed, frames, channels=6, h=5, w=7, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [Grid(torch.randn(channels, h, w, generator=generator), factor) for _ in range(frames)]


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_an_update_equals_matching_with_the_larger_sets(factor):
    reference, first, second, third, query = draw(6, 5, channels=12, factor=factor)
    labels = torch.randint(-1, 2, (4, *query.shape), generator=torch.Generator().manual_seed(1))
    sets = Sets(2, ((reference, labels[0]),), frames=2)
    for grid, label in zip((first, second, third), labels[1:]):
        sets = sets.update(grid, label)
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


def test_an_update_without_confident_locations_changes_nothing():
    reference, later = draw(7, 2)
    sets = Sets(1, ((reference, torch.zeros(5, 7).long()),))
    assert sets.update(later, torch.full((5, 7), -1)) is sets and not sets.updates
