"""Merge attention over parts of the keys into attention over all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_dsl.errors import BindingError


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`(out, lse)` over the union of the keys of the parts, which must not share a key.

    Each part is `(out [..., Q, DV], lse [..., Q])` of the same queries, as a call with `return_lse=True` gives it. With
    m the largest lse of a row,

        lse = m + log(sum_i exp(lse_i - m)),   out = sum_i exp(lse_i - lse) out_i

    A row that no part sees gives 0 and minus infinity, and no gradient. Sums run in the dtype of `lse`; `out` has the
    dtype of the first part's. Differentiable in everything, to any order. Raises BindingError if the parts do not fit.
    """
    if not parts:
        raise BindingError("merge needs at least one (out, lse)")
    for i, part in enumerate(parts):
        if not (isinstance(part, tuple | list) and len(part) == 2 and all(isinstance(x, Tensor) for x in part)):
            raise BindingError(f"merge: part {i} is {type(part).__name__}; expected (out, lse), two tensors")
        out, lse = part
        if out.shape != parts[0][0].shape or lse.shape != out.shape[:-1]:
            raise BindingError(
                f"merge: part {i} is out {list(out.shape)}, lse {list(lse.shape)}; "
                f"expected {list(parts[0][0].shape)} and {list(parts[0][0].shape[:-1])}"
            )
    lses = torch.stack([lse for _, lse in parts])
    peak = lses.detach().amax(0)
    base = torch.where(peak == -math.inf, 0.0, peak)
    weights = torch.exp(lses - base)
    total = weights.sum(0)
    seen = total > 0
    whole = torch.where(seen, total, 1.0)
    shares = (weights / whole).unsqueeze(-1)
    out = torch.stack([share * out.to(share.dtype) for share, (out, _) in zip(shares, parts, strict=True)]).sum(0)
    return out.to(parts[0][0].dtype), torch.where(seen, base + torch.log(whole), -math.inf)
