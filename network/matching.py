"""Soft matching: the exact mean of the K best cosine similarities to sets of features.

Features come on a small grid and are compared on an enlarged one. Bilinear enlargement is linear,
so the similarities of enlarged features are the enlarged similarities of small ones, divided by
the norms of the enlarged features: with U the (sparse) matrix that enlarges and normalises,
similarity = U_query (query @ reference.T) U_reference.T.

Only the right part of this product, E = (query @ reference.T) U_reference.T, is computed in full,
for one row of query locations (or a part of one) at a time, so that memory depends neither on the
factor nor on the size of the sets. The members of a set are stored in blocks, tiles of the enlarged
grid. No weight in U_query is negative, so U_query applied to the blocks' maxima in E is an upper
bound of every similarity in a block. Blocks are searched in the order of their bounds: once the
K-th best similarity found is no less than the smallest bound searched, no other block can contain a
better one; until then, four times as many blocks are searched. For measurements, also of attempts
that failed, see docs/log/2026-11-23-soft-matching-speed.md.
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
# torch warns once per process that the layout that this module uses is in beta
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

# Similarities held at a time, 9 MB in float32: they stay in a CPU's cache. Bounds memory, too: with
# larger chunks a GPU would need more
CHUNK = 9 << 18
# Query locations per product of small features: four rows at stride 8 and 480p. The product of one
# row takes 0.34 s instead of 0.25 s per frame; enlarging four at once leaves the cache
PRODUCT = 428
# Positions of the enlarged grid in a block. Neighbours in 2-D are more alike than runs of 32 in a
# row, so their bounds are tighter: 9.2 blocks to search instead of 14.8 (VGG, factor 1.8)
TILE = (4, 8)
BLOCK = TILE[0] * TILE[1]
# Blocks searched first, plus one for every two of K. Fewer is slower (0.88 to 0.80 s at 10 to 14
# blocks against 0.74 s at 18), as more positions need a second search
FIRST_BLOCKS = 8
NOTHING = -1e20  # the similarity of padding: below every cosine, but its multiples stay finite
LOWEST_COSINE = -1.0  # the score of an empty set: as unlike as can be
TINY = 1e-12  # least norm, against division by 0


class Grid:
    """A frame's features on a bilinearly enlarged grid, enlarged on demand.

    Args:
        features: (C, h, w) from the encoder. Products are computed in their precision: float32,
            bfloat16 or float16.
        factor: bilinear enlargement, > 0; the grid has `shape` (H, W), about (h, w) * factor.
    """

    def __init__(self, features: torch.Tensor, factor: float = 1.0):
        self.features, self.factor = features, factor
        self.shape = tuple(max(1, round(side * factor)) for side in features.shape[1:])
        # the search in small products is for CPUs only: a GPU multiplies faster than it gathers,
        # and MPS has no sparse matrices
        self.is_small = features.device.type == "cpu" and factor > 1

    def enlarged(self) -> torch.Tensor:
        """(H*W, C) enlarged and L2-normalised features. Differentiable."""
        large = self._enlarge(self.features.float()).flatten(1).T
        return F.normalize(large, dim=1).to(self.features.dtype)

    def _enlarge(self, features: torch.Tensor) -> torch.Tensor:
        if features.shape[1:] == self.shape:
            return features
        return F.interpolate(features.contiguous()[None], size=self.shape, mode="bilinear",
                             align_corners=False)[0]

    def norms(self) -> torch.Tensor:
        """(H*W,) norms of the enlarged features; four channels at a time, to save memory."""
        squares = sum(self._enlarge(part.float()).square().sum(0)
                      for part in self.features.split(4))
        return squares.flatten().sqrt_().clamp_(min=TINY)

    def corners(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(H*W, 4) locations between which each position lies, and their bilinear weights."""
        (h, w), (height, width) = self.features.shape[1:], self.shape
        (top, bottom, down), (left, right, along) = _axis(h, height), _axis(w, width)
        corners = [y[:, None] * w + x for y in (top, bottom) for x in (left, right)]
        weights = [y[:, None] * x for y in (1 - down, down) for x in (1 - along, along)]
        return torch.stack(corners, -1).flatten(0, 1), torch.stack(weights, -1).flatten(0, 1)


