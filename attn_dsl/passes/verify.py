"""Hand every claim of a proof to solvers that share no code with it: z3 and isl.

    sound   where the condition holds, no pair of the tile satisfies the clause
    exact   where it does not hold, some pair does
    cover   the clauses together are the mask: a pair that the mask keeps satisfies one of them, and, for those that
            are called exact, the other way round

z3 answers what can be put as "this never holds", with parameters, lengths and tile positions symbolic. isl answers all
three where the mask is affine. A question that a solver cannot answer so is put again with the parameters set to
`values`. An answer that a claim is wrong counts only once plain integers confirm it; no answer never counts as proof.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import product
from types import MappingProxyType

from attn_dsl.errors import AttnError
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import (
    FALSE,
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    Index,
    K,
    Load,
    Node,
    Param,
    Q,
    Reduce,
    Size,
    Unary,
    UnaryOp,
    Var,
    post_order,
    substitute,
)
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import InRange
from attn_dsl.passes.concrete import evaluate
from attn_dsl.passes.logic import divisors
from attn_dsl.passes.monotone import K0, K1, Q0, Q1, Q_OFFSET
from attn_dsl.passes.prove import Claim, Proof, conjunction, disjunction
from attn_dsl.passes.unroll import unroll_node

TIMEOUT = 2.0
MAX_PAIRS = 1 << 16
"""Pairs of a tile that are looked at, one by one, to confirm that a tile is empty."""
_NO_VALUES: Mapping[str, bool | int | float] = MappingProxyType({})


class Outcome(Enum):
    PROVED = "proved"
    REFUTED = "refuted"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Verdict:
    """What one solver says to one question.

    subject         "empty" or "full" for a claim, "visit" or "masked" for the cover
    question        "sound", "exact" or "cover"
    condition       what was asked, for people
    given           the values that parameters were set to; none where the answer holds for all
    reason          why there is no answer
    counterexample  where the claim is wrong, by name: `{"q": 128, "k": 127, "window": 1}`
    """

    solver: str
    question: str
    subject: str
    condition: str
    outcome: Outcome
    seconds: float
    given: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""
    counterexample: Mapping[str, int] = field(default_factory=dict)
