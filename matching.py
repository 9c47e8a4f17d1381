"""Soft matching: the mean of the K best cosine similarities to sets of features, exactly.

Features lie on a small grid and are compared on an enlarged one. Bilinear enlargement is linear,
so the similarities of enlarged features are the enlarged similarities of small ones, divided by
the norms of the enlarged features: with U the (sparse) matrix that enlarges and normalises,
similarity = U_query (query @ reference.T) U_reference.T.

Only the right half of that product, E = (query @ reference.T) U_reference.T, is computed as a
whole, a row of query cells at a time. The members of a set come in blocks, tiles of the enlarged
grid. No weight in U_query is negative, so U_query applied to the blocks' maxima in E bounds every
similarity in a block from above. The blocks with the best bounds are looked into; where the K-th
best found there is no less than the next bound, nothing better is left, and where it is less, four
times as many are looked into.
"""

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

CHUNK = 1 << 22  # similarities held at a time: 16 MB in float32, about a CPU's cache
TILE = (4, 8)  # positions of the enlarged grid that make a block
BLOCK = TILE[0] * TILE[1]
FIRST_BLOCKS = 8  # looked into first, and one more for every two of K
NOTHING = -1e20  # the similarity of padding
LOWEST_COSINE = -1.0  # the score of an empty set
TINY = 1e-12


class Grid:
    """The features of a frame, seen on an enlarged grid.

    Args:
        features: (C, h, w) as the encoder gives them.
        factor: bilinear enlargement, > 0; the grid has `shape` (H, W), about (h, w) * factor.
    """

    def __init__(self, features: torch.Tensor, factor: float = 1.0):
        self.features = features
        self.shape = tuple(max(1, round(side * factor)) for side in features.shape[1:])
        # a GPU multiplies faster than it gathers, and MPS has no sparse matrices
        self.is_small = features.device.type == "cpu" and factor > 1

    def enlarged(self) -> torch.Tensor:
        """(H*W, C) enlarged unit features. Differentiable."""
        return F.normalize(self._enlarge(self.features).flatten(1).T, dim=1)

    def _enlarge(self, features: torch.Tensor) -> torch.Tensor:
        if features.shape[1:] == self.shape:
            return features
        return F.interpolate(features.contiguous()[None], size=self.shape, mode="bilinear",
                             align_corners=False)[0]

    def norms(self) -> torch.Tensor:
        """(H*W,) norms of the enlarged features, from a few channels at a time."""
        squares = sum(self._enlarge(part).square().sum(0) for part in self.features.split(64))
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
        grids: the frames, of one feature size and factor.
        labels: (T, H, W) integers, the set of each position: 0, 1, ...; -1 is in none.
        sets: how many sets there are.
    """

    def __init__(self, grids: list[Grid], labels: torch.Tensor, sets: int):
        self.grids, self.is_small = grids, grids[0].is_small
        order, labels = _by_tiles(labels), labels.flatten()
        # of each set, the positions counted through the frames
        self.members = [order[labels[order] == i] for i in range(sets)]
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
        corners, weights = self.grids[0].corners()
        step = len(self.cells) // len(self.grids)
        corners = torch.cat([corners + i * step for i in range(len(self.grids))])
        weights = torch.cat([weights / g.norms()[:, None] for g in self.grids])
        corners, weights = corners[order], weights[order]
        corners[order < 0] = len(self.cells)
        weights[order < 0] = 0.25
        self.enlarge = _sparse(corners, weights, len(self.cells) + 1)  # (R, T*h*w + 1)


def _by_tiles(labels: torch.Tensor) -> torch.Tensor:
    """(T, H, W) -> (T*H*W,) positions, those of a tile of the grid after each other."""
    frames, height, width = (torch.arange(n, device=labels.device) for n in labels.shape)
    tile = (frames[:, None, None] * len(height) + height[:, None] // TILE[0]) * len(width) \
        + width // TILE[1]
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
    found = top_k(query, reference, k)
    if torch.is_grad_enabled() and query.features.requires_grad:
        scores = _differentiable(query, reference, found)
    else:
        scores = [values.mean(1) if values.shape[1] else values.new_full((len(values),),
                  LOWEST_COSINE) for values, _ in found]
    return torch.stack(scores).view(-1, *query.shape)


def _differentiable(query: Grid, reference: Reference, found) -> list[torch.Tensor]:
    """The mean of similarities is the similarity to the mean of the features that were found."""
    features, others = query.enlarged(), torch.cat([g.enlarged() for g in reference.grids])
    return [(features * F.embedding_bag(positions, others, mode="mean")).sum(1)
            if positions.shape[1] else features.new_full((len(features),), LOWEST_COSINE)
            for _, positions in found]


@torch.no_grad()
def top_k(query: Grid, reference: Reference, k: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The K best members of each set for every position of a frame.

    Returns:
        For each set (H*W, K) cosine similarities, in no order, and (H*W, K) positions in the
        reference frames, counted through them; K = min(k, size).
    """
    search = _search_small if reference.is_small else _search_large
    parts = list(search(query, reference, k))  # of consecutive positions, for each set
    return [tuple(torch.cat(tensors) for tensors in zip(*of_set)) for of_set in zip(*parts)]


