"""Selection: which scores of every row are the lowest. In C on a CPU, else by NumPy's or torch's partition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wanda.kernels.native import level, native, pool

FEW = 32  # entries of a row up to which each is compared with all others


def lowest(scores: Tensor, counts: int | Sequence[int]) -> Tensor:
    """Mark the `counts` lowest entries (of every row, or of each its own) of scores [groups, n], float32.

    Equivalent to a stable ascending sort of each row (ties by position, earlier first), found by the value of that
    rank: a threshold instead of a sort. Returns bool [groups, n].
    """
    if _compiled(scores):
        return _marked(scores, counts, few=False)
    if not isinstance(counts, int):
        if min(counts, default=0) == max(counts, default=0):
            return lowest(scores, min(counts, default=0))
        marked = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        wanted = torch.tensor(counts, device=scores.device)
        for count in set(counts):
            marked[wanted == count] = lowest(scores[wanted == count], count)
        return marked
    groups, n = scores.shape
    if counts <= 0 or counts >= n or groups == 0:
        return torch.full((groups, n), counts > 0, dtype=torch.bool, device=scores.device)
    threshold = _ranked(scores, counts)
    marked = scores <= threshold
    if int(torch.count_nonzero(marked)) > groups * counts:  # ties at the threshold: the later ones stay
        below = scores < threshold
        ties = marked & ~below
        marked = below | (ties & (ties.cumsum(dim=1) <= counts - below.sum(dim=1, keepdim=True)))
    return marked


def lowest_of_few(scores: Tensor, count: int) -> Tensor:
    """`lowest` for rows of at most FEW entries, scores [groups, m]: every entry is compared with all others."""
    if _compiled(scores):
        return _marked(scores, count, few=True)
    groups, m = scores.shape
    columns = scores.T.contiguous()  # [m, groups]
    rank = torch.zeros(m, groups, dtype=torch.uint8, device=scores.device)
    for i in range(m - 1):
        earlier_is_lower = columns[i] <= columns[i + 1 :]  # [m - 1 - i, groups]
        rank[i + 1 :] += earlier_is_lower
        rank[i] += (m - 1 - i) - earlier_is_lower.sum(dim=0, dtype=torch.uint8)
    return (rank < count).T


def clear_lost(values: Tensor, mask: Tensor) -> Tensor:
    """Set to 0 in place what the mask [rows, n] does not keep (False); the others keep their bits. Returns values."""
    if values.device.type == mask.device.type == "cpu" and values.element_size() in (2, 4) and native() is not None:
        if values.stride(1) != 1 and values.stride(0) == 1:  # a matrix that lies transposed
            clear_lost(values.T, mask.T)
            return values
        if values.stride(1) == 1:
            kept, module = mask.contiguous(), native()
            assert module is not None
            places = (values.data_ptr(), values.stride(0), kept.data_ptr())
            module.clear_lost(values.element_size(), *values.shape, *places, torch.get_num_threads(), pool())
            return values
    return values.masked_fill_(~mask, 0)


def _compiled(scores: Tensor) -> bool:
    return scores.device.type == "cpu" and scores.dtype == torch.float32 and native() is not None


def _marked(scores: Tensor, counts: int | Sequence[int], few: bool) -> Tensor:
    module = native()
    assert module is not None
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    marked = torch.empty(scores.shape, dtype=torch.bool)
    wanted = torch.tensor([counts] if isinstance(counts, int) else counts, dtype=torch.int64)
    places = (scores.data_ptr(), scores.stride(0), wanted.data_ptr(), len(wanted) > 1, marked.data_ptr())
    module.mark_lowest(*scores.shape, *places, few, level(), torch.get_num_threads(), pool())
    return marked


def _ranked(scores: Tensor, rank: int) -> Tensor:
    """The value of rank `rank`, from 1, of every row of scores [groups, n]: [groups, 1]."""
    if scores.device.type != "cpu":
        return torch.kthvalue(scores, rank, dim=1, keepdim=True).values
    array = scores.detach().numpy()  # NumPy's partition is vectorised, torch's is not
    return torch.from_numpy(np.partition(array, rank - 1, axis=1)[:, rank - 1, None])
