"""Calls in another order of positions that were made before: nothing is chosen or planned again, only tensors are new.

What strides say is read and written where it is. Of what is sorted the forward kernel reads and writes each row where
it stands in the order of the caller; for the backward pass one launch gathers all that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from attn_dsl.backend import sorting
from attn_dsl.backend.execute import Gradients, Options, Program
from attn_dsl.backend.layouts import Layout, Permutation
from attn_dsl.backend.portable.launch_permute import Permuting, permuting
from attn_dsl.backend.portable.tape import LaunchesByKind
from attn_dsl.backend.replay import once, shares_of, wanted_of
from attn_dsl.backend.sorting import Sort

if TYPE_CHECKING:
    from attn_dsl.backend.order import Ordered
    from attn_dsl.backend.portable.launch import Call as PortableCall


class Inner(Protocol):
    def outputs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tensors: Sequence[Tensor],
        q_offset: int | Tensor,
        out: Tensor | None = None,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(out, lse, shifted), as `portable.launch.forward`; `out` and `rows` are given, with such strides, where the
        call that this was made for has them."""


class InnerBackward(Protocol):
    def gradients(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tensors: Sequence[Tensor],
        q_offset: int | Tensor,
        out: Tensor,
        shifted: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        wanted: frozenset[str],
        results: Sequence[Tensor] = (),
    ) -> Gradients:
        """Of calls of a kind in the order of their tensors; dq, dk and dv are `results` where these can be written."""


Makes = Callable[[Program, "PortableCall", Options], Inner]
Rows = tuple[Tensor, Tensor, Tensor]


class Forward:
    """The forward pass of one kind of call; `made` makes what runs it in its order."""

    def __init__(self, ordered: Ordered, made: Makes) -> None:
        given = ordered.given
        self.by, self.layout, self.both_passes = ordered.by, ordered.layout, ordered.layout.both_passes
        self.program, self.start = ordered.program, ordered.call.q_offset
        self.names, self.heads = tuple(given.tensors), (given.query.shape[1], given.key.shape[1])
        target = ordered.target(torch.empty(0, dtype=given.query.dtype, device="meta"))
        bound = ordered.bound
        if target is not None:
            bound = replace(bound, results={"out": target[1]})
        self.out = None if target is None else tuple(target[0].shape)
        self.inner = made(ordered.program, bound, ordered.options)
        self.backward_program, call = ordered.backward_program, ordered.call
        self.call = replace(call, query=_like(call.query), key=_like(call.key), value=_like(call.value), tensors={})

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, tensors: Sequence[Tensor], q_offset: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out, lse), not differentiable."""
        return self.outputs(query, key, value, tensors, q_offset)[:2]

    def outputs(
        self, query: Tensor, key: Tensor, value: Tensor, tensors: Sequence[Tensor], q_offset: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(out, lse, shifted) in the order of the caller."""
        return self.sorted(query, key, value, tensors)[0]

    def sorted(self, query: Tensor, key: Tensor, value: Tensor, tensors: Sequence[Tensor]) -> tuple[Rows, Sort | None]:
        """`outputs`, and the sort, if positions are sorted."""
        layout, known, inner = self.found(tensors)
        if isinstance(layout, Permutation):
            order = layout.queries, layout.keys
            return self.inner.outputs(query, key, value, inner, self.start, rows=order), known
        target, rows = layout.target(self.out or (), query), query.shape[2]
        assert target is not None
        split = layout.split(query), layout.split(key, keys=True), layout.split(value, keys=True)
        _, lse, shifted = self.inner.outputs(*split, inner, self.start, target[1])
        joined = layout.join(lse, rows)
        results = target[0][:, :, :rows], joined, joined if shifted is lse else layout.join(shifted, rows)
        return results, None

    def found(self, tensors: Sequence[Tensor]) -> tuple[Layout, Sort | None, list[Tensor]]:
        """(layout, sort, captured tensors of the program in its order)."""
        named = dict(zip(self.names, tensors, strict=True))
        if self.by is None:
            return self.layout, None, [named[name] for name in self.program.tensor_names]
        tensor, names = named[self.by.tensor.name], self.program.tensor_names
        known = sorting.sort(self.by, tensor, names)
        named |= sorting.read(self.by, tensor, known, names)
        return known.layout(*self.heads), known, [named[name] for name in names]


