"""Files that run with torch and triton alone: what they compute in Triton's interpreter, how they are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from portable_support import Problem, assert_close
from standalone_support import run_alone
from variant_cases import Case, cases

from attn_dsl.cli import main
from attn_dsl.errors import BindingError

CHOSEN = ("alibi", "t5_bias", "gpt_oss", "packed_causal", "bigbird", "block_diffusion", "gated_score", "tree")


def chosen() -> dict[str, Problem]:
    """One call of each chosen variant: row terms, tables, sinks, integer tensors, skips, divisors, gates."""
    found: dict[str, Case] = {}
    for case in cases():
        if case.name in CHOSEN:
            found[case.name] = replace(case, sizes=replace(case.sizes, B=1))
    return {name: Problem.of(case) for name, case in found.items()}


def test_a_file_computes_both_passes_where_attn_dsl_cannot_be_imported(tmp_path: Path) -> None:
    problems = chosen()
    for name, found in run_alone(problems, "backward", tmp_path, interpret=True).items():
        truth = problems[name].truth(problems[name].upstream())
        assert {"query", "key", "value"} <= found.grads.keys() <= truth.grads.keys()
        assert_close(found, truth, 3e-5)


def test_a_file_of_the_forward_pass_is_shorter_and_computes_it(tmp_path: Path) -> None:
    problems = {name: problem for name, problem in chosen().items() if name in ("alibi", "gpt_oss")}
    for name, found in run_alone(problems, "forward", tmp_path, interpret=True).items():
        assert_close(found, problems[name].truth(), 3e-5)
        assert "backward" not in (tmp_path / f"{name}.py").read_text()


def test_the_command_line_writes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emit", "sliding_window", "--which", "backward", "--standalone", "--target", "sm_80"]) == 0
    text = capsys.readouterr().out
    compile(text, "sliding_window.py", "exec")
    assert "import attn_dsl" not in text and "from attn_dsl" not in text
    assert "capability=(8, 0)" in text and "window: int = 1024" in text and "sliding_window.attn:" in text


def test_one_pass_is_shown_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def emitted(*options: str) -> str:
        assert main(["emit", "t5_bias", *options]) == 0
        return capsys.readouterr().out

    forward, backward = emitted("--which", "forward"), emitted("--which", "backward")
    assert "def kv_ranges(" in forward and "def q_ranges(" not in forward and "_grad(" not in forward
    assert "def q_ranges(" in backward and "def query_grad(" in backward and "def add_pairs(" in backward
    both = emitted("--target", "sm_90", "--dtype", "bfloat16")
    assert "# Hopper kernels" in both and "# Hopper kernels" not in emitted("--target", "sm_80", "--dtype", "bfloat16")


def test_what_no_kernel_computes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emit", "noop", "--standalone", "--dtype", "float64"]) == 2
    assert main(["emit", "noop", "--standalone", "--target", "ninety"]) == 2
    assert "expected sm_80" in capsys.readouterr().err
    import attn_dsl

    with pytest.raises(BindingError, match="`device`: expected cuda"):
        attn_dsl.compile("noop").source("cpu", torch.float32, standalone=True)