def _axis(small: int, large: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lower and upper neighbour of each enlarged position, and its distance from the lower one."""
    source = (torch.arange(large, dtype=torch.float64) + 0.5) * small / large - 0.5
    source = source.clamp(0, small - 1)
    lower = source.long().clamp(max=max(0, small - 2))
    return lower, (lower + 1).clamp(max=small - 1), (source - lower).float()


class Reference:
    """Sets of features from one or more reference frames, prepared for matching.

    Args:
        grids: T reference frames, all with the same factor.
        labels: T times (H, W) integers, the set of each position: 0 to `sets` - 1, -1 for none.
        sets: number of sets.
    """

    def __init__(self, grids: list[Grid], labels: Iterable[torch.Tensor], sets: int):
        self.grids, self.is_small = grids, grids[0].is_small
        tiles, start = [], 0
        for frame in labels:
            tiles.append(start + _by_tiles(frame))
            start += frame.numel()
        order, flat = torch.cat(tiles), torch.cat([frame.flatten() for frame in labels])
        # each set's positions, numbered through all frames
        self.members = [order[flat[order] == i] for i in range(sets)]
        self.sizes = [len(m) for m in self.members]
        with torch.no_grad():
            if self.is_small:
                self._gather_small()
            else:
                order = torch.cat(self.members)
                self.features = torch.cat([g.enlarged() for g in grids])[order]  # (R, C)

    def _gather_small(self) -> None:
        """Prepare products of small features: pad sets to whole blocks, build U_reference.

        Padding refers to an extra location, whose similarity to everything is NOTHING.
        """
        self.members = [F.pad(m, (0, -len(m) % BLOCK), value=-1) for m in self.members]
        self.blocks = [len(m) // BLOCK for m in self.members]
        order = torch.cat(self.members)  # (R,), -1 for padding
        self.locations = torch.cat([g.features.flatten(1).T for g in self.grids])  # (T*h*w, C)
        frames, start = [], 0
        for grid in self.grids:
            corners, weights = grid.corners()
            frames.append((corners + start, weights / grid.norms()[:, None]))
            start += grid.features[0].numel()
        corners, weights = (torch.cat(parts)[order] for parts in zip(*frames))
        corners[order < 0] = len(self.locations)
        weights[order < 0] = 0.25
        self.enlarge = _sparse(corners, weights, len(self.locations) + 1)  # (R, T*h*w + 1)


def _by_tiles(labels: torch.Tensor) -> torch.Tensor:
    """(H, W) -> (H*W,) positions ordered by tile."""
    height, width = (torch.arange(n, device=labels.device) for n in labels.shape)
    tile = height[:, None] // TILE[0] * len(width) + width // TILE[1]
    return tile.flatten().argsort(stable=True)


def _sparse(columns: torch.Tensor, values: torch.Tensor, width: int) -> torch.Tensor:
    """Sparse matrix (n, width) with four values in each row, at (n, 4) columns."""
    rows = torch.arange(0, columns.numel() + 1, columns.shape[1])
    return torch.sparse_csr_tensor(rows, columns.flatten(), values.flatten(),
                                   (len(columns), width), check_invariants=False)


def soft_match(query: Grid, reference: Reference, k: int) -> torch.Tensor:
    """Score every position of a frame against every set (the paper's soft matching layer).

    Args:
        k: number of best similarities that are averaged.

    Returns:
        (sets, H, W) mean of the min(k, size) largest cosine similarities, in [-1, 1]; -1 for an
        empty set. Differentiable in the features of query and reference.
    """
    if torch.is_grad_enabled() and query.features.requires_grad:
        return _differentiable(query, reference, top_k(query, reference, k))
    scores = torch.full((len(reference.sizes), *query.shape), LOWEST_COSINE,
                        device=query.features.device)
    for positions, matches in _search(query, reference, k):
        for score, (values, _) in zip(scores.flatten(1), matches):
            if values.shape[1]:
                score[positions] = values.mean(1)
    return scores


def _differentiable(query: Grid, reference: Reference, matches) -> torch.Tensor:
    """`soft_match` with gradients: a mean of similarities is the similarity to the mean feature."""
    features, others = query.enlarged(), torch.cat([g.enlarged() for g in reference.grids])
    scores = [(features * F.embedding_bag(positions, others, mode="mean")).sum(1)
              if positions.shape[1] else features.new_full((len(features),), LOWEST_COSINE)
              for _, positions in matches]
    return torch.stack(scores).view(-1, *query.shape)


def top_k(query: Grid, reference: Reference, k: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Find the K best members of each set for every position of a frame.

    Returns:
        For each set (H*W, K) cosine similarities, unordered, and (H*W, K) positions, numbered
        through all reference frames; K = min(k, size).
    """
    count, device = query.shape[0] * query.shape[1], query.features.device
    best = [(torch.empty(count, min(k, size), device=device),
             torch.empty(count, min(k, size), dtype=torch.long, device=device))
            for size in reference.sizes]
    for positions, matches in _search(query, reference, k):
        for whole, part in zip(best, matches):
            for tensor, values in zip(whole, part):
                tensor[positions] = values
    return best


@torch.no_grad()
def _search(query: Grid, reference: Reference, k: int) -> Iterator[tuple[torch.Tensor, list]]:
    """Yield positions of the query in parts, (n,), with each set's K best: (n, K) and (n, K)."""
    yield from (_search_small if reference.is_small else _search_large)(query, reference, k)


def _largest(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Faster `topk`: the k largest of each row of (n, m), unordered, and their columns.

    For any grouping of columns, the k groups with the largest maxima contain the k largest values.
    Here a group consists of every (m // size)-th column, so that maxima run over whole rows.
    """
    columns = values.shape[1]
    size = math.isqrt(columns // k) if k else 0
    if size < 3:  # too few columns per group to save anything
        return values.topk(k, dim=1, sorted=False)
    groups = columns // size
    best = values[:, :groups * size].unflatten(1, (size, groups)).amax(1).topk(
        k, dim=1, sorted=False).indices  # (n, k)
    step = torch.arange(0, groups * size, groups, device=values.device)
    places = (best[:, None] + step[:, None]).flatten(1)  # (n, size * k)
    if columns % size:
        rest = torch.arange(groups * size, columns, device=values.device)
        places = torch.cat([places, rest.expand(len(places), -1)], dim=1)
    largest, where = values.gather(1, places).topk(k, dim=1, sorted=False)
    return largest, places.gather(1, where)


def _search_large(query: Grid, reference: Reference, k: int):
    """`_search` by products of enlarged features, for GPUs, and for grids without enlargement."""
    features, matches = query.enlarged(), []
    for others, members in zip(reference.features.split(reference.sizes), reference.members):
        values, rows = _products(features, others, min(k, len(others)))
        matches.append((values, members[rows]))
    yield torch.arange(len(features), device=features.device), matches


def _products(query: torch.Tensor, reference: torch.Tensor, k: int):
    """(n, C), (m, C) -> each query row's k largest products and their reference rows, (n, k)."""
    parts, start, rows = [], 0, max(1, CHUNK // max(1, len(reference)))
    while start < len(query):
        try:
            parts.append(_largest((query[start:start + rows] @ reference.T).float(), k))
            start += rows
        except torch.cuda.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
            _warn_once("out of device memory: matching continues with smaller chunks")
    return tuple(torch.cat(tensors) for tensors in zip(*parts))


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _search_small(query: Grid, reference: Reference, k: int):
    """`_search` by products of small features, in strips of columns that limit the buffers."""
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
    """`_search` in a strip: positions (H, n) and the locations around them, corners (H, n, 4).

    One row of query locations at a time; E is kept for the two rows that positions lie between.
    """
    w = features.shape[2]
    first, last = int(corners[0, 0, 0]) % w, int(corners[0, -1, 1]) % w
    strip = features[..., first:last + 1].permute(1, 2, 0)  # (h, c, C)
    wide, blocks = strip.shape[1], sum(reference.blocks)
    # Preallocated: a sparse product that allocates its result fills it with 0 and copies it first
    group = max(1, PRODUCT // wide)
    similarity = torch.full((len(reference.locations) + 1, group * wide), NOTHING)
    column = torch.zeros(blocks * BLOCK, wide)
    half = torch.zeros(2, wide, blocks * BLOCK)  # E of an even and an odd row
    maxima = torch.zeros(2, wide, blocks)
    computed = -1  # the last row of E
    for rows in _runs(corners[:, 0, 0]):
        lower = int(corners[rows, 0, 2][0]) // w
        for i in range(max(computed + 1, lower - 1), lower + 1):
            if i % group == 0:
                some = strip[i:i + group].flatten(0, 1)
                product = similarity[:-1, :len(some)]
                if some.dtype == product.dtype:
                    torch.mm(reference.locations, some.T, out=product)
                else:
                    product.copy_(reference.locations @ some.T)
            row = similarity[:, i % group * wide:][:, :wide]
            column.addmm_(reference.enlarge, row, beta=0)
            # five times as fast as torch's copy (0.22 against 1.09 ms per row)
            cv2.transpose(column.numpy(), half[i % 2].numpy())
            torch.amax(half[i % 2].unflatten(1, (blocks, BLOCK)), dim=2, out=maxima[i % 2])
        computed = lower
        around = corners[rows].flatten(0, 1)  # (n, 4)
        around = around // w % 2 * wide + around % w - first  # rows of E
        count = max(1, CHUNK // (8 * max(1, blocks)))
        for part in zip(positions[rows].flatten().split(count), around.split(count),
                        weights[rows].flatten(0, 1).split(count)):
            yield part[0], _search_row(*part[1:], half.flatten(0, 1), maxima.flatten(0, 1),
                                       reference, k)


def _runs(keys: torch.Tensor) -> list[slice]:
    """Slices of consecutive equal keys."""
    ends = keys.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def _search_row(corners: torch.Tensor, weights: torch.Tensor, half: torch.Tensor,
                maxima: torch.Tensor, reference: Reference, k: int) -> list:
    """The K best of each set for positions between (n, 4) rows of E, with weights (n, 4)."""
    bounds = _sparse(corners, weights, len(maxima)) @ maxima  # (n, blocks)
    blocks = half.view(-1, BLOCK)  # row by row of E
    starts = corners * maxima.shape[1]  # (n, 4)
    matches = []
    for bound, size, members in zip(bounds.split(reference.blocks, dim=1), reference.sizes,
                                    reference.members):
        values, places = _search_blocks(bound, blocks, starts, weights, min(k, size))
        matches.append((values, members[places]))
        starts = starts + bound.shape[1]
    return matches


def _search_blocks(bound: torch.Tensor, blocks: torch.Tensor, starts: torch.Tensor,
                   weights: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best members of a set, searching more blocks where the first ones are not enough.

    Args:
        bound: (n, m) an upper bound of the similarities in each block of the set.
        blocks: (b, BLOCK) of E.
        starts: (n, 4) the set's first block at each of the four corners of a position.
        weights: (n, 4) of the corners.

    Returns:
        (n, k) similarities and (n, k) members, numbered within the set.
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
        count *= 4  # few positions get here: a smaller factor would only add rounds
    return values, members
