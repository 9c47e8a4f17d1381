"""Soft matching: the mean of the K best cosine similarities to sets of features, exactly.

Features lie on a small grid and are compared on an enlarged one. Bilinear enlargement is linear,
so the similarities of enlarged features are the enlarged similarities of small ones, divided by
the norms of the enlarged features: with U the (sparse) matrix that enlarges and normalises,
similarity = U_query (query @ reference.T) U_reference.T.

Only the right half of that product, E = (query @ reference.T) U_reference.T, is computed as a
whole, a row of query cells at a time, or a part of one, so that memory depends neither on the
factor nor on the size of the sets. The members of a set come in blocks, tiles of the enlarged
grid. No weight in U_query is negative, so U_query applied to the blocks' maxima in E bounds every
similarity in a block from above. The blocks with the best bounds are looked into; where the K-th
best found there is no less than the least of these bounds, nothing better is left, and where it is
less, four times as many are looked into.
"""

import functools
import logging
import math
import warnings
from collections.abc import Iterable, Iterator

import cv2
import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

CHUNK = 9 << 18  # similarities held at a time: 9 MB in float32, a part of a CPU's cache
PRODUCT = 428  # cells of a query in one product of small features: four rows at stride 8, 480p
TILE = (4, 8)  # positions of the enlarged grid that make a block
BLOCK = TILE[0] * TILE[1]
FIRST_BLOCKS = 8  # looked into first, and one more for every two of K
NOTHING = -1e20  # the similarity of padding
LOWEST_COSINE = -1.0  # the score of an empty set
TINY = 1e-12


