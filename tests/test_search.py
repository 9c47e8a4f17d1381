"""The search for similar cells against dense float64 products."""

import pytest
import torch
import torch.nn.functional as F

from network import search
from network.search import nearest, windows


def unit(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1).to(dtype)


def chosen(similarity, positions):
    return similarity.gather(1, positions).sort(1, descending=True).values


@pytest.mark.parametrize("n, m, k", [(5, 7, 3), (300, 40, 16), (3, 4, 9), (1, 1, 1)])
def test_of_few_keys_the_best_are_found(n, m, k):
    query, keys = unit(0, n, 8), unit(1, m, 8)
    with torch.no_grad():
        values, positions = nearest(query, keys, k)
    dense = query.double() @ keys.double().T
    expected = dense.sort(1, descending=True).values[:, :k]
    assert values.shape == positions.shape == expected.shape
    torch.testing.assert_close(values.sort(1, descending=True).values.double(), expected,
                               atol=1e-5, rtol=0)
    torch.testing.assert_close(chosen(dense, positions), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n, m, k, size", [(3, 1000, 4, 16), (600, 333, 16, 5), (2, 130, 16, 2)])
def test_of_many_keys_the_best_of_groups_are_found(n, m, k, size):
    query, keys = unit(2, n, 16), unit(3, m, 16)
    with torch.no_grad():
        values, positions = nearest(query, keys, k)
    dense = query.double() @ keys.double().T
    groups = m // size
    best = dense[:, :size * groups].unflatten(1, (size, groups)).amax(1)
    expected = best.sort(1, descending=True).values[:, :k]
    torch.testing.assert_close(chosen(dense, positions), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(dense.gather(1, positions), values.double(), atol=1e-5, rtol=0)
    assert all(len(row.unique()) == k for row in positions % groups)


def test_of_no_keys_none_are_found():
    values, positions = nearest(unit(0, 4, 8), unit(1, 0, 8), 5)
    assert values.shape == positions.shape == (4, 0)


def test_half_precision_finds_nearly_the_same():
    query, keys = unit(4, 50, 32, dtype=torch.bfloat16), unit(5, 700, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        values, positions = nearest(query, keys, 8)
    exact = (query.double() @ keys.double().T).gather(1, positions)
    torch.testing.assert_close(values.double(), exact, atol=4e-3, rtol=0)


def dense_windows(query, others, radius):
    """(h*w, T*h*w) float64 similarities, minus infinity outside of the window."""
    h, w, _ = query.shape
    similarity = torch.cat([query.double().flatten(0, 1) @ other.double().flatten(0, 1).T
                            for other in others], 1)
    y, x = torch.arange(h * w) // w, torch.arange(h * w) % w
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    return similarity.masked_fill(~near.repeat(1, len(others)), -torch.inf)


@pytest.mark.parametrize("h, w", [(1, 1), (5, 7), (4, 8), (9, 17)])
@pytest.mark.parametrize("frames, k, radius", [(1, 3, 0), (2, 5, 2), (3, 40, 20)])
def test_windows(h, w, frames, k, radius):
    query, *others = unit(6, frames + 1, h, w, 8)
    values, positions = windows(query, others, k, radius)
    dense = dense_windows(query, others, radius)
    expected = dense.sort(1, descending=True).values[:, :values.shape[1]]
    assert values.shape == (h * w, min(k, frames * min(radius + 1, h) * min(radius + 1, w)))
    torch.testing.assert_close(values.sort(1, descending=True).values.double(), expected,
                               atol=1e-5, rtol=0)
    torch.testing.assert_close(chosen(dense, positions), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("search_", [
    lambda query, other: nearest(query.flatten(0, 1), other.flatten(0, 1), 3),
    lambda query, other: windows(query, [other], 3, 2)])
def test_gradients_are_those_of_the_dense_products(search_):
    query, other = (unit(seed, 4, 5, 6).double().requires_grad_() for seed in (7, 8))
    values, positions = search_(query, other)
    values.square().sum().backward()
    found = query.grad.clone(), other.grad.clone()
    query.grad = other.grad = None
    dense = query.flatten(0, 1) @ other.flatten(0, 1).T
    dense.gather(1, positions).square().sum().backward()
    for gradient, tensor in zip(found, (query, other)):
        torch.testing.assert_close(gradient, tensor.grad, atol=1e-5, rtol=1e-4)


def test_what_is_kept_of_windows_is_bounded():
    assert search._windows.cache_parameters()["maxsize"] == 8
