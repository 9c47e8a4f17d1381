"""The K largest dot products of query rows with reference rows, fused in one GPU kernel.

A program takes a block of query rows and walks over the reference in tiles. The similarities of a
tile and the K best so far stay in registers, so the similarity matrix is never in memory. While
the largest similarity of a tile beats the smallest of the K, in any row, it takes its place.

Triton comes with torch's CUDA builds. Without it, and for whatever else the kernel can't take,
`takes` is False.
"""

import functools
import warnings

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LARGEST_K = 32  # the K best of a block are held in registers
LARGEST = 1 << 24  # rows: offsets within a tile and row numbers are 32-bit in the kernel
# Query rows, reference rows and channels at a time. Not tuned: chosen from what the compiler says,
# that registers suffice on an H100 and that shared memory does on smaller GPUs too, with 99 KB.
BLOCKS = {torch.float32: (64, 64, 16), torch.bfloat16: (64, 128, 64), torch.float16: (64, 128, 64)}
WARPS, STAGES = 4, 3
PROGRAMS = 1024  # a few for every multiprocessor of a large GPU; fewer blocks of queries share ...
SLICE = 2048  # ... the reference out, in slices of at least so many rows

if triton is not None:
    @triton.jit(do_not_specialize=["queries", "members", "tiles", "k"])
    def _kernel(query, reference, values_out, rows_out, queries, members, channels, query_stride,
                reference_stride, tiles, k, SLOTS: tl.constexpr, BLOCK_Q: tl.constexpr,
                BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
        """One block of queries against one slice of the reference.

        query, reference: (channels, stride), padded with zeros to whole blocks.
        values_out, rows_out: (slices, queries, k); -inf and 0 where a slice has too few members.
        tiles: of BLOCK_R members in a slice.
        """
        here = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        columns = tl.arange(0, BLOCK_R)[None, :]
        slots = tl.arange(0, SLOTS)[None, :]
        chunk = tl.arange(0, BLOCK_C)
        query += here[:, None] + chunk[None, :] * query_stride
        reference += columns + chunk[:, None] * reference_stride
        query_stride = query_stride.to(tl.int64)
        reference_stride = reference_stride.to(tl.int64)
        # slots past k, of infinite similarity, are never the smallest
        values = tl.where(slots < k, float("-inf"), float("inf"))
        values = tl.broadcast_to(values, (BLOCK_Q, SLOTS))
        rows = tl.zeros((BLOCK_Q, SLOTS), tl.int32)
        smallest = tl.min(values, 1)
        first = tl.program_id(1) * tiles
        for i in range(first, tl.minimum(first + tiles, tl.cdiv(members, BLOCK_R))):
            start = i * BLOCK_R
            tile = tl.zeros((BLOCK_Q, BLOCK_R), tl.float32)
            for channel in range(0, channels, BLOCK_C):
                q = tl.load(query + channel * query_stride)
                r = tl.load(reference + (channel * reference_stride + start))
                tile = tl.dot(q, r, tile, input_precision="ieee")
            # whether the maximum of a number and NaN is NaN differs between devices
            tile = tl.where((start + columns < members) & (tile == tile), tile, float("-inf"))
            best = tl.max(tile, 1)
            while tl.max((best > smallest).to(tl.int32), 0) > 0:
                # of equal ones the first, or a row would lose more than it gains
                column = tl.min(tl.where(tile == best[:, None], columns, BLOCK_R), 1)
                slot = tl.min(tl.where(values == smallest[:, None], slots, SLOTS), 1)
                hit = (best > smallest)[:, None] & (slots == slot[:, None])
                values = tl.where(hit, best[:, None], values)
                rows = tl.where(hit, (start + column)[:, None], rows)
                smallest = tl.min(values, 1)
                tile = tl.where(columns == column[:, None], float("-inf"), tile)
                best = tl.max(tile, 1)
        out = (tl.program_id(1).to(tl.int64) * queries + here)[:, None] * k + slots
        kept = (here[:, None] < queries) & (slots < k)
        tl.store(values_out + out, values, mask=kept)
        tl.store(rows_out + out, rows.to(tl.int64), mask=kept)


def takes(query: torch.Tensor, reference: torch.Tensor, k: int) -> bool:
    """Whether `top_k` can take these; they may be any tensors and any k."""
    return (triton is not None and query.ndim == reference.ndim == 2
            and query.shape[1] == reference.shape[1] > 0
            and 1 <= k <= min(len(reference), LARGEST_K)
            and 0 < len(query) <= LARGEST and len(reference) <= LARGEST
            and query.dtype == reference.dtype and query.dtype in BLOCKS
            and query.device == reference.device and _works(query.device, query.dtype))


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel can be built here (Triton needs a C compiler) and is right on a few rows.

    Under Triton's interpreter (TRITON_INTERPRET=1 before it is imported) a CPU will do.
    """
    interpreted = not isinstance(_kernel, triton.JITFunction)
    if not interpreted and (device.type != "cuda"
                            or torch.cuda.get_device_capability(device) < (8, 0)):
        return False
    rows = F.normalize(torch.arange(2400.0).view(100, 24).square().sin(), dim=1).to(device, dtype)
    try:
        values, _ = top_k(rows, rows, 5)
        expected = (rows.double() @ rows.double().T).topk(5).values
        wrong = (values.sort(descending=True).values - expected).abs().max().item()
        if not wrong < 1e-5:
            raise ArithmeticError(f"its similarities are wrong by {wrong:.1g}")
    except Exception as error:  # a compiler's, a driver's, a wrong result's: all are a reason
        warnings.warn(f"no fused matching on {device}, but the slower one: {error}", stacklevel=3)
        return False
    return True


@torch.no_grad()
def top_k(query: torch.Tensor, reference: torch.Tensor, k: int) \
        -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest dot products of each query row with the rows of the reference.

    A copy of both is made, with the channels first. Products and sums are float32 with nothing
    rounded to TF32.

    Args:
        query, reference: (Q, C) and (R, C), in any memory layout.
        k: from 1 to R. What else is needed of the three, `takes` tells; here it isn't asked.

    Returns:
        (Q, k) float32 similarities, in no order, and (Q, k) int64 rows of the reference. NaN is
        left out: where fewer than k are numbers, -inf and row 0 make up for them.
    """
    block_q, block_r, block_c = BLOCKS[query.dtype]
    queries, members = len(query), len(reference)
    blocks, tiles = triton.cdiv(queries, block_q), triton.cdiv(members, block_r)
    slices = max(1, min(PROGRAMS // blocks, members // SLICE))
    query = _channels_first(query, block_q, block_c)
    reference = _channels_first(reference, block_r, block_c)
    values = query.new_empty(slices, queries, k, dtype=torch.float32)
    rows = query.new_empty(slices, queries, k, dtype=torch.int64)
    with torch.cuda.device_of(query):
        _kernel[blocks, slices](
            query, reference, values, rows, queries, members, len(query), query.shape[1],
            reference.shape[1], triton.cdiv(tiles, slices), k, SLOTS=triton.next_power_of_2(k),
            BLOCK_Q=block_q, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=WARPS, num_stages=STAGES)
    if slices == 1:
        return values[0], rows[0]
    values, places = values.transpose(0, 1).flatten(1).topk(k, dim=1, sorted=False)
    return values, rows.transpose(0, 1).flatten(1).gather(1, places)


def _channels_first(features: torch.Tensor, rows: int, channels: int) -> torch.Tensor:
    """(n, C) -> contiguous (C', n'), padded with zeros to multiples of `channels` and `rows`."""
    n, c = features.shape
    padded = features.new_zeros(c + -c % channels, n + -n % rows)
    padded[:c, :n] = features.T
    return padded
