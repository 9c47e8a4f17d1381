"""How a frame's cells are shared out among products: groups of keys, and tiles of windows.

Numbers only, as arrays of numpy: it knows no vector that is compared.
"""

import functools

import numpy as np

GROUP = 16  # columns of which only the best is looked at further; a power of 2
TILE = (4, 8)  # cells whose windows are looked into by one product
NOTHING = -1e4  # added to the similarity of what isn't there


def group_size(keys: int, k: int) -> int:
    """How many of so many keys make a group where K are looked for; below 2: there are none."""
    return min(GROUP, keys // (4 * k)) if k else 0


@functools.lru_cache(8)
def tiles(h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """(tiles, cells of a tile) which cells (h, w), the last ones again where a tile juts out.

    Also (h*w,) where each cell is in that.
    """
    (high, wide) = TILE
    rows, columns = -(-h // high), -(-w // wide)
    y, x = np.divmod(np.arange(rows * high * columns * wide).reshape(rows * high, columns * wide),
                     columns * wide)
    cells = np.minimum(y, h - 1) * w + np.minimum(x, w - 1)
    place = np.arange(cells.size).reshape(rows, columns, high, wide).swapaxes(1, 2)
    cells = cells.reshape(rows, high, columns, wide).swapaxes(1, 2).reshape(-1, high * wide)
    return cells, place.reshape(rows * high, columns * wide)[:h, :w].reshape(-1)


@functools.lru_cache(8)
def windows_of_tiles(h: int, w: int, radius: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """(tiles, cells of a tile, m) 0 within a window, else NOTHING, and (tiles, m) which cells.

    m are those that lie in the windows of a tile, frame by frame.
    """
    (high, wide), side = TILE, 2 * radius
    y, x = (np.arange(-(-n // step))[:, None] * step + np.arange(step + side) - radius
            for n, step in ((h, high), (w, wide)))  # (rows, high + side), (columns, wide + side)
    y, x = np.broadcast_arrays(y[:, None, :, None], x[None, :, None])
    tiles, each = y.shape[0] * y.shape[1], y.shape[2] * y.shape[3]
    exists = ((y >= 0) & (y < h) & (x >= 0) & (x < w)).reshape(tiles, 1, each)
    cells = (y * w + x).clip(0, h * w - 1).reshape(tiles, each)
    down, along = (abs(np.arange(step + side) - np.arange(step)[:, None] - radius) <= radius
                   for step in TILE)
    near = (down[:, None, :, None] & along[None, :, None]).reshape(high * wide, each)
    mask = np.tile(np.where(near & exists, np.float32(0), np.float32(NOTHING)), (1, 1, frames))
    return mask, np.concatenate([cells + i * h * w for i in range(frames)], 1)
