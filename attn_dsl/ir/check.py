"""The laws of a well-formed variant, checked after every pass. Node constructors see to types; the rest stands here."""

from __future__ import annotations

from collections.abc import Iterator

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import Node
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import InRange, Variant


class MalformedIR(Exception):
    """A pass broke the IR. Never the user's fault."""


def check_variant(variant: Variant) -> None:
    """Raise MalformedIR with the first law that the variant breaks."""
    for law in _broken(variant):
        raise MalformedIR(f"`{variant.name}`: {law}")


def _broken(variant: Variant) -> Iterator[str]:
    if variant.score.type is not Type.FLOAT:
        yield "the score is not a float"
    if variant.mask.type is not Type.BOOL or "score" in variant.mask.depends:
        yield "the mask is not a bool, or depends on the score"
    if variant.sink is not None and (variant.sink.type is not Type.FLOAT or not variant.sink.depends <= {"b", "h"}):
        yield "the sink is not a float over b and h"
    for tensor in variant.tensors:
        bounds = [bound for p in tensor.promises if isinstance(p, InRange) for bound in (p.low, p.high)]
        for node in (*tensor.extents, *bounds):
            if node.type is not Type.INT or node.depends:
                yield f"an extent or bound of `{tensor.name}` is not an int over sizes and parameters"
            yield from _undeclared(variant, node)
    for root in variant.roots:
        if free := root.depends - {*ir.INDEX_NAMES, "score"}:
            yield f"`{min(free)}` is used outside of its reduction"
        yield from _undeclared(variant, root)


def _undeclared(variant: Variant, root: Node) -> Iterator[str]:
    parameters = {p.name: p.type for p in variant.parameters}
    tensors = {t.name: t for t in variant.tensors}
    sizes = {e.name for t in variant.tensors for e in t.extents if isinstance(e, ir.Size)} | set(ir.SIZE_NAMES)
    for node in ir.post_order(root):
        match node:
            case ir.Param(name, kind) if parameters.get(name) is not kind:
                yield f"parameter `{name}`: {kind.value} is not declared"
            case ir.Size(name) if name not in sizes:
                yield f"size `{name}` is bound by no tensor"
            case ir.Load(name, indices, kind):
                declared = tensors.get(name)
                if declared is None or declared.dtype.type is not kind or len(declared.extents) != len(indices):
                    yield f"the look-up in `{name}` does not fit its declaration"
                elif any(index.type is not Type.INT for index in indices):
                    yield f"an index of `{name}` is not an int"
