"""Soft matching: the mean of the K best cosine similarities to sets of features, exactly.

Features lie on a small grid and are compared on an enlarged one. Bilinear enlargement is linear,
so the similarities of enlarged features are the enlarged similarities of small ones, divided by
the norms of the enlarged features: with U the (sparse) matrix that enlarges and normalises,
similarity = U_query (query @ reference.T) U_reference.T. The large matrix exists in chunks only.
"""

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

CHUNK = 1 << 22  # similarities held at a time: 16 MB in float32, about a CPU's cache
BLOCK = 32  # similarities of which only the largest is looked at first
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
        return F.interpolate(features[None], size=self.shape, mode="bilinear",
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
        labels = labels.flatten()
        members = [(labels == i).nonzero()[:, 0] for i in range(sets)]
        self.sizes = [len(m) for m in members]
        self.order = torch.cat(members)  # (R,) position of each member, counted through frames
        self.is_small = grids[0].is_small
        self.grids = grids
        with torch.no_grad():
            if self.is_small:
                self.cells = torch.cat([g.features.flatten(1).T for g in grids])  # (T*h*w, C)
                corners, weights = grids[0].corners()
                step = grids[0].features[0].numel()
                corners = torch.cat([corners + i * step for i in range(len(grids))])
                weights = torch.cat([weights / g.norms()[:, None] for g in grids])
                self.enlarge = _sparse(corners[self.order], weights[self.order], len(self.cells))
            else:
                self.features = torch.cat([g.enlarged() for g in grids])[self.order]  # (R, C)


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
    chunks = _small_chunks if reference.is_small else _chunks
    starts = [sum(reference.sizes[:i]) for i in range(len(reference.sizes))]
    found = [[] for _ in reference.sizes]
    for similarity in chunks(query, reference):  # (q, R)
        for i, (start, size) in enumerate(zip(starts, reference.sizes)):
            found[i].append(_block_top_k(similarity[:, start:start + size], min(k, size)))
    return [(torch.cat([values for values, _ in parts]),
             reference.order[torch.cat([columns for _, columns in parts]) + start])
            for start, parts in zip(starts, found)]


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


def _chunks(query: Grid, reference: Reference) -> Iterator[torch.Tensor]:
    """(q, R) similarities of consecutive positions of the frame, by products of large grids."""
    rows = max(1, CHUNK // max(1, len(reference.features)))
    for part in query.enlarged().split(rows):
        yield part @ reference.features.T


def _small_chunks(query: Grid, reference: Reference) -> Iterator[torch.Tensor]:
    """The same from the products of small grids, one row of the enlarged grid after the other."""
    channels, h, w = query.features.shape
    height, width = query.shape
    members = len(reference.order)
    corners, weights = query.corners()
    weights = weights / query.norms()[:, None]
    cells = query.features.permute(1, 2, 0)  # (h, w, C)
    step = min(width, max(1, CHUNK // max(1, members)))
    # buffers, since a sparse product that makes its own result fills and copies it first
    column = torch.zeros(members, w)  # a row of cells, enlarged on the reference's side
    rows = torch.zeros(2, w, members)  # an even and an odd row of cells, the same turned
    full = torch.zeros(step, members)
    known = -1
    for y in range(height):
        row = slice(y * width, (y + 1) * width)
        last = int(corners[row, -1].max()) // w
        for i in range(max(known + 1, last - 1), last + 1):
            column.addmm_(reference.enlarge, reference.cells @ cells[i].T, beta=0)
            rows[i % 2] = column.T
        known = last
        columns = corners[row] // w % 2 * w + corners[row] % w
        for part, weight in zip(columns.split(step), weights[row].split(step)):
            yield full[:len(part)].addmm_(_sparse(part, weight, 2 * w), rows.flatten(0, 1), beta=0)
