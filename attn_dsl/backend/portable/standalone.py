"""One file for one variant that runs with torch and triton alone: kernels, the variant's functions, launchers.

Definitions are copied as they stand in this package, those that the variant needs, in their order; what is written here
is only the file's own `attention(query, key, value, ...)`. Gradients are those of query, key, value and of captured
float tensors; parameters are numbers.
"""

from __future__ import annotations

import ast
import inspect
import keyword
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

import attn_dsl
from attn_dsl.backend.execute import Program
from attn_dsl.backend.portable import alone, backward, device, forward, host, tiles, width
from attn_dsl.backend.portable.emit import Emitted
from attn_dsl.backend.printer import emit
from attn_dsl.backend.python_dialect import PythonDialect
from attn_dsl.errors import BindingError
from attn_dsl.ir.nodes import Size
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Variant

FORWARD = {
    "SCORE": "score", "FULL_SCORE": "full_score", "FACTOR": "factor", "SLOPE": "slope", "MASK": "mask",
    "KEY_MASK": "key_mask", "ROW": "row_term", "SINK": "sink", "KV_RANGES": "kv_ranges", "SKIP": "kv_skip",
}  # fmt: skip
DELTA = {"SINK": "sink", "ROW": "row_term", "SINK_GRAD": "sink_grad", "SCATTER": "add_sink"}
_BOTH = {
    "SCORE": "score", "FULL_SCORE": "full_score", "FACTOR": "factor", "SLOPE": "slope", "MASK": "mask",
    "KEY_MASK": "key_mask", "QUERY_MASK": "query_mask",
}  # fmt: skip
KEYS = {
    **_BOTH, "Q_RANGES": "q_ranges", "SKIP": "q_skip", "KEY_GRAD": "key_grad", "FULL_KEY_GRAD": "full_key_grad",
    "SCATTER": "add_key_sums",
}  # fmt: skip
QUERIES = {
    **_BOTH, "KV_RANGES": "kv_ranges", "SKIP": "kv_skip", "QUERY_GRAD": "query_grad",
    "FULL_QUERY_GRAD": "full_query_grad", "SCATTER": "add_query_sums", "SCATTER_PAIRS": "add_pairs",
    "SCATTER_FULL_PAIRS": "add_full_pairs",
}  # fmt: skip
"""The emitted functions of each kernel, by the names of its arguments."""

IMPORTS = """import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
"""


def functions(
    program: Program,
    which: str = "forward",
    dtype: torch.dtype = torch.bfloat16,
    capability: tuple[int, int] | None = None,
) -> str:
    """The variant's functions alone, as the portable kernels call them in a pass; the forward functions of the Hopper
    kernels behind those, where the dtype has such and `capability` is theirs."""
    variant = program.variant
    wanted = [t.name for t in variant.tensors if t.dtype.type is Type.FLOAT] if which == "backward" else []
    emitted = program.kernels.text(frozenset(wanted), fast_tanh=dtype.itemsize == 2)
    names = {*FORWARD.values()} if which == "forward" else {*DELTA.values(), *KEYS.values(), *QUERIES.values()}
    known = _definitions(emitted.source)
    needed = _needed([known], names)
    text = "\n\n\n".join(definition.text for name, definition in known.items() if name in needed) + "\n"
    if which == "backward" or capability != (9, 0) or dtype.itemsize != 2:
        return text
    return f"# portable kernels\n\n\n{text}\n\n# Hopper kernels\n{program.hopper.source()}"