class Grid:
    """The features of a frame, seen on an enlarged grid.

    Args:
        features: (C, h, w) as the encoder gives them. Products are taken in their precision:
            float32, bfloat16 or float16.
        factor: bilinear enlargement, > 0; the grid has `shape` (H, W), about (h, w) * factor.
    """

    def __init__(self, features: torch.Tensor, factor: float = 1.0):
        self.features, self.factor = features, factor
        self.shape = tuple(max(1, round(side * factor)) for side in features.shape[1:])
        # a GPU multiplies faster than it gathers, and MPS has no sparse matrices
        self.is_small = features.device.type == "cpu" and factor > 1

    def enlarged(self) -> torch.Tensor:
        """(H*W, C) enlarged unit features. Differentiable."""
        large = self._enlarge(self.features.float()).flatten(1).T
        return F.normalize(large, dim=1).to(self.features.dtype)

    def _enlarge(self, features: torch.Tensor) -> torch.Tensor:
        if features.shape[1:] == self.shape:
            return features
        return F.interpolate(features.contiguous()[None], size=self.shape, mode="bilinear",
                             align_corners=False)[0]

    def norms(self) -> torch.Tensor:
        """(H*W,) norms of the enlarged features, from a few channels at a time."""
        squares = sum(self._enlarge(part.float()).square().sum(0)
                      for part in self.features.split(4))
        return squares.flatten().sqrt_().clamp_(min=TINY)

    def corners(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(H*W, 4) small cells between which a position lies, and their bilinear weights."""
        (h, w), (height, width) = self.features.shape[1:], self.shape
        (top, bottom, down), (left, right, along) = _axis(h, height), _axis(w, width)
        cells = [y[:, None] * w + x for y in (top, bottom) for x in (left, right)]
        weights = [y[:, None] * x for y in (1 - down, down) for x in (1 - along, along)]
        return torch.stack(cells, -1).flatten(0, 1), torch.stack(weights, -1).flatten(0, 1)


def _axis(small: int, large: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lower and upper neighbour of each enlarged position, and how far it is from the lower."""
    source = (torch.arange(large, dtype=torch.float64) + 0.5) * small / large - 0.5
    source = source.clamp(0, small - 1)
    lower = source.long().clamp(max=max(0, small - 2))
    return lower, (lower + 1).clamp(max=small - 1), (source - lower).float()


class Reference:
    """Features of one or more frames to match against, gathered in sets.

    Args:
        grids: T frames, of one factor.
        labels: T times (H, W) integers, the set of each position: 0, 1, ...; -1 is in none.
        sets: how many sets there are.
    """

    def __init__(self, grids: list[Grid], labels: Iterable[torch.Tensor], sets: int):
        self.grids, self.is_small = grids, grids[0].is_small
        tiles, start = [], 0
        for frame in labels:
            tiles.append(start + _by_tiles(frame))
            start += frame.numel()
        order, flat = torch.cat(tiles), torch.cat([frame.flatten() for frame in labels])
        # of each set, the positions counted through the frames
        self.members = [order[flat[order] == i] for i in range(sets)]
        self.sizes = [len(m) for m in self.members]
        with torch.no_grad():
            if self.is_small:
                self._gather_small()
            else:
                order = torch.cat(self.members)
                self.features = torch.cat([g.enlarged() for g in grids])[order]  # (R, C)

    def _gather_small(self) -> None:
        """Sets are padded to whole blocks with members of a cell that is similar to nothing."""
        self.members = [F.pad(m, (0, -len(m) % BLOCK), value=-1) for m in self.members]
        self.blocks = [len(m) // BLOCK for m in self.members]
        order = torch.cat(self.members)  # (R,), -1 for padding
        self.cells = torch.cat([g.features.flatten(1).T for g in self.grids])  # (T*h*w, C)
        frames, start = [], 0
        for grid in self.grids:
            corners, weights = grid.corners()
            frames.append((corners + start, weights / grid.norms()[:, None]))
            start += grid.features[0].numel()
        corners, weights = (torch.cat(parts)[order] for parts in zip(*frames))
        corners[order < 0] = len(self.cells)
        weights[order < 0] = 0.25
        self.enlarge = _sparse(corners, weights, len(self.cells) + 1)  # (R, T*h*w + 1)


def _by_tiles(labels: torch.Tensor) -> torch.Tensor:
    """(H, W) -> (H*W,) positions, those of a tile of the grid after each other."""
    height, width = (torch.arange(n, device=labels.device) for n in labels.shape)
    tile = height[:, None] // TILE[0] * len(width) + width // TILE[1]
    return tile.flatten().argsort(stable=True)


def _sparse(columns: torch.Tensor, values: torch.Tensor, width: int) -> torch.Tensor:
    """(n, 4) columns and values -> (n, width) sparse matrix."""
    rows = torch.arange(0, columns.numel() + 1, columns.shape[1])
    return torch.sparse_csr_tensor(rows, columns.flatten(), values.flatten(),
                                   (len(columns), width), check_invariants=False)


def soft_match(query: Grid, reference: Reference, k: int) -> torch.Tensor:
    """Score every position of a frame against every set (the paper's soft matching layer).

    Returns:
        (sets, H, W) mean of the min(k, size) largest cosine similarities, in [-1, 1]; -1 for an
        empty set. Differentiable in the features of query and reference.
    """
    if torch.is_grad_enabled() and query.features.requires_grad:
        return _differentiable(query, reference, top_k(query, reference, k))
    scores = torch.full((len(reference.sizes), *query.shape), LOWEST_COSINE,
                        device=query.features.device)
    for positions, found in _search(query, reference, k):
        for score, (values, _) in zip(scores.flatten(1), found):
            if values.shape[1]:
                score[positions] = values.mean(1)
    return scores


def _differentiable(query: Grid, reference: Reference, found) -> torch.Tensor:
    """The mean of similarities is the similarity to the mean of the features that were found."""
    features, others = query.enlarged(), torch.cat([g.enlarged() for g in reference.grids])
    scores = [(features * F.embedding_bag(positions, others, mode="mean")).sum(1)
              if positions.shape[1] else features.new_full((len(features),), LOWEST_COSINE)
              for _, positions in found]
    return torch.stack(scores).view(-1, *query.shape)


def top_k(query: Grid, reference: Reference, k: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The K best members of each set for every position of a frame.

    Returns:
        For each set (H*W, K) cosine similarities, in no order, and (H*W, K) positions in the
        reference frames, counted through them; K = min(k, size).
    """
    count, device = query.shape[0] * query.shape[1], query.features.device
    best = [(torch.empty(count, min(k, size), device=device),
             torch.empty(count, min(k, size), dtype=torch.long, device=device))
            for size in reference.sizes]
    for positions, found in _search(query, reference, k):
        for whole, part in zip(best, found):
            for tensor, values in zip(whole, part):
                tensor[positions] = values
    return best


@torch.no_grad()
def _search(query: Grid, reference: Reference, k: int) -> Iterator[tuple[torch.Tensor, list]]:
    """Some positions of the query, and for each set their K best: (n, K) and (n, K); and so on."""
    yield from (_search_small if reference.is_small else _search_large)(query, reference, k)


def _largest(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, m) -> the k largest of each row, in no order, and their columns: (n, k) each.

    However columns are grouped, the k groups with the largest maxima hold the k largest values.
    Here every (m // size)-th column is of one group.
    """
    columns = values.shape[1]
    size = math.isqrt(columns // k) if k else 0
    if size < 3:
        return values.topk(k, dim=1, sorted=False)
    groups = columns // size
    best = values[:, :groups * size].unflatten(1, (size, groups)).amax(1).topk(
        k, dim=1, sorted=False).indices  # (n, k)
    step = torch.arange(0, groups * size, groups, device=values.device)
    places = (best[:, None] + step[:, None]).flatten(1)  # (n, size * k)
    if columns % size:
        rest = torch.arange(groups * size, columns, device=values.device)
        places = torch.cat([places, rest.expand(len(places), -1)], dim=1)
    found, where = values.gather(1, places).topk(k, dim=1, sorted=False)
    return found, places.gather(1, where)


def _search_large(query: Grid, reference: Reference, k: int):
    """The K best by products of enlarged features."""
    features, found = query.enlarged(), []
    for others, members in zip(reference.features.split(reference.sizes), reference.members):
        values, rows = _products(features, others, min(k, len(others)))
        found.append((values, members[rows]))
    yield torch.arange(len(features), device=features.device), found


def _products(query: torch.Tensor, reference: torch.Tensor, k: int):
    """(n, C) and (m, C) -> the k largest products of each query row, and the rows: (n, k) each."""
    parts, start, rows = [], 0, max(1, CHUNK // max(1, len(reference)))
    while start < len(query):
        try:
            parts.append(_largest((query[start:start + rows] @ reference.T).float(), k))
            start += rows
        except torch.cuda.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
            _say_once("the device's memory is short: matching goes on in smaller parts")
    return tuple(torch.cat(tensors) for tensors in zip(*parts))


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)


def _search_small(query: Grid, reference: Reference, k: int):
    """The same from products of small features, a strip of columns after the other."""
    corners, weights = query.corners()
    weights = weights / query.norms()[:, None]
    corners, weights = (x.unflatten(0, query.shape) for x in (corners, weights))  # (H, W, 4)
    members, w = sum(reference.blocks) * BLOCK, query.features.shape[2]
    strips = -(-w * members // CHUNK)
    left = corners[0, :, 0] % w
    for columns in _runs(left // -(-w // max(1, strips))):
        positions = torch.arange(weights[..., 0].numel()).view(query.shape)[:, columns]
        yield from _search_strip(query.features, corners[:, columns], weights[:, columns],
                                 positions, reference, k)


def _search_strip(features: torch.Tensor, corners: torch.Tensor, weights: torch.Tensor,
                  positions: torch.Tensor, reference: Reference, k: int):
    """Positions (H, n) of a strip between cells (H, n, 4), those of a row of cells at a time."""
    w = features.shape[2]
    first, last = int(corners[0, 0, 0]) % w, int(corners[0, -1, 1]) % w
    cells = features[..., first:last + 1].permute(1, 2, 0)  # (h, c, C)
    wide, blocks = cells.shape[1], sum(reference.blocks)
    # buffers, since a sparse product that makes its own result fills and copies it first
    group = max(1, PRODUCT // wide)
    similarity = torch.full((len(reference.cells) + 1, group * wide), NOTHING)
    column = torch.zeros(blocks * BLOCK, wide)
    half = torch.zeros(2, wide, blocks * BLOCK)  # E, for an even and an odd row of cells
    maxima = torch.zeros(2, wide, blocks)
    known = -1
    for rows in _runs(corners[:, 0, 0]):
        lower = int(corners[rows, 0, 2][0]) // w
        for i in range(max(known + 1, lower - 1), lower + 1):
            if i % group == 0:
                some = cells[i:i + group].flatten(0, 1)
                product = similarity[:-1, :len(some)]
                if some.dtype == product.dtype:
                    torch.mm(reference.cells, some.T, out=product)
                else:
                    product.copy_(reference.cells @ some.T)
            row = similarity[:, i % group * wide:][:, :wide]
            column.addmm_(reference.enlarge, row, beta=0)
            # five times as fast as torch's copy
            cv2.transpose(column.numpy(), half[i % 2].numpy())
            torch.amax(half[i % 2].unflatten(1, (blocks, BLOCK)), dim=2, out=maxima[i % 2])
        known = lower
        cell = corners[rows].flatten(0, 1)  # (n, 4)
        cell = cell // w % 2 * wide + cell % w - first  # among the 2 * c cells of E
        count = max(1, CHUNK // (8 * max(1, blocks)))
        for part in zip(positions[rows].flatten().split(count), cell.split(count),
                        weights[rows].flatten(0, 1).split(count)):
            yield part[0], _search_row(*part[1:], half.flatten(0, 1), maxima.flatten(0, 1),
                                       reference, k)


def _runs(keys: torch.Tensor) -> list[slice]:
    """Where equal keys follow each other."""
    ends = keys.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def _search_row(cells: torch.Tensor, weights: torch.Tensor, half: torch.Tensor,
                maxima: torch.Tensor, reference: Reference, k: int) -> list:
    """The K best of each set for positions between (n, 4) rows of E, with weights (n, 4)."""
    bounds = _sparse(cells, weights, len(maxima)) @ maxima  # (n, blocks)
    blocks = half.view(-1, BLOCK)  # those of the first cell, of the second, ...
    starts = cells * maxima.shape[1]  # (n, 4)
    found = []
    for bound, size, members in zip(bounds.split(reference.blocks, dim=1), reference.sizes,
                                    reference.members):
        values, places = _search_blocks(bound, blocks, starts, weights, min(k, size))
        found.append((values, members[places]))
        starts = starts + bound.shape[1]
    return found


def _search_blocks(bound: torch.Tensor, blocks: torch.Tensor, starts: torch.Tensor,
                   weights: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best members of a set, looking into more blocks where the first ones don't settle it.

    Args:
        bound: (n, m) an upper bound of the similarities in each block of the set.
        blocks: (b, BLOCK) of E.
        starts: (n, 4) the set's first block at each of the four corners of a position.
        weights: (n, 4) of the corners.

    Returns:
        (n, k) similarities and (n, k) members, counted from the set's first.
    """
    values = bound.new_empty(len(bound), k)
    members = starts.new_empty(len(bound), k)
    open_, count, everything = torch.arange(len(bound)), FIRST_BLOCKS + k // 2, bound.shape[1]
    while len(open_):
        count = min(count, everything)
        unsettled = []
        for part in open_.split(max(1, CHUNK // max(1, 8 * count * BLOCK))):
            best, chosen = _largest(bound[part], count)  # (n, count)
            rows = starts[part][..., None] + chosen[:, None]  # (n, 4, count)
            corners = blocks.index_select(0, rows.flatten()).view(len(part), 4, count * BLOCK)
            similarity = torch.bmm(weights[part][:, None], corners)[:, 0]
            values[part], where = _largest(similarity, k)
            members[part] = chosen.gather(1, where // BLOCK) * BLOCK + where % BLOCK
            if count < everything:
                unsettled.append(part[values[part].amin(1) < best.amin(1)])
        open_ = torch.cat(unsettled) if unsettled else open_[:0]
        count *= 4
    return values, members
