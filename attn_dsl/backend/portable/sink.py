"""The gradient of a sink: what its expression over b and h hands on to captured tensors and parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_dsl.backend.cpu.functions import tile_functions
from attn_dsl.backend.portable.launch import Call, Kernels


def sink_gradients(
    kernels: Kernels, call: Call, lse: Tensor, delta: Tensor, wanted: frozenset[str]
) -> dict[str, Tensor]:
    """A sink with probability p takes -p * delta of each row; its partial derivatives, emitted for torch, carry it on.

    float32, by name, those of `wanted` that the sink reads. The host waits for nothing.
    """
    derivative = tile_functions(kernels.variant, torch.float32).sink_grad
    assert derivative is not None
    batch, heads = call.sizes[:2]
    device = call.query.device
    b, h = torch.arange(batch, device=device).view(-1, 1), torch.arange(heads, device=device).view(1, -1)
    scalars = (*call.parameters, *call.sizes)
    sink, _, *partials = derivative.function(b, h, scalars, call.tensors)
    share = torch.exp(torch.as_tensor(sink, device=device).expand(batch, heads).unsqueeze(-1) - lse)
    upstream = -torch.where(lse == -torch.inf, 0.0, share * delta).sum(-1)
    shapes = {t.name: x.shape for t, x in zip(kernels.variant.tensors, call.tensors, strict=True)}
    found: dict[str, Tensor] = {}
    indices = derivative.indices(b, h, None, None, scalars, call.tensors)
    for target, index, partial in zip(derivative.loads, indices, partials, strict=False):
        if target.tensor in wanted:
            grad = found.setdefault(target.tensor, torch.zeros(shapes[target.tensor], device=device))
            places = tuple(torch.as_tensor(i, device=device).expand(batch, heads) for i in index)
            grad.index_put_(places, upstream * partial, accumulate=True)
    for name, partial in zip(derivative.parameters, partials[len(derivative.loads) :], strict=True):
        if name in wanted:
            found[name] = (upstream * partial).sum()
    return found
