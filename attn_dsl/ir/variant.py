"""A checked attention variant: declarations and three expressions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from attn_dsl.errors import Source, Span
from attn_dsl.ir.nodes import Node, post_order, with_children
from attn_dsl.ir.types import DType, Type


@dataclass(frozen=True)
class Parameter:
    """A parameter of the header. `const` parameters are baked in when compiling, the others are run-time arguments."""

    name: str
    type: Type
    default: bool | int | float | None = None
    const: bool = False


@dataclass(frozen=True)
class Nondecreasing:
    """Promise: the tensor does not decrease along `axis`."""

    axis: int


@dataclass(frozen=True)
class InRange:
    """Promise: every element lies in `[low, high)`; the bounds are INT expressions over sizes and parameters."""

    low: Node
    high: Node


Promise = Nondecreasing | InRange


@dataclass(frozen=True)
class Tensor:
    """A tensor captured at the call. Extents are INT expressions over sizes and parameters."""

    name: str
    dtype: DType
    extents: tuple[Node, ...]
    promises: tuple[Promise, ...] = ()


@dataclass(frozen=True)
class Variant:
    """An attention variant as a typed expression graph.

    score  FLOAT, over `b h q k`, the incoming score, parameters, sizes and tensors
    mask   BOOL, without the incoming score; true keeps the pair
    sink   FLOAT over `b h`, or None: a logit that joins the softmax denominator of each row
    """

    name: str
    parameters: tuple[Parameter, ...]
    tensors: tuple[Tensor, ...]
    score: Node
    mask: Node
    sink: Node | None = None
    doc: str = ""
    source: Source | None = field(default=None, compare=False, repr=False)
    locations: Mapping[Node, Span] = field(default_factory=lambda: MappingProxyType({}), compare=False, repr=False)

    @property
    def roots(self) -> Iterator[Node]:
        """score, mask and, where there is one, sink."""
        yield self.score
        yield self.mask
        if self.sink is not None:
            yield self.sink

    def parameter(self, name: str) -> Parameter:
        return next(p for p in self.parameters if p.name == name)

    def tensor(self, name: str) -> Tensor:
        return next(t for t in self.tensors if t.name == name)


def rewrite_variant(variant: Variant, rule: Callable[[Node], Node]) -> Variant:
    """Apply `rule` to every node of a variant, operands first: expressions, extents and promises.

    A rewritten node keeps the source location of what it came from.
    """
    done: dict[Node, Node] = {}

    def new(root: Node) -> Node:
        for node in post_order(root):
            if node not in done:
                done[node] = rule(with_children(node, tuple(done[child] for child in node.children)))
        return done[root]

    def promise(old: Promise) -> Promise:
        return InRange(new(old.low), new(old.high)) if isinstance(old, InRange) else old

    score, mask = new(variant.score), new(variant.mask)
    sink = None if variant.sink is None else new(variant.sink)
    tensors = tuple(
        replace(t, extents=tuple(map(new, t.extents)), promises=tuple(map(promise, t.promises)))
        for t in variant.tensors
    )
    locations: dict[Node, Span] = {}
    for old, after in done.items():
        if old in variant.locations:
            locations.setdefault(after, variant.locations[old])
    return replace(variant, tensors=tensors, score=score, mask=mask, sink=sink, locations=MappingProxyType(locations))
