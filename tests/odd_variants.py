"""Random variants that nobody would write, and calls of them: what a compiler meets once it is used.

`OddText(seed)` writes a `.attn` text, from all operations and kinds of look-ups of the language; `odd_call` draws sizes
and what the text needs; `drawn` is both, and `agree` says whether an answer is right. Equal seeds give equal results.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from portable_support import Problem, Result, program_of
from torch import Tensor

from attn_dsl.ir.variant import Variant

HEAD = "attention odd(n: int, w: int = 3, c: float = 0.7, g: float, flag: bool, const m: int = 2)"
TENSORS = {
    "signs": ("int8", ("B", "KV")), "counts": ("uint8", ("KV",)), "small": ("int16", ("B",)),
    "numbers": ("int32", ("B", "H")), "rows": ("int64", ("Q",)), "seen": ("bool", ("B", "KV")),
    "keep": ("bool", ("KV",)), "pairs": ("bool", ("Q", "KV")), "half": ("float16", ("H", "5")),
    "brain": ("bfloat16", ("KV",)), "one": ("float32", ("1",)), "corner": ("float32", ("1", "1")),
    "double": ("float64", ("N",)), "distances": ("float32", ("H", "9")), "heads": ("float32", ("B", "H")),
    "queries": ("float64", ("H", "Q")), "groups": ("float32", ("HK", "KV")),
    "whole": ("float32", ("B", "H", "Q", "KV")),
}  # fmt: skip
OF_POSITIONS = {"rows", "pairs", "queries", "whole"}
"""Read at `q`, so that a call must not begin behind 0."""
INTEGERS = ("int8", "uint8", "int16", "int32", "int64")
FLOATS = ("float16", "bfloat16", "float32", "float64")
OWN = {"B": "b", "H": "h", "HK": "hk", "Q": "q", "KV": "k"}


class OddText:
    """`text`, and the names of the captured tensors that it declares in `used`."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.used: set[str] = set()
        self.variables: list[str] = []
        self.place = "score"
        lines = []
        for place, share, write in (("score", 0.85, self.real), ("mask", 0.8, self.truth), ("sink", 0.35, self.real)):
            if self.random.random() < share:
                self.place = place
                lines.append(f"{place} = {write(self.random.randint(0, 3) if place == 'sink' else self.depth)}")
        declared = (f"tensor {name}: {d}[{', '.join(e)}]" for name, (d, e) in TENSORS.items() if name in self.used)
        self.text = "\n".join([HEAD, *declared, *lines]) + "\n"

    @property
    def depth(self) -> int:
        return self.random.randint(1, 4)

    def pick(self, *choices: str) -> str:
        return self.random.choice(choices)

    def ends(self, depth: int) -> bool:
        return depth <= 0 or self.random.random() < 0.15

    def look_up(self, *types: str) -> str | None:
        per_head = {"B", "H", "HK", "N", "1", "5", "9"}
        names = [n for n, (d, e) in TENSORS.items() if d in types and (self.place != "sink" or per_head.issuperset(e))]
        if not names:
            return None
        name = self.random.choice(names)
        self.used.add(name)
        return f"{name}[{', '.join(map(self.index, TENSORS[name][1]))}]"

    def index(self, extent: str) -> str:
        own = OWN.get(extent)
        if own is not None and self.random.random() < 0.5:
            return own
        return self.pick("0", f"({self.integer(1)}) % {extent}", f"clamp({self.integer(1)}, 0, {extent} - 1)")

    def reduction(self, operations: tuple[str, ...], body: Callable[[], str]) -> str:
        name, low = f"d{len(self.variables)}", self.random.randint(-2, 2)
        high, operation = low + self.random.randint(1, 4), self.pick(*operations)
        self.variables.append(name)
        inner = body()
        self.variables.pop()
        return f"{operation}({name} in {low}..{high}: {inner})"

    def integer(self, depth: int) -> str:
        x, y = (lambda: self.integer(depth - 1)), (lambda: self.integer(0))
        if self.ends(depth):
            positions = () if self.place == "sink" else ("q", "k", "q", "k", "q", "k")
            literal = str(self.random.randint(-3, 9))
            return self.pick(literal, *"bhnwm", "hk", "Q", "KV", "H", "HK", "B", "D", *self.variables, *positions)
        match self.pick("+", "-", "*", "//", "%", "**", "neg", "two", "one", "clamp", "if", "round", "load", "reduce"):
            case ("+" | "-" | "*") as operator:
                return f"({x()} {operator} {x()})"
            case ("//" | "%") as operator:
                return f"({x()} {operator} {self.pick('1', '2', '3', 'w', 'm', 'KV', 'H', '7')})"
            case "**":
                return f"({x()} ** {self.pick('0', '1', '2', '3')})"
            case "neg":
                return f"(-{x()})"
            case "two":
                return f"{self.pick('min', 'max')}({x()}, {x()})"
            case "one":
                return f"{self.pick('abs', 'sign')}({x()})"
            case "clamp":
                return f"clamp({x()}, {y()}, {y()})"
            case "if":
                return f"({x()} if {self.truth(depth - 1)} else {x()})"
            case "round":
                return f"{self.pick('floor', 'ceil')}(clamp({self.real(depth - 1, score=False)}, -50.0, 50.0))"
            case "load":
                return self.look_up(*INTEGERS) or x()
            case _:
                return self.reduction(("sum", "min", "max"), x)

    def truth(self, depth: int) -> str:
        x, y = (lambda: self.truth(depth - 1)), (lambda: self.integer(depth - 1))
        if self.ends(depth):
            return self.pick("true", "false", "flag", "flag", "flag" if self.place == "sink" else "q >= k")
        compare = self.pick("<", "<=", ">", ">=", "==", "!=")
        match self.pick("int", "int", "int", "chain", "and", "or", "not", "if", "load", "load", "any", "float", "same"):
            case "int":
                return f"({y()} {compare} {y()})"
            case "chain":
                return f"({y()} {self.pick('<', '<=')} {y()} {self.pick('<', '<=')} {y()})"
            case ("and" | "or") as operator:
                return f"({x()} {operator} {x()})"
            case "not":
                return f"(not {x()})"
            case "if":
                return f"({x()} if {x()} else {x()})"
            case "load":
                return self.look_up("bool") or x()
            case "any":
                return self.reduction(("any", "all"), x)
            case "float":
                return f"({self.real(depth - 1, score=False)} {compare} {self.real(depth - 1, score=False)})"
            case _:
                return f"({x()} {self.pick('==', '!=')} {x()})"

    def real(self, depth: int, score: bool = True) -> str:
        def x() -> str:
            return self.real(depth - 1, score)

        if self.ends(depth):
            scores = ("score",) * 5 if score and self.place == "score" else ()
            return self.pick("0.0", "1.0", "-1.0", "0.5", "3.25", "1", "c", "g", "c", "g", *scores)
        match self.pick(
            "+", "-", "*", "/", "two", "f", "f", "f", "if", "load", "load", "load", "cast", "sum", "**", "%", "clamp",
        ):  # fmt: skip
            case ("+" | "-" | "*") as operator:
                return f"({x()} {operator} {x()})"
            case "/":
                return f"({x()} / (1.0 + abs({x()})))"
            case "two":
                return f"{self.pick('min', 'max')}({x()}, {x()})"
            case "if":
                return f"({x()} if {self.truth(depth - 1)} else {x()})"
            case "load":
                return self.look_up(*FLOATS) or x()
            case "cast":
                return f"({self.integer(depth - 1)} * {self.pick('0.5', '1.0', 'c')})"
            case "sum":
                return self.reduction(("sum", "min", "max"), x)
            case "**":
                return f"((0.5 + abs({x()})) ** {self.pick('2', '0.5', 'tanh(g)', '3.0', '0', '1')})"
            case "%":
                return f"({x()} {self.pick('%', '//')} 1.75)"
            case "clamp":
                return f"clamp({x()}, -1.0, {self.pick('c', '1.0', 'g')})"
            case _:
                return self.function(x())

    def function(self, x: str) -> str:
        """A function of the language, kept to where its values have a few digits to compare."""
        name = self.pick(
            "abs", "sign", "sqrt", "rsqrt", "exp", "exp2", "log", "log2", "log1p", "tanh", "sigmoid", "silu", "relu",
            "gelu", "sin", "cos", "tan", "erf",
        )  # fmt: skip
        if name in ("sqrt", "rsqrt", "log", "log2", "log1p"):
            return f"{name}(abs({x}) + 0.5)"
        return f"{name}(tanh({x}))" if name in ("exp", "exp2", "tan") else f"{name}({x})"