def standalone(
    program: Program,
    which: str = "forward",
    dtype: torch.dtype = torch.bfloat16,
    capability: tuple[int, int] | None = None,
) -> str:
    """The text of the file.

    which: `forward`, or `backward` for both passes. dtype: in 16 bits `tanh` is the hardware's. capability: choose
    tiles for this compute capability instead of that of the GPU at hand.

    Raises BindingError for float64, which the kernels do not compute in.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise BindingError(f"`dtype`: expected float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}")
    variant, both = program.variant, which == "backward"
    floats = [i for i, tensor in enumerate(variant.tensors) if tensor.dtype.type is Type.FLOAT] if both else []
    wanted = [variant.tensors[i].name for i in floats]
    emitted = program.kernels.text(frozenset(wanted), fast_tanh=dtype is not torch.float32)
    own = _own_functions(program, emitted, both, capability)
    parts = [
        ("Arithmetic, loads and ranges", _of_module(device)),
        (f"What the compiler made of `{variant.name}`", _definitions(emitted.source)),
        ("Kernels", _of_module(forward) | (_of_module(backward) if both else {})),
        ("Tile shapes", _of_module(tiles)),
        ("Launchers", _of_module(host) | _of_module(alone)),
        ("The call", _definitions(own)),
    ]
    needed = _needed([part for _, part in parts], _definitions(own))
    text = f'"""{_summary(program, both)}"""\n\n# ruff: noqa\n{IMPORTS}'
    for title, definitions in parts:
        chosen = [definition.text for name, definition in definitions.items() if name in needed]
        if chosen:
            text += f"\n\n# {'-' * 64} {title}\n\n\n" + "\n\n\n".join(dict.fromkeys(chosen)) + "\n"
    return text


def _summary(program: Program, both: bool) -> str:
    variant = program.variant
    arguments = ", ".join(["query", "key", "value", *_names(variant)[0].values()])
    return f"""Attention variant `{variant.name}`: {"forward and backward" if both else "forward"} kernels and their launch.

    out, lse = attention({arguments}, ...)

Written by attn-dsl {attn_dsl.__version__}; needs torch and triton only.
"""  # noqa: E501


# ---------------------------------------------------------------- definitions of a module


@dataclass(frozen=True)
class Definition:
    """A definition as it was written, and every name that stands in it."""

    text: str
    uses: frozenset[str]


def _of_module(module: ModuleType) -> dict[str, Definition]:
    return _definitions(inspect.getsource(module))


def _definitions(source: str) -> dict[str, Definition]:
    """Functions, classes and constants by name; a constant keeps the text that explains it, and comments before it."""
    lines, found = source.splitlines(), dict[str, Definition]()
    body = ast.parse(source).body
    for i, node in enumerate(body):
        names = _bound(node)
        if not names:
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1
        while first > 0 and lines[first - 1].startswith("# ") and not lines[first - 1].startswith("# --"):
            first -= 1
        last = node.end_lineno or node.lineno
        explained = isinstance(node, ast.Assign | ast.AnnAssign) and i + 1 < len(body)
        if explained and isinstance(after := body[i + 1], ast.Expr) and isinstance(after.value, ast.Constant):
            last = after.end_lineno or last
        uses = frozenset(part.id for part in ast.walk(node) if isinstance(part, ast.Name))
        definition = Definition("\n".join(lines[first:last]).strip("\n"), uses)
        found |= dict.fromkeys(names, definition)
    return found


def _bound(node: ast.stmt) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case _:
            return []


def _needed(parts: Sequence[Mapping[str, Definition]], roots: Iterable[str]) -> set[str]:
    """What the roots use, and what that uses."""
    known: dict[str, Definition] = {}
    for part in parts:
        known |= part
    needed: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in known and name not in needed:
            needed.add(name)
            waiting += known[name].uses
    return needed


# ---------------------------------------------------------------- the file's own functions


def _own_functions(program: Program, emitted: Emitted, both: bool, capability: tuple[int, int] | None) -> str:
    variant, binder = program.variant, program.binder
    given = [
        f"forward={_constants(FORWARD, emitted)}",
        f"reach={width.reach(variant.roots)}",
        f"gathers={program.kernels.gathers}",
    ]
    if both:
        names = [tensor.name for tensor in variant.tensors]
        given += [
            f"delta={_constants(DELTA, emitted)}",
            f"keys={_constants(KEYS, emitted, TOTALS=emitted.key_totals)}",
            f"queries={_constants(QUERIES, emitted, TOTALS=emitted.query_totals)}",
            f"targets={tuple(map(names.index, emitted.targets))}",
        ]
    texts = ["FUNCTIONS = Functions(\n" + "".join(f"    {item},\n" for item in given) + ")\n"]
    for name, results in (("extents", [t.extents for t in variant.tensors]), ("divisors", binder.divisors)):
        if results:
            texts.append(emit(name, ("scalars",), tuple(results), binder.signature, PythonDialect()))
    texts.append(_attention(program, both, capability))
    return "\n\n".join(texts)


def _constants(names: Mapping[str, str], emitted: Emitted, **more: int) -> str:
    found = [f"{key}={emitted.function(name)}" for key, name in names.items()]
    found += [f"{key}={value}" for key, value in more.items()]
    lines = textwrap.wrap(", ".join(found), 100)
    return "dict(\n" + "".join(f"        {line}\n" for line in lines) + "    )"


def _attention(program: Program, both: bool, capability: tuple[int, int] | None) -> str:
    """`attention(query, key, value, tensors..., *, parameters..., scale=None, q_offset=0)`."""
    variant = program.variant
    tensors, parameters = _names(variant)
    arguments = [
        "query: Tensor",
        "key: Tensor",
        "value: Tensor",
        *(f"{name}: Tensor" for name in tensors.values()),
        "*",
    ]
    ordered = sorted(variant.parameters, key=lambda p: p.default is not None)
    for p in ordered:
        arguments.append(f"{parameters[p.name]}: {_TYPES[p.type]}" + ("" if p.default is None else f" = {p.default!r}"))
    arguments += ["scale: float | None = None", "q_offset: int | Tensor = 0"]
    sizes = [_first(variant, size) for size in program.kernels.extents]
    shapes = "".join(f"{name}: {_declared(variant, declared)}\n" for declared, name in tensors.items())
    target = "" if capability is None else f", capability={capability}"
    body = f'''
"""(out [B, H, Q, DV], lse [B, H, Q] float32) of query [B, H, Q, D], key [B, HK, KV, D], value [B, HK, KV, DV].

