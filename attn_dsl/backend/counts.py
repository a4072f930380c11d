"""Count the tiles and pairs of a call from its schedule: no dense mask, and memory that does not grow with the length.

Everything that a call knows is put into the expressions first, as numbers; what is left varies with the tile alone and
is evaluated for many rows of tiles at once. Refused, as `NotCounted`: what reads a tensor or size that was not given,
and what would take more evaluations than `MAX_EVALUATIONS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from attn_dsl.backend.cpu.relative import RELATIVE, ByDistance, parts
from attn_dsl.backend.picture import COLUMNS, Cell, Picture
from attn_dsl.backend.tile_kinds import Axis, Kinds, tile_kinds
from attn_dsl.errors import BindingError
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.ir.nodes import (
    FALSE,
    Binary,
    BinaryOp,
    Const,
    Index,
    Load,
    Node,
    Param,
    Size,
    Var,
    post_order,
    rewrite,
    substitute,
)
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.fold import Scalar, constant, folded
from attn_dsl.passes.monotone import Q0, Q1
from attn_dsl.passes.prove import Proof
from attn_dsl.passes.schedule import Schedule, TileRanges
from attn_dsl.passes.simplify import simplify_node
from attn_dsl.passes.summaries import Claims, reads_at_positions

MAX_EVALUATIONS = 1 << 29
"""Of one expression, for one count: some seconds to half a minute."""
CHUNK = 1 << 15
"""Elements evaluated at once: what stays in the cache from one operation to the next."""
DISTANCE = Var("distance")


class NotCounted(Exception):
    """A count is not made; carries the reason."""


@dataclass(frozen=True)
class Call:
    """A call as far as counts depend on it: those of one batch entry and one head."""

    variant: Variant
    q_len: int
    kv_len: int
    q_offset: int
    block: tuple[int, int]
    parameters: Mapping[str, Scalar]
    sizes: Mapping[str, int]
    tensors: Mapping[str, torch.Tensor]
    batch: int = 0
    head: int = 0

    @property
    def rows(self) -> int:
        return -(-self.q_len // self.block[0])

    @property
    def columns(self) -> int:
        return -(-self.kv_len // self.block[1])

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The sizes that are known; a tensor binds the extents that are names."""
        sizes = {**self.sizes, "Q": self.q_len, "KV": self.kv_len}
        for tensor in self.variant.tensors:
            if tensor.name not in self.tensors:
                continue
            shape = self.tensors[tensor.name].shape
            if len(shape) != len(tensor.extents):
                raise BindingError(f"tensor `{tensor.name}` has {len(shape)} axes, expected {len(tensor.extents)}")
            for extent, size in zip(tensor.extents, shape, strict=True):
                if isinstance(extent, Size):
                    sizes.setdefault(extent.name, size)
        return sizes

    def bind(self, root: Node, **variables: int) -> Node:
        """The expression with numbers for all that the call knows. Raises NotCounted where something is missing."""

        def number(node: Node) -> Node:
            match node:
                case Param(name) if name in self.parameters:
                    return constant(self.parameters[name], node.type)
                case Size(name) if name in self.numbers:
                    return Const(self.numbers[name])
                case Index("b"):
                    return Const(self.batch)
                case Index("h"):
                    return Const(self.head)
                case Index("hk") if {"H", "HK"} <= self.numbers.keys():
                    return Const(self.head // (self.numbers["H"] // self.numbers["HK"]))
                case Var(name) if name in variables:
                    return Const(variables[name])
                case Load(tensor, indices) if tensor in self.tensors and all(isinstance(i, Const) for i in indices):
                    return constant(
                        self._element(tensor, tuple(int(i.value) for i in indices if isinstance(i, Const))), node.type
                    )
                case _:
                    return folded(node)

        bound = rewrite(root, number)
        self._refuse_missing(bound)
        return simplify_node(bound)

    def _element(self, tensor: str, place: tuple[int, ...]) -> Scalar:
        shape = self.tensors[tensor].shape
        if not all(0 <= i < size for i, size in zip(place, shape, strict=True)):
            raise BindingError(f"`{tensor}` of shape {tuple(shape)} has no element {place}")
        return self.tensors[tensor][place].item()

    def _refuse_missing(self, bound: Node) -> None:
        for node in post_order(bound):
            match node:
                case Load(tensor) if tensor not in self.tensors:
                    raise NotCounted(f"it depends on tensor `{tensor}`, which was not given")
                case Size(name) | Param(name) | Index("hk" as name):
                    raise NotCounted(f"it depends on `{name}`, which was not given")
                case _:
                    pass

    def value(self, node: Node, shape: torch.Size, **variables: torch.Tensor) -> torch.Tensor:
        """A bound expression over `q k` and free variables, expanded to a shape."""
        env = Environment(indices=variables, variables=variables, tensors=self.tensors)
        with torch.no_grad():
            return evaluate(node, env, torch.tensor(False)).expand(shape)


@dataclass(frozen=True)
class TileCounts:
    """Tiles of each kind, the pairs in the visited ones, and those in the ones that need the mask."""

    empty: int
    partial: int
    full: int
    computed: int
    masked: int
    picture: Picture


def count_tiles(call: Call, schedule: Schedule, claims: Claims | None = None) -> TileCounts:
    """Classify every tile as the schedule does or, where there are claims, as these do. Raises NotCounted."""
    return _tiles(call, schedule, claims).counts()


def _tiles(call: Call, schedule: Schedule, claims: Claims | None) -> _Tiles:
    given = claims is not None and all(name in call.tensors for name in reads_at_positions(call.variant.mask))
    return _Tiles(call, schedule.kv) if claims is None or not given else _Listed(call, schedule.kv, claims)


class _Tiles:
    """The tiles of a call, by rows: in closed form or, where the schedule asks of single tiles, tile by tile."""

    def __init__(self, call: Call, ranges: TileRanges) -> None:
        self.call = call
        bind = partial(call.bind, block=call.block[1], q_offset=call.q_offset)
        self.segments = [(bind(s.begin), bind(s.end), s.masked) for s in ranges.segments]
        self.skip, self.full = bind(ranges.skip), bind(ranges.full)
        self.is_closed = self.skip is FALSE and self.full is FALSE
        self.edges = _edges(call.columns)

    def counts(self) -> TileCounts:
        call = self.call
        _refuse_long(call.rows * (len(self.edges) if self.is_closed else call.columns), "tiles to tell apart")
        lines = _edges(call.rows)
        cells = torch.zeros(len(lines) - 1, len(self.edges) - 1, 2, dtype=torch.int64)
        pairs = torch.zeros(2, dtype=torch.int64)
        narrow = call.columns * call.block[1] - call.kv_len
        for rows in self.chunks():
            found, last = self.in_cells(rows)
            cells.index_add_(0, torch.searchsorted(lines, rows, right=True) - 1, found)
            q0, q1 = self.positions(rows)
            pairs += ((q1 - q0 + 1)[:, None] * (found.sum(1) * call.block[1] - last * narrow)).sum(0)
        partial_tiles, full = cells.sum((0, 1)).tolist()
        area = torch.outer(lines.diff(), self.edges.diff())
        picture = Picture(_cells(cells, area), call.rows, call.columns)
        empty = call.rows * call.columns - full - partial_tiles
        return TileCounts(empty, partial_tiles, full, int(pairs.sum()), int(pairs[0]), picture)

    def chunks(self) -> Iterator[torch.Tensor]:
        """All rows of tiles, some at a time."""
        width = len(self.edges) if self.is_closed else self.call.columns
        return _ranges(0, self.call.rows, max(1, CHUNK * 8 // width))

    def positions(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last query of each row of tiles."""
        call = self.call
        q0 = call.q_offset + rows * call.block[0]
        return q0, (q0 + call.block[0] - 1).clamp(max=call.q_offset + call.q_len - 1)

    def intervals(self, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
        """Begin and end of each segment of the rows, `[rows, 1]`, and whether it is masked."""
        q0, q1 = (x[:, None] for x in self.positions(rows))
        for begin, end, masked in self.segments:
            limits = (self.call.value(node, q0.shape, q0=q0, q1=q1) for node in (begin, end))
            yield next(limits), next(limits), masked

    def in_cells(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Masked and full tiles of each cell, `[rows, cells, 2]`, and of the last column, `[rows, 2]`."""
        if not self.is_closed:
            kinds = self.kinds(rows)
            cell = torch.searchsorted(self.edges, torch.arange(self.call.columns), right=True) - 1
            found = kinds.new_zeros(len(rows), len(self.edges) - 1, 2, dtype=torch.int64)
            return found.index_add_(1, cell, kinds.to(torch.int64)), kinds[:, -1].to(torch.int64)
        left, right = self.edges[:-1], self.edges[1:]
        found = torch.zeros(len(rows), len(left), 2, dtype=torch.int64)
        last = torch.zeros(len(rows), 2, dtype=torch.int64)
        for begin, end, masked in self.intervals(rows):
            which = 0 if masked else 1
            found[..., which] += (torch.minimum(end, right) - torch.maximum(begin, left)).clamp(min=0)
            last[:, which] += ((begin < end) & (end == self.call.columns))[:, 0]
        return found, last

    def kinds(self, rows: torch.Tensor) -> torch.Tensor:
        """Whether each tile is masked, and whether it is full: bool `[rows, columns, 2]`."""
        call = self.call
        tile = torch.arange(call.columns)
        found = torch.zeros(len(rows), call.columns, 2, dtype=torch.bool)
        for begin, end, masked in self.intervals(rows):
            found[..., 0 if masked else 1] |= (begin <= tile) & (tile < end)
        q0, q1 = (x[:, None] for x in self.positions(rows))
        k0 = tile * call.block[1]
        k1 = (k0 + call.block[1] - 1).clamp(max=call.kv_len - 1)
        shape = found.shape[:2]
        full = call.value(self.full, shape, q0=q0, q1=q1, k0=k0, k1=k1) & found[..., 0]
        found = torch.stack((found[..., 0] & ~full, found[..., 1] | full), dim=-1)
        return found & ~call.value(self.skip, shape, q0=q0, q1=q1, k0=k0, k1=k1)[..., None]


class _Listed(_Tiles):
    """The tiles of a call by claims over what tensors hold."""

    def __init__(self, call: Call, ranges: TileRanges, claims: Claims) -> None:
        super().__init__(call, ranges)
        self.is_closed, self.claims = False, claims

    @cached_property
    def _kinds(self) -> Kinds:
        call = self.call
        _refuse_long(call.rows * call.columns, "tiles to tell apart")
        if self.claims.refined is not None:
            _refuse_long(call.q_len * call.kv_len, "pairs to ask the mask about")
        sizes, at = call.numbers, torch.tensor
        heads = sizes.get("H", 1) // sizes.get("HK", 1) or 1
        env = Environment(
            indices={
                name: at(number).view(1, 1, 1, 1)
                for name, number in (("b", call.batch), ("h", call.head), ("hk", call.head // heads))
            },
            variables={"q_offset": at(call.q_offset)},
            parameters=call.parameters,
            sizes=sizes,
            tensors=call.tensors,
        )
        rows = Axis(call.q_offset, call.q_len, call.block[0])
        with torch.no_grad():
            return tile_kinds(self.claims, call.variant.mask, env, rows, Axis(0, call.kv_len, call.block[1]))

    def kinds(self, rows: torch.Tensor) -> torch.Tensor:
        visited, full = self._kinds.visited[0, 0, rows], self._kinds.full[0, 0, rows]
        return torch.stack((visited & ~full, full), dim=-1)


def count_kept(
    call: Call, proof: Proof, schedule: Schedule, tiles: TileCounts | None, claims: Claims | None = None
) -> int:
    """The pairs that the mask keeps. Raises NotCounted.

    By distances where the mask is a function of `q - k`; else by the intervals of single queries where those are exact;
    else by evaluating the mask on the tiles that need it.
    """
    mask = ByDistance()(call.bind(call.variant.mask))
    if isinstance(mask, Const):
        return call.q_len * call.kv_len if mask.value else 0
    if mask in parts([mask]):
        return _kept_by_distance(call, substitute(mask, {RELATIVE: DISTANCE}))
    is_closed = _Tiles(call, schedule.kv).is_closed
    if is_closed and all(side.claim.exact and side.kv.exact for side in proof.visit):
        return _kept_by_row(call, schedule.kv)
    if tiles is None:
        raise NotCounted("the tiles are not counted")
    return tiles.computed - tiles.masked + _kept_by_pair(call, _tiles(call, schedule, claims), mask, tiles.masked)


def _kept_by_distance(call: Call, mask: Node) -> int:
    """Of the distances q - k, each occurs on one diagonal of the matrix."""
    _refuse_long(call.q_len + call.kv_len, "distances")
    total = 0
    for diagonal in _ranges(1 - call.kv_len, call.q_len, CHUNK):
        pairs = (diagonal + call.kv_len).clamp(max=call.q_len) - diagonal.clamp(min=0)
        keep = call.value(mask, diagonal.shape, distance=diagonal + call.q_offset)
        total += int((pairs * keep).sum())
    return total


def _kept_by_row(call: Call, ranges: TileRanges) -> int:
    """With tiles of 1 x 1, what is visited is what is kept."""
    _refuse_long(call.q_len, "rows")
    row: Node = Const(0)
    for segment in ranges.segments:
        length = Binary(BinaryOp.MAX, Binary(BinaryOp.SUB, segment.end, segment.begin), Const(0))
        row = Binary(BinaryOp.ADD, row, length)
    row = call.bind(substitute(row, {Q1: Q0}), block=1, q_offset=call.q_offset)
    chunks = _ranges(call.q_offset, call.q_offset + call.q_len, CHUNK)
    return sum(int(call.value(row, q0.shape, q0=q0).sum()) for q0 in chunks)


def _kept_by_pair(call: Call, tiles: _Tiles, mask: Node, pairs: int) -> int:
    """What the mask keeps of the tiles that need it."""
    _refuse_long(max(pairs, call.rows * call.columns), "pairs to ask the mask about")
    total = 0
    inside = torch.arange(call.block[1])
    for rows in tiles.chunks():
        for q0, q1, masked in zip(*tiles.positions(rows), tiles.kinds(rows)[..., 0], strict=True):
            q = torch.arange(int(q0), int(q1) + 1)[:, None]
            k = (masked.nonzero() * call.block[1] + inside).flatten()
            for some in torch.split(k[k < call.kv_len], max(1, CHUNK // len(q))):
                total += int(call.value(mask, torch.Size((len(q), len(some))), q=q, k=some[None, :]).sum())
    return total


def _ranges(start: int, end: int, step: int) -> Iterator[torch.Tensor]:
    """The integers `[start, end)`, `step` at a time."""
    for first in range(start, end, step):
        yield torch.arange(first, min(first + step, end))


def _refuse_long(evaluations: int, of: str) -> None:
    if evaluations > MAX_EVALUATIONS:
        raise NotCounted(f"there are {evaluations:,} {of}, more than {MAX_EVALUATIONS:,}")


def _edges(tiles: int) -> torch.Tensor:
    """Where the cells of a picture begin and end, for so many tiles."""
    cells = min(tiles, COLUMNS)
    return (torch.arange(cells + 1) * tiles + cells - 1) // cells


def _cells(found: torch.Tensor, area: torch.Tensor) -> tuple[tuple[Cell, ...], ...]:
    return tuple(
        tuple(Cell(full, masked, tiles - full - masked) for (masked, full), tiles in zip(line, areas, strict=True))
        for line, areas in zip(found.tolist(), area.tolist(), strict=True)
    )
