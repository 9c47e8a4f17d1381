"""The search for similar locations against dense float64 products."""

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


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}  # of similarities


def one_set(keys, members=1):
    """(m, C) keys of one frame's set, in rows of groups, and which of them are valid."""
    groups = -(-len(keys) // members)
    rows = F.pad(keys, (0, 0, 0, members * groups - len(keys)))
    valid = (torch.arange(len(rows)) < len(keys)).float()
    return rows.view(1, 1, members, groups, -1), valid.view(1, 1, members, groups)


@pytest.mark.parametrize("n, m, k", [(5, 7, 3), (300, 40, 16), (3, 9, 9), (1, 1, 1)])
def test_few_keys_are_searched_exactly(n, m, k):
    query, keys = unit(0, n, 8), unit(1, m, 8)
    with torch.no_grad():
        values, positions = (x[:, 0] for x in nearest(query, *one_set(keys), k))
    dense = query.double() @ keys.double().T
    expected = dense.sort(1, descending=True).values[:, :k]
    assert values.shape == positions.shape == expected.shape
    torch.testing.assert_close(values.sort(1, descending=True).values.double(), expected,
                               atol=1e-5, rtol=0)
    torch.testing.assert_close(chosen(dense, positions), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n, m, k, size", [(3, 1000, 4, 16), (600, 333, 16, 5), (2, 130, 16, 2),
                                           (2, 640, 16, 20)])
