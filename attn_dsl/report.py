"""What a proof means for a call of given lengths: how many tiles are empty, partial and full, and a picture of them.

Counts are those of one batch entry and one head (`batch`, `head`); they differ between heads only where the mask looks
at `b` or `h`. They come from the schedule, not from a dense mask; a count that would need a tensor that was not given,
or too much time, is None, and a note says why.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attn_dsl.backend.binding import checked, checked_block
from attn_dsl.backend.counts import Call, NotCounted, TileCounts, count_kept, count_tiles
from attn_dsl.backend.execute import made_on_cpu
from attn_dsl.errors import BindingError, Span
from attn_dsl.ir.nodes import Const
from attn_dsl.ir.variant import Variant
from attn_dsl.passes import pipeline
from attn_dsl.passes.fold import Scalar
from attn_dsl.passes.logic import divisors
from attn_dsl.passes.order import Place, number, residues
from attn_dsl.passes.order_by_data import sorts
from attn_dsl.passes.order_grid import KEY_COLUMNS, QUERY_COLUMNS, Strips, strips
from attn_dsl.passes.prove import Claim, Proof
from attn_dsl.passes.prove_text import WIDTH, expression, proof_text
from attn_dsl.passes.schedule import Schedule, derive_schedule
from attn_dsl.passes.summaries import derive_claims, reads_at_positions

if TYPE_CHECKING:
    from torch import Tensor

    from attn_dsl.passes.verify import Verdict

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Report:
    """Claims and counts of one call, and the `orders` of positions in which it may run instead of its own.

    `verdicts` are there once `verified` has asked the solvers.
    """

    call: Call
    proof: Proof
    schedule: Schedule
    tiles: TileCounts | None
    kept: int | None
    notes: tuple[str, ...]
    orders: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] | None = None

    @property
    def total(self) -> int:
        """Pairs of a query and a key."""
        return self.call.q_len * self.call.kv_len

    @property
    def is_refuted(self) -> bool:
        """Whether a solver has found a claim wrong."""
        return any(verdict.counterexample for verdict in self.verdicts or ())

    def verified(self) -> Report:
        """The report with the verdicts of z3 and isl on every claim. Raises AttnError where one is not installed."""
        from attn_dsl.passes.verify import verify

        return replace(self, verdicts=verify(self.proof, self.call.parameters))

    # -- forms --------------------------------------------------------------------------------------------------------

    def json(self) -> dict[str, Any]:
        """Everything as plain data."""
        call, tiles = self.call, self.tiles
        data: dict[str, Any] = {
            "variant": call.variant.name,
            "q_len": call.q_len,
            "kv_len": call.kv_len,
            "q_offset": call.q_offset,
            "parameters": dict(call.parameters),
            "block": list(call.block),
            "tiles": {name: getattr(tiles, name, None) for name in ("empty", "partial", "full")},
            "pairs": {"kept": self.kept, "computed": getattr(tiles, "computed", None), "total": self.total},
            "claims": [_claim(claim) for claim in self.proof.claims],
            "orders": list(self.orders),
            "notes": list(self.notes),
        }
        if self.verdicts is not None:
            data["verification"] = [_verdict(verdict) for verdict in self.verdicts]
        return data

    def text(self, *, color: bool = False) -> str:
        """For people: the claims, the counts and a picture, with colors for a terminal if wanted."""
        parts = [self.title, proof_text(self.proof), "\n".join(self._counts())]
        if self.tiles is not None:
            parts.append(self.tiles.picture.text(color=color))
        parts += [textwrap.fill(f"order: {order}", WIDTH, subsequent_indent="  ") for order in self.orders]
        parts += [textwrap.fill(f"note: {note}", WIDTH, subsequent_indent="  ") for note in self.notes]
        if self.verdicts is not None:
            parts.append("\n".join(_verification(self.verdicts)))
        return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"

    def svg(self) -> str:
        """The picture, with the counts below it. Without counts there is nothing to draw: raises BindingError."""
        if self.tiles is None:
            raise BindingError(f"there are no tiles to draw: {self.notes[0]}")
        return self.tiles.picture.svg(self.title, [line.strip() for line in self._counts()])

    @property
    def title(self) -> str:
        call = self.call
        values = ", ".join(f"{name}={_plain(value)}" for name, value in call.parameters.items())
        start = f" from position {call.q_offset:,}" if call.q_offset else ""
        name = f"{call.variant.name}({values})" if values else call.variant.name
        return (
            f"{name}: {call.q_len:,} queries{start}, {call.kv_len:,} keys, tiles of {call.block[0]} x {call.block[1]}"
        )

    def _counts(self) -> Iterator[str]:
        tiles = self.tiles
        if tiles is not None:
            number = tiles.empty + tiles.partial + tiles.full
            counts = ((name, getattr(tiles, name)) for name in ("full", "partial", "empty"))
            yield "tiles  " + ", ".join(f"{count:,} {name} ({count / number:.1%})" for name, count in counts)
        computed = None if tiles is None else tiles.computed
        known = [(n, c) for n, c in (("kept", self.kept), ("computed", computed)) if c is not None]
        shares = [f"{count:,} {name} ({count / self.total:.1%})" for name, count in known]
        yield "pairs  " + ", ".join([*shares, f"{self.total:,} in all"])


def report(
    variant: Variant,
    q_len: int,
    kv_len: int,
    *,
    block: tuple[int, int] = (128, 128),
    q_offset: int = 0,
    parameters: Mapping[str, object] = _NOTHING,
    tensors: Mapping[str, Tensor] | None = None,
    sizes: Mapping[str, int] | None = None,
    batch: int = 0,
    head: int = 0,
) -> Report:
    """Prove a variant and count the tiles of a call of `q_len` queries, the first at `q_offset`, and `kv_len` keys.

    `block` is the tile shape, (queries, keys). `parameters` are needed where they have no default, `tensors` and
    `sizes` (`B H HK D`) for counts of a mask that looks at them. Raises BindingError where an argument is wrong.
    """
    q_len, kv_len, block = checked("q_len", q_len, 1), checked("kv_len", kv_len, 1), checked_block(block)
    q_offset = checked("q_offset", q_offset, 0)
    _check_tensors(variant, tensors or {})
    program = pipeline.run(variant, parameters, stop_after="schedule")
    assert program.proof is not None and program.schedule is not None
    values = _values(variant, program.variant, parameters)
    known = {name: tensor.detach().cpu() for name, tensor in (tensors or {}).items()}
    call = Call(program.variant, q_len, kv_len, q_offset, block, values, sizes or {}, known, batch, head)
    _check_divisors(call)
    _check_extents(call)
    with made_on_cpu():
        return _counted(call, program.proof, program.schedule)


def _counted(call: Call, proof: Proof, schedule: Schedule) -> Report:
    tiles, kept, notes = None, None, []
    claims = derive_claims(call.variant, proof) if reads_at_positions(call.variant.mask) else None
    try:
        tiles = count_tiles(call, schedule, claims)
    except NotCounted as why:
        notes.append(f"tiles are not counted: {why}")
    try:
        kept = count_kept(call, proof, schedule, tiles, claims)
    except NotCounted as why:
        notes.append(f"kept pairs are not counted: {why}")
    if call.variant.mask.depends & {"b", "h"} and not notes:
        notes.append(f"counts are for batch entry {call.batch}, head {call.head}")
    return Report(call, proof, schedule, tiles, kept, tuple(notes), tuple(_orders(call, tiles)))


def _orders(call: Call, tiles: TileCounts | None) -> Iterator[str]:
    """The orders that the mask speaks of, and what each would compute, where that is known."""
    for order in residues(call.variant):
        count = number(order.modulus, call.parameters)
        what = f"residue classes of `{expression(order.modulus)}`"
        if count is None or count < 2 or call.q_offset % count:
            yield f"{what}: not for this call"
            continue
        inner = order.reordered(Place.BATCH, ragged=call.kv_len % count != 0)
        lengths = (-(-call.q_len // count), -(-call.kv_len // count))
        sizes = {"Q": call.q_len, "KV": call.kv_len, **call.sizes}
        known = {**call.parameters, **{order.size_name(name): size for name, size in sizes.items()}}
        found = replace(
            call, variant=inner, q_len=lengths[0], kv_len=lengths[1], q_offset=call.q_offset // count, parameters=known
        )
        yield f"{count} {what}: in each, {expression(inner.mask)}{_saved(found, count, tiles)}"
    for grid in strips(call.variant):
        yield f"strips of `{expression(grid.width)}` columns{_in_strips(call, grid, tiles)}"
    for by_data in sorts(call.variant):
        yield f"positions sorted by `{by_data.tensor.name}`: in it, {expression(by_data.shown)}"


def _in_strips(call: Call, grid: Strips, tiles: TileCounts | None) -> str:
    """What strips of a grid compute, with the fewest columns in boxes of keys that do."""
    width = number(grid.width, call.parameters)
    if not width or call.q_offset or call.q_len % width or call.kv_len % width:
        return ": not for this call"
    columns = next((n for n in KEY_COLUMNS if grid.starts(width, n, call.parameters) is not None), None)
    if columns is None:
        return f": not for this call, of which each sees more than {KEY_COLUMNS[-1]}"
    rows, sizes = (call.q_len // width, call.kv_len // width), {**call.sizes, "Q": call.q_len, "KV": call.kv_len}
    named = {grid.name(name): size for name, size in {**sizes, "H": 1, "HK": 1, "lead": 0}.items()}
    inner = replace(
        call, variant=grid.reordered(columns, ragged=False), parameters={**call.parameters, **named},
        q_len=rows[0] * QUERY_COLUMNS, kv_len=rows[1] * columns,
    )  # fmt: skip
    computed = [_computed(replace(inner, head=strip)) for strip in range(-(-width // QUERY_COLUMNS))]
    what = f": keys in boxes of {columns} columns, for the Hopper forward kernel"
    return what + ("" if None in computed else _beside(sum(x or 0 for x in computed), tiles))


def _computed(call: Call) -> int | None:
    try:
        return count_tiles(call, derive_schedule(call.variant)).computed
    except NotCounted:
        return None


def _saved(call: Call, count: int, tiles: TileCounts | None) -> str:
    computed = _computed(call)
    return "" if computed is None else _beside(computed * count, tiles)


def _beside(computed: int, tiles: TileCounts | None) -> str:
    if tiles is None or computed >= tiles.computed:
        return f"; {computed:,} pairs computed, which is not fewer"
    return f"; {computed:,} pairs computed instead of {tiles.computed:,}"


def _values(variant: Variant, baked: Variant, given: Mapping[str, object]) -> dict[str, Scalar]:
    """Every parameter's value: those of the call, and the `const` ones that are baked in."""
    from attn_dsl.passes.bake import coerce

    defaults = {p.name: p.default for p in baked.parameters}
    values = {
        p.name: coerce(p, given[p.name]) if p.name in given else defaults.get(p.name, p.default)
        for p in variant.parameters
    }
    if missing := [name for name, value in values.items() if value is None]:
        names = ", ".join(f"`{name}`" for name in missing)
        raise BindingError(f"`{variant.name}` needs a value for {names}")
    return {name: value for name, value in values.items() if value is not None}


