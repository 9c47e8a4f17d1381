"""Top-k search for the most similar keys: in all memory frames, or in a window of each.

Keys have few channels, so selecting the top-k takes about as long as the matrix product. Most of
the code here makes the selection cheaper.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

ROWS = 256  # query locations per matrix product, so that the product stays in a CPU's cache
# Matrix products per search in an exported graph, for the same reason. A graph has no loop over the
# queries, so their number is fixed instead of their size.
PARTS = 8
# Members a group can have, a power of 2 and at least `state.MEMBERS`. The member's index replaces
# the last bits of a similarity: 5 of the 23 bits of a float's mantissa, after which cosines are
# exact to 4e-6. Larger makes them less exact.
MAX_MEMBERS = 32
# Indices that fit into the last bits of a similarity: those of a bfloat16 product, stored as
# float32, are 16 zeros, so it stays exact. More keys than that carry their member's index instead.
INDICES = 1 << 16
# Parts in which rows of similarities are reduced to maxima before their partial sort, and the least
# number of columns per result for which that pays (2,304 rows of 640, k = 8, AMD Zen 4: 6.3 ms
# without, 3.0, 1.7 and 1.4 with 2, 4 and 8 parts; of 112, k = 16: 0.5 ms without, 1.6 with 4)
SORTED_PARTS, LONG = 4, 32
# Channels added to keys to mark empty rows. One would do, but matrix units of CPUs take channels in
# pairs, those of GPUs in eights.
PADDING = 8
# Locations (rows, columns) whose windows share one product. Larger tiles mean fewer products, but
# more similarities outside the windows, which are computed and discarded.
TILE = (4, 8)
NOTHING = -1e4  # similarity of an empty row: low enough that its softmax weight is 0
LOWEST = -1.5  # threshold between empty rows and cosines, which are >= -1 up to rounding


def nearest(query: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor,
            k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k most similar keys in each of S sets.

    Approximate, for speed: only the best member of each group is a candidate, so the top-k is taken
    among G instead of E*G keys per frame (measured on 13,824 keys, float32: 79 to 41 ms). Exact
    where gradients are enabled, and where groups have one member.

    Args:
        query: (n, C) unit vectors.
        keys: (F, S, E, G, C) unit vectors of the same precision: F frames with S sets each, of E
            members in each of G groups.
        valid: (F, S, E, G) 1, or 0 for an empty row.
        k: number of keys to return, at most G.

    Returns:
        (n, S, K) similarities, float32, unsorted, and (n, S, K) indices into the F*S*E*G keys.
        Where a set has fewer than k keys, the similarity is `NOTHING` and the index arbitrary.
    """
    if torch.onnx.is_in_onnx_export():
        best, rows = _for_export(query, keys, valid, k)
    elif torch.is_grad_enabled() or valid.shape[2] == 1:
        best, rows = _exact(query, keys, valid, k)
    else:
        best, rows = _by_groups(query, keys, valid, k)
    return torch.where(best > LOWEST, best, NOTHING), rows