@dataclass(frozen=True)
class OddCall:
    query: Tensor
    key: Tensor
    value: Tensor
    bindings: dict[str, Any]
    q_offset: int | Tensor


def odd_call(
    variant: Variant, seed: int, dtype: torch.dtype, lengths: tuple[int, ...], dims: tuple[int, ...] = (1, 3, 16)
) -> OddCall:
    """Random arguments of a variant of `OddText`, its lengths and head dimensions among those given."""
    draw, make = random.Random(seed), torch.Generator().manual_seed(seed)
    kv_heads = draw.choice([1, 1, 2])
    sizes = {"B": draw.choice([1, 2]), "HK": kv_heads, "H": kv_heads * draw.choice([1, 2]), "N": draw.choice([1, 4])}
    sizes |= {"Q": draw.choice(lengths), "KV": draw.choice(lengths)}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64)

    def captured(kind: str, shape: list[int]) -> Tensor:
        if kind == "bool":
            return torch.rand(shape, generator=make) < 0.6
        if kind in INTEGERS:
            return torch.randint(0 if kind == "uint8" else -4, 6, shape, generator=make).to(getattr(torch, kind))
        return normal(*shape).to(getattr(torch, kind))

    dim, value_dim = draw.choice(dims), draw.choice((1, 2, 16) if 1 in dims else dims)
    inputs = [
        normal(sizes["B"], sizes[heads], sizes[length], width).to(dtype)
        for heads, length, width in (("H", "Q", dim), ("HK", "KV", dim), ("HK", "KV", value_dim))
    ]
    bindings: dict[str, Any] = {"n": draw.randint(-3, 6), "flag": draw.random() < 0.5, "w": draw.randint(1, 5)}
    bindings["g"] = draw.choice([1.0, 0.5, -0.25, 2.0, 0.75])
    bindings["c"] = draw.choice([1.0, 0.5, 0.3125])
    names = {tensor.name for tensor in variant.tensors}
    for name in sorted(names):
        kind, extents = TENSORS[name]
        bindings[name] = captured(kind, [sizes[e] if e in sizes else int(e) for e in extents])
    behind: int | Tensor = draw.choice([0, 3])
    if sizes["B"] == 2 and draw.random() < 0.3:
        behind = torch.tensor([0, 4])
    return OddCall(*inputs, bindings, 0 if names & OF_POSITIONS else behind)


