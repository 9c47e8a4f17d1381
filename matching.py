"""Soft matching: the mean of the K best cosine similarities to a set of features."""

import torch
import torch.nn.functional as F

CHUNK_ELEMENTS = 1 << 23  # similarities held at a time: 32 MB in float32

LOWEST_COSINE = -1.0  # the score of an empty set


def soft_match(query: torch.Tensor, sets: list[torch.Tensor], k: int) -> torch.Tensor:
    """Score every query feature against every set (the paper's soft matching layer).

    Args:
        query: (Q, C) features of the new frame.
        sets: N+1 tensors (R_i, C), the reference features of background and of each object.
        k: how many of the best similarities are averaged; min(k, R_i) where a set is smaller.

    Returns:
        (N+1, Q) mean of the k largest cosine similarities, in [-1, 1]; -1 for an empty set.

    Exact and differentiable. The query is taken in chunks, so the (Q, R) matrix never exists
    as a whole outside of training, where autograd keeps the chunks.
    """
    sizes = [len(s) for s in sets]
    reference = F.normalize(torch.cat(sets), dim=1)  # (R, C)
    query = F.normalize(query, dim=1)
    rows = max(1, CHUNK_ELEMENTS // max(1, len(reference)))
    return torch.cat([_score_chunk(chunk @ reference.T, sizes, k) for chunk in query.split(rows)],
                     dim=1)


def _score_chunk(similarity: torch.Tensor, sizes: list[int], k: int) -> torch.Tensor:
    """(q, R) similarities, with columns grouped by set -> (N+1, q) scores."""
    return torch.stack([
        columns.topk(min(k, size), dim=1, sorted=False).values.mean(dim=1) if size
        else similarity.new_full((len(similarity),), LOWEST_COSINE)
        for columns, size in zip(similarity.split(sizes, dim=1), sizes)])
