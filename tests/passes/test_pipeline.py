"""The order of the passes, and what can be seen of each."""

import subprocess
import sys
import timeit

import pytest
import strategies
from hypothesis import given, settings
from variant_cases import SHIPPED, cases

from attn_dsl.errors import BindingError
from attn_dsl.frontend import load
from attn_dsl.ir.nodes import TRUE, post_order
from attn_dsl.ir.parser import parse_ir, parse_nodes
from attn_dsl.passes.pipeline import PASSES, Program, dump, run
from attn_dsl.passes.simplify import simplify

NAMES = [step.name for step in PASSES]
CONSTANTS = {case.name: case.constants for case in cases()}


def test_every_pass_is_called_back_in_order_with_its_time():
    seen = []
    run(load("alibi"), on_pass=lambda step, program, seconds: seen.append((step.name, seconds >= 0)))
    assert seen == [(name, True) for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_stopping_after_a_pass_leaves_the_rest_undone_and_shows_it(name):
    program = run(load("gemma2_local"), stop_after=name)
    assert dump(program, name).strip()
    done = NAMES[: NAMES.index(name) + 1]
    assert (program.schedule is not None) == ("schedule" in done)
    assert (program.levels is not None) == ("hoist" in done)


def test_an_unknown_pass_is_named():
    with pytest.raises(BindingError, match="no pass `simplfy`; the passes are bake, unroll"):
        run(load("causal"), stop_after="simplfy")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_variant_runs_through_and_its_text_reads_back(name):
    program = run(load(name), CONSTANTS[name])
    for step in ("bake", "unroll", "simplify"):
        assert parse_ir(dump(program, step)) == program.variant
    assert parse_nodes(dump(program, "differentiate"))
    for step in NAMES:
        assert dump(program, step).endswith("\n")


@pytest.mark.parametrize("name", SHIPPED)
def test_simplifying_never_makes_a_shipped_variant_larger(name):
    before = run(load(name), CONSTANTS[name], stop_after="unroll").variant
    after = run(load(name), CONSTANTS[name], stop_after="simplify").variant
    assert len(list(post_order(*after.roots))) <= len(list(post_order(*before.roots)))


def test_simplifying_any_shipped_variant_takes_less_than_3_ms():
    for name in SHIPPED:
        variant = run(load(name), CONSTANTS[name], stop_after="unroll").variant
        best = min(timeit.repeat(lambda variant=variant: simplify(variant), number=1, repeat=9))
        assert best < 3e-3, f"{name}: {best * 1e3:.2f} ms"


def test_gradients_show_in_the_spelling_of_the_language():
    text = dump(run(load("alibi"), stop_after="differentiate"), "differentiate")
    assert "# d score / d slope[h] = k - q" in text


def test_the_algebra_loads_neither_torch_nor_sympy():
    code = "import sys, attn_dsl.passes.pipeline; sys.exit(bool({'torch', 'sympy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@settings(max_examples=50, deadline=None)
@given(strategies.variants(mask=strategies.affine_masks()))
def test_random_variants_run_through_all_passes_but_the_proof(variant):
    program = Program(variant)
    for step in PASSES:
        if step.name not in ("prove", "schedule"):
            program = step.run(program)
            assert step.text(program).endswith("\n")
    assert program.levels is not None and program.terms is not None
    assert program.variant.mask is TRUE or program.variant.mask.type is variant.mask.type