def _block_top_k(similarity: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, R) -> the k largest of each row and their columns, (q, k) each.

    The k blocks with the largest maxima hold the k largest elements.
    """
    columns = similarity.shape[1]
    if columns <= 2 * k * BLOCK:
        return similarity.topk(k, dim=1, sorted=False)
    rest = columns % BLOCK
    blocks = similarity[:, :columns - rest].unflatten(1, (-1, BLOCK))  # (q, R // BLOCK, BLOCK)
    best = blocks.amax(2).topk(k, dim=1, sorted=False).indices[..., None]  # (q, k, 1)
    candidates = blocks.gather(1, best.expand(-1, -1, BLOCK)).flatten(1)
    places = (best * BLOCK + torch.arange(BLOCK, device=best.device)).flatten(1)
    if rest:
        candidates = torch.cat([candidates, similarity[:, columns - rest:]], dim=1)
        tail = torch.arange(columns - rest, columns, device=best.device)
        places = torch.cat([places, tail.expand(len(places), -1)], dim=1)
    values, where = candidates.topk(k, dim=1, sorted=False)
    return values, places.gather(1, where)


def _search_large(query: Grid, reference: Reference, k: int) -> Iterator[list]:
    """The K best by products of enlarged features."""
    rows = max(1, CHUNK // max(1, len(reference.features)))
    for part in query.enlarged().split(rows):
        similarity = (part @ reference.features.T).split(reference.sizes, dim=1)
        found = [_block_top_k(s, min(k, s.shape[1])) for s in similarity]
        yield [(values, members[columns])
               for (values, columns), members in zip(found, reference.members)]


def _search_small(query: Grid, reference: Reference, k: int) -> Iterator[list]:
    """The same from products of small features, a row of the enlarged grid at a time."""
    w = query.features.shape[2]
    blocks = sum(reference.blocks)
    members = blocks * BLOCK
    corners, weights = query.corners()
    weights = weights / query.norms()[:, None]
    cells = query.features.permute(1, 2, 0)  # (h, w, C)
    # buffers, since a sparse product that makes its own result fills and copies it first
    similarity = torch.full((len(reference.cells) + 1, w), NOTHING)
    column = torch.zeros(members, w)
    half = torch.zeros(2, w, members)  # E, for an even and an odd row of cells
    maxima = torch.zeros(2, w, blocks)
    known = -1
    for row in torch.arange(len(corners)).split(query.shape[1]):
        last = int(corners[row, -1].max()) // w
        for i in range(max(known + 1, last - 1), last + 1):
            torch.mm(reference.cells, cells[i].T, out=similarity[:-1])
            column.addmm_(reference.enlarge, similarity, beta=0)
            half[i % 2] = column.T
            torch.amax(half[i % 2].unflatten(1, (blocks, BLOCK)), dim=2, out=maxima[i % 2])
        known = last
        columns = corners[row] // w % 2 * w + corners[row] % w  # (W, 4) among the 2 * w cells
        yield _search_row(columns, weights[row], half.flatten(0, 1), maxima.flatten(0, 1),
                          reference, k)


def _search_row(columns: torch.Tensor, weights: torch.Tensor, half: torch.Tensor,
                maxima: torch.Tensor, reference: Reference, k: int) -> list:
    """The K best of each set for a row of positions between (W, 4) columns of E."""
    bounds = _sparse(columns, weights, len(maxima)) @ maxima  # (W, blocks)
    blocks = half.view(-1, BLOCK)  # those of the first cell, of the second, ...
    starts = columns * maxima.shape[1]  # (W, 4)
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
        bound: (W, n) an upper bound of the similarities in each block of the set.
        blocks: (m, BLOCK) of E.
        starts: (W, 4) the set's first block at each of the four corners of a position.
        weights: (W, 4) of the corners.

    Returns:
        (W, k) similarities and (W, k) members, counted from the set's first.
    """
    values = bound.new_empty(len(bound), k)
    members = starts.new_empty(len(bound), k)
    open_, count, everything = torch.arange(len(bound)), FIRST_BLOCKS + k // 2, bound.shape[1]
    while len(open_):
        count = min(count, everything)
        unsettled = []
        for part in open_.split(max(1, CHUNK // max(1, 4 * count * BLOCK))):
            best = bound[part].topk(min(count + 1, everything), dim=1)
            chosen = best.indices[:, :count]  # (w, count)
            rows = starts[part][..., None] + chosen[:, None]  # (w, 4, count)
            corners = blocks.index_select(0, rows.flatten()).view(len(part), 4, count * BLOCK)
            similarity = torch.bmm(weights[part][:, None], corners)[:, 0]
            values[part], where = similarity.topk(k, dim=1)
            members[part] = chosen.gather(1, where // BLOCK) * BLOCK + where % BLOCK
            if count < everything:
                unsettled.append(part[values[part, -1] < best.values[:, -1]])
        open_ = torch.cat(unsettled) if unsettled else open_[:0]
        count *= 4
    return values, members