def test_many_keys_are_searched_by_groups(n, m, k, size):
    query, keys = unit(2, n, 16), unit(3, m, 16)
    rows, valid = one_set(keys, size)
    with torch.no_grad():
        values, positions = (x[:, 0] for x in nearest(query, rows, valid, k))
    dense = query.double() @ keys.double().T
    groups = rows.shape[3]
    best = F.pad(dense, (0, size * groups - m), value=-9).unflatten(1, (size, groups)).amax(1)
    expected = best.sort(1, descending=True).values[:, :k]
    torch.testing.assert_close(chosen(dense, positions), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(dense.gather(1, positions), values.double(), atol=1e-5, rtol=0)
    assert all(len(row.unique()) == k for row in positions % groups)


@pytest.mark.parametrize("grad, dtype", [
    (False, torch.float32), (True, torch.float32), (False, torch.bfloat16)])
@pytest.mark.parametrize("members", [1, 4])
def test_sets_of_several_frames_are_searched_separately(grad, members, dtype):
    """The best of each set over all frames; invalid keys are never selected."""
    query, keys = unit(2, 7, 8, dtype=dtype), unit(3, 3, 2, members, 6, 8, dtype=dtype)
    tolerance = TOLERANCE[dtype]
    generator = torch.Generator().manual_seed(4)
    valid = (torch.rand(keys.shape[:-1], generator=generator) > 0.4).float()
    valid[:, 1, :, 2:] = 0  # six groups with anything, of which some may be empty, too
    with torch.set_grad_enabled(grad):
        values, positions = nearest(query, keys, valid, 6)
    assert values.shape == positions.shape == (7, 2, 6)
    dense = query.double() @ keys.flatten(0, 3).double().T
    of_set = torch.arange(2)[:, None, None].expand(3, 2, members, 6).flatten()
    for i in range(2):
        there = (valid.flatten() > 0) & (of_set == i)
        similarity = dense.masked_fill(~there, -1e4)
        if not grad:  # the best of each group
            similarity = similarity.unflatten(1, valid.shape)[:, :, i].amax(2).flatten(1)
        else:
            similarity = similarity.unflatten(1, valid.shape)[:, :, i].flatten(1)
        expected = similarity.sort(1, descending=True).values[:, :6]
        torch.testing.assert_close(values[:, i].double().sort(1, descending=True).values,
                                   expected, atol=tolerance, rtol=0)
        real = values[:, i] > -2
        assert there[positions[:, i][real]].all()
        torch.testing.assert_close(dense.gather(1, positions[:, i])[real],
                                   values[:, i][real].double(), atol=tolerance, rtol=0)


def test_long_rows_of_several_frames_and_sets_are_sorted_by_their_maxima():
    """The top-k of bfloat16 similarities; only the columns of the largest maxima are sorted."""
    frames, sets, members, groups, k = 4, 2, 3, 72, 8
    assert frames * groups >= search.LONG * k
    query = unit(2, 300, 32, dtype=torch.bfloat16)
    keys = unit(3, frames, sets, members, groups, 32, dtype=torch.bfloat16)
    # similar keys side by side, so that the best ones share columns of the maxima
    keys[:, :, :, 1::4] = keys[:, :, :, ::4]
    valid = torch.ones(keys.shape[:-1])
    valid[1:, 1] = 0  # 72 groups of the second set, fewer than SORTED_PARTS * k columns
    valid[0, 1, :, 5:] = 0
    with torch.no_grad():
        values, positions = nearest(query, keys, valid, k)
        similarity = (query @ keys.flatten(0, 3).T).double()
    grouped = similarity.masked_fill(valid.flatten() == 0, -1e4).unflatten(1, valid.shape)
    for i in range(sets):
        expected = grouped[:, :, i].amax(2).flatten(1).sort(1, descending=True).values[:, :k]
        torch.testing.assert_close(values[:, i].double().sort(1, descending=True).values.clamp(-2),
                                   expected.clamp(-2), atol=0, rtol=0)
        real = values[:, i] > -2
        assert real.sum() == 300 * (k, 5)[i]
        torch.testing.assert_close(similarity.gather(1, positions[:, i])[real],
                                   values[:, i][real].double(), atol=0, rtol=0)


@pytest.mark.parametrize("n, frames, sets, members, groups", [
    (50, 1, 1, 20, 40), (7, 3, 2, 4, 17), (1, 2, 3, 1, 16)])
def test_an_exported_search_gives_the_same_result(n, frames, sets, members, groups):
    """With ONNX operators, for sizes that are no multiples of the group size."""
    query, keys = unit(8, n, 64), unit(9, frames, sets, members, groups, 64)
    generator = torch.Generator().manual_seed(1)
    valid = (torch.rand(keys.shape[:-1], generator=generator) > 0.2).float()
    k = min(16, frames * groups)
    with torch.no_grad():
        expected = nearest(query, keys, valid, k)
        best, rows = search._for_export(query, keys, valid, k)
    best, order = best.sort(2, descending=True)
    expected, there = expected[0].sort(2, descending=True).values, best > -2
    torch.testing.assert_close(best[there], expected[there], atol=2e-5, rtol=0)
    assert (expected[~there] == search.NOTHING).all()
    dense = (query @ keys.flatten(0, 3).T)[:, None].expand(-1, sets, -1)
    torch.testing.assert_close(dense.gather(2, rows.gather(2, order))[there], best[there],
                               atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_set_gives_no_matches(dtype):
    keys, _ = one_set(unit(1, 6, 8, dtype=dtype), 2)
    with torch.no_grad():
        values, positions = nearest(unit(0, 4, 8, dtype=dtype), keys, torch.zeros(1, 1, 2, 3), 3)
    assert (positions < 6).all()
    assert values.shape == (4, 1, 3) and (values == search.NOTHING).all()


@pytest.mark.parametrize("count", [700, 1 << 16, 70_000])  # beyond 16 bits for the index, too
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_matches(count, dtype):
    query, keys = unit(4, 5, 32, dtype=dtype), unit(5, count, 32, dtype=dtype)
    with torch.no_grad():
        rows, valid = one_set(keys, 16)
        values, positions = (x[:, 0] for x in nearest(query, rows, valid, 8))
    dense = query.double() @ keys.double().T
    torch.testing.assert_close(values.double(), dense.gather(1, positions), atol=4e-3, rtol=0)
    dense = F.pad(dense, (0, valid.numel() - count), value=-9)
    best = dense.unflatten(1, (16, -1)).amax(1).sort(1, descending=True).values[:, :8]
    torch.testing.assert_close(values.double().sort(1, descending=True).values, best, atol=4e-3,
                               rtol=0)


@pytest.mark.parametrize("count", [40, 1 << 16, 70_000])
def test_the_largest_of_bfloat16_values_are_those_of_a_sort(count):
    like = torch.zeros(1, dtype=torch.bfloat16)
    values = unit(0, 9, count, dtype=torch.bfloat16).float()
    values[:, 5:20] = search.NOTHING
    with torch.no_grad():
        best, columns = search.largest(values, 30, like)
    expected = values.sort(1, descending=True).values[:, :30]
    torch.testing.assert_close(best.sort(1, descending=True).values.clamp(min=-2),
                               expected.clamp(min=-2), atol=0, rtol=0)
    real = best > -2
    torch.testing.assert_close(values.gather(1, columns)[real], best[real], atol=0, rtol=0)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_hold_the_neighbourhood_of_each_location(h, w, frames, k, radius, dtype):
    query, *others = unit(6, frames + 1, h, w, 8, dtype=dtype)
    tolerance = TOLERANCE[dtype]
    there = torch.ones(frames)
    with torch.no_grad():
        values, positions = windows(query, torch.stack(others), there, k, radius)
    dense = dense_windows(query, others, radius)
    expected = dense.sort(1, descending=True).values[:, :k]
    expected = F.pad(expected, (0, k - expected.shape[1]), value=-torch.inf)
    found = values.sort(1, descending=True).values.double()
    torch.testing.assert_close(found.masked_fill(found < -2, -torch.inf), expected,
                               atol=tolerance, rtol=0)
    assert values.shape == (h * w, k) and set(values[values < -2].tolist()) <= {search.NOTHING}
    real = values > -2
    torch.testing.assert_close(dense.gather(1, positions)[real], values[real].double(),
                               atol=tolerance, rtol=0)


def test_windows_of_a_missing_frame_are_empty():
    query, *others = unit(6, 3, 5, 7, 8)
    alone = windows(query, torch.stack(others[1:]), torch.ones(1), 5, 2)
    values, positions = windows(query, torch.stack(others), torch.tensor([0.0, 1]), 5, 2)
    for now, expected in zip((values, positions), (alone[0], alone[1] + 35)):
        torch.testing.assert_close(now.sort(1).values, expected.sort(1).values)


@pytest.mark.parametrize("search_", [
    lambda query, other: [x[:, 0] for x in nearest(
        query.flatten(0, 1), *one_set(other.flatten(0, 1), 4), 3)],
    lambda query, other: windows(query, other[None], torch.ones(1), 3, 2)])
def test_gradients_equal_those_of_dense_products(search_):
    query, other = (unit(seed, 4, 5, 6).double().requires_grad_() for seed in (7, 8))
    values, positions = search_(query, other)
    values.square().sum().backward()
    found = query.grad.clone(), other.grad.clone()
    query.grad = other.grad = None
    dense = query.flatten(0, 1) @ other.flatten(0, 1).T
    dense.gather(1, positions).square().sum().backward()
    for gradient, tensor in zip(found, (query, other)):
        torch.testing.assert_close(gradient, tensor.grad, atol=1e-5, rtol=1e-4)


def test_the_cache_of_windows_is_bounded():
    assert search._tiles.cache_parameters()["maxsize"] == 8