def _exact(query, keys, valid, k):
    """Search all keys. Differentiable. Arguments and results as in `nearest`."""
    _, sets, members, groups = valid.shape
    similarity = (query @ keys.flatten(0, 3).T).float() + (valid.flatten() - 1) * -NOTHING
    similarity = similarity.unflatten(1, valid.shape).transpose(1, 2).flatten(2)
    best, column = similarity.topk(k, dim=2, sorted=False)  # column: (frame, member, group)
    size = members * groups
    set_index = torch.arange(sets, device=query.device)[:, None]
    return best, (column // size * sets + set_index) * size + column % size


def _by_groups(query, keys, valid, k):
    """Search the best member of each group. Not differentiable.

    Each similarity carries its key's index in its last bits (`_by_index`), or its member's index,
    so that a maximum or a partial sort of similarities yields both.
    """
    query, keys = _with_empty_rows(query, keys, valid)
    flat = keys.flatten(0, 3)
    by_index = _by_index(query, len(flat))
    members = torch.arange(valid.shape[2], dtype=torch.int32, device=query.device)[:, None]

    def column_of(row):
        _, sets, members, groups = valid.shape
        return _divided(row, sets * members * groups) * groups + row % groups

    # Reused for all parts: each new buffer of this size would cost a page fault per page.
    float32_buffer = torch.empty(ROWS, len(flat), device=query.device)
    product_buffer = torch.empty_like(float32_buffer, dtype=query.dtype)
    results = []
    for rows in query.split(ROWS):
        similarity = float32_buffer[:len(rows)]
        product = torch.mm(rows, flat.T, out=product_buffer[:len(rows)])
        if by_index:
            _write_indices(product, similarity)
        else:
            bits = similarity.copy_(product).view(torch.int32)
            if query.dtype == torch.float32:  # half precision leaves the last bits 0
                bits.bitwise_and_(-MAX_MEMBERS)
            bits.unflatten(1, valid.shape).bitwise_or_(members)
        best = similarity.unflatten(1, valid.shape).amax(3).transpose(1, 2).flatten(2)
        if by_index:
            results.append(_largest_by_index(best, k, column_of))
        else:
            best, column = best.topk(k, dim=2, sorted=False)
            results.append((best, _row(column, best.view(torch.int32) & MAX_MEMBERS - 1, valid)))
    return tuple(torch.cat(parts) for parts in zip(*results))


def _with_empty_rows(query: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor
                     ) -> tuple[torch.Tensor, torch.Tensor]:
    """Add channels to (..., C) queries and keys that make the similarity of empty rows `NOTHING`.

    They cost less than adding it to the similarities.

    Args:
        valid: 1, or 0 for an empty row; of the keys' shape without C.
    """
    empty = ((valid - 1) * (-NOTHING / PADDING))[..., None].expand(*valid.shape, PADDING)
    return F.pad(query, (0, PADDING), value=1), torch.cat([keys, empty.to(keys.dtype)], -1)


def _write_indices(values: torch.Tensor, out: torch.Tensor) -> None:
    """Convert (n, m) bfloat16 values to float32, with the column in the last 16 bits.

    (Interleaving the halves of the float32 in one pass, by `cv2.merge`, takes longer.)
    """
    columns = torch.arange(values.shape[1], dtype=torch.int32)
    out.copy_(values).view(torch.int32).bitwise_or_(columns)


def _by_index(values: torch.Tensor, count: int) -> bool:
    """Return whether an index below `count` fits into the last bits of similarities as float32.

    Those of bfloat16 products on a CPU have 16 bits to spare.
    """
    return (values.dtype == torch.bfloat16 and values.device.type == "cpu" and count <= INDICES
            and not torch.is_grad_enabled())


def _largest_by_index(values: torch.Tensor, k: int, column: Callable[[torch.Tensor], torch.Tensor]
                      ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest values of each row and their indices, (..., k) each, unsorted.

    The k largest of a long row are in the columns of the k largest maxima of `SORTED_PARTS` columns
    each, so only those are sorted.

    Args:
        values: (..., m) float32, with an index in the last bits (see `_separated`) that differs
            within a row.
        column: maps such indices to the values' columns.
    """
    count = values.shape[-1]
    if count % SORTED_PARTS == 0 and count >= LONG * k:
        groups = count // SORTED_PARTS
        maxima = _partitioned(values.unflatten(-1, (SORTED_PARTS, groups)).amax(-2), k)
        group = column(_separated(maxima)[1]) % groups
        first = groups * torch.arange(SORTED_PARTS)[:, None]
        values = values.gather(-1, (group[..., None, :] + first).flatten(-2))
    return _separated(_partitioned(values, k))


def _partitioned(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k largest values of the last dimension, unsorted.

    NumPy's partial sort is vectorised: 1.4 ms instead of 10 for 16 of 576 values at 2,304
    locations. Only without indices, though, which is why they are in the values' last bits.
    """
    array = values.numpy()
    return torch.from_numpy(np.partition(array, array.shape[-1] - k)[..., -k:])


def _separated(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split float32 values into bfloat16 values, as float32, and the int64 index in the rest."""
    bits = values.contiguous().view(torch.int32)
    return (bits & -INDICES).view(torch.float32), (bits & INDICES - 1).long()


def largest(values: torch.Tensor, k: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest of each row, as float32, and their columns, unsorted.

    Args:
        values: (n, m) similarities, float32 or as `like`. Those above `LOWEST` must be exact in the
            precision of `like`; of others the column may be any.
        like: a tensor of keys, whose precision and device decide how to search.
    """
    if not _by_index(like, values.shape[1]):
        return values.float().topk(k, dim=1, sorted=False)
    with_columns = torch.empty(values.shape)
    _write_indices(values.to(like.dtype), with_columns)
    return _largest_by_index(with_columns, k, lambda column: column)


def _row(column, member, valid):
    """Convert (n, S, K) indices of (frame, group), and of the member, to indices of keys."""
    _, sets, members, groups = valid.shape
    set_index = torch.arange(sets, device=column.device)[:, None]
    frame, group = _divided(column, groups), column % groups
    return ((frame * sets + set_index) * members + member) * groups + group


def _for_export(query, keys, valid, k):
    """Like `_by_groups`, but with operators that ONNX has, and for any shape at run time."""
    count, flat = query.shape[0], keys.flatten(0, 3).T
    missing = (valid.flatten() - 1) * -NOTHING
    # the last location is repeated, so that all parts have the same size
    rows = torch.arange((count + PARTS - 1) // PARTS * PARTS).clamp(max=count - 1)
    results = []
    for part in query[rows].reshape(PARTS, -1, query.shape[1]).unbind():
        similarity = (part @ flat + missing).reshape(-1, *valid.shape)
        best, member = similarity.max(3)
        best, member = (x.transpose(1, 2).flatten(2) for x in (best, member))
        best, column = best.topk(k, dim=2)
        results.append((best, _row(column, member.gather(2, column), valid)))
    return tuple(torch.cat(parts)[:count] for parts in zip(*results))


def windows(query: torch.Tensor, others: torch.Tensor, valid: torch.Tensor, k: int,
            radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k most similar locations in a window of other frames, for each location. Exact.

    Args:
        query: (h, w, C) unit vectors.
        others: (T, h, w, C) unit vectors of T frames of the same size.
        valid: (T,) 1, or 0 for an empty slot.
        k: number of locations to return, at most (2 * radius + 1)^2.
        radius: half the side of the square window, in locations, >= 0; 0 is a single location.

    Returns:
        (h*w, K) similarities, float32, unsorted, and (h*w, K) indices into the T*h*w locations.
        Where a window has fewer than k, the similarity is `NOTHING` and the index arbitrary.
    """
    # while exporting, sizes are symbolic and must not be cached
    tiles = _tiles.__wrapped__ if torch.onnx.is_in_onnx_export() else _tiles
    members, position, surroundings, start, excluded = tiles(
        *query.shape[:2], radius, others.shape[0], query.device, query.dtype)
    query, others = _with_empty_rows(query, others,
                                     valid[:, None, None].expand(others.shape[:3]))
    products = query.flatten(0, 1)[members] @ others.flatten(0, 2)[surroundings].transpose(1, 2)
    products += excluded
    best, column = largest(products.flatten(0, 1), k, query)
    best, location = best[position], surroundings.flatten()[start + column[position]]
    return torch.where(best > LOWEST, best, NOTHING), location


@functools.lru_cache(8)  # one entry per frame size; several, for clips of other sizes in turn
def _tiles(h: int, w: int, radius: int, frames: int, device: torch.device, dtype: torch.dtype):
    """Return the index tables of `windows`.

    The windows of neighbouring locations overlap, so each tile of t locations is multiplied with
    the m locations of its surroundings at once, and a mask selects each location's own window.

    Args:
        h, w: size of the feature map.
        radius: of a window, in locations.
        frames: T.
        device: of the tables.
        dtype: of the keys.

    Returns:
        (tiles, t) the locations of each tile, repeated where a tile extends beyond the frame;
        (h*w,) the position of each location in that table;
        (tiles, T*m) the surroundings of each tile, frame by frame;
        (h*w, 1) where the surroundings of each location's tile start in that table;
        (tiles, t, T*m) 0 inside a location's window and the frame, else `NOTHING` or less.
    """
    (high, wide), border = TILE, 2 * radius
    down, across = (h + high - 1) // high, (w + wide - 1) // wide  # numbers of tiles

    def arange(n):
        return torch.arange(n, device=device)

    y = (arange(down)[:, None] * high + arange(high)).clamp(max=h - 1)
    x = (arange(across)[:, None] * wide + arange(wide)).clamp(max=w - 1)
    members = (y[:, None, :, None] * w + x[None, :, None, :]).flatten(2).flatten(0, 1)
    y, x = arange(h)[:, None], arange(w)
    position = ((_divided(y, high) * across + _divided(x, wide)) * (high * wide)
                + y % high * wide + x % wide).flatten()
    y = arange(down)[:, None] * high + arange(high + border) - radius
    x = arange(across)[:, None] * wide + arange(wide + border) - radius
    in_frame = ((y >= 0) & (y < h))[:, None, :, None] & ((x >= 0) & (x < w))[None, :, None, :]
    in_frame = (in_frame.flatten(2).flatten(0, 1).float() - 1) * -NOTHING
    around = y.clamp(0, h - 1)[:, None, :, None] * w + x.clamp(0, w - 1)[None, :, None, :]
    around = around.flatten(2).flatten(0, 1)  # (tiles, m)
    surroundings = (around[:, None] + arange(frames)[:, None] * (h * w)).flatten(1)
    rows, columns = ((arange(n + border) - arange(n)[:, None] - radius).abs() <= radius
                     for n in TILE)
    in_window = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
    in_window = (in_window.float() - 1) * -NOTHING
    start = _divided(position, high * wide)[:, None] * surroundings.shape[1]
    return (members, position, surroundings, start,
            (in_window + in_frame[:, None]).repeat(1, 1, frames).to(dtype))


def _divided(x: torch.Tensor, by: int) -> torch.Tensor:
    """Divide integers, rounding down."""
    return torch.div(x, by, rounding_mode="floor")