{shapes}scale: factor of the logits, 1 / sqrt(D) unless given. q_offset: position of the first query, or int64 [B].
{"Differentiable in query, key, value and float tensors." if both else "Not differentiable."}
"""
key, value = checked(query, key, value)
scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
parameters, tensors = {_tuple(parameters.values())}, {_tuple(tensors.values())}
call = Call(query, key, value, parameters, tensors, {_tuple(sizes)}, scale, q_offset{target})
'''
    if tensors:
        body += """for tensor, shape in zip(tensors, extents((*parameters, *call.sizes)), strict=True):
    if tuple(tensor.shape) != shape:
        raise ValueError(f"expected a tensor of shape {shape}, got {tuple(tensor.shape)}")
"""
    if program.binder.divisors:
        body += """if min(divisors((*parameters, *call.sizes))) <= 0:
    raise ValueError(f"a parameter that divides is not positive: {parameters}")
"""
    differentiable = "Differentiable.apply(FUNCTIONS, call, query, key, value, *tensors)"
    body += f"return {differentiable if both else 'run_forward(FUNCTIONS, call)[:2]'}\n"
    whole = ", ".join(argument.replace(" ", "\0") for argument in arguments)  # lines break between arguments only
    head = textwrap.fill(whole, 110, initial_indent="    ", subsequent_indent="    ").replace("\0", " ")
    return f"def attention(\n{head},\n) -> tuple[Tensor, Tensor]:{textwrap.indent(body, '    ')}"


def _names(variant: Variant) -> tuple[dict[str, str], dict[str, str]]:
    """The arguments for tensors and for parameters, by declared names; those that mean something else get a `_`."""
    taken = {*keyword.kwlist, "math", "Tensor", "parameters", "tensors", "call", "extents", "divisors", "shape"}
    taken |= {"tensor", "checked", "run_forward", "Call", "Differentiable", "FUNCTIONS", "zip", "tuple", "float", "min"}
    taken |= {"int", "bool", "ValueError"}

    def safe(name: str) -> str:
        plain = name if name.isascii() and name.isidentifier() else "x" + name.encode("ascii", "replace").hex()
        while plain in taken:
            plain += "_"
        taken.add(plain)
        return plain

    tensors = {tensor.name: safe(tensor.name) for tensor in variant.tensors}
    return tensors, {parameter.name: safe(parameter.name) for parameter in variant.parameters}


_TYPES = {Type.BOOL: "bool", Type.INT: "int", Type.FLOAT: "float"}


def _declared(variant: Variant, name: str) -> str:
    from attn_dsl.ir.infix import infix

    tensor = variant.tensor(name)
    return f"{tensor.dtype.value} [{', '.join(map(infix, tensor.extents))}]"


def _first(variant: Variant, size: Size) -> str:
    """Where a size that only tensors know is read from."""
    names = _names(variant)[0]
    for tensor in variant.tensors:
        if size in tensor.extents:
            return f"{names[tensor.name]}.shape[{tensor.extents.index(size)}]"
    raise BindingError(f"no tensor of `{variant.name}` has the extent {size.name} alone")


def _tuple(items: Iterable[str]) -> str:
    return f"({''.join(f'{item}, ' for item in items).rstrip()})"
