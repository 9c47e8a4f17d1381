"""Memory readout and update against dense float64 formulas; contents of a state."""

import pytest
import torch
import torch.nn.functional as F

from network import reader as module
from network.decoder import Block, Decoder
from network.reader import (
    READOUT,
    VALUE,
    Reader,
    best_other,
    conjugate_gradients,
    filled,
    foreground_first,
    rivals,
    with_union,
)
from network.state import INTEGERS, MEM_FRAMES, blank, without

H, W, C, SIDE = 5, 7, 20, 2
ROWS = "reference_keys", "reference_values", "reference_rows"  # some of which hold nothing


@pytest.fixture
def reader():
    torch.manual_seed(0)
    return Reader(C, 12, SIDE).eval()


def features(reader, seed):
    generator = torch.Generator().manual_seed(seed)
    return reader.describe(torch.randn(1, C, H, W, generator=generator))


def masks(seed, objects):
    """(N+1, 2 * H, 2 * W) probabilities."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(objects + 1, H * SIDE, W * SIDE, generator=generator).mul(3).softmax(0)


def ids(seed, objects):
    """(2 * H, 2 * W) random object ids."""
    generator = torch.Generator().manual_seed(200 + seed)
    return torch.randint(0, objects + 1, (H * SIDE, W * SIDE), generator=generator)


def one_hot(mask, objects):
    return F.one_hot(mask, objects + 1).permute(2, 0, 1).float()


def labels(mask):
    """(2 * H, 2 * W) object ids -> (H, W) of the locations."""
    return mask[::SIDE, ::SIDE].clone()


def empty(reader, objects):
    return blank((H, W), objects, reader.widths, lambda name, shape: torch.zeros(
        shape, dtype=torch.long if name in INTEGERS else torch.float32))


def refer(reader, state, seed, objects, closer=True):
    """Return a state with a reference frame and a zoomed crop, some of whose locations are valid.

    Returns:
        The state; and the frames, each its `Features`, masks and labels.
    """
    mask = ids(seed, objects)
    frames = [(features(reader, seed), one_hot(mask, objects), labels(mask))]
    if closer:
        mask = ids(seed + 50, objects)
        kept = torch.rand(H, W, generator=torch.Generator().manual_seed(seed)) > 0.5
        frames.append((features(reader, seed + 50), one_hot(mask, objects),
                       torch.where(kept, labels(mask), -1)))
    seen, found, sets = zip(*frames)
    views = seen[0]._replace(key=torch.cat([x.key for x in seen]),
                             shared=torch.cat([x.shared for x in seen]))
    return reader.start(state, views, torch.stack(found), torch.stack(sets)), frames


def followed(reader, objects, frames=(1, 2, 3, 4, 5), every=2):
    """A state after a reference frame and some more, and the inputs of a dense formula.

    Returns:
        The state; all frames that are searched everywhere, as `refer` has them, labels 0 where
        none are known; and the two last frames.
    """
    state, given = refer(reader, empty(reader, objects), 0, objects)
    later, recent = [], [given[0]]
    for i in frames:
        seen, found = features(reader, i), masks(i, objects)
        long = (i + 1) % every == 0
        state = reader.remember(state, seen, found, long)
        recent.append((seen, found, None))
        if long:
            later.append((seen, found, torch.zeros(H, W).long()))
    return state, given, later[-MEM_FRAMES:], recent[-2:]


def values_of(reader, seen, found):
    """(h*w, M, VALUE + 1) values of a frame, object by object, then those of the union."""
    objects = [*found[1:]]
    rival = [torch.stack([x for j, x in enumerate(objects) if j != i] or [0 * objects[0]])
             for i in range(len(objects))]
    if len(objects) > 1:
        objects.append(found[1:].sum(0))
        rival.append(0 * objects[:1][0][None])
    values = []
    for own, others in zip(objects, rival):
        share = F.avg_pool2d(own[None, None], SIDE)
        other = F.avg_pool2d(others[None], SIDE).amax(1, keepdim=True)
        x = torch.cat([F.pixel_unshuffle(own[None, None], SIDE), share, other], 1)
        x = seen.shared + reader.own(2 * x - 1)
        x = reader.value(F.relu(x + reader.layers(x)))
        values.append(torch.cat([x, share], 1).flatten(2)[0].T)
    return torch.stack(values, 1).detach()


def dense_read(keys, values, query, k, temperature):
    """Dense readout (n, M, D): for each query, of its k most similar keys."""
    similarity = query.double() @ keys.double().T
    rows = []
    for row in similarity:
        order = row.argsort(descending=True)[:k]
        order = order[torch.isfinite(row[order])]
        weights = (row[order] / temperature).softmax(0)
        rows.append((weights[:, None, None] * values.double()[order]).sum(0))
    return torch.stack(rows), similarity.amax(1)


@pytest.mark.parametrize("objects", [1, 3])
@pytest.mark.parametrize("frames", [(), (1,), range(1, 14)])
def test_the_global_readout_equals_the_dense_formula(reader, objects, frames):
    state, given, later, _ = followed(reader, objects, frames)
    query, every = features(reader, 9), [*given, *later]
    with torch.no_grad():
        readout, scores = reader.read(state, query)
    several = objects > 1
    assert readout.shape == (objects + several, READOUT, H, W)
    assert scores.shape == (objects + 1, H, W)
    sets = torch.cat([x[2].flatten() for x in every])
    keys = torch.cat([x[0].key[0] for x in every]).detach()
    values = torch.cat([values_of(reader, *x[:2]) for x in every])
    expected, similarity = dense_read(keys[sets >= 0], values[sets >= 0], query.key[0], module.K,
                                      module.TEMPERATURE)
    expected = expected.view(H, W, objects + several, VALUE + 1).permute(2, 3, 0, 1)
    far = module.SCALARS
    torch.testing.assert_close(readout[:, far:far + VALUE].double(), expected[:, :-1],
                               atol=1e-4, rtol=0)
    torch.testing.assert_close(readout[:, 6].double(), expected[:, -1], atol=1e-4, rtol=0)
    torch.testing.assert_close(readout[0, 8].double(), similarity.view(H, W), atol=1e-5, rtol=0)
    # the score of a set: the mean of its best
    sets = torch.cat([x[2].flatten() for x in given])
    keys = torch.cat([x[0].key[0] for x in given]).detach()
    wanted = [sets == i for i in range(objects + 1)] + [sets > 0] * several
    found = [*scores, scores[0] + readout[-1, 0] / 5]
    for which, score in zip(wanted, found):
        products = query.key[0].double() @ keys[which].double().T
        mean = products.sort(1, descending=True).values[:, :module.K_SET].mean(1)
        torch.testing.assert_close(score.double(), mean.view(H, W), atol=1e-5, rtol=0)
    torch.testing.assert_close(readout[:objects, 0], 5 * (scores[1:] - scores[0]))


@pytest.mark.parametrize("frames", [(), (1, 2, 3)])
def test_the_local_readout_equals_the_dense_formula(reader, frames, monkeypatch):
    monkeypatch.setattr(module, "RADIUS", 1)
    state, _, _, recent = followed(reader, 2, frames)
    query = features(reader, 9)
    with torch.no_grad():
        readout, _ = reader.read(state, query)
    y, x = torch.arange(H * W) // W, torch.arange(H * W) % W
    near = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs()) <= 1
    keys = torch.cat([seen.local_key[0].flatten(0, 1) for seen, _, _ in recent]).double()
    similarity = (query.local_key[0].flatten(0, 1).double() @ keys.T).masked_fill(
        ~near.repeat(1, len(recent)), -torch.inf)
    values = torch.cat([values_of(reader, *x[:2]) for x in recent]).double()
    best, where = similarity.topk(8, dim=1)  # in a corner of one frame there are four
    weights = (best / module.TEMPERATURE).softmax(1)
    expected = (weights[..., None, None] * values[where]).sum(1).view(H, W, 3, VALUE + 1)
    expected = expected.permute(2, 3, 0, 1).detach()
    torch.testing.assert_close(readout[:, -VALUE:].double(), expected[:, :-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(readout[:, 9].double(), expected[:, -1], atol=1e-4, rtol=0)


def ridge_regression(reader, frames, weights):
    """(C, N+1) by least squares, with the ridge as additional rows."""
    rows, targets = [], []
    for (seen, found, _), weight in zip(frames, weights):
        x = seen.unit[0].double().detach()
        y = F.avg_pool2d(found[None], SIDE)[0].flatten(1).T.double()
        balance = (y / (y.mean(0) + module.LEAST)).sum(1)
        root = (weight * balance / balance.sum()).sqrt()[:, None]
        rows.append(x * root)
        targets.append(y * root)
    rows.append(module.RIDGE ** 0.5 * torch.eye(C).double())
    targets.append(torch.zeros(C, targets[0].shape[1]).double())
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution


@pytest.mark.parametrize("frames, weights", [
    ((), [1]), ((1,), [0.6, 0.4]), ((1, 3), [0.6, 0.4 * 0.7, 0.4 * 0.3]),
    ((1, 3, 5), [0.6, 0.4 * 0.49, 0.4 * 0.21, 0.4 * 0.3])])
def test_linear_labels_equal_ridge_regression(reader, frames, weights):
    state, given, later, _ = followed(reader, 2, frames)
    query = features(reader, 9)
    with torch.no_grad():
        readout, _ = reader.read(state, query)
    solution = ridge_regression(reader, [given[0], *later], weights)
    expected = (query.unit[0].double() @ solution).T[1:].view(2, H, W).detach()
    torch.testing.assert_close(readout[:2, 3].double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(readout[2, 3].double(), expected.sum(0), atol=1e-4, rtol=0)


def test_linear_labels_weigh_reference_frames_equally(reader):
    state, first = refer(reader, empty(reader, 2), 0, 2)
    state, second = refer(reader, state, 7, 2)
    solution = ridge_regression(reader, [first[0], second[0]], [0.5, 0.5])
    torch.testing.assert_close(state.linear.double(), solution, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype, steps, away", [(torch.float64, 80, 1e-9),
                                                (torch.float32, module.STEPS, 1e-4)])
def test_conjugate_gradients_agree_with_a_direct_solver(dtype, steps, away):
    """Features as similar as those of a frame, and the ridge of the shipped checkpoint."""
    torch.manual_seed(0)
    unit = F.normalize(torch.randn(900, 256) @ torch.diag(0.97 ** torch.arange(256.0)), dim=1)
    matrix, ridge = unit.T @ unit / len(unit), torch.tensor(0.0018)
    right = unit.T @ torch.rand(900, 4) / len(unit)
    right[:, 3] = 0  # of an object that was nowhere
    whole = matrix.double() + ridge.double() * torch.eye(256)
    expected = torch.linalg.solve(whole, right.double())
    found = conjugate_gradients(matrix.to(dtype), right.to(dtype), ridge.to(dtype), steps)
    torch.testing.assert_close(found.double(), expected, atol=away, rtol=0)


def test_the_number_of_an_object_does_not_matter(reader):
    order = [2, 0, 1]  # the object that is first, second and third now
    renamed = torch.tensor([0, *(1 + order.index(i) for i in range(3))])
    seen, later, states = features(reader, 0), features(reader, 1), []
    for mask, found in ((ids(0, 3), masks(1, 3)),
                        (renamed[ids(0, 3)], masks(1, 3)[[0, *(1 + i for i in order)]])):
        state = reader.start(empty(reader, 3), seen, one_hot(mask, 3)[None], labels(mask)[None])
        states.append(reader.remember(state, later, found, long=True))
    with torch.no_grad():
        first, second = (reader.read(state, features(reader, 9))[0] for state in states)
    torch.testing.assert_close(second, first[[*order, 3]], atol=1e-4, rtol=1e-4)


def test_the_number_of_memory_frames_is_bounded(reader):
    state, *_ = followed(reader, 1, range(1, 30), every=3)
    assert (int(state.frames), int(state.memories)) == (30, 10)
    # the reference frame counts as the first
    kept = sorted(20 + 3 * i for i in range(MEM_FRAMES))
    for frame in kept:  # in the place of the oldest, which would be the next to go
        found = state.memory_keys[(frame - 2) // 3 % MEM_FRAMES].flatten(0, 1)[:H * W]
        torch.testing.assert_close(found, features(reader, frame).key[0])
    for i, frame in enumerate((28, 29)):
        torch.testing.assert_close(state.recent_keys[i], features(reader, frame).local_key[0])
        torch.testing.assert_close(
            state.recent_values[i], values_of(reader, features(reader, frame), masks(frame, 1)))
    torch.testing.assert_close(state.previous, masks(29, 1))
    first, *_ = followed(reader, 1, ())
    for name in ("keys", "valid", "values"):
        assert torch.equal(*(getattr(x, f"reference_{name}") for x in (state, first)))


def test_state_shapes_depend_only_on_counts(reader):
    shapes = [tuple(x.shape) for x in followed(reader, 2, ())[0]]
    for seed, long in ((1, False), (2, True), (3, True)):
        state, _ = refer(reader, empty(reader, 2), seed, 2)
        for i in range(seed):
            state = reader.remember(state, features(reader, i), masks(seed, 2), long)
        assert [tuple(x.shape) for x in state] == shapes


def test_a_new_object_is_absent_from_earlier_frames(reader):
    state, given, *_ = followed(reader, 1)
    mask = ids(7, 2)
    seen = features(reader, 7)
    wide = reader.start(state, seen, one_hot(mask, 2)[None], labels(mask)[None])

    def lacking(found):
        """Without the second object."""
        return torch.cat([found, 0 * found[:1]])

    # as if it had been looked for from the beginning
    expected = empty(reader, 2)
    views = given[0][0]._replace(key=torch.cat([x[0].key for x in given]),
                                 shared=torch.cat([x[0].shared for x in given]))
    expected = reader.start(expected, views, torch.stack([lacking(x[1]) for x in given]),
                            torch.stack([x[2] for x in given]))
    for i in (1, 2, 3, 4, 5):
        expected = reader.remember(expected, features(reader, i), lacking(masks(i, 1)),
                                   (i + 1) % 2 == 0)
    expected = reader.start(expected, seen, one_hot(mask, 2)[None], labels(mask)[None])
    for name, now, then in zip(wide._fields, wide, expected):
        if name in ROWS:  # what isn't valid may be anything
            now, then = (x[wide.reference_valid > 0] for x in (now, then))
        elif name == "memory_values":
            now, then = (x[wide.memory_valid > 0] for x in (now, then))
        torch.testing.assert_close(now, then, atol=1e-5, rtol=1e-4)
    readout, scores = reader.read(wide, features(reader, 9))
    assert len(readout) == 3 and len(scores) == 3


def test_a_step_does_not_modify_the_previous_state(reader):
    state, *_ = followed(reader, 1)
    before = [x.clone() for x in state]
    other = reader.remember(state, features(reader, 4), masks(4, 1), long=True)
    refer(reader, other, 7, 2)
    assert all(torch.equal(now, then) for now, then in zip(state, before))


def test_gradients_reach_all_weights_and_earlier_predictions(reader):
    state, _ = refer(reader, empty(reader, 2), 0, 2, closer=False)
    found = masks(1, 2).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    seen = torch.randn(1, C, H, W, generator=generator).requires_grad_()
    state = reader.remember(state, reader.describe(seen), found, long=True)
    readout, scores = reader.read(state, features(reader, 2))
    (readout.square().sum() + scores.square().sum()).backward()
    for tensor in (found, seen, *reader.parameters()):
        assert tensor.grad.abs().sum() > 0


def test_rows_hold_the_frame_locations_first_then_those_of_closer_views():
    chosen = torch.zeros(4, 3, 10, dtype=torch.bool)
    chosen[0, 0, [1, 4, 5]] = True  # fits
    chosen[1, 0, 2], chosen[1, 1], chosen[1, 2, :4] = True, True, True  # too many closer ones
    chosen[2, 0], chosen[2, 1] = True, True  # too many of its own
    rows, there = filled(chosen, 6)  # the last set is empty
    found = [row[kept].tolist() for row, kept in zip(rows, there)]
    assert found[0] == [1, 4, 5] and found[3] == []
    assert found[1][0] == 2 and len(found[1]) == 6  # 5 of 14, every third one
    steps = torch.tensor(found[1][1:]).diff()
    assert found[1][1] >= 10 and found[1][-1] == 23 and steps.min() >= 2 and steps.max() <= 3
    assert len(found[2]) == 6 and max(found[2]) == 9  # 6 of 10
    assert torch.tensor(found[2]).diff().max() <= 2
    for row in found:
        assert row == sorted(set(row))


def test_keys_are_initialised_with_principal_components(reader):
    torch.manual_seed(1)
    wide = Reader(100, 40, SIDE)
    samples = torch.randn(500, 100) @ torch.diag(torch.linspace(0.1, 3, 100))
    wide.initialise_keys(samples)
    unit = F.normalize(samples, dim=1)
    _, _, directions = torch.linalg.svd(unit, full_matrices=False)
    kept = unit @ wide.key.weight.T
    expected = unit @ directions[:module.KEY].T
    torch.testing.assert_close(kept.square().sum(1), expected.square().sum(1), atol=1e-4, rtol=0)


def test_the_best_other_object_is_found_for_each_object():
    x = torch.tensor([[1.0, 5, 2], [3, 5, 1], [2, 0, 4]])
    assert best_other(x).tolist() == [[3, 5, 4], [2, 5, 4], [3, 5, 2]]
    assert best_other(x[:1]).tolist() == [[0, 0, 0]]


def test_the_union_of_objects_is_read_as_a_single_object_would_be(reader):
    """Except the linear labels, in whose sums all objects weigh equally."""
    seen, later, mask, found = features(reader, 0), features(reader, 1), ids(0, 3), masks(1, 3)
    state = reader.start(empty(reader, 3), seen, one_hot(mask, 3)[None], labels(mask)[None])
    state = reader.remember(state, later, found, long=True)
    mask = (mask > 0).long()
    alone = reader.start(empty(reader, 1), seen, one_hot(mask, 1)[None], labels(mask)[None])
    alone = reader.remember(alone, later, torch.stack([found[0], found[1:].sum(0)]), long=True)
    with torch.no_grad():
        readout, expected = (reader.read(x, features(reader, 9))[0] for x in (state, alone))
    assert len(readout) == 4 and len(expected) == 1
    fitted = [3, 4]
    others = [i for i in range(READOUT) if i not in fitted]
    torch.testing.assert_close(readout[3:, others], expected[:, others], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(readout[3:, fitted], 0 * expected[:, fitted])


@pytest.mark.parametrize("objects", [1, 2, 5])
def test_the_union_decides_what_is_foreground(objects):
    own = 4 * torch.randn(objects, 3, 4)
    assert torch.equal(foreground_first(own[:1], 1), own[:1])
    assert torch.equal(with_union(own)[:objects], own)
    assert len(with_union(own)) == len(rivals(own)) == objects + (objects > 1)
    if objects > 1:
        union = 4 * torch.randn(1, 3, 4)
        found = foreground_first(torch.cat([own, union]), objects)
        found = F.pad(found, (0, 0, 0, 0, 1, 0)).softmax(0)
        torch.testing.assert_close(found[1:], union.sigmoid() * own.softmax(0))
        torch.testing.assert_close(with_union(own)[-1], own.sum(0))
        assert torch.equal(rivals(own)[:-1], best_other(own)) and not rivals(own)[-1].any()


@pytest.mark.parametrize("objects, channel", [(2, 1), (3, 2), (3, 3)])
def test_removing_an_object_leaves_no_trace(reader, objects, channel):
    """Except sums in which all objects weigh equally."""
    kept = [i for i in range(objects + 1) if i != channel]
    fewer = torch.tensor([kept.index(i) if i in kept else -1 for i in range(objects + 1)])
    state, expected = empty(reader, objects), empty(reader, objects - 1)
    for seed in (0, 7):
        seen, mask = features(reader, seed), ids(seed, objects)
        state = reader.start(state, seen, one_hot(mask, objects)[None], labels(mask)[None])
        expected = reader.start(expected, seen, one_hot(mask, objects)[None, kept],
                                fewer[labels(mask)][None])
    for i in (1, 2):
        state = reader.remember(state, features(reader, i), masks(i, objects), i == 2)
        expected = reader.remember(expected, features(reader, i), masks(i, objects)[kept], i == 2)
    found = reader.revalued(without(state, channel))
    for name, now, then in zip(found._fields, found, expected):
        assert now.shape == then.shape, name
        if name in ROWS:
            now, then = (x[expected.reference_valid > 0] for x in (now, then))
        elif name.startswith("memory") and name != "memory_masks" and now.dim() > 2:
            now, then = (x[expected.memories - 1] for x in (now, then))  # the only one there is
        if not name.endswith(("squares", "labels", "linear")):
            torch.testing.assert_close(now, then, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.linear, state.linear[:, kept])
    with torch.no_grad():
        readout, scores = reader.read(found, features(reader, 9))
        torch.testing.assert_close(scores, reader.read(expected, features(reader, 9))[1])
    assert len(readout) == objects - 1 + (objects > 2)


@pytest.mark.parametrize("sizes", [[(12, 20), (6, 10)], [(3, 5), (6, 10)], [(6, 10), (2, 2)]])
def test_a_block_projects_the_resized_channels_of_frame_and_objects(sizes):
    """Against one convolution of all channels, resized and concatenated, in float64."""
    torch.manual_seed(0)
    block = Block(5, 7, 8).double()
    shared = torch.randn(1, 5, 6, 10).double()
    own = [torch.randn(3, channels, *size).double() for channels, size in zip((4, 3), sizes)]
    resized = [F.adaptive_avg_pool2d(x, (6, 10)) if x.shape[2] > 6 else
               F.interpolate(x, size=(6, 10), mode="bilinear", align_corners=False) for x in own]
    expected = block.project(torch.cat([shared.expand(3, -1, -1, -1), *resized], 1))
    expected = expected + block.layers(expected)
    torch.testing.assert_close(block(block.project_shared(shared), *own), expected)


@pytest.mark.parametrize("channels, finer, sides", [((4, 8, 16, 20), 2, (24, 12, 6, 3)),
                                                    ((4, 8), 1, (12, 6)), ((4,), 0, (6,))])
def test_the_decoder_scores_the_finest_level_per_object(channels, finer, sides):
    decoder = Decoder(6, channels, finer)
    levels = [torch.randn(1, c, side, side + 1) for c, side in zip(channels, sides)]
    readout = torch.randn(3, 6, 6, 7, requires_grad=True)
    previous = torch.rand(3, 2, sides[0], sides[0] + 1, requires_grad=True)
    logits = decoder(readout, previous, levels)
    assert logits.shape == (3, sides[0], sides[0] + 1)
    alone = decoder(readout[2:], previous[2:], levels)
    torch.testing.assert_close(alone[0], logits[2], atol=1e-5, rtol=1e-4)
    logits.sum().backward()
    assert readout.grad.abs().sum() > 0 and (finer == 0) == (previous.grad is None)
    assert all(p.grad is not None for p in decoder.parameters())
