"""Soft matching against a dense float64 version."""

import pytest
import torch

import matching
from matching import soft_match


def dense(query, sets, k):
    """Every similarity at once, in float64: the definition."""
    unit = [x.double() / x.double().norm(dim=1, keepdim=True) for x in (query, *sets)]
    query, sets = unit[0], unit[1:]
    scores = []
    for features in sets:
        similarity = query @ features.T
        best = similarity.sort(dim=1, descending=True).values[:, :min(k, len(features))]
        scores.append(best.mean(dim=1) if len(features) else torch.full((len(query),), -1.0))
    return torch.stack(scores).double()


CASES = [  # query size, set sizes, channels, K
    (1, (1, 1), 1, 1), (7, (1, 30), 8, 5), (64, (5, 200), 96, 20), (33, (400, 3), 16, 4),
    (50, (20, 21, 19, 1), 32, 20), (129, (257, 63), 512, 1), (20, (0, 9), 8, 3),
    (20, (9, 0), 8, 100),
]


@pytest.mark.parametrize("queries, sizes, channels, k", CASES)
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 23])
def test_equals_dense(queries, sizes, channels, k, chunk, monkeypatch):
    monkeypatch.setattr(matching, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(queries)
    query = torch.randn(queries, channels, generator=generator)
    sets = [torch.randn(size, channels, generator=generator) for size in sizes]
    scores = soft_match(query, sets, k)
    assert scores.shape == (len(sets), queries)
    torch.testing.assert_close(scores.double(), dense(query, sets, k), atol=1e-5, rtol=0)


def test_equals_dense_on_random_shapes():
    generator = torch.Generator().manual_seed(0)

    def draw(high):
        return int(torch.randint(1, high, (), generator=generator))

    for _ in range(50):
        channels = draw(64)
        query = torch.randn(draw(200), channels, generator=generator)
        sets = [torch.randn(draw(300), channels, generator=generator) for _ in range(1 + draw(4))]
        k = draw(40)
        torch.testing.assert_close(soft_match(query, sets, k).double(), dense(query, sets, k),
                                   atol=1e-5, rtol=0)


def test_gradients_equal_dense(monkeypatch):
    monkeypatch.setattr(matching, "CHUNK_ELEMENTS", 200)
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(n, 12, generator=generator) for n in (40, 5, 60)]
    weights = torch.randn(2, 40, generator=generator)

    def gradients(match, dtype):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]
        (match(leaves[0], leaves[1:], 7) * weights.to(dtype)).sum().backward()
        return [leaf.grad.double() for leaf in leaves]

    for ours, reference in zip(gradients(soft_match, torch.float32),
                               gradients(dense, torch.float64)):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)


def test_a_feature_of_the_set_scores_one():
    features = torch.eye(6)
    scores = soft_match(3 * features, [features[:2], features[2:]], k=1)
    known = torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(scores, known)


def test_a_small_set_is_not_padded_with_zeros():
    query = torch.tensor([[1.0, 0.0]])
    only = torch.tensor([[0.6, 0.8]])
    assert soft_match(query, [only], k=20).item() == pytest.approx(0.6)
