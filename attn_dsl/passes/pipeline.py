"""The whole compiler in one tuple: the passes in their order, and the program that they fill in.

The order matters in four places:

- `bake` first: until then, bounds of reductions may be parameters.
- `unroll` before `simplify`, which knows no binders; both before all that reads expressions, so that every later pass
  sees one normal form.
- `prove` before `schedule`, which takes claims only.
- `differentiate` and `separate` before `hoist`, which places what they found together with the score, so that the
  backward pass shares what it can with the forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from attn_dsl.errors import BindingError
from attn_dsl.ir.check import check_variant
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import Node
from attn_dsl.ir.printer import print_ir, print_nodes
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.bake import bake
from attn_dsl.passes.differentiate import Gradient, Gradients, LoadGradient, ParameterGradient, differentiate
from attn_dsl.passes.hoist import Levels, hoist
from attn_dsl.passes.separate import Terms, separate
from attn_dsl.passes.simplify import Simplifier, simplify
from attn_dsl.passes.unroll import unroll

if TYPE_CHECKING:  # they load sympy
    from attn_dsl.passes.prove import Proof
    from attn_dsl.passes.schedule import Schedule


@dataclass(frozen=True)
class Program:
    """A variant and what the passes have found out about it; a field is None until its pass has run."""

    variant: Variant
    constants: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    proof: Proof | None = None
    schedule: Schedule | None = None
    gradients: Gradients | None = None
    terms: Terms | None = None
    levels: Levels | None = None


@dataclass(frozen=True)
class Pass:
    """`run` fills in the program; `text` shows what it made, for people."""

    name: str
    run: Callable[[Program], Program]
    text: Callable[[Program], str]


OnPass = Callable[[Pass, Program, float], None]
"""Called after each pass with the program as it then is and the seconds that the pass took."""


def run(
    variant: Variant,
    constants: Mapping[str, object] = MappingProxyType({}),
    *,
    stop_after: str | None = None,
    on_pass: OnPass | None = None,
) -> Program:
    """Run the passes in their order, up to and including `stop_after`; the IR is checked after each.

    Raises BindingError where `constants` do not fit or `stop_after` is no pass.
    """
    if stop_after is not None:
        _named(stop_after)
    program = Program(variant, constants)
    for step in PASSES:
        start = time.perf_counter()
        program = step.run(program)
        seconds = time.perf_counter() - start
        check_variant(program.variant)
        if on_pass is not None:
            on_pass(step, program, seconds)
        if step.name == stop_after:
            break
    return program


def dump(program: Program, after: str | None = None) -> str:
    """What the pass `after` made of the program, which must have run so far; without a pass, the IR as it is."""
    return print_ir(program.variant) if after is None else _named(after).text(program)


def _named(name: str) -> Pass:
    found = next((step for step in PASSES if step.name == name), None)
    if found is None:
        raise BindingError(f"no pass `{name}`; the passes are {', '.join(step.name for step in PASSES)}")
    return found


def _bake(program: Program) -> Program:
    return replace(program, variant=bake(program.variant, program.constants))


def _unroll(program: Program) -> Program:
    return replace(program, variant=unroll(program.variant))


def _simplify(program: Program) -> Program:
    return replace(program, variant=simplify(program.variant))


def _prove(program: Program) -> Program:
    from attn_dsl.passes.prove import prove

    return replace(program, proof=prove(program.variant))


def _schedule(program: Program) -> Program:
    from attn_dsl.passes.schedule import derive_schedule

    return replace(program, schedule=derive_schedule(program.variant, program.proof))


def _differentiate(program: Program) -> Program:
    found = differentiate(program.variant)
    simplifier = Simplifier()
    sink = None if found.sink is None else _simplified(found.sink, simplifier)
    return replace(program, gradients=Gradients(_simplified(found.score, simplifier), sink))


def _simplified(gradient: Gradient, simplifier: Simplifier) -> Gradient:
    return Gradient(
        simplifier(gradient.d_score),
        tuple(LoadGradient(item.load, simplifier(item.partial)) for item in gradient.loads),
        tuple(ParameterGradient(item.parameter, simplifier(item.partial)) for item in gradient.parameters),
    )


def _separate(program: Program) -> Program:
    return replace(program, terms=separate(program.variant.score))


def _hoist(program: Program) -> Program:
    return replace(program, levels=hoist(expressions(program)))


def expressions(program: Program) -> dict[str, Node]:
    """Every expression that a kernel evaluates, by name: `score mask sink`, and `d_...` for the derivatives."""
    variant = program.variant
    named = {"score": variant.score, "mask": variant.mask}
    if variant.sink is not None:
        named["sink"] = variant.sink
    if program.gradients is not None:
        named |= _partials("score", program.gradients.score)
        if program.gradients.sink is not None:
            named |= _partials("sink", program.gradients.sink)
    return named


def _partials(of: str, gradient: Gradient) -> dict[str, Node]:
    """`d_score_score` by the incoming score, `d_score_load0_table` by the first look-up, `d_score_param_cap`."""
    named = {"d_score_score": gradient.d_score} if of == "score" else {}
    named |= {f"d_{of}_load{i}_{item.load.tensor}": item.partial for i, item in enumerate(gradient.loads)}
    return named | {f"d_{of}_param_{item.parameter.name}": item.partial for item in gradient.parameters}


def _text_ir(program: Program) -> str:
    return print_ir(program.variant)


def _text_proof(program: Program) -> str:
    from attn_dsl.passes.prove_text import proof_text

    assert program.proof is not None
    return proof_text(program.proof)


def _text_schedule(program: Program) -> str:
    assert program.schedule is not None
    return program.schedule.text() + "\n"


def _text_gradients(program: Program) -> str:
    assert program.gradients is not None
    lines = list(_legend("score", program.gradients.score))
    roots = _partials("score", program.gradients.score)
    if program.gradients.sink is not None:
        lines += _legend("sink", program.gradients.sink)
        roots |= _partials("sink", program.gradients.sink)
    return "\n".join(lines) + "\n\n" + print_nodes(roots, program.variant.locations)


def _legend(of: str, gradient: Gradient) -> Iterator[str]:
    """One line for each derivative, in the spelling of the language; comments to the reader of the IR below them."""
    wanted = [("score", gradient.d_score)] if of == "score" else []
    wanted += [(infix(item.load), item.partial) for item in gradient.loads]
    wanted += [(item.parameter.name, item.partial) for item in gradient.parameters]
    yield from (f"# d {of} / d {name} = {infix(partial)}" for name, partial in wanted)


def _text_terms(program: Program) -> str:
    assert program.terms is not None
    return program.terms.text()


def _text_levels(program: Program) -> str:
    assert program.levels is not None
    return program.levels.text()


PASSES = (
    Pass("bake", _bake, _text_ir),
    Pass("unroll", _unroll, _text_ir),
    Pass("simplify", _simplify, _text_ir),
    Pass("prove", _prove, _text_proof),
    Pass("schedule", _schedule, _text_schedule),
    Pass("differentiate", _differentiate, _text_gradients),
    Pass("separate", _separate, _text_terms),
    Pass("hoist", _hoist, _text_levels),
)
