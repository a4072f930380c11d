"""Calls in an order of positions in which their mask is dense (`passes/order.py`): tensors in, results back.

The tensors of a call are seen in the new order by their strides, and results are written so that they come out in the
order of the caller. Where strides cannot say it, or the lengths are no multiple of the modulus, one copy of a tensor is
made that is laid out as they need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attn_dsl.backend import gpu
from attn_dsl.backend.binding import Call
from attn_dsl.backend.cost import visited_tiles
from attn_dsl.backend.cpu.functions import schedule_functions
from attn_dsl.backend.execute import CPU, DECODE, Gradients, Options, Outputs, Program, portable_call, program_for
from attn_dsl.backend.portable import launch_decode as decode
from attn_dsl.backend.portable.launch import Call as PortableCall
from attn_dsl.ir.infix import infix
from attn_dsl.passes.order import Place, Residues, number

BLOCK = (128, 128)
"""The tile shape for which visited pairs are counted."""
GAIN = 0.9
"""An order must leave so much of the pairs that are visited without it, or less."""


@dataclass(frozen=True)
class Classes:
    """Tensors [B, H, S, D] and lines [B, H, S] as `count` interleaved sequences, placed as `Place` says.

    `batch` is that of the call. Sequences are as long as the longest; what one lacks is filled up.
    """

    count: int
    place: Place
    batch: int

    def is_view(self, x: Tensor) -> bool:
        """Whether strides alone can say it."""
        (batch, heads, rows, _), stride = x.shape, x.stride()
        if rows % self.count:
            return False
        match self.place:
            case Place.BATCH:
                return batch == 1
            case Place.HEAD:
                return heads == 1 or stride[2] == heads * stride[1]
            case Place.PAIR:
                return 1 in (batch, heads) or stride[0] == heads * stride[1]

    def new(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An empty tensor for as many rows as all sequences have, laid out so that they are a view."""
        batch, heads, rows, dim = shape
        rows += -rows % self.count
        if self.place is Place.HEAD:
            return like.new_empty(batch, rows, heads, dim).transpose(1, 2)
        return like.new_empty(batch, heads, rows, dim)

    def split(self, x: Tensor) -> Tensor:
        """A tensor [B, H, S, D] in this order, as a view of itself or of a copy with rows of zeros at the end."""
        if not self.is_view(x):
            rows, copy = x.shape[2], self.new(x.shape, x)
            copy[:, :, :rows].copy_(x)
            copy[:, :, rows:].zero_()
            x = copy
        return self.view(x)

    def view(self, x: Tensor) -> Tensor:
        """`split` without a copy."""
        (batch, heads, rows, dim), (by_batch, by_head, by_row, by_column) = x.shape, x.stride()
        match self.place:
            case Place.BATCH:
                outer = by_row, by_head
            case Place.HEAD:
                outer = by_batch, by_row if heads == 1 else by_head
            case Place.PAIR:
                outer = by_batch if heads == 1 else by_head, by_row
        shape = (*self.outer(batch, heads), rows // self.count, dim)
        return x.as_strided(shape, (*outer, by_row * self.count, by_column), x.storage_offset())

    def outer(self, batch: int, heads: int) -> tuple[int, int]:
        """The batch and heads of what has such in the order of the caller."""
        match self.place:
            case Place.BATCH:
                return self.count, heads
            case Place.HEAD:
                return batch, self.count * heads
            case Place.PAIR:
                return batch * heads, self.count

    def split_line(self, x: Tensor, filler: float) -> Tensor:
        """Numbers of rows [B, H, S] in this order, contiguous."""
        batch, heads, rows = x.shape
        x = torch.nn.functional.pad(x, (0, -rows % self.count), value=filler).view(batch, heads, -1, self.count)
        x = x.permute(0, 1, 3, 2) if self.place is Place.PAIR else x.permute(0, 3, 1, 2)
        return x.reshape(*self.outer(batch, heads), -1).contiguous()

    def join(self, x: Tensor, rows: int) -> Tensor:
        """The first rows, in the order of the caller, of what a kernel made in this one: [..., S / d] or with D."""
        first = (self.batch, -1, self.count) if self.place is Place.PAIR else (self.batch, self.count, -1)
        x = x.reshape(*first, *x.shape[2:])
        return x.movedim(2 if self.place is Place.PAIR else 1, 3).flatten(2, 3)[:, :, :rows]


@dataclass(frozen=True)
class Ordered:
    """A call in residue classes: the program over positions within a class, and the tensors so seen."""

    classes: Classes
    program: Program
    call: PortableCall
    given: Call
    options: Options

    @staticmethod
    def of(residues: Residues, program: Program, call: Call, options: Options, count: int) -> Ordered:
        classes = Classes(count, _place(call, count), call.query.shape[0])
        ragged = call.key.shape[2] % count != 0
        inner = _program(program, residues, classes.place, ragged)
        named = {residues.size_name(name): size for name, size in call.sizes.items()}
        wanted = [p.name for p in inner.variant.parameters]
        query, key, value = (classes.split(x) for x in (call.query, call.key, call.value))
        sizes = zip(
            ("B", "H", "HK", "Q", "KV"), (*query.shape[:2], key.shape[1], query.shape[2], key.shape[2]), strict=True
        )
        known = {name: x.to(query.device) if isinstance(x, Tensor) else x for name, x in call.parameters.items()}
        bound = replace(
            call,
            query=query,
            key=key,
            value=value,
            sizes={**call.sizes, **dict(sizes)},
            parameters={name: known[name] if name in known else named[name] for name in wanted},
            q_offset=call.q_offset // count,
        )
        return Ordered(classes, inner, portable_call(inner, bound, options), call, options)

    @property
    def laid_out(self) -> str:
        """How the tensors come into this order."""
        given = {"query": self.given.query, "key": self.given.key, "value": self.given.value}
        copied = [f"`{name}`" for name, x in given.items() if not self.classes.is_view(x)]
        return f"{', '.join(copied)} copied" if copied else "nothing copied"

    def forward(self) -> Outputs:
        out = self._output(self.given.query)
        call = replace(self.call, results={"out": self.classes.view(out)})
        _, lse, shifted = gpu.forward(self.program, call, self.options.backend)
        rows = self.given.query.shape[2]
        line = self.classes.join(lse, rows)
        return out[:, :, :rows], line, line.new_empty(0) if shifted is lse else self.classes.join(shifted, rows)

    def _output(self, like: Tensor) -> Tensor:
        return self.classes.new((*self.given.query.shape[:3], self.given.value.shape[3]), like)

    def backward(
        self, outputs: Outputs, grad_out: Tensor, grad_lse: Tensor | None, wanted: frozenset[str]
    ) -> Gradients:
        classes, given = self.classes, self.given
        out, lse, shifted = outputs
        line = classes.split_line(shifted if self.program.has_row_term else lse, float("-inf"))
        grad_lse = None if grad_lse is None else classes.split_line(grad_lse, 0.0)
        inputs = {"dq": given.query, "dk": given.key, "dv": given.value}
        results = {name: classes.new(x.shape, x) for name, x in inputs.items()}
        call = replace(self.call, results={name: classes.view(x) for name, x in results.items()})
        found = gpu.backward(
            self.program, call, self.options, classes.split(out), line, classes.split(grad_out), grad_lse, wanted
        )
        grads = zip(results.items(), (found.query, found.key, found.value), strict=True)
        dq, dk, dv = (
            x[:, :, :rows] if grad is call.results[name] else classes.join(grad, rows)
            for (name, x), grad in grads
            for rows in [inputs[name].shape[2]]
        )
        return Gradients(dq, dk, dv, found.captured)

    def replay(self, made: Callable[[Program, PortableCall, Options], Inner]) -> Replay:
        """What runs the forward pass of calls of this kind, by what `made` makes of the inner call."""
        out = self._output(torch.empty(0, dtype=self.given.query.dtype, device="meta"))
        call = replace(self.call, results={"out": self.classes.view(out)})
        return Replay(self.classes, made(self.program, call, self.options), tuple(out.shape))


class Inner(Protocol):
    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tensors: Sequence[Tensor],
        q_offset: int | Tensor,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of a call in residue classes."""


@dataclass(frozen=True)
class Replay:
    """The forward pass of one kind of call; `out` is the shape of its output with the rows that fill it up."""

    classes: Classes
    inner: Inner
    out: tuple[int, ...]

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, tensors: Sequence[Tensor], q_offset: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out, lse), not differentiable."""
        classes, rows = self.classes, query.shape[2]
        q, k, v = (classes.split(x) for x in (query, key, value))
        made = classes.new(self.out, query)
        _, lse = self.inner.run(q, k, v, tensors, q_offset // classes.count, classes.view(made))
        return made[:, :, :rows], classes.join(lse, rows)


@dataclass(frozen=True)
class Choice:
    """What was decided for a kind of call: the classes, or the order as given, and why."""

    residues: Residues | None
    count: int
    why: str


def ordered(program: Program, call: Call, options: Options) -> Ordered | None:
    """The call in a better order than its own, or None."""
    found = choice(program, call, options)
    if found is None or found.residues is None:
        return None
    return Ordered.of(found.residues, program, call, options, found.count)


def choice(program: Program, call: Call, options: Options) -> Choice | None:
    """Which order a call takes; None where its mask speaks of none, or its kernels take the given order alone."""
    if not program.orders or program.binder.stored or options.backend in (CPU, DECODE):
        return None
    if isinstance(call.q_offset, Tensor):
        return None
    numbers = tuple((name, x) for name, x in call.parameters.items() if isinstance(x, int))
    key = (numbers, tuple(call.sizes.items()), call.q_offset, options.backend)
    kept = program.choices
    if key not in kept:
        if len(kept) >= 4096:
            kept.clear()
        kept[key] = _decided(program, call, options)
    return kept[key]


def _decided(program: Program, call: Call, options: Options) -> Choice:
    if options.backend == "gpu" and decode.reason(portable_call(program, call, options)):
        return Choice(None, 1, "as given, for few queries")
    start = call.q_offset
    assert isinstance(start, int)
    before = _visited(program, call.sizes, call.parameters, start)
    best = Choice(None, 1, "as given: no residue class is fewer pairs")
    least = None if before is None else before * GAIN
    for residues in program.orders:
        count = number(residues.modulus, call.parameters)
        if count is None or count < 2 or start % count:
            continue
        ragged = call.sizes["KV"] % count != 0
        inner = _program(program, residues, Place.BATCH, ragged)
        named = {residues.size_name(name): size for name, size in call.sizes.items()}
        lengths = {name: -(-call.sizes[name] // count) for name in ("Q", "KV")}
        sizes = {**call.sizes, "B": count, **lengths}
        pairs = _visited(inner, sizes, {**call.parameters, **named}, start // count)
        after = None if pairs is None else pairs * call.sizes["B"]
        if least is None or (after is not None and after < least):
            what = f"{count} residue classes of {infix(residues.modulus)}"
            saved = "" if before is None or after is None else f": {after:,} pairs visited instead of {before:,}"
            best, least = Choice(residues, count, what + saved), after
    return best


def _visited(program: Program, sizes: Mapping[str, int], parameters: Mapping[str, Any], q_offset: int) -> int | None:
    """Pairs of the whole tiles that the schedule ranges over; None where that depends on what tensors hold."""
    functions = schedule_functions(program.variant, program.schedule)
    if functions.slots:
        return None
    scalars = tuple({**parameters, **sizes}[name] for name in program.binder.scalars)
    return visited_tiles(functions, sizes, scalars, q_offset, BLOCK) * BLOCK[0] * BLOCK[1]


def _place(call: Call, count: int) -> Place:
    """Where the residue stands so that the fewest tensors are copied."""
    if call.query.shape[0] == 1:
        return Place.BATCH
    if call.query.shape[1] != call.key.shape[1]:
        return Place.HEAD
    views = {
        place: sum(Classes(count, place, call.query.shape[0]).is_view(x) for x in (call.query, call.key, call.value))
        for place in (Place.PAIR, Place.HEAD)
    }
    return max(views, key=lambda place: views[place])


def _program(program: Program, residues: Residues, place: Place, ragged: bool) -> Program:
    key = (residues.modulus, place, ragged)
    if key not in program.reordered:
        program.reordered[key] = program_for(residues.reordered(place, ragged=ragged))
    return program.reordered[key]