STORED = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""What a gradient loses that is stored so."""


def agree(found: Result, truth: Result, rough: Result, tolerance: float, text: str) -> None:
    """Each output and gradient within `tolerance`, and within what `rough`, plain float32 arithmetic, loses thirtyfold.

    Gradients that are not finite in truth are not looked at.
    """
    named = {"out": (found.out, truth.out, rough.out), "lse": (found.lse, truth.lse, rough.lse)}
    named |= {f"grad of {n}": (grad, truth.grads[n], rough.grads[n]) for n, grad in found.grads.items()}
    for name, (mine, exact, plain) in named.items():
        infinite = exact.isinf()
        if name.startswith("grad") and not exact.isfinite().all():
            continue
        assert torch.equal(mine.isinf(), infinite), f"{name}: infinities differ\n{text}"
        error, loss = (torch.where(infinite, 0.0, x.double() - exact.double()).abs().max() for x in (mine, plain))
        largest = torch.where(infinite, 0.0, exact).abs().max().clamp(min=1.0)
        allowed = max(tolerance, STORED.get(mine.dtype, 0.0)) * largest + 30 * loss
        assert error <= allowed, f"{name}: error {error:.3g} of {largest:.3g}\n{text}"


def drawn(
    seed: int, dtype: torch.dtype, lengths: tuple[int, ...], dims: tuple[int, ...] = (1, 3, 16)
) -> tuple[Problem, str]:
    """A problem and its text. Fails where the compiler refuses the text, or the answer is no number: tests leave such
    seeds out."""
    text = OddText(seed).text
    program = program_of(text)
    call = odd_call(program.variant, seed, dtype, lengths, dims)
    names = {p.name for p in program.variant.parameters} | {t.name for t in program.variant.tensors}
    bindings = {name: value for name, value in call.bindings.items() if name in names}
    problem = Problem(program, call.query, call.key, call.value, bindings, call.q_offset)
    lse = problem.truth().lse
    assert not (lse.isnan() | (lse == torch.inf)).any() and (lse[lse.isfinite()].abs() < 1e3).all(), text
    return problem, text
