"""Calls in an order of positions in which their mask is dense: tensors in, results back in the order of the caller.

`passes/order.py` and `passes/order_by_data.py` say which orders a mask speaks of, and rewrite the variant; `layouts.py`
lays out the tensors. Here an order is chosen, by the pairs that are visited in it, and its program is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_dsl.backend import execute, sorting
from attn_dsl.backend.binding import Call
from attn_dsl.backend.cost import visited_tiles
from attn_dsl.backend.cpu.functions import schedule_functions
from attn_dsl.backend.execute import (
    CPU,
    DECODE,
    GPU,
    HOPPER,
    Gradients,
    Options,
    Outputs,
    Program,
    portable_call,
    program_for,
)
from attn_dsl.backend.layouts import Classes, Grid, Layout, Permutation
from attn_dsl.backend.sorting import Sort
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import Index, K, Q
from attn_dsl.passes.order import Place, Residues, number
from attn_dsl.passes.order_by_data import Sorted
from attn_dsl.passes.order_grid import KEY_COLUMNS, QUERY_COLUMNS, Strips, exchanged

if TYPE_CHECKING:  # it loads Triton
    from attn_dsl.backend.hopper.launch_backward import Replay
    from attn_dsl.backend.portable.launch import Call as PortableCall

BLOCK = (128, 128)
"""The tile shape for which visited pairs are counted."""
QUERIES = 64
"""Of a tile in the backward pass, where a program owns 128 keys."""
GAIN = 0.9
"""An order must leave so much of the pairs that are visited without it, or less."""
LEADS = (0, 1, 2, 3)
"""Rows that may stand before the first of a strip of keys, so that tiles begin where what is seen of them begins."""
SHORT = 512
"""Fewer keys are few tiles in any order."""
BY_STRIPS_OF_KEYS = True
"""Whether the backward pass over a grid goes by strips of keys, 1.8 times as fast as in the order given."""
KEPT = 4096
"""So many choices are remembered."""


@dataclass(frozen=True)
class Ordered:
    """A call in another order: the program over positions in that order, and its call; where positions are sorted, by
    what, and the sort: query, key and value are then as they were given."""

    layout: Layout
    program: Program
    call: Call
    given: Call
    outer: Program
    options: Options
    by: Sorted | None = None
    sort: Sort | None = None

    def laid_out(self, backend: str) -> str:
        """How the tensors come into this order, for the kernels of the forward pass."""
        if self.rows is not None and backend == HOPPER:
            return "rows gathered by the forward kernel, `query`, `key`, `value` copied for the backward pass"
        given = {"query": self.given.query, "key": self.given.key, "value": self.given.value}
        copied = [f"`{name}`" for name, x in given.items() if not self.layout.is_view(x)]
        return f"{', '.join(copied)} copied" if copied else "nothing copied"

    @property
    def rows(self) -> tuple[Tensor, Tensor] | None:
        """Where a GPU finds the rows of queries and of keys, where strides do not say it."""
        return (self.layout.queries, self.layout.keys) if isinstance(self.layout, Permutation) else None

    @property
    def bound(self) -> PortableCall:
        """The call as kernels of a GPU take it, whose tensors are in the order of the caller if it has `rows`."""
        return replace(portable_call(self.program, self.call, self.options), rows=self.rows)

    def in_order(self, call: Call) -> Call:
        """The call with copies of query, key and value where strides do not say where rows are."""
        if self.rows is None:
            return call
        key, value = (self.layout.split(x, keys=True) for x in (call.key, call.value))
        return replace(call, query=self.layout.split(call.query), key=key, value=value)

    def forward(self) -> Outputs:
        layout, rows = self.layout, self.given.query.shape[2]
        if self.options.backend == CPU:
            out, lse, none = execute.run_forward(self.program, self.in_order(self.call), self.options)
            return layout.join(out, rows), layout.join(lse, rows), none
        if self.rows is not None:
            return execute.run_forward(self.program, self.call, self.options, rows=self.rows)
        target = self.target(self.given.query)
        assert target is not None
        _, lse, shifted = execute.run_forward(self.program, self.call, self.options, {"out": target[1]})
        lines = [layout.join(x, rows) if x.numel() else x for x in (lse, shifted)]
        return target[0][:, :, :rows], lines[0], lines[1]

    def target(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """`Layout.target` for the output."""
        return self.layout.target((*self.given.query.shape[:3], self.given.value.shape[3]), like)

    @property
    def backward_program(self) -> Program:
        """That of the backward pass: by the runs of keys where positions are sorted."""
        return self.program if self.by is None else sorted_program(self.outer, self.by, K)

    @property
    def in_backward(self) -> tuple[Program, Call]:
        """Those of the backward pass, with tensors in this order."""
        if self.by is None or self.sort is None:
            return self.program, self.call
        inner, given = self.backward_program, self.given.tensors
        found = sorting.read(self.by, given[self.by.tensor.name], self.sort, inner.tensor_names)
        tensors = {**given, **found}
        return inner, self.in_order(replace(self.call, tensors={name: tensors[name] for name in inner.tensor_names}))

    def strips_of_keys(self, wanted: frozenset[str]) -> StripsOfKeys | None:
        """How the backward pass takes another order than the forward pass; None where it takes the same, or that of the
        call."""
        if wanted or self.layout.both_passes:
            return None
        return strips_of_keys(self.outer, self.given, self.options)

    def backward(
        self, outputs: Outputs, grad_out: Tensor, grad_lse: Tensor | None, wanted: frozenset[str]
    ) -> Gradients:
        layout, given = self.layout, self.given
        if not layout.both_passes:
            strips = self.strips_of_keys(wanted)
            if strips is not None:
                return strips.backward(given, outputs, grad_out, grad_lse)
            return execute.run_backward(self.outer, given, self.options, outputs, grad_out, grad_lse, wanted)
        out, lse, shifted = outputs  # rows that fill up a sequence have probabilities of 0
        lines = [layout.split_line(x, float("inf")) if x.numel() else x for x in (lse, shifted)]
        grad_lse = None if grad_lse is None else layout.split_line(grad_lse, 0.0)
        inputs = {"dq": given.query, "dk": given.key, "dv": given.value}
        targets = {} if self.options.backend == CPU else {n: layout.target(x.shape, x) for n, x in inputs.items()}
        results = {name: target[1] for name, target in targets.items() if target is not None}
        saved = (layout.split(out), lines[0], lines[1])
        program, call = self.in_backward
        found = execute.run_backward(
            program, call, self.options, saved, layout.split(grad_out), grad_lse, wanted, results
        )

        def joined(name: str, grad: Tensor, inner: Tensor) -> Tensor:
            rows, target = inputs[name].shape[2], targets.get(name)
            if target is not None and grad is target[1]:
                return target[0][:, :, :rows]
            return layout.join(grad.reshape(inner.shape), rows, keys=name != "dq")

        dq = joined("dq", found.query, self.call.query)
        dk, dv = joined("dk", found.key, self.call.key), joined("dv", found.value, self.call.value)
        return Gradients(dq, dk, dv, found.captured)


# ---------------------------------------------------------------- which order


@dataclass(frozen=True)
class Choice:
    """What was decided for a kind of call: an order, or none, and why.

    count: of residue classes, or of columns of keys in a strip. lead: rows before the first, in a strip of keys.
    """

    order: Residues | Sorted | Strips | None
    why: str
    count: int = 1
    lead: int = 0


@torch.no_grad()
def ordered(program: Program, call: Call, options: Options) -> Ordered | None:
    """The call in a better order than its own, or None."""
    found = choice(program, call, options)
    match found.order if found is not None else None:
        case Residues() as order:
            assert found is not None
            return _in_classes(order, program, call, options, found.count)
        case Strips() as order:
            assert found is not None
            return in_strips(order, program, call, options, found.count, found.lead)
        case Sorted() as order:
            return _by_data(order, program, call, options)
        case None:
            return None


def choice(program: Program, call: Call, options: Options) -> Choice | None:
    """Which order a call takes; None where its mask speaks of none, or its kernels take the given order alone."""
    if not program.orders or program.binder.layout or options.backend == DECODE:
        return None
    if isinstance(call.q_offset, Tensor):
        return Choice(None, "as given, since `q_offset` is a tensor")
    numbers = tuple((name, x) for name, x in call.parameters.items() if isinstance(x, int))
    key = (numbers, tuple(call.sizes.items()), call.q_offset, options.backend)
    kept = program.choices
    if key not in kept:
        if len(kept) >= KEPT:
            kept.clear()
        kept[key] = _decided(program, call, options)
    return kept[key]


def _decided(program: Program, call: Call, options: Options) -> Choice:
    if options.backend == GPU and _decodes(program, call, options):
        return Choice(None, "as given, for few queries")
    before = _visited(program, call.sizes, call.parameters, call.q_offset)
    best, least = Choice(None, "as given: no other visits fewer pairs"), None if before is None else before * GAIN
    for found, after in (*_classes(program, call), *_strips(program, call, options, least)):
        if least is None or (after is not None and after < least):
            saved = "" if before is None or after is None else f": {after:,} pairs visited instead of {before:,}"
            best, least = replace(found, why=found.why + saved), after
    if best.order is None:
        best = next(_sorts(program, call), best)
    return best


def _decodes(program: Program, call: Call, options: Options) -> bool:
    from attn_dsl.backend.portable import launch_decode

    return launch_decode.reason(portable_call(program, call, options)) is not None


def _classes(program: Program, call: Call) -> Iterator[tuple[Choice, int | None]]:
    """Choices of residue classes, and the pairs that each visits, where that is known."""
    start = call.q_offset
    assert isinstance(start, int)
    for order in program.orders:
        count = number(order.modulus, call.parameters) if isinstance(order, Residues) else None
        if count is None or count < 2 or start % count or not isinstance(order, Residues):
            continue
        inner = _program(program, order, Place.BATCH, call.sizes["KV"] % count != 0)
        lengths = {name: -(-call.sizes[name] // count) for name in ("Q", "KV")}
        sizes = {**call.sizes, "B": count, **lengths}
        pairs = _visited(inner, sizes, {**call.parameters, **_named(order, call)}, start // count)
        what = f"{count} residue classes of {infix(order.modulus)}"
        yield Choice(order, what, count), None if pairs is None else pairs * call.sizes["B"]


def _strips(program: Program, call: Call, options: Options, most: float | None) -> Iterator[tuple[Choice, int | None]]:
    """Choices of strips of a grid, for the Hopper forward kernel, and the pairs that each visits, fewer than `most`."""
    if options.backend not in (GPU, HOPPER) or call.q_offset:
        return
    from attn_dsl.backend.gpu import has_grids, takes_grids

    if not has_grids(call.query.device):
        return
    sizes = call.sizes
    for order in program.orders:
        width = number(order.width, call.parameters) if isinstance(order, Strips) else None
        if not isinstance(order, Strips) or width is None or width < 1 or sizes["Q"] % width or sizes["KV"] % width:
            continue
        columns = next((n for n in KEY_COLUMNS if order.starts(width, n, call.parameters) is not None), None)
        if columns is None:
            continue
        found: list[tuple[int, Choice]] = []
        strips = -(-width // QUERY_COLUMNS)
        what = f"{strips} strips of the grid of {infix(order.width)} columns, keys in boxes of {columns} columns"
        for lead in LEADS[: BLOCK[1] // columns]:
            laid = in_strips(order, program, call, options, columns, lead)
            known = {**laid.call.parameters, order.name("H"): 1}  # strips differ, and heads do not
            pairs = _visited(laid.program, {**laid.call.sizes, "B": 1, "H": strips, "HK": strips}, known, 0)
            if pairs is not None:
                found.append((pairs * sizes["B"] * sizes["H"], Choice(order, what, columns, lead)))
        pairs, best = min(found, key=lambda pair: pair[0], default=(None, None))
        if pairs is None or best is None or (most is not None and pairs >= most):
            continue
        laid = in_strips(order, program, call, options, columns, best.lead)
        if takes_grids(laid.program, portable_call(laid.program, laid.call, options)):  # it may compile
            yield best, pairs


@dataclass(frozen=True)
class StripsOfKeys:
    """How the Hopper backward kernel takes calls of one kind by strips of keys: `bound` is one of them without its
    tensors, `config` the kernel's configuration. count, lead: as those of `Choice`, of boxes of queries. ordered:
    whether sums of dQ have an order."""

    order: Strips
    count: int
    lead: int
    program: Program
    bound: PortableCall
    config: Any
    ordered: bool

    def backward(self, given: Call, outputs: Outputs, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        from attn_dsl.backend.hopper.launch_backward import backward

        rows = outputs[0], outputs[1], grad_out, grad_lse
        kernels, bound = self.program.hopper_backward, self._bound(given)
        found = backward(kernels, bound, *rows, self.config, ordered=self.ordered)
        return Gradients(found.query, found.key, found.value, found.captured)

    def replay(self, given: Call, out: Tensor, grad_out: Tensor) -> Replay:
        """What repeats `backward`."""
        from attn_dsl.backend.hopper.launch_backward import Replay

        kernels, bound = self.program.hopper_backward, self._bound(given)
        return Replay(kernels, bound, out, grad_out, self.config, self.ordered, frozenset())

    def _bound(self, given: Call) -> PortableCall:
        tensors = tuple(given.tensors[tensor.name] for tensor in self.program.variant.tensors)
        return replace(self.bound, query=given.query, key=given.key, value=given.value, tensors=tensors)


def strips_of_keys(program: Program, call: Call, options: Options) -> StripsOfKeys | None:
    """How the Hopper backward kernel takes calls like this by strips of keys; None where it does not."""
    if not BY_STRIPS_OF_KEYS or not all(isinstance(x, int | float) for x in call.parameters.values()):
        return None
    tensors = (call.query, call.key, call.value, *call.tensors.values())
    key = (
        options, call.scale, call.q_offset, *call.parameters.values(), *call.sizes.values(),
        *[(x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in tensors],
    )  # fmt: skip
    if key not in program.strips_of_keys:
        if len(program.strips_of_keys) >= KEPT:
            program.strips_of_keys.clear()
        program.strips_of_keys[key] = _strips_of_keys(program, call, options)
    return program.strips_of_keys[key]


def _strips_of_keys(program: Program, call: Call, options: Options) -> StripsOfKeys | None:
    from attn_dsl.backend.gpu import backward_config_of_grid

    for given in program.orders:
        order = given.exchanged() if isinstance(given, Strips) else None
        width = None if order is None else number(order.width, call.parameters)
        if order is None or width is None:
            continue
        columns = next((n for n in KEY_COLUMNS if order.starts(width, n, call.parameters) is not None), None)
        if columns is None or columns > QUERIES:
            continue
        strips = -(-width // QUERY_COLUMNS)
        found = []
        for lead in LEADS[: QUERIES // columns]:
            laid = in_strips(order, program, call, options, columns, lead)
            sizes = {**laid.call.sizes, "B": 1, "H": strips, "HK": strips}
            sizes |= {"Q": sizes["KV"], "KV": sizes["Q"]}
            known = {**laid.call.parameters, order.name("H"): 1, order.name("HK"): 1}
            from_keys = program_for(exchanged(laid.program.variant))
            pairs = _visited(from_keys, sizes, known, 0, (BLOCK[1], QUERIES))
            found.append((0 if pairs is None else pairs, lead, laid))
        _, lead, laid = min(found, key=lambda one: one[0])
        if program.has_row_term or laid.program.has_row_term:  # what a row lacks is counted from its first query
            continue
        bound = portable_call(laid.program, laid.call, options)
        config = backward_config_of_grid(laid.program, bound, options)
        if config is not None:
            none = torch.empty(0, device="meta")
            bound = replace(bound, query=none, key=none, value=none, tensors=())
            return StripsOfKeys(order, columns, lead, laid.program, bound, config, options.deterministic)
    return None


def _sorts(program: Program, call: Call) -> Iterator[Choice]:
    """Choices of an order by data, for calls whose queries and keys are the same positions."""
    sizes = call.sizes
    if call.q_offset or sizes["Q"] != sizes["KV"] or sizes["KV"] < SHORT:
        return
    for order in program.orders:
        if isinstance(order, Sorted):
            name = order.tensor.name
            whole = call.tensors[name].shape[order.axis] == sizes["KV"]
            if whole and ("h" not in order.indices or sizes["H"] == sizes["HK"]):
                yield Choice(order, f"sorted by `{name}`, since pairs with unlike elements are not kept")


def _visited(
    program: Program,
    sizes: Mapping[str, int],
    parameters: Mapping[str, Any],
    q_offset: int | Tensor,
    block: tuple[int, int] = BLOCK,
) -> int | None:
    """Pairs of the whole tiles that the schedule ranges over; None where that depends on what tensors hold."""
    functions = schedule_functions(program.variant, program.schedule)
    if functions.slots or isinstance(q_offset, Tensor):
        return None
    scalars = tuple({**parameters, **sizes}[name] for name in program.binder.scalars)
    return visited_tiles(functions, sizes, scalars, q_offset, block) * block[0] * block[1]


def programs(program: Program) -> Iterator[Program]:
    """The program in each order that calls may take beside their own, no two alike."""
    made = {program.text: program}
    for order in program.orders:
        match order:
            case Residues():
                inner = [_program(program, order, place, ragged) for place in Place for ragged in (False, True)]
            case Sorted():
                inner = [sorted_program(program, order, side) for side in (Q, K)]
            case Strips():
                inner = []
        made |= {found.text: found for found in inner}
    yield from list(made.values())[1:]


# ---------------------------------------------------------------- residue classes


def _in_classes(order: Residues, program: Program, call: Call, options: Options, count: int) -> Ordered:
    layout = Classes(count, _place(call, count), call.query.shape[0])
    inner = _program(program, order, layout.place, call.key.shape[2] % count != 0)
    assert isinstance(call.q_offset, int)
    known = {**_named(order, call), **call.parameters}
    parameters = {parameter.name: known[parameter.name] for parameter in inner.variant.parameters}
    return _laid_out(layout, inner, program, call, options, parameters, call.tensors, call.q_offset // count)


def _laid_out(
    layout: Layout,
    inner: Program,
    outer: Program,
    call: Call,
    options: Options,
    parameters: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    q_offset: int,
) -> Ordered:
    query = layout.split(call.query)
    key, value = layout.split(call.key, keys=True), layout.split(call.value, keys=True)
    (batch, heads, q_len, _), (_, kv_heads, kv_len, _) = query.shape, key.shape
    sizes = {**call.sizes, "B": batch, "H": heads, "HK": kv_heads, "Q": q_len, "KV": kv_len}
    bound = replace(
        call,
        query=query,
        key=key,
        value=value,
        sizes=sizes,
        parameters=parameters,
        tensors={tensor.name: tensors[tensor.name] for tensor in inner.variant.tensors},
        q_offset=q_offset,
    )
    return Ordered(layout, inner, bound, call, outer, options)


def _named(order: Residues, call: Call) -> dict[str, int]:
    """Sizes of the call by the names of the parameters that stand for them."""
    return {order.size_name(name): size for name, size in call.sizes.items()}


def _place(call: Call, count: int) -> Place:
    """Where the residue stands so that the fewest tensors are copied."""
    batch = call.query.shape[0]
    if batch == 1:
        return Place.BATCH
    if call.query.shape[1] != call.key.shape[1]:
        return Place.HEAD
    views = {
        place: sum(Classes(count, place, batch).is_view(x) for x in (call.query, call.key, call.value))
        for place in (Place.PAIR, Place.HEAD)
    }
    return max(views, key=lambda place: views[place])


def _program(program: Program, order: Residues, place: Place, ragged: bool) -> Program:
    key = (order.modulus, place, ragged)
    if key not in program.reordered:
        program.reordered[key] = program_for(order.reordered(place, ragged=ragged))
    return program.reordered[key]


# ---------------------------------------------------------------- strips of a grid


def in_strips(order: Strips, program: Program, call: Call, options: Options, columns: int, lead: int = 0) -> Ordered:
    key = (order.width, columns, order.of_keys)
    if key not in program.reordered:
        inner = program.reordered[key] = program_for(order.reordered(columns, ragged=False))
        inner.strips = order, columns
    inner, sizes = program.reordered[key], call.sizes
    width = number(order.width, call.parameters)
    assert width is not None
    strips = -(-width // QUERY_COLUMNS)
    own, other = ("KV", "Q") if order.of_keys else ("Q", "KV")
    lengths = {own: sizes[own] // width * QUERY_COLUMNS, other: (sizes[other] // width + lead) * columns}
    known = {**order.named_sizes(sizes, lead), **call.parameters}
    bound = replace(
        call,
        sizes={**sizes, **lengths, "H": strips * sizes["H"], "HK": strips * sizes["HK"]},
        parameters={parameter.name: known[parameter.name] for parameter in inner.variant.parameters},
    )
    return Ordered(Grid(width, QUERY_COLUMNS), inner, bound, call, program, options)


# ---------------------------------------------------------------- orders by data


def _by_data(order: Sorted, program: Program, call: Call, options: Options) -> Ordered:
    inner = sorted_program(program, order, Q)
    tensor, names = call.tensors[order.tensor.name], inner.tensor_names
    found = sorting.sort(order, tensor, names)
    layout = found.layout(call.query.shape[1], call.key.shape[1])
    tensors = {**call.tensors, **sorting.read(order, tensor, found, names)}
    bound = replace(call, tensors={name: tensors[name] for name in names})
    return Ordered(layout, inner, bound, call, program, options, order, found)


def sorted_program(program: Program, order: Sorted, side: Index) -> Program:
    """The program over sorted positions, by the runs of queries or of keys."""
    key = (order.tensor.name, side.name)
    if key not in program.reordered:
        inner = program.reordered[key] = program_for(order.reordered(side))
        inner.is_sorted = side is Q
    return program.reordered[key]
