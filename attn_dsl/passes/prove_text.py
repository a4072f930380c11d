"""What a proof says, as text for people: the clauses, when a tile has no pair of each, and why that is unknown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import FALSE, TRUE, Const, Node
from attn_dsl.passes.derivation import Constraint, Projection
from attn_dsl.passes.project import FAR
from attn_dsl.passes.prove import Claim, Proof, Side
from attn_dsl.passes.schedule import Bound, maximum_of, minimum_of
from attn_dsl.passes.symbolic import Space

WIDTH = 110
LONGEST = 4000
"""Characters of an expression; a longer part of it is left out."""
_LABEL = 14

_HELP = {
    "it reads tensor": "calls tell tiles apart by what the tensor holds; a clause on positions beside it, such as "
    "`q - k < window` or `k < prefix`, bounds them in closed form",
    "it compares floating-point numbers": "compare integers: scale both sides, or use `//`",
    "its bounds are not constants": "bind the bounds with `const` parameters, at most 64 apart",
    "the sign of a factor": "a `const` parameter or a literal has a sign that is known",
    "it divides by what varies": "divide by a parameter, a size or a literal",
    "it divides by what is not known to be positive": "divide by a parameter, a size or a literal, or promise that the "
    "tensor is `in [1, ...)`",
    "it is not linear": "a product of two positions has no closed form; compare each position by itself",
    "it needs more than": "split the variant, or make parameters `const`",
}


def proof_text(proof: Proof) -> str:
    """The mask, its clauses and those of its negation, each with its claim."""
    lines = [*textwrap.wrap(f"mask = {expression(proof.variant.mask)}", WIDTH, subsequent_indent="    "), ""]
    lines += _part("It keeps a pair where", proof.visit, "It keeps no pair.")
    lines += ["", *_part("It hides a pair where", proof.masked, "It hides no pair."), ""]
    lines.append(
        "A tile is EMPTY where no clause of the first kind has a pair in it, FULL where none of the second has."
    )
    return "\n".join(lines) + "\n"


def expression(node: Node) -> str:
    """A part of a claim, whole unless it is enormous."""
    return infix(node, {Const(FAR): "inf", Const(-FAR): "-inf"}, longest=LONGEST)


def help_for(reason: str) -> str:
    """What would let a proof go on that stopped for this reason; empty where nothing general is known."""
    return next((text for start, text in _HELP.items() if reason.startswith(start)), "")


def _part(title: str, sides: Sequence[Side], none: str) -> Iterator[str]:
    if not sides:
        yield none
        return
    yield title
    for side in sides:
        yield from _clause(side)


def _clause(side: Side) -> Iterator[str]:
    claim = side.claim
    where = f"  ({_place(claim)})" if claim.spans else ""
    yield from textwrap.wrap(
        expression(claim.clause_node) + where, WIDTH, initial_indent="  ", subsequent_indent="    "
    )
    yield from _verdict(claim)
    if claim.condition is not TRUE:
        yield from _interval("q tile sees", "k", side.kv, claim.space)
        yield from _interval("kv tile sees", "q", side.q, claim.space)
    for reason in claim.reasons:
        yield _line("UNKNOWN", reason)
        if help_for(reason):
            yield _line("help", help_for(reason))


def _place(claim: Claim) -> str:
    """File and line, the file's name without its folders."""
    span = min(claim.spans)
    return f"{span.source.name.rsplit('/', 1)[-1]}:{span.line}"


def _verdict(claim: Claim) -> Iterator[str]:
    """When a tile has no pair of the clause."""
    if claim.condition is TRUE:
        yield _line("no pair", f"in any tile  [{claim.rule}]")
    elif claim.condition is not FALSE:
        word = "iff" if claim.exact else "if"
        yield _line(f"no pair {word}", f"{expression(claim.condition)}  [{claim.rule}]")
    elif claim.exact:
        yield _line("a pair", "in every tile")
    elif not claim.reasons:
        yield _line("UNKNOWN", "no rule applies")


def _interval(label: str, position: str, view: Projection, space: Space) -> Iterator[str]:
    """The positions of the other axis that a tile sees, where the clause bounds them."""
    low = _bound(view.lower, space, least=True)
    high = _bound(view.upper, space, least=False)
    if low is not None and high is not None:
        yield _line(label, f"{position} in [{expression(low)}, {expression(high)}]")
    elif low is not None:
        yield _line(label, f"{position} >= {expression(low)}")
    elif high is not None:
        yield _line(label, f"{position} <= {expression(high)}")


def _bound(constraints: Sequence[Constraint], space: Space, *, least: bool) -> Node | None:
    nodes = [Bound.of(constraint, space).node for constraint in constraints]
    return None if not nodes else maximum_of(nodes) if least else minimum_of(nodes)


def _line(label: str, text: str) -> str:
    indent = " " * 4
    start = f"{indent}{label:{_LABEL}}"
    return textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=indent + " " * _LABEL)
