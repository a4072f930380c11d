"""Calls of the shipped variants that fill some tiles, and the error budget that kernels on a GPU must keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from portable_support import Result
from variant_cases import Case, Sizes

FEW = 64
LARGER = Sizes(B=2, H=4, HK=2, Q=333, KV=333, D=64, DV=64)
PARAMETERS: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 100},
    "prefix_lm": {"prefix": 70},
    "softcap": {"cap": 3.0},
    "t5_bias": {"reach": 40},
    "longformer": {"reach": 30, "globals": 10},
    "bigbird": {"block": 32, "reach": 1, "globals": 1, "random": 2},
    "sparse_strided": {"stride": 50},
    "sparse_fixed": {"stride": 64, "summary": 5},
    "dilated_window": {"window": 160, "dilation": 4},
    "natten1d": {"r": 20},
    "natten2d": {"width": 37, "height": 9, "r": 3},
    "natten3d": {"width": 37, "height": 3, "depth": 3, "r": 1},
    "shared_prefix": {"prefix": 90},
    "block_diffusion": {"length": 167, "block": 16},
    "gemma2_local": {"window": 120, "cap": 5.0},
    "gpt_oss": {"window": 64},
}

SEGMENTS = """attention segments()
tensor segment: int32[B, KV]
tensor bias: float32[H, Q]

score = score + bias[h, q]
mask = segment[b, q] == segment[b, k]
"""
"""A mask whose positions are sorted, in an order that all heads share."""


def larger(name: str, **sizes: int) -> Case:
    const = frozenset({"random"}) if name == "bigbird" else frozenset()
    return Case(name, PARAMETERS.get(name, {}), replace(LARGER, **sizes), const)


def within_budget(found: Result, truth: Result, eager: Result, factor: float, logits: float = 8.0) -> None:
    """The root mean square error is at most `factor` times that of the eager computation, everywhere.

    A weight of the softmax is known as well as float32 knows its logit: eps * |logit|. Where weights of size 1 cancel
    in a gradient (of a bias by query, say, whose row is all sink: dLSE + p * delta with p = 1 and delta = -dLSE), so
    much of what is summed is left, however small the sum. `logits` are the largest magnitude; upstream is of size 1.

    That of a few numbers is a matter of chance: the gradient of four slopes, or of a cap, has from a twentieth of the
    usual eager error to several times it, by the seed. It is held to three times, or to what the dtype rounds away.
    """
    named = {"out": (found.out, truth.out, eager.out)}
    named.update({name: (found.grads[name], truth.grads[name], eager.grads[name]) for name in truth.grads})
    rounding = torch.finfo(torch.float32).eps * logits
    for name, (a, b, c) in named.items():
        assert not a.isnan().any(), name
        ours, theirs = ((x.double() - b).square().mean().sqrt().item() for x in (a, c))
        largest = b.abs().max().item()
        allowed = factor * theirs + rounding * max(1.0, largest)
        if b.numel() < FEW:
            allowed = max(3 * theirs, torch.finfo(found.out.dtype).eps / 2 * largest) + rounding * max(1.0, largest)
        assert ours <= allowed, f"{name}: {ours:.3g}, eager {theirs:.3g}"
    error = torch.where(truth.lse.isinf(), 0.0, found.lse.double() - truth.lse).abs().max()
    assert error < 2e-2, f"lse: {error:.3g}"
