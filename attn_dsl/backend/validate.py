"""`validate=True`: promises and index ranges of a call, checked where the tensors are; the first offender is named."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from attn_dsl.backend.binding import Call
from attn_dsl.errors import BindingError
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.ir.nodes import Load, Node, post_order
from attn_dsl.ir.variant import InRange, Nondecreasing, Variant
from attn_dsl.passes.lengths import KV_LEN, PAGE_TABLE

ROWS, KEYS = 512, 2048
"""Pairs are looked at in tiles of this shape, so that memory does not grow with the square of the length."""


@torch.no_grad()
def validate(variant: Variant, call: Call) -> None:
    """Raise BindingError for the first broken promise or index that is out of range where the mask is true."""
    if isinstance(call.q_offset, Tensor) and bool((call.q_offset < 0).any()):
        raise BindingError(f"`q_offset`: expected positions >= 0, got {int(call.q_offset.min())}")
    base = Environment(
        parameters=call.parameters,
        sizes=call.sizes,
        tensors=call.tensors,
        device=call.query.device,
    )
    if PAGE_TABLE in call.tensors:
        _check_pages(call)
    for declared in variant.tensors:
        for promise in declared.promises:
            if isinstance(promise, Nondecreasing):
                _check_order(declared.name, call.tensors[declared.name], promise.axis)
            else:
                _check_range(declared.name, call.tensors[declared.name], promise, base)
    if any(isinstance(node, Load) for node in post_order(*variant.roots)):
        try:
            _check_indices(variant, call, base)
        except (IndexError, ZeroDivisionError) as error:
            raise BindingError(str(error)) from None


def _check_pages(call: Call) -> None:
    """The pages of the keys that there are; what a table names past those is not looked at."""
    table, (pages, _, size, _) = call.tensors[PAGE_TABLE], call.key.shape
    there = call.tensors[KV_LEN] if KV_LEN in call.tensors else table.new_full(table.shape[:1], call.sizes["KV"])
    used = torch.arange(table.shape[1], device=table.device) * size < there[:, None]
    place = _first(used & ((table < 0) | (table >= pages)))
    if place is not None:
        raise BindingError(
            f"`{PAGE_TABLE}`: expected pages from 0 to {pages - 1}, got {int(table[place])} at {list(place)}"
        )


def _check_order(name: str, tensor: Tensor, axis: int) -> None:
    if tensor.shape[axis] < 2:
        return
    after, before = tensor.narrow(axis, 1, tensor.shape[axis] - 1), tensor.narrow(axis, 0, tensor.shape[axis] - 1)
    place = _first(after < before)
    if place is not None:
        first = int(before[place]) if not tensor.is_floating_point() else float(before[place])
        then = int(after[place]) if not tensor.is_floating_point() else float(after[place])
        place = (*place[:axis], place[axis] + 1, *place[axis + 1 :])
        raise BindingError(
            f"`{name}`: expected nondecreasing values along axis {axis}, got {then} after {first} at {list(place)}"
        )


def _check_range(name: str, tensor: Tensor, promise: InRange, env: Environment) -> None:
    low, high = (int(evaluate(bound, env)) for bound in (promise.low, promise.high))
    place = _first((tensor < low) | (tensor >= high))
    if place is not None:
        raise BindingError(f"`{name}`: expected values in [{low}, {high}), got {tensor[place].item()} at {list(place)}")


def _first(wrong: Tensor) -> tuple[int, ...] | None:
    """The first place, in row-major order, that is true."""
    if not bool(wrong.any()):
        return None
    at = int(wrong.reshape(-1).to(torch.uint8).argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(at, device="cpu"), wrong.shape))


def _check_indices(variant: Variant, call: Call, base: Environment) -> None:
    """Evaluate as the dense evaluator does, which raises for an index out of range where its value is used."""
    nowhere = torch.tensor(False, device=base.device)
    for env in _tiles(call, base):
        mask: Node = variant.mask
        keep = evaluate(mask, env, active=nowhere)
        keep = evaluate(mask, env, active=keep)
        evaluate(variant.score, env, active=keep)
    if variant.sink is not None:
        evaluate(variant.sink, env)


def _tiles(call: Call, base: Environment) -> Iterator[Environment]:
    sizes, device = call.sizes, base.device
    head = torch.arange(sizes["H"], device=device).view(1, -1, 1, 1)
    offset = torch.as_tensor(call.q_offset, device=device).reshape(-1, 1, 1, 1)
    for row in range(0, sizes["Q"], ROWS):
        q = torch.arange(row, min(row + ROWS, sizes["Q"]), device=device).view(1, 1, -1, 1) + offset
        for key in range(0, sizes["KV"], KEYS):
            indices = {
                "b": torch.arange(sizes["B"], device=device).view(-1, 1, 1, 1),
                "h": head,
                "hk": head // (sizes["H"] // sizes["HK"]),
                "q": q,
                "k": torch.arange(key, min(key + KEYS, sizes["KV"]), device=device).view(1, 1, 1, -1),
            }
            yield replace(base, indices=indices, score=torch.tensor(math.nan, device=device))
