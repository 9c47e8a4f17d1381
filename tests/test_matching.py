"""Soft matching against a dense float64 version on enlarged features."""

import pytest
import torch
import torch.nn.functional as F

from network import matching
from network.matching import Grid, Reference, soft_match, top_k


def enlarge(features, shape):
    """(C, h, w) -> (H*W, C) unit features in float64: the definition."""
    large = F.interpolate(features[None].double(), size=shape, mode="bilinear",
                          align_corners=False)[0].flatten(1).T
    return large / large.norm(dim=1, keepdim=True)


def similarities(query, references, labels, shape):
    """All similarities with each set, in float64."""
    others = torch.cat([enlarge(r, x.shape) for r, x in zip(references, labels)])
    labels = torch.cat([x.flatten() for x in labels])
    return [enlarge(query, shape) @ others[labels == i].T for i in range(int(labels.max()) + 1)]


def dense(query, references, labels, k, shape):
    scores = []
    for similarity in similarities(query, references, labels, shape):
        best = similarity.sort(dim=1, descending=True).values[:, :k]
        scores.append(best.mean(1) if best.shape[1] else torch.full((len(best),), -1.0).double())
    return torch.stack(scores).view(-1, *shape)


def draw(seed, channels, h, w, factor, sets=2, frames=1):
    """Features of a frame and of reference frames, and random sets; -1 is in none."""
    generator = torch.Generator().manual_seed(seed)
    query, *references = torch.randn(1 + frames, channels, h, w, generator=generator)
    shape = Grid(query, factor).shape
    return query, references, torch.randint(-1, sets, (frames, *shape), generator=generator)


def match(query, references, labels, k, factor, enlarge_first=False):
    query, *grids = [Grid(features, factor) for features in (query, *references)]
    for grid in (query, *grids):
        grid.is_small = grid.is_small and not enlarge_first  # False is what a GPU does
    return soft_match(query, Reference(grids, labels, int(labels.max()) + 1), k)


SHAPES = [  # channels, h, w, factor
    (8, 6, 9, 1), (96, 5, 7, 1.8), (16, 12, 9, 2), (4, 1, 6, 3), (8, 7, 1, 2.5), (6, 5, 6, 2),
    (8, 9, 11, 0.5), (70, 4, 4, 7.3), (4, 1, 1, 5),
    *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((32, 10, 17, 4), (8, 20, 30, 2))),
]


@pytest.mark.parametrize("channels, h, w, factor", SHAPES)
@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("chunk", [1, 5000, matching.CHUNK])
def test_matching_equals_the_dense_formula(channels, h, w, factor, k, chunk, monkeypatch):
    monkeypatch.setattr(matching, "CHUNK", chunk)
    query, references, labels = draw(h, channels, h, w, factor)
    labels.view(-1)[0] = 1  # the last set is never without a member
    scores = match(query, references, labels, k, factor)
    expected = dense(query, references, labels, k, scores.shape[1:])
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("enlarge_first", [False, True])
def test_matching_equals_the_dense_formula_on_random_shapes(enlarge_first):
    generator = torch.Generator().manual_seed(0)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for seed in range(40):
        factor = 0.5 + 4 * torch.rand((), generator=generator).item()
        query, references, labels = draw(seed, integer(8, 64), integer(1, 12), integer(1, 12),
                                         factor, sets=integer(1, 4), frames=integer(1, 3))
        labels.view(-1)[0] = max(0, int(labels.max()))
        k = integer(1, 40)
        scores = match(query, references, labels, k, factor, enlarge_first)
        expected = dense(query, references, labels, k, scores.shape[1:])
        torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [1, 2.5])