def _like(x: Tensor) -> Tensor:
    """The tensor without its data."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


# ---------------------------------------------------------------- with gradients


class Differentiable:
    """Calls of one kind whose gradients are wanted, both passes in the same order."""

    def __init__(self, forward: Forward, backward: InnerBackward) -> None:
        self.forward, self.inner = forward, backward
        self._gathers = LaunchesByKind()
        self._scatter = Permuting(3, scatter=True)

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, tensors: Sequence[Tensor], q_offset: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out, lse), differentiable once."""
        out, lse = _Again.apply(self, query, key, value, *tensors)  # type: ignore[no-untyped-call]
        return out, lse

    def gradients(
        self,
        inputs: Rows,
        tensors: Sequence[Tensor],
        known: Sort | None,
        out: Tensor,
        shifted: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        wanted: frozenset[str],
    ) -> Gradients:
        """Of `inputs`, query, key and value; all is in the order of the caller."""
        forward, own = self.forward, dict(zip(self.forward.names, tensors, strict=True))
        if known is None:
            return self._by_strides(inputs, own, out, shifted, grad_out, grad_lse, wanted)
        by, names = forward.by, forward.backward_program.tensor_names
        assert by is not None
        layout, own = known.layout(*forward.heads), own | sorting.read(by, own[by.tensor.name], known, names)
        lines = [shifted] if grad_lse is None else [shifted, grad_lse.float().contiguous()]
        query, key, value, grad_out, out, shifted, *line = self._gathered(layout, (*inputs, grad_out, out), lines)
        rows, given = (out, shifted, grad_out), [own[name] for name in names]
        inputs = query, key, value
        found = self.inner.gradients(*inputs, given, forward.start, *rows, line[0] if line else None, wanted)
        grads = [x.reshape(like.shape) for x, like in zip((found.query, found.key, found.value), inputs, strict=True)]
        dq, dk, dv = self._scatter(grads, (layout.queries, layout.keys, layout.keys))
        return Gradients(dq, dk, dv, found.captured)

    def _gathered(self, layout: Permutation, tensors: Sequence[Tensor], lines: Sequence[Tensor]) -> list[Tensor]:
        """Query, key, value and what belongs to queries, in the sorted order. Gradients of results are from outside,
        and may be of another kind in each call."""
        count = len(tensors)
        indices = [layout.queries, layout.keys, layout.keys, *[layout.queries] * (count - 3)]
        return list(self._gathers((count,), permuting(count, scatter=False), (*tensors, *indices, *lines)))

    def _by_strides(
        self,
        inputs: Rows,
        tensors: dict[str, Tensor],
        out: Tensor,
        shifted: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        wanted: frozenset[str],
    ) -> Gradients:
        layout, inner = self.forward.layout, [tensors[name] for name in self.forward.backward_program.tensor_names]
        query, key, value = (layout.split(x, keys=i > 0) for i, x in enumerate(inputs))
        targets = [layout.target(x.shape, x) for x in inputs]
        results = [target[1] for target in targets if target is not None]
        out, grad_out = layout.split(out), layout.split(grad_out)
        shifted = layout.split_line(shifted, float("inf"))  # rows that fill up a sequence have probabilities of 0
        grad_lse = None if grad_lse is None else layout.split_line(grad_lse, 0.0)
        rows = out, shifted, grad_out, grad_lse
        found = self.inner.gradients(query, key, value, inner, self.forward.start, *rows, wanted, results)

        def joined(i: int, grad: Tensor, inside: Tensor) -> Tensor:
            target, length = targets[i], inputs[i].shape[2]
            if target is not None and grad is target[1]:
                return target[0][:, :, :length]
            return layout.join(grad.reshape(inside.shape), length, keys=i > 0)

        return Gradients(
            joined(0, found.query, query), joined(1, found.key, key), joined(2, found.value, value), found.captured
        )


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, replay: Differentiable, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        (out, lse, shifted), ctx.known = replay.forward.sorted(query, key, value, rest)
        lines = (lse,) if shifted is lse else (lse, shifted)
        # As much as by a first call, which a checkpoint may compare.
        ctx.save_for_backward(out, *lines, query, key, value, *rest)
        ctx.replay, ctx.lines = replay, len(lines)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return once(_Again.gradients, ctx, *grads)

    @staticmethod
    def gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        replay, saved, lines = ctx.replay, ctx.saved_tensors, ctx.lines
        out, shifted, (query, key, value, *rest) = saved[0], saved[lines], saved[1 + lines :]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        elif grad_out.stride(-1) != 1:  # that of a sum is one number everywhere; no kernel is compiled for that
            grad_out = grad_out.contiguous()
        needs, names = ctx.needs_input_grad[4:], replay.forward.names
        rows = out, shifted, grad_out, grad_lse
        found = replay.gradients((query, key, value), rest, ctx.known, *rows, wanted_of(names, needs))
        return (None, found.query, found.key, found.value, *shares_of(found, names, rest, needs))
