"""Hand every claim of a proof to solvers that share no code with it: z3 and isl.

    sound   where the condition holds, no pair of the tile satisfies the clause
    exact   where it does not hold, some pair does
    cover   the clauses together are the mask: what it keeps (or hides) satisfies one of them, and what satisfies one
            that is called exact is kept (or hidden)

z3 answers what can be put as "this never holds"; isl answers all three where the mask is affine. Parameters, lengths
and tile positions are symbols, so that an answer is for every tile of every call; where a solver has none, the question
is put again with the parameters set to numbers. A counterexample counts only once plain integers confirm it, and "don't
know" never counts as proof.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from itertools import product
from types import MappingProxyType

from attn_dsl.errors import AttnError
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import K, Load, Node, Q
from attn_dsl.passes.concrete import evaluate
from attn_dsl.passes.fold import Scalar, constant
from attn_dsl.passes.monotone import K0, K1, Q0, Q1
from attn_dsl.passes.prove import Claim, Proof
from attn_dsl.passes.verify_questions import Question, questions, smaller

TIMEOUT = 2.0
"""Seconds that z3 has for one question."""
SMALL = (8, 64, 256)
"""Tile sizes among which a counterexample to exactness is looked for, every pair of it."""
_NO_VALUES: Mapping[str, Scalar] = MappingProxyType({})


class Outcome(Enum):
    PROVED = "proved"
    REFUTED = "refuted"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Verdict:
    """What one solver says to one question.

    kind            "empty": about a clause of the mask, or all of them; "full": about those of its negation
    claim           what the question is about; None for the cover
    given           the values that parameters were set to; without any, the answer holds for all
    reason          why there is no answer
    counterexample  where the claim is wrong: `{"q": 128, "k": 127, "window": 1}`
    """

    solver: str
    question: str
    kind: str
    claim: Claim | None
    outcome: Outcome
    seconds: float
    given: Mapping[str, Scalar] = field(default_factory=dict)
    reason: str = ""
    counterexample: Mapping[str, int] = field(default_factory=dict)

    def text(self) -> str:
        """One line: `z3 refutes it: q=128, k=127, window=1`."""
        match self.outcome:
            case Outcome.PROVED:
                return f"{self.solver} proves it" + _listed(" for ", self.given)
            case Outcome.REFUTED:
                return f"{self.solver} refutes it: " + _listed("", {**self.counterexample, **self.given})
            case Outcome.UNKNOWN:
                return f"{self.solver} does not know: {self.reason}"


def _listed(before: str, values: Mapping[str, Scalar]) -> str:
    return before + ", ".join(f"{name}={str(value).lower()}" for name, value in values.items()) if values else ""


def verify(proof: Proof, values: Mapping[str, Scalar] = _NO_VALUES, *, timeout: float = TIMEOUT) -> tuple[Verdict, ...]:
    """Every question about a proof to every solver that can be asked it; `values` are for the parameters.

    A refuted claim is a verdict, not an exception. Raises AttnError where z3 or islpy is not installed.
    """
    for module in ("z3", "islpy"):
        if find_spec(module) is None:
            raise AttnError(f"verification needs {module}: pip install attn-dsl[verify]")
    return tuple(_Verification(proof, values, timeout).run())


Answer = tuple[Outcome, str, Mapping[Node, int]]


@dataclass(frozen=True)
class _Verification:
    proof: Proof
    values: Mapping[str, Scalar]
    timeout: float

    def run(self) -> Iterator[Verdict]:
        for question in questions(self.proof):
            if question.name != "exact":
                yield self.verdict("z3", self.ask_z3, question)
            yield self.verdict("isl", self.ask_isl, question)

    def verdict(self, solver: str, ask: Callable[[Question], Answer], question: Question) -> Verdict:
        """The answer with symbols; where there is none, the answer with numbers for the parameters that have one."""
        start = time.perf_counter()
        outcome, reason, point = ask(question)
        given = {p: constant(self.values[p.name], p.type) for p in question.parameters if p.name in self.values}
        if outcome is Outcome.UNKNOWN and given:
            outcome, reason, point = ask(question.given(given))
        else:
            given = {}
        return Verdict(
            solver,
            question.name,
            question.kind,
            question.claim,
            outcome,
            time.perf_counter() - start,
            {p.name: value.value for p, value in given.items()},
            reason,
            {infix(node): value for node, value in point.items()},
        )

    def ask_z3(self, question: Question) -> Answer:
        from attn_dsl.passes.verify_z3 import Z3

        conditions = [*question.pair, question.goal]
        found = Z3(conditions, frozenset(question.leaves), question.positive).find(self.timeout)
        if isinstance(found, str):
            return Outcome.UNKNOWN, found, {}
        return _confirmed(question, found)

    def ask_isl(self, question: Question) -> Answer:
        from attn_dsl.passes.verify_islpy import Islpy, NoAnswer

        try:
            isl = Islpy(question.leaves)
            if question.name != "exact":
                return _confirmed(question, isl.find([*question.pair, question.goal]))
            pair, tile = [*question.pair, question.clause], [*question.tile, question.goal]
            found = isl.find_tile(tile, pair)
            sizes = SMALL if found is not None else ()
            small = (point for size in sizes if (point := isl.find_tile([*tile, *smaller(size)], pair)) is not None)
            return _confirmed(question, next(small, found))
        except NoAnswer as why:
            return Outcome.UNKNOWN, str(why), {}


def _confirmed(question: Question, point: Mapping[Node, int] | None) -> Answer:
    """What a solver has found, looked at with plain integers."""
    if point is None:
        return Outcome.PROVED, "", {}
    if why := _is_imagined(point):
        return Outcome.UNKNOWN, f"no counterexample but one that imagines {why}", {}
    if question.name == "exact" and (point[Q1] - point[Q0]) * (point[K1] - point[K0]) > SMALL[-1] ** 2:
        return Outcome.UNKNOWN, "no counterexample but one that is too large to look at", {}
    if _holds(question, point):
        return Outcome.REFUTED, "", point
    return Outcome.UNKNOWN, "no counterexample but one that divides by zero", {}


def _holds(question: Question, point: Mapping[Node, int]) -> bool:
    """Whether a point is a counterexample."""
    try:
        if not all(evaluate(node, point) for node in (*question.tile, question.goal)):
            return False
        return question.name != "exact" or not any(evaluate(question.clause, pair) for pair in _pairs(point))
    except ZeroDivisionError:
        return False


def _is_imagined(point: Mapping[Node, int]) -> str:
    """What a solver made up that a call may not be able to bring about: results of floats, elements of tensors."""
    for node in point:
        if node.children and not isinstance(node, Load):
            return f"a value of `{infix(node)}`"
    seen: dict[tuple[object, ...], int] = {}
    for node, value in point.items():
        if isinstance(node, Load):
            place = (node.tensor, *(evaluate(index, point) for index in node.indices))
            if seen.setdefault(place, value) != value:
                return f"two values of `{infix(node)}`"
    return ""


def _pairs(tile: Mapping[Node, int]) -> Iterator[dict[Node, int]]:
    for q, k in product(range(tile[Q0], tile[Q1] + 1), range(tile[K0], tile[K1] + 1)):
        yield {**tile, Q: q, K: k}