@pytest.mark.parametrize("sizes", [(1, 50), (50, 1), (0, 7), (3, 0, 60)])
def test_sets_of_any_size_are_matched(factor, sizes):
    query, references, labels = draw(1, 16, 8, 10, factor)
    order = torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(2))
    labels.fill_(-1)
    for i, part in enumerate(order[:sum(sizes)].split(sizes)):
        labels.view(-1)[part] = i
    reference = Reference([Grid(references[0], factor)], labels, len(sizes))
    scores = soft_match(Grid(query, factor), reference, k=20)
    for i, size in enumerate(sizes):
        if not size:
            assert (scores[i] == -1).all()
        else:
            others = enlarge(references[0], scores.shape[1:])[labels.flatten() == i]
            similarity = enlarge(query, scores.shape[1:]) @ others.T
            expected = similarity.topk(min(20, size), dim=1).values.mean(1).view(scores.shape[1:])
            torch.testing.assert_close(scores[i].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("enlarge_first", [False, True])
@pytest.mark.parametrize("factor", [1, 2.5])
def test_reference_frames_may_differ_in_size(factor, enlarge_first):
    query, (first,), labels = draw(4, 40, 8, 10, factor)
    _, (second,), more = draw(5, 40, 5, 13, factor)
    grids = [Grid(x, factor) for x in (query, first, second)]
    for grid in grids:
        grid.is_small = grid.is_small and not enlarge_first
    labels = [labels[0], more[0]]
    scores = soft_match(grids[0], Reference(grids[1:], labels, 2), 5)
    expected = dense(query, [first, second], labels, 5, scores.shape[1:])
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [1, 2])
def test_positions_belong_to_the_similarities(factor):
    query, references, labels = draw(3, 16, 9, 14, factor, frames=2)
    reference = Reference([Grid(r, factor) for r in references], labels, 2)
    grid = Grid(query, factor)
    others = torch.cat([enlarge(r, grid.shape) for r in references])
    for i, (values, positions) in enumerate(top_k(grid, reference, k=6)):
        assert values.shape == positions.shape == (grid.shape[0] * grid.shape[1], 6)
        assert (labels.flatten()[positions] == i).all()
        assert all(len(set(row)) == 6 for row in positions.tolist())
        found = torch.einsum("qc,qkc->qk", enlarge(query, grid.shape), others[positions])
        torch.testing.assert_close(values.double(), found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("first", [1, 3, 1000])
@pytest.mark.parametrize("smooth", [False, True])
def test_results_do_not_depend_on_the_number_of_first_blocks(first, smooth, monkeypatch):
    monkeypatch.setattr(matching, "FIRST_BLOCKS", first)
    query, references, labels = draw(7, 24, 18, 26, 2.5, sets=1)
    if smooth:  # features that hardly differ, as behind random weights
        query, references = query * 0.01 + 1, [r * 0.01 + 1 for r in references]
    scores = match(query, references, labels, 2, 2.5)
    expected = dense(query, references, labels, 2, scores.shape[1:])
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [1, 1.8])
def test_gradients_equal_dense(factor):
    query, references, labels = draw(4, 12, 7, 9, factor)
    shape = Grid(query, factor).shape
    weights = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))

    def gradients(scores_of, dtype):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (query, *references)]
        scores = scores_of(leaves[0], leaves[1:])
        (scores * weights.to(scores.dtype)).sum().backward()
        return [leaf.grad.double() for leaf in leaves]

    ours = gradients(lambda q, r: match(q, r, labels, 7, factor), torch.float32)
    reference = gradients(lambda q, r: dense(q, r, labels, 7, shape), torch.float64)
    for found, expected in zip(ours, reference):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_largest_finds_values_at_the_end_and_in_one_group():
    values = torch.zeros(3, 1000)  # K = 5: groups of 14, every 71st column; 6 columns in none
    values[0, 993:] = torch.arange(1.0, 8)  # five of them in no group
    values[1, 3:500:71] = torch.arange(1.0, 8)  # all in one group
    values[2, ::150] = torch.arange(1.0, 8)  # each in another
    found, columns = matching._largest(values, 5)
    assert found.sort(dim=1).values.tolist() == [[3, 4, 5, 6, 7]] * 3
    expected = [list(range(995, 1000)), list(range(145, 430, 71)), [300, 450, 600, 750, 900]]
    assert columns.sort(dim=1).values.tolist() == expected


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("enlarge_first", [False, True])
def test_half_precision_is_close_to_the_dense_scores(dtype, tolerance, enlarge_first):
    query, references, labels = draw(7, 96, 9, 11, 2)
    expected = dense(query, references, labels, 5, Grid(query, 2).shape)
    scores = match(query.to(dtype), [r.to(dtype) for r in references], labels, 5, 2,
                   enlarge_first)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, atol=tolerance, rtol=0)


def test_a_small_set_is_not_padded_with_zeros():
    query = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    only = Reference([Grid(torch.tensor([0.6, 0.8]).view(2, 1, 1))], torch.zeros(1, 1, 1), 1)
    assert soft_match(Grid(query), only, k=20).item() == pytest.approx(0.6)


def test_features_of_zeros_score_zero():
    """After a ReLU a location may be all zeros; its cosine is 0 instead of NaN."""
    query, references, labels = draw(6, 8, 5, 6, 2)
    scores = match(torch.zeros_like(query), references, labels, 3, 2)
    torch.testing.assert_close(scores, torch.zeros_like(scores))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_features_does_not_matter(scale):
    query, references, labels = draw(8, 8, 5, 6, 2)
    scores = match(query * scale, [r * scale for r in references], labels, 40, 2)
    expected = dense(query, references, labels, 40, scores.shape[1:])
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


def test_padding_is_never_selected():
    """Even if every member of a set is maximally dissimilar to the frame."""
    features = torch.full((4, 5, 6), 1e6)
    grids = [Grid(features, 2), Grid(-features, 2)]
    reference = Reference([grids[1]], torch.zeros(1, 10, 12), sets=1)
    (values, positions), = top_k(grids[0], reference, k=120)
    torch.testing.assert_close(values, -torch.ones(120, 120))
    assert positions.sort(dim=1).values.tolist() == [list(range(120))] * 120


def test_running_out_of_memory_halves_the_chunks(monkeypatch, caplog):
    drawn = draw(3, 8, 5, 7, 1.0)
    expected = dense(*drawn, 3, (5, 7))
    largest = matching._largest

    def short_of_memory(values, k):
        if len(values) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return largest(values, k)

    monkeypatch.setattr(matching, "_largest", short_of_memory)
    matching._warn_once.cache_clear()
    for _ in range(2):
        found = match(*drawn, 3, 1.0)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    assert caplog.text.count("smaller chunks") == 1
    monkeypatch.setattr(matching, "_largest", lambda *_: short_of_memory(torch.zeros(9), 1))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        match(*drawn, 3, 1.0)
