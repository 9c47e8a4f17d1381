"""Which locations of other frames resemble those of a frame most: everywhere, or near each.

Keys are vectors of few channels, so products are small and choosing among them takes as long.
"""

import functools

import torch

ROWS = 256  # of one product, so that it stays in a CPU's cache
PARTS = 8  # of the products in an exported graph, for the same reason
BITS = 32  # a power of 2; no group has more members
TILE = (4, 8)  # locations whose windows are looked into by one product
NOTHING = -1e4  # the similarity of what isn't there; its weight in a softmax is 0
LOWEST = -1.5  # below every cosine


def nearest(query: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor,
            k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The most similar keys of each of several sets.

    Of the members of a group only the most similar counts, so that K are chosen among few; where
    gradients are wanted, among all.

    Args:
        query: (n, C) unit vectors.
        keys: (F, S, E, G, C) unit vectors of the same precision: of F frames S sets, each of E
            members of G groups.
        valid: (F, S, E, G) 1, or 0 where there is no key.
        k: at most G.

    Returns:
        (n, S, K) similarities in float32, in no order, and (n, S, K) which of the F*S*E*G keys;
        `NOTHING` where a set has fewer.
    """
    if torch.onnx.is_in_onnx_export():
        best, rows = _in_a_graph(query, keys, valid, k)
    elif torch.is_grad_enabled() or valid.shape[2] == 1:
        best, rows = _exactly(query, keys, valid, k)
    else:
        best, rows = _by_groups(query, keys, valid, k)
    return torch.where(best > LOWEST, best, NOTHING), rows


def _exactly(query, keys, valid, k):
    frames, sets, members, groups = valid.shape
    similarity = (query @ keys.flatten(0, 3).T).float() + (valid.flatten() - 1) * -NOTHING
    similarity = similarity.unflatten(1, valid.shape).transpose(1, 2).flatten(2)
    best, column = similarity.topk(k, dim=2, sorted=False)  # column: (frame, member, group)
    size = members * groups
    which = torch.arange(sets, device=query.device)[:, None]
    return best, (column // size * sets + which) * size + column % size


def _by_groups(query, keys, valid, k):
    flat, columns = keys.flatten(0, 3), valid.numel()
    member = torch.arange(valid.shape[2], dtype=torch.int32, device=query.device)[:, None]
    # so that a cosine becomes a positive number, and what isn't valid a negative one
    shift = (4 * valid - 2).flatten()
    # buffers, since fresh memory has to be mapped first
    whole = torch.empty(ROWS, columns, device=query.device)
    narrow = torch.empty_like(whole, dtype=query.dtype)
    found = []
    for rows in query.split(ROWS):
        similarity = whole[:len(rows)]
        similarity.copy_(torch.mm(rows, flat.T, out=narrow[:len(rows)])).add_(shift)
        # positive floats are in the order of their bits, the last of which can name the member
        bits = similarity.view(torch.int32).unflatten(1, valid.shape)
        bits = bits.bitwise_and_(-BITS).bitwise_or_(member).amax(3)  # (n, F, S, G)
        best, column = bits.transpose(1, 2).flatten(2).view(torch.float32).topk(
            k, dim=2, sorted=False)
        found.append((best - 2, _row(column, best.view(torch.int32) & BITS - 1, valid)))
    return tuple(torch.cat(parts) for parts in zip(*found))


def _row(column, member, valid):
    """(n, S, K) which (frame, group) of a set, and which member of it -> which key."""
    _, sets, members, groups = valid.shape
    which = torch.arange(sets, device=column.device)[:, None]
    frame, group = torch.div(column, groups, rounding_mode="floor"), column % groups
    return ((frame * sets + which) * members + member) * groups + group


def _in_a_graph(query, keys, valid, k):
    """As `_by_groups`, of any shapes."""
    count, flat = query.shape[0], keys.flatten(0, 3).T
    missing = (valid.flatten() - 1) * -NOTHING
    rows = torch.arange((count + PARTS - 1) // PARTS * PARTS).clamp(max=count - 1)
    found = []
    for part in query[rows].reshape(PARTS, -1, query.shape[1]).unbind():
        similarity = (part @ flat + missing).reshape(-1, *valid.shape)
        best, member = similarity.max(3)
        best, member = (x.transpose(1, 2).flatten(2) for x in (best, member))
        best, column = best.topk(k, dim=2)
        found.append((best, _row(column, member.gather(2, column), valid)))
    return tuple(torch.cat(parts)[:count] for parts in zip(*found))


def windows(query: torch.Tensor, others: torch.Tensor, valid: torch.Tensor, k: int,
            radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K most similar locations of other frames within a square window around each location.

    Args:
        query: (h, w, C) unit vectors.
        others: (T, h, w, C).
        valid: (T,) 1, or 0 for a frame that isn't there.
        k: at most the locations of a window.
        radius: of the window, in locations; 0 is the same place.

    Returns:
        (h*w, K) similarities in float32, in no order, and (h*w, K) locations, counted through the
        T frames; `NOTHING` where there are fewer.
    """
    exporting = torch.onnx.is_in_onnx_export()
    layout = (_tiles.__wrapped__ if exporting else _tiles)(*query.shape[:2], radius,
                                                           others.shape[0], query.device)
    of_tile, place, cells, inside, exists = layout
    products = query.flatten(0, 1)[of_tile] @ others.flatten(0, 2)[cells].transpose(1, 2)
    missing = ((valid - 1) * -NOTHING).repeat_interleave(inside.shape[1])
    similarity = products.float() + inside.repeat(1, others.shape[0]) + (exists + missing)
    best, where = similarity.flatten(0, 1).topk(k, dim=1, sorted=False)
    rows = torch.div(place, TILE[0] * TILE[1], rounding_mode="floor")
    best, where = best[place], cells[rows].gather(1, where[place])
    return torch.where(best > LOWEST, best, NOTHING), where


@functools.lru_cache(8)
def _tiles(h: int, w: int, radius: int, frames: int, device: torch.device):
    """How windows are shared out among products: those of a tile's locations overlap.

    Returns:
        (tiles, locations of a tile) which locations, the last ones again where a tile juts out;
        (h*w,) where each location is in that; (tiles, T*m) the locations around a tile, frame by
        frame; (locations of a tile, m) 0 within a window, else `NOTHING`; (tiles, 1, T*m) 0 within
        the frame, else `NOTHING`.
    """
    (high, wide), side = TILE, 2 * radius
    down, along = (h + high - 1) // high, (w + wide - 1) // wide

    def count(n):
        return torch.arange(n, device=device)

    y = (count(down)[:, None] * high + count(high)).clamp(max=h - 1)
    x = (count(along)[:, None] * wide + count(wide)).clamp(max=w - 1)
    of_tile = (y[:, None, :, None] * w + x[None, :, None, :]).flatten(2).flatten(0, 1)
    y, x = count(h)[:, None], count(w)
    place = ((_div(y, high) * along + _div(x, wide)) * (high * wide)
             + y % high * wide + x % wide).flatten()
    y = count(down)[:, None] * high + count(high + side) - radius
    x = count(along)[:, None] * wide + count(wide + side) - radius
    exists = (((y >= 0) & (y < h))[:, None, :, None] & ((x >= 0) & (x < w))[None, :, None, :])
    exists = (exists.flatten(2).flatten(0, 1).float() - 1) * -NOTHING
    cells = y.clamp(0, h - 1)[:, None, :, None] * w + x.clamp(0, w - 1)[None, :, None, :]
    cells = cells.flatten(2).flatten(0, 1)  # (tiles, m)
    cells = (cells[:, None] + count(frames)[:, None] * (h * w)).flatten(1)
    rows, columns = ((count(n + side) - count(n)[:, None] - radius).abs() <= radius for n in TILE)
    inside = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
    return (of_tile, place, cells, (inside.float() - 1) * -NOTHING,
            exists.repeat(1, frames)[:, None])


def _div(x: torch.Tensor, by: int) -> torch.Tensor:
    return torch.div(x, by, rounding_mode="floor")
