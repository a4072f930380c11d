"""The printed form of the IR: static single assignment, one node a line, so that sharing shows.

    variant alibi
    %0 = score : float            # score
    %1 = index h : int            # h
    %2 = load slope[%1] : float   # h           alibi.attn:3:17
    ...
    tensor slope: float32[%9]
    score = %7
    mask = %8

Behind `#` stand what the node depends on and, where it is known, the place in the source. `parser.parse_ir` reads the
text back to the same nodes; it ignores the comments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from typing_extensions import assert_never

from attn_dsl.errors import Span
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import Node
from attn_dsl.ir.variant import InRange, Nondecreasing, Parameter, Promise, Tensor, Variant

_NO_LOCATIONS: Mapping[Node, Span] = {}
_COMMENT_COLUMN = 40


def print_ir(variant: Variant, *, locations: bool = True) -> str:
    """The text of a whole variant; `locations=False` leaves out where in the source each node came from."""
    expressions = {"score": variant.score, "mask": variant.mask}
    if variant.sink is not None:
        expressions["sink"] = variant.sink
    declared = [node for tensor in variant.tensors for node in _operands(tensor)]
    registers = number(*declared, *expressions.values())
    lines = [f"variant {variant.name}"]
    lines += [f"doc {json.dumps(line)}" for line in variant.doc.split("\n") if variant.doc]
    lines += [_parameter(parameter) for parameter in variant.parameters]
    lines += _definitions(registers, variant.locations if locations else _NO_LOCATIONS)
    lines += [_tensor(tensor, registers) for tensor in variant.tensors]
    lines += [f"{name} = {registers[root]}" for name, root in expressions.items()]
    return "\n".join(lines) + "\n"


def print_nodes(expressions: Mapping[str, Node], locations: Mapping[Node, Span] = _NO_LOCATIONS) -> str:
    """The text of a named set of expressions, with what they share defined once. Names are identifiers."""
    registers = number(*expressions.values())
    lines = _definitions(registers, locations)
    lines += [f"{name} = {registers[root]}" for name, root in expressions.items()]
    return "\n".join(lines) + "\n"


def number(*roots: Node) -> dict[Node, str]:
    """A register for each node under the roots, in the order of definition."""
    return {node: f"%{i}" for i, node in enumerate(ir.post_order(*roots))}


def operation(node: Node, registers: Mapping[Node, str]) -> str:
    """The right-hand side of the line that defines a node, without its type."""
    operands = [registers[child] for child in node.children]
    match cast(ir.Expr, node):
        case ir.Const(value):
            return f"const {literal(value)}"
        case ir.Param(name):
            return f"param {name}"
        case ir.Index(name):
            return f"index {name}"
        case ir.Size(name):
            return f"size {name}"
        case ir.Var(name):
            return f"var {name}"
        case ir.Score():
            return "score"
        case ir.Load(tensor):
            return f"load {tensor}[{', '.join(operands)}]"
        case ir.Select():
            return f"select {', '.join(operands)}"
        case ir.Cast():
            return f"cast {operands[0]}"
        case ir.Reduce(op, var):
            low, high, body = operands
            return f"reduce {op.value} {var.name} in {low}..{high}: {body}"
        case ir.Unary(op):
            return f"{op.value} {operands[0]}"
        case ir.Binary(op) | ir.Compare(op):
            return f"{op.value} {', '.join(operands)}"
        case unreachable:
            assert_never(unreachable)


def literal(value: bool | int | float) -> str:
    """`true`, `-3`, `0.1`, `inf`, `nan`: the shortest text that reads back to the same value."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _definitions(registers: Mapping[Node, str], locations: Mapping[Node, Span]) -> list[str]:
    lines = []
    for node, register in registers.items():
        text = f"{register} = {operation(node, registers)} : {node.type.value}"
        order = (*ir.INDEX_NAMES, "score")
        depends = sorted(node.depends, key=lambda name: (order.index(name) if name in order else len(order), name))
        comment = f"{' '.join(depends):11} {locations.get(node, '')}".rstrip()
        lines.append(f"{text:{_COMMENT_COLUMN}}# {comment}" if comment else text)
    return lines


def _parameter(parameter: Parameter) -> str:
    const = "const " if parameter.const else ""
    default = "" if parameter.default is None else f" = {literal(parameter.default)}"
    return f"{const}parameter {parameter.name}: {parameter.type.value}{default}"


def _operands(tensor: Tensor) -> list[Node]:
    bounds = [(p.low, p.high) for p in tensor.promises if isinstance(p, InRange)]
    return [*tensor.extents, *(node for pair in bounds for node in pair)]


def _tensor(tensor: Tensor, registers: Mapping[Node, str]) -> str:
    extents = ", ".join(registers[extent] for extent in tensor.extents)
    promises = "".join(f" {_promise(promise, registers)}" for promise in tensor.promises)
    return f"tensor {tensor.name}: {tensor.dtype.value}[{extents}]{promises}"


def _promise(promise: Promise, registers: Mapping[Node, str]) -> str:
    match promise:
        case Nondecreasing(axis):
            return f"nondecreasing over {axis}"
        case InRange(low, high):
            return f"in [{registers[low]}, {registers[high]})"
