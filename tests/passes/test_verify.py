"""Independent solvers on what the proofs claim: they find nothing wrong, and they do find what is made wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

import pytest
from random_masks import RandomMask
from variant_cases import SHIPPED

from attn_dsl.errors import AttnError
from attn_dsl.frontend import load
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import FALSE, TRUE, Binary, BinaryOp, Const, K, Node, Q, post_order, substitute
from attn_dsl.ir.variant import Variant
from attn_dsl.passes import pipeline
from attn_dsl.passes.concrete import evaluate
from attn_dsl.passes.monotone import K0, K1, Q0, Q1
from attn_dsl.passes.prove import Claim, Proof, prove
from attn_dsl.passes.verify import Outcome, Verdict, verify

pytest.importorskip("z3")
pytest.importorskip("islpy")

VALUES = {"width": 12, "height": 10, "depth": 5, "r": 2, "length": 100, "reach": 3, "globals": 2}
RANDOM = 48


@cache
def shipped(name: str) -> Proof:
    constants = {"random": 2} if name == "bigbird" else {}
    proof = pipeline.run(load(name), constants, stop_after="prove").proof
    assert proof is not None
    return proof


def of(text: str) -> Proof:
    return prove(load(f"attention made\n{text}\n"))


def values(variant: Variant) -> dict[str, bool | int | float]:
    defaults = {p.name: p.default for p in variant.parameters if p.default is not None}
    return {**defaults, **{p.name: VALUES[p.name] for p in variant.parameters if p.name in VALUES}}


def claim_with(proof: Proof, condition: Node, which: int = 0) -> Claim:
    """Put another condition in the place of the one that was proved."""
    claim = proof.claims[which]
    claim.__dict__["condition"] = condition
    assert claim.condition is condition
    return claim


def refuted(verdicts: tuple[Verdict, ...]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.outcome is Outcome.REFUTED]


def at(verdict: Verdict, *roots: Node) -> dict[Node, int]:
    """The counterexample by node."""
    known = {**verdict.counterexample, **{name: int(value) for name, value in verdict.given.items()}}
    return {node: known[infix(node)] for node in post_order(*roots) if infix(node) in known}


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "natten3d"])
def test_every_claim_of_a_shipped_variant_is_proved_by_a_solver(name: str) -> None:
    proof = shipped(name)
    verdicts = verify(proof, values(proof.variant))
    assert not refuted(verdicts)
    asked = {(v.question, v.kind, id(v.claim)) for v in verdicts}
    proved = {(v.question, v.kind, id(v.claim)) for v in verdicts if v.outcome is Outcome.PROVED}
    assert asked == proved


def test_affine_claims_are_proved_for_all_parameters_and_lengths() -> None:
    for name in ("causal", "sliding_window", "longformer", "natten1d", "prefix_lm", "padded"):
        assert all(v.outcome is Outcome.PROVED and not v.given for v in verify(shipped(name))), name


@pytest.mark.parametrize("seed", range(RANDOM))
def test_no_claim_about_a_random_mask_is_refuted(seed: int) -> None:
    rng = random.Random(seed)
    variant = RandomMask(rng).variant(("affine", "boolean", "general")[seed % 3])
    numbers = {"a": rng.randint(-5, 15), "w": rng.randint(1, 9), "flag": True}
    verdicts = verify(prove(variant), numbers, timeout=0.1)
    assert not refuted(verdicts), (seed, [v.text() for v in refuted(verdicts)])
    if seed % 3 == 0:
        assert any(v.outcome is Outcome.PROVED for v in verdicts)


@pytest.mark.parametrize("seed", range(0, RANDOM, 2))
def test_a_claim_moved_by_one_is_refuted_by_a_counterexample_that_holds(seed: int) -> None:
    rng = random.Random(seed)
    proof = prove(RandomMask(rng).variant("affine"))
    proved = proof.claims[0].condition
    corner, by = rng.choice((Q0, Q1, K0, K1)), rng.choice((1, -1))
    moved = substitute(proved, {corner: Binary(BinaryOp.ADD, corner, Const(by))})
    wrong = claim_with(proof, moved)
    found = refuted(verify(proof, {"w": 3}))
    for verdict in found:
        assert verdict.claim is wrong
        point = at(verdict, moved, wrong.clause_node, Q, K, Q0, Q1, K0, K1)
        if verdict.question == "sound":
            assert point[Q0] <= point[Q] <= point[Q1] and point[K0] <= point[K] <= point[K1]
            assert evaluate(moved, point) and evaluate(wrong.clause_node, point)
        else:
            assert not evaluate(moved, point) and not any_pair(wrong.clause_node, point)
    if wrong.exact and any(evaluate(proved, tile) != evaluate(moved, tile) for tile in tiles(rng, proved, moved)):
        assert found, f"seed {seed}: `{infix(moved)}` for `{infix(proved)}`"


def tiles(rng: random.Random, *conditions: Node) -> Iterator[dict[Node, int]]:
    """Random small tiles and values of all else in the conditions."""
    leaves = [node for node in post_order(*conditions) if not node.children and not isinstance(node, Const)]
    for _ in range(300):
        tile: dict[Node, int] = {node: rng.randint(1, 9) for node in leaves}
        for first, last in ((Q0, Q1), (K0, K1)):
            tile[first] = rng.randrange(12)
            tile[last] = tile[first] + rng.randrange(6)
        yield tile


def any_pair(clause: Node, tile: dict[Node, int]) -> bool:
    rows, columns = range(tile[Q0], tile[Q1] + 1), range(tile[K0], tile[K1] + 1)
    return any(evaluate(clause, {**tile, Q: q, K: k}) for q in rows for k in columns)


def test_an_unsound_condition_is_refuted_by_both_solvers_with_small_numbers() -> None:
    proof = of("mask = q >= k")
    moved = substitute(proof.claims[0].condition, {K0: Binary(BinaryOp.ADD, K0, Const(1))})
    claim_with(proof, moved)
    found = refuted(verify(proof))
    assert {(v.solver, v.question) for v in found} == {("z3", "sound"), ("isl", "sound")}
    for verdict in found:
        point = verdict.counterexample
        assert point["q"] >= point["k"] and point["k0"] + 1 > point["q1"] and max(point.values()) <= 16
        assert f" q={point['q']}," in verdict.text() and f" k={point['k']}" in verdict.text()


def test_a_condition_that_is_called_exact_and_misses_tiles_is_refuted() -> None:
    proof = of("mask = 0 <= q - k < 7")
    claim_with(proof, FALSE)
    (verdict,) = refuted(verify(proof))
    assert (verdict.solver, verdict.question) == ("isl", "exact")
    tile = {node: verdict.counterexample[infix(node)] for node in (Q0, Q1, K0, K1)}
    assert not any_pair(proof.claims[0].clause_node, tile)


def test_clauses_that_are_not_the_mask_are_refuted() -> None:
    proof, other = of("mask = q >= k or k < 3"), of("mask = q >= k or k < 4")
    swapped = Proof(other.variant, proof.space, proof.visit, proof.masked)
    found = refuted(verify(swapped))
    assert {(v.solver, v.kind) for v in found if v.question == "cover"} >= {("z3", "empty"), ("z3", "full")}
    assert all(v.counterexample["k"] == 3 for v in found if v.question == "cover")


def test_a_wrong_claim_about_a_parameter_shows_its_value() -> None:
    proof = shipped("sliding_window")
    proof = prove(proof.variant)
    claim_with(proof, TRUE)
    verdict = refuted(verify(proof))[0]
    assert {"q", "k", "window"} <= verdict.counterexample.keys()
    assert "window=" in verdict.text()


def test_a_wrong_claim_that_needs_numbers_says_which_were_given() -> None:
    proof = prove(shipped("sparse_strided").variant)
    wrong = claim_with(proof, FALSE, which=1)
    found = [v for v in refuted(verify(proof, {"stride": 6})) if v.claim is wrong]
    assert [(v.solver, v.question, v.given) for v in found] == [("isl", "exact", {"stride": 6})]


def test_what_a_solver_cannot_decide_is_unknown_with_a_reason() -> None:
    proof = of("tensor doc: int32[KV]\nmask = doc[q] == doc[k] and q >= k")
    claim_with(proof, TRUE)
    for verdict in verify(proof):
        assert verdict.outcome is not Outcome.UNKNOWN or verdict.reason
    assert [v.solver for v in refuted(verify(proof)) if v.question == "sound"] == ["z3", "isl"]


def test_promises_of_tensors_are_used() -> None:
    proof = of("tensor n: int32[B] in [0, 8)\nmask = q < n[b]")
    condition = load("attention c\nmask = q >= 8\n").mask
    claim_with(proof, substitute(condition, {Q: Q0}))
    assert not [v for v in refuted(verify(proof)) if v.question == "sound"]
    claim_with(proof, substitute(substitute(condition, {Const(8): Const(7)}), {Q: Q0}))
    assert not [v for v in refuted(verify(proof)) if v.question == "sound"]
    claim_with(proof, substitute(substitute(condition, {Const(8): Const(6)}), {Q: Q0}))
    assert [v for v in refuted(verify(proof)) if v.question == "sound"]


def test_a_missing_solver_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_dsl.passes.verify.find_spec", lambda name: None)
    with pytest.raises(AttnError, match=r"pip install attn-dsl\[verify\]"):
        verify(shipped("causal"))
