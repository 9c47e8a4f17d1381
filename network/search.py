"""Which cells of other frames resemble those of a frame most: everywhere, or near each.

Keys are vectors of few channels, so products are small and choosing among them takes as long. It
knows neither what a cell means nor what is done with what was found.
"""

import functools

import torch
import torch.nn.functional as F

from network.tiles import GROUP, TILE, group_size, windows_of_tiles

ROWS = 256  # of one product, so that it stays in a CPU's cache


def nearest(query: torch.Tensor, keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all keys the most similar ones.

    Of many keys, and where no gradient is wanted, every (m // size)-th is of one group, of whose
    members only the best counts: cells beside each other, which are much alike, are in different
    groups. What is found then are the K best of the groups' best.

    Args:
        query: (n, C) unit vectors.
        keys: (m, C) unit vectors, of the same precision.

    Returns:
        (n, K) similarities in float32, in no order, and (n, K) rows of `keys`; K = min(k, m).
    """
    k = min(k, len(keys))
    size = group_size(len(keys), k)
    if size < 2 or torch.is_grad_enabled():
        return (query @ keys.T).float().topk(k, dim=1, sorted=False)
    groups = len(keys) // size
    member = torch.arange(size, dtype=torch.int32, device=query.device)[:, None]
    # buffers, since fresh memory has to be mapped first
    whole = torch.empty(ROWS, len(keys), device=query.device)
    narrow = torch.empty_like(whole, dtype=query.dtype)
    found = []
    for rows in query.split(ROWS):
        similarity = whole[:len(rows)]
        similarity.copy_(torch.mm(rows, keys.T, out=narrow[:len(rows)]))
        # positive floats are in the order of their bits, the last of which can name the member
        bits = similarity.add_(2).view(torch.int32)[:, :groups * size]
        bits = bits.unflatten(1, (size, groups)).bitwise_and_(-GROUP).bitwise_or_(member)
        best, group = bits.amax(1).view(torch.float32).topk(k, dim=1, sorted=False)
        found.append((best - 2, (best.view(torch.int32) & GROUP - 1) * groups + group))
    values, columns = (torch.cat(parts) for parts in zip(*found))
    return values, columns


def windows(query: torch.Tensor, others: list[torch.Tensor], k: int,
            radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K most similar cells of other frames within a square window around each cell of a frame.

    Args:
        query: (h, w, C) unit vectors.
        others: T frames, (h, w, C) each.
        radius: of the window, in cells; 0 is the same place.

    Returns:
        (h*w, K) similarities in float32, in no order, and (h*w, K) cells, counted through the T
        frames; K = min(k, cells in the window of a corner).
    """
    (h, w), (high, wide) = query.shape[:2], TILE
    k = min(k, len(others) * min(radius + 1, h) * min(radius + 1, w))
    rows, columns = -(-h // high), -(-w // wide)  # of tiles
    below, right = rows * high - h, columns * wide - w
    tiles = F.pad(query, (0, 0, 0, right, 0, below)).view(rows, high, columns, wide, -1)
    tiles = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (tiles, cells, C)
    around = [F.pad(other, (0, 0, radius, radius + right, radius, radius + below))
              .unfold(0, high + 2 * radius, high).unfold(1, wide + 2 * radius, wide)
              for other in others]  # (rows, columns, C, high + 2 * radius, wide + 2 * radius)
    around = torch.stack(around, 2).flatten(4).transpose(3, 4).flatten(2, 3).flatten(0, 1)
    near, cells = _windows(h, w, radius, len(others), query.device)
    similarity = (tiles @ around.transpose(1, 2)).float() + near
    values, where = similarity.flatten(0, 1).topk(k, dim=1, sorted=False)
    found = cells.repeat_interleave(high * wide, 0).gather(1, where)
    values, found = (x.view(rows, columns, high, wide, k).transpose(1, 2)
                     .reshape(rows * high, columns * wide, k)[:h, :w].reshape(h * w, k)
                     for x in (values, found))
    return values, found


@functools.lru_cache(8)
def _windows(h: int, w: int, radius: int, frames: int,
             device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """As `windows_of_tiles`, on a device."""
    mask, cells = windows_of_tiles(h, w, radius, frames)
    return torch.from_numpy(mask).to(device), torch.from_numpy(cells).to(device)