def _check_tensors(variant: Variant, tensors: Mapping[str, Tensor]) -> None:
    dtypes = {tensor.name: tensor.dtype.value for tensor in variant.tensors}
    for name, tensor in tensors.items():
        if name not in dtypes:
            raise BindingError(f"`{variant.name}` has no tensor `{name}`")
        if not hasattr(tensor, "dtype"):
            raise BindingError(f"`{name}`: expected a {dtypes[name]} tensor, got {type(tensor).__name__}")


def _check_extents(call: Call) -> None:
    """Where the lengths and parameters of the call say what they are."""
    for declared in call.variant.tensors:
        if declared.name not in call.tensors:
            continue
        shape = list(call.tensors[declared.name].shape)
        if len(shape) != len(declared.extents):
            raise BindingError(
                f"`{declared.name}`: expected {len(declared.extents)} axes, got {len(shape)}, shape {shape}"
            )
        for axis, (extent, size) in enumerate(zip(declared.extents, shape, strict=True)):
            try:
                expected = call.bind(extent)
            except NotCounted:
                continue
            if isinstance(expected, Const) and expected.value != size:
                what = f"{expected.value} elements ({expression(extent)}) on axis {axis}"
                raise BindingError(f"`{declared.name}`: expected {what}, got shape {shape}")


