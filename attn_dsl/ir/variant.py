"""A checked attention variant: declarations and three expressions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from attn_dsl.errors import Source, Span
from attn_dsl.ir.nodes import Node
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
    locations: Mapping[Node, Span] = field(default=MappingProxyType({}), compare=False, repr=False)

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
