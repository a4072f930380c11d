"""The gradient of a sink: what its expression over b and h hands on to captured tensors and parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_dsl.backend.portable.launch import Call, Kernels
from attn_dsl.ir.evaluate import Environment, evaluate


def sink_gradients(
    kernels: Kernels, call: Call, lse: Tensor, delta: Tensor, wanted: frozenset[str]
) -> dict[str, Tensor]:
    """A sink with probability p takes -p * delta of each row; autograd carries that through the sink's expression."""
    variant = kernels.variant
    assert variant.sink is not None
    batch, heads, kv_heads = call.sizes[:3]
    device = call.query.device
    leaves: dict[str, Any] = {t.name: x for t, x in zip(variant.tensors, call.tensors, strict=True)}
    leaves.update({p.name: x for p, x in zip(variant.parameters, call.parameters, strict=True)})
    inputs = {name: leaves[name].detach().requires_grad_() for name in sorted(wanted)}
    leaves.update(inputs)
    head = torch.arange(heads, device=device).view(1, -1)
    environment = Environment(
        indices={"b": torch.arange(batch, device=device).view(-1, 1), "h": head, "hk": head // (heads // kv_heads)},
        parameters={p.name: leaves[p.name] for p in variant.parameters},
        sizes=dict(zip(("B", "H", "HK", "Q", "KV", "D", *(e.name for e in kernels.extents)), call.sizes, strict=True)),
        tensors={t.name: leaves[t.name] for t in variant.tensors},
        dtype=torch.float32,
        device=device,
    )
    with torch.enable_grad():
        sink = evaluate(variant.sink, environment).expand(batch, heads)
        share = torch.where(lse == -torch.inf, 0.0, torch.exp(sink.detach().unsqueeze(-1) - lse))
        if not sink.requires_grad:
            return {}
        grads = torch.autograd.grad(sink, list(inputs.values()), -(share * delta).sum(-1), allow_unused=True)
    return {name: grad.float() for name, grad in zip(inputs, grads, strict=True) if grad is not None}