def _check_divisors(call: Call) -> None:
    for divisor in divisors(call.variant.mask):
        try:
            value = call.bind(divisor)
        except NotCounted:
            continue
        if isinstance(value, Const) and value.value < 1:
            name = f"`{expression(divisor)}`"
            raise BindingError(f"`{call.variant.name}` divides by {name}: it must be at least 1, got {value.value}")


# -- plain data -------------------------------------------------------------------------------------------------------


def _claim(claim: Claim) -> dict[str, Any]:
    return {
        "kind": claim.kind,
        "clause": expression(claim.clause_node),
        "condition": expression(claim.condition),
        "rule": claim.rule,
        "exact": claim.exact,
        "span": _span(claim.spans),
        "reasons": list(claim.reasons),
    }


def _span(spans: Sequence[Span]) -> dict[str, Any] | None:
    """The text from the first to the last of the spans, of the file that the first is in."""
    if not spans:
        return None
    source = spans[0].source
    here = [span for span in spans if span.source == source]
    whole = Span(source, min(span.start for span in here), max(span.end for span in here))
    end = Span(source, whole.end, whole.end)
    return {
        "file": source.name,
        "line": whole.line,
        "column": whole.column,
        "end_line": end.line,
        "end_column": end.column,
        "text": whole.text,
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    claim = verdict.claim
    return {
        "solver": verdict.solver,
        "question": verdict.question,
        "kind": verdict.kind,
        "clause": None if claim is None else expression(claim.clause_node),
        "outcome": verdict.outcome.value,
        "given": dict(verdict.given),
        "reason": verdict.reason,
        "counterexample": dict(verdict.counterexample),
        "milliseconds": round(verdict.seconds * 1000, 2),
    }


def _verification(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The verdicts, those about one clause together."""
    yield "z3 and isl on the claims (sound: right where it holds; exact: only there; cover: the clauses are the mask)"
    before = ""
    for verdict in verdicts:
        clause = "all clauses" if verdict.claim is None else expression(verdict.claim.clause_node)
        subject = f"{verdict.kind.upper()}  {clause}"
        if subject != before:
            yield from textwrap.wrap(subject, WIDTH, initial_indent="  ", subsequent_indent="    ")
        before = subject
        line = f"{verdict.question}: {verdict.text()}  ({verdict.seconds * 1000:.0f} ms)"
        yield from textwrap.wrap(line, WIDTH, initial_indent="    ", subsequent_indent="      ")


def _plain(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
