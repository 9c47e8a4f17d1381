"""What a memory says of each object, against dense float64 formulas; what it keeps."""

import pytest
import torch
import torch.nn.functional as F

from network import reader as module
from network import rules
from network.bank import Bank
from network.decoder import Decoder
from network.reader import (
    EVIDENCE,
    Reader,
    best_other,
    foreground_first,
    rivals,
    with_union,
)
from network.rules import VALUE, View
from network.state import plain, restored

H, W, C, SIDE = 5, 7, 20, 2


@pytest.fixture
def reader():
    torch.manual_seed(0)
    return Reader(C, 12, SIDE).eval()


def features(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(C, H, W, generator=generator)


def masks(seed, objects):
    """(N+1, 2 * H, 2 * W) probabilities."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(objects + 1, H * SIDE, W * SIDE, generator=generator).mul(3).softmax(0)


def ids(seed, objects):
    """(2 * H, 2 * W) object ids, as mixed as can be."""
    generator = torch.Generator().manual_seed(200 + seed)
    return torch.randint(0, objects + 1, (H * SIDE, W * SIDE), generator=generator)


def one_hot(mask, objects):
    return F.one_hot(mask, objects + 1).permute(2, 0, 1).float()


def refer(reader, bank, seed, objects, chosen=None):
    views = [View(reader.look(features(seed)), ids(seed, objects))]
    if chosen is not None:
        views.append(View(reader.look(features(seed + 50)), ids(seed + 50, objects), chosen))
    reader.refer(bank, views, list(range(1, objects + 1)))


def filled(reader, objects, frames=(1, 2, 3), every=2, **kept):
    """A bank after a reference frame, a closer view of it, and some frames."""
    bank = Bank(every=every, **kept)
    chosen = torch.rand(H, W, generator=torch.Generator().manual_seed(3)) > 0.5
    refer(reader, bank, 0, objects, chosen)
    for i in frames:
        reader.remember(bank, reader.look(features(i)), masks(i, objects))
    return bank


def dense_read(keys, values, query, k, temperature):
    """Each query's (n, D) read from its k most similar keys, one after the other."""
    similarity = query.double() @ keys.double().T
    rows = []
    for row in similarity:
        order = row.argsort(descending=True)[:k]
        order = order[torch.isfinite(row[order])]
        weights = (row[order] / temperature).softmax(0)
        rows.append((weights[:, None] * values.double()[order]).sum(0))
    return torch.stack(rows), similarity.amax(1)


@pytest.mark.parametrize("objects", [1, 3])
def test_what_is_read_everywhere_equals_the_dense_formula(reader, objects):
    bank, query = filled(reader, objects), reader.look(features(9))
    with torch.no_grad():
        evidence, scores = reader.read(bank, query)
    several = objects + (objects > 1)  # their union counts as one more
    assert evidence.shape == (several, EVIDENCE, H, W) and scores.shape == (objects + 1, H, W)
    entries, labels = [*bank.given, *bank.later], torch.cat(bank.labels)
    known = torch.cat([labels >= 0, torch.ones(H * W * len(bank.later)).bool()])
    keys, values = (torch.cat([getattr(entry, name) for entry in entries])[known].detach()
                    for name in ("key", "values"))
    expected, similarity = dense_read(keys, values, query.key, module.K, module.TEMPERATURE)
    expected = expected.view(H, W, several, VALUE + 1).permute(2, 3, 0, 1)
    far = module.SCALARS
    torch.testing.assert_close(evidence[:, far:far + VALUE].double(), expected[:, :-1],
                               atol=1e-4, rtol=0)
    torch.testing.assert_close(evidence[:, 6].double(), expected[:, -1], atol=1e-4, rtol=0)
    torch.testing.assert_close(evidence[0, 8].double(), similarity.view(H, W), atol=1e-5, rtol=0)
    # the score of a set: the mean of its best
    given = torch.cat([entry.key for entry in bank.given]).detach()
    for i in range(objects + 1):
        products = query.key.double() @ given[labels == i].double().T
        mean = products.sort(1, descending=True).values[:, :module.K_SET].mean(1)
        torch.testing.assert_close(scores[i].double(), mean.view(H, W), atol=1e-5, rtol=0)
    torch.testing.assert_close(evidence[:objects, 0], 5 * (scores[1:] - scores[0]))


def test_what_is_read_near_by_equals_the_dense_formula(reader, monkeypatch):
    monkeypatch.setattr(module, "RADIUS", 1)
    bank, query = filled(reader, 2), reader.look(features(9))
    with torch.no_grad():
        evidence, _ = reader.read(bank, query)
    y, x = torch.arange(H * W) // W, torch.arange(H * W) % W
    near = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs()) <= 1
    keys = torch.cat([entry.near.flatten(0, 1) for entry in bank.recent]).double()
    similarity = (query.near.flatten(0, 1).double() @ keys.T).masked_fill(
        ~near.repeat(1, 2), -torch.inf)
    values = torch.cat([entry.values for entry in bank.recent]).double()
    best, where = similarity.topk(8, dim=1)
    weights = (best / module.TEMPERATURE).softmax(1)
    expected = (weights[..., None] * values[where]).sum(1).view(H, W, 3, VALUE + 1)
    expected = expected.permute(2, 3, 0, 1).detach()
    torch.testing.assert_close(evidence[:, -VALUE:].double(), expected[:, :-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(evidence[:, 9].double(), expected[:, -1], atol=1e-4, rtol=0)


def test_linear_labels_are_those_of_the_ridge_regression(reader):
    bank, query = filled(reader, 2, frames=()), reader.look(features(9))
    with torch.no_grad():
        evidence, _ = reader.read(bank, query)
    x = reader.look(features(0)).unit.double().detach()
    labels = F.avg_pool2d(one_hot(ids(0, 2), 2)[None], SIDE)[0].flatten(1).T.double()
    weights = (labels / (labels.mean(0) + rules.LEAST)).sum(1)
    root = (weights / weights.sum()).sqrt()[:, None]
    # as rows beside the data
    rows = torch.cat([x * root, module.RIDGE ** 0.5 * torch.eye(C).double()])
    targets = torch.cat([labels * root, torch.zeros(C, 3).double()])
    solution = torch.linalg.lstsq(rows, targets).solution
    expected = (query.unit.double() @ solution).T[1:].view(2, H, W).detach()
    torch.testing.assert_close(evidence[:2, 3].double(), expected, atol=1e-4, rtol=0)


def test_an_object_is_what_it_is_whatever_its_number(reader):
    order = [2, 0, 1]  # the object that is first, second and third now
    renamed = torch.tensor([0, *(1 + order.index(i) for i in range(3))])
    bank, other = Bank(every=1), Bank(every=1)
    cells, later = reader.look(features(0)), reader.look(features(1))
    reader.refer(bank, [View(cells, ids(0, 3))], [1, 2, 3])
    reader.refer(other, [View(cells, renamed[ids(0, 3)])], [1, 2, 3])
    reader.remember(bank, later, masks(1, 3))
    reader.remember(other, later, masks(1, 3)[[0, *(1 + i for i in order)]])
    with torch.no_grad():
        first, second = (reader.read(b, reader.look(features(9)))[0] for b in (bank, other))
    torch.testing.assert_close(second, first[[*order, 3]], atol=1e-4, rtol=1e-4)


def test_only_so_many_frames_are_kept(reader):
    bank = filled(reader, 1, frames=range(1, 30), every=3, later=2, recent=2)
    assert (len(bank.given), len(bank.later), len(bank.recent)) == (2, 2, 2)
    # the reference frame counts as the first
    for entry, frame in zip((*bank.later, *bank.recent), (26, 29, 28, 29)):
        torch.testing.assert_close(entry.found, masks(frame, 1))
    torch.testing.assert_close(bank.given[0].found, one_hot(ids(0, 1), 1))


def test_an_object_that_comes_later_was_nowhere_before(reader):
    bank = filled(reader, 1)
    bank.widen(2)
    refer(reader, bank, 7, 2)
    nowhere = slice(VALUE + 1, 2 * (VALUE + 1))  # between the first and the union
    before = [*bank.given[:2], *bank.later, bank.recent[0]]
    for entry in before:
        assert entry.values.shape[1] == 3 * (VALUE + 1)
        assert not entry.found[2].any() and not entry.values[:, nowhere][:, -1].any()
    absent = torch.cat([one_hot(ids(0, 1), 1), torch.zeros(1, H * SIDE, W * SIDE)])
    expected = reader._entry(reader.look(features(0)), absent).values
    torch.testing.assert_close(bank.given[0].values, expected)
    evidence, scores = reader.read(bank, reader.look(features(9)))
    assert len(evidence) == 3 and len(scores) == 3


def test_a_copy_goes_its_own_way(reader):
    bank = filled(reader, 1)
    other = bank.copy()
    before = [p.clone() for p in reader.read(bank, reader.look(features(9)))]
    reader.remember(other, reader.look(features(4)), masks(4, 1))
    other.widen(2)
    refer(reader, other, 7, 2)
    for now, then in zip(reader.read(bank, reader.look(features(9))), before):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


def test_a_bank_comes_back_from_its_plain_parts(reader):
    bank = filled(reader, 2)
    again = restored(plain(bank))
    for now, then in zip(reader.read(again, reader.look(features(9))),
                         reader.read(bank, reader.look(features(9)))):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    assert again.later.maxlen == bank.later.maxlen and again.every == bank.every


def test_gradients_reach_all_weights_and_what_was_found_before(reader):
    bank = Bank(every=1)
    refer(reader, bank, 0, 2)
    found = masks(1, 2).requires_grad_()
    seen = features(1).requires_grad_()
    reader.remember(bank, reader.look(seen), found)
    evidence, scores = reader.read(bank, reader.look(features(2)))
    (evidence.square().sum() + scores.square().sum()).backward()
    for tensor in (found, seen, *reader.parameters()):
        assert tensor.grad.abs().sum() > 0


def test_keys_start_as_the_principal_directions(reader):
    torch.manual_seed(1)
    wide = Reader(100, 40, SIDE)
    samples = torch.randn(500, 100) @ torch.diag(torch.linspace(0.1, 3, 100))
    wide.start(samples)
    unit = F.normalize(samples, dim=1)
    _, _, directions = torch.linalg.svd(unit, full_matrices=False)
    kept = unit @ wide.key.weight.T
    expected = unit @ directions[:module.KEY].T
    torch.testing.assert_close(kept.square().sum(1), expected.square().sum(1), atol=1e-4, rtol=0)


def test_the_best_other_object():
    x = torch.tensor([[1.0, 5, 2], [3, 5, 1], [2, 0, 4]])
    assert best_other(x).tolist() == [[3, 5, 4], [2, 5, 4], [3, 5, 2]]
    assert best_other(x[:1]).tolist() == [[0, 0, 0]]


def test_the_union_of_objects_is_read_as_a_single_object_would_be(reader):
    """All but the linear labels, in whose sums each object weighs alike."""
    bank, alone = Bank(every=1), Bank(every=1)
    cells, later = reader.look(features(0)), reader.look(features(1))
    mask, found = ids(0, 3), masks(1, 3)
    reader.refer(bank, [View(cells, mask)], [1, 2, 3])
    reader.refer(alone, [View(cells, (mask > 0).long())], [1])
    reader.remember(bank, later, found)
    reader.remember(alone, later, torch.stack([found[0], found[1:].sum(0)]))
    with torch.no_grad():
        evidence, expected = (reader.read(b, reader.look(features(9)))[0] for b in (bank, alone))
    assert len(evidence) == 4 and len(expected) == 1
    fitted = [3, 4]
    others = [i for i in range(EVIDENCE) if i not in fitted]
    torch.testing.assert_close(evidence[3:, others], expected[:, others], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(evidence[3:, fitted], 0 * expected[:, fitted])


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


@pytest.mark.parametrize("channels, finer, sides", [((4, 8, 16, 20), 2, (24, 12, 6, 3)),
                                                    ((4, 8), 1, (12, 6)), ((4,), 0, (6,))])
def test_decoder_scores_the_finest_level_of_each_object_alone(channels, finer, sides):
    decoder = Decoder(6, channels, finer)
    levels = [torch.randn(1, c, side, side + 1) for c, side in zip(channels, sides)]
    evidence = torch.randn(3, 6, 6, 7, requires_grad=True)
    previous = torch.rand(3, 2, sides[0], sides[0] + 1, requires_grad=True)
    logits = decoder(evidence, previous, levels)
    assert logits.shape == (3, sides[0], sides[0] + 1)
    alone = decoder(evidence[2:], previous[2:], levels)
    torch.testing.assert_close(alone[0], logits[2], atol=1e-5, rtol=1e-4)
    logits.sum().backward()
    assert evidence.grad.abs().sum() > 0 and (finer == 0) == (previous.grad is None)
    assert all(p.grad is not None for p in decoder.parameters())
