"""Packed sequences: rows of all of them one behind the other, `[1, H, T, D]`, and where each ends.

The kernels of a GPU find their sequence on the device (`portable/device.py`). On the CPU this is the loop over the
sequences, each with its own rows as they stand; `b` and the sizes of the batch are then numbers of the loop.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from attn_dsl.backend.binding import Call, readable
from attn_dsl.backend.cpu import attention as cpu
from attn_dsl.backend.cpu.problem import Problem
from attn_dsl.backend.execute import Gradients, Outputs, Program, program_for
from attn_dsl.errors import BindingError
from attn_dsl.passes.lengths import KEY_ENDS, QUERY_ENDS, SEQUENCE, SEQUENCES, one_sequence
from attn_dsl.passes.simplify import simplify


def check_packed(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises BindingError unless they have three axes, and key and value as many rows."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            got = f"{x.dim()}, shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise BindingError(f"`{name}`: expected 3 axes [rows of all sequences, heads, dimension], got {got}")
    if key.shape[0] != value.shape[0]:
        raise BindingError(f"`value`: expected {key.shape[0]} rows, those of `key`, got {value.shape[0]}")


def checked_ends(name: str, packed: Tensor, ends: Tensor, longest: int | None) -> tuple[Tensor, int]:
    """Cumulative lengths as int32 [B + 1], and the longest, which is read unless given. Raises BindingError."""
    total, device = packed.shape[0], packed.device
    what = f"int cumulative lengths [B + 1] on {device}, from 0 to {total}, the rows of `{name}`"
    fits = isinstance(ends, Tensor) and ends.dtype in (torch.int32, torch.int64) and ends.device == device
    if not fits or ends.dim() != 1 or ends.shape[0] < 2:
        got = f"{ends.dtype} {list(ends.shape)} on {ends.device}" if isinstance(ends, Tensor) else type(ends).__name__
        raise BindingError(f"the ends of `{name}`: expected {what}, got {got}")
    if readable(ends):
        found = ends.tolist()
        if found[0] != 0 or found[-1] != total or sorted(found) != found:
            raise BindingError(f"the ends of `{name}`: expected {what}, got {found}")
    if longest is None:
        if torch.compiler.is_compiling():
            raise BindingError(f"`longest_{name}`: expected an int in a compiled graph, which cannot look at the ends")
        longest = int(ends.diff().max())
    if isinstance(longest, bool) or not isinstance(longest, int | torch.SymInt) or longest < 1:
        raise BindingError(f"the longest sequence of `{name}`: expected an int of at least 1, got {longest!r}")
    if readable(ends) and int(ends.diff().max()) > longest:
        raise BindingError(f"the longest sequence of `{name}`: expected {int(ends.diff().max())}, got {longest}")
    return ends.to(torch.int32), longest


# ---------------------------------------------------------------- the loop over the sequences


@functools.lru_cache(maxsize=256)
def _of_one(program: Program, ends: bool) -> Program:
    return program_for(simplify(one_sequence(program.variant, ends=ends)))


def _each(program: Program, call: Call) -> Iterator[tuple[slice, slice, Call, Problem]]:
    """The rows and keys of each sequence that has queries, as slices of those of all, and its call.

    A sequence without keys sees one that its mask does not keep.
    """
    query_ends, key_ends = call.tensors[QUERY_ENDS].tolist(), call.tensors[KEY_ENDS].tolist()
    for b in range(len(query_ends) - 1):
        rows, keys = slice(query_ends[b], query_ends[b + 1]), slice(key_ends[b], key_ends[b + 1])
        if rows.start == rows.stop:
            continue
        empty = keys.start == keys.stop
        key, value = (
            x.new_zeros((1, x.shape[1], 1, x.shape[3])) if empty else x[:, :, keys] for x in (call.key, call.value)
        )
        of = _of_one(program, empty)
        given = {**call.parameters, **call.tensors, SEQUENCE: b, SEQUENCES: call.sizes["B"]}
        one = of.binder.bind(call.query[:, :, rows], key, value, call.scale, 0, given)
        yield rows, keys, one, cpu.problem_of(of.variant, of.schedule, one)


def forward(program: Program, call: Call) -> tuple[Tensor, Tensor]:
    """`(out [1, H, T, DV], lse [1, H, T])` on the CPU, in memory row by row."""
    _, heads, total, _ = call.query.shape
    arithmetic = torch.float64 if call.query.dtype is torch.float64 else torch.float32
    out = call.query.new_empty((1, total, heads, call.value.shape[3])).transpose(1, 2)
    lse = call.query.new_empty((1, total, heads), dtype=arithmetic).transpose(1, 2)
    for rows, _, one, problem in _each(program, call):
        out[:, :, rows], lse[:, :, rows] = cpu.forward(problem, one)
    return out, lse


def backward(
    program: Program,
    call: Call,
    outputs: Outputs,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
) -> Gradients:
    """Gradients on the CPU; those of what is captured are summed over the sequences."""
    dtype = outputs[1].dtype
    query, key, value = (torch.zeros(x.shape, dtype=dtype) for x in (call.query, call.key, call.value))
    captured: dict[str, Tensor] = {}
    for rows, keys, one, problem in _each(program, call):
        out, lse, grad = (x[:, :, rows] for x in (outputs[0], outputs[1], grad_out))
        found = cpu.backward(problem, one, out, lse, grad, None if grad_lse is None else grad_lse[:, :, rows], wanted)
        query[:, :, rows] = found.query.view_as(query[:, :, rows])
        if keys.start < keys.stop:
            key[:, :, keys] = found.key.view_as(key[:, :, keys])
            value[:, :, keys] = found.value.view_as(value[:, :, keys])
        for name, share in (found.tensors | found.parameters).items():
            captured[name] = captured[name] + share if name in captured else share
    return Gradients(query, key, value, captured)
