"""The command line: answers, exit codes, and no traceback for wrong input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from variant_cases import SHIPPED

from attn_dsl.cli import main

WRONG = "attention wrong\nmask = q >= kk\nscore = scor + 1.0\n"
PROVE = ["--q-len", "2048", "--kv-len", "2048", "--block", "128", "128"]


@pytest.fixture
def wrong(tmp_path: Path) -> str:
    path = tmp_path / "wrong.attn"
    path.write_text(WRONG)
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, text: str | bytes, *argv: str) -> int:
    """Run a command with `text` on standard input."""
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    return main(argv)


def test_check_says_that_a_text_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "causal"]) == 0
    assert "causal" in capsys.readouterr().out


def test_check_accepts_every_shipped_variant() -> None:
    assert main(["check", *SHIPPED]) == 0


def test_check_reports_all_errors_with_codes_and_places(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", wrong]) == 1
    answer = capsys.readouterr()
    assert answer.out == ""
    assert answer.err.count("error[E") == 2
    assert "wrong.attn:2:13" in answer.err and "wrong.attn:3:9" in answer.err
    assert "\x1b[" not in answer.err


def test_check_of_several_files_reports_the_wrong_ones(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "causal", wrong, "noop"]) == 1
    answer = capsys.readouterr()
    assert "causal" in answer.out and "noop" in answer.out and "error[E" in answer.err


def test_check_as_json(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", wrong, "--format", "json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert (first["line"], first["column"], first["text"]) == (2, 13, "kk")
    assert second["code"].startswith("E") and second["file"].endswith("wrong.attn")


def test_check_reads_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "attention a\nmask = q >= k\n", "check", "-") == 0
    assert run(monkeypatch, WRONG, "check", "-") == 1
    assert "<stdin>:2:13" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "\0", "attention", "(" * 5000, "mask = " + "9" * 5000, "\ufeff", "a = " * 999])
def test_check_answers_nonsense_with_diagnostics(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    assert run(monkeypatch, text, "check", "-") == 1


def test_bytes_that_are_no_text_are_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, b"attention a\xff\n", "check", "-") == 1
    assert "UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["check", "causl"], "did you mean causal?"),
        (["check", "../variants/causal"], "no file"),
        (["check", "."], "no file"),
        (["explain", "E999"], "E999"),
        (["prove", "causal", *PROVE, "--set", "window=3"], "window"),
        (["prove", "sliding_window", *PROVE, "--set", "windw=3"], "window"),
        (["prove", "sliding_window", *PROVE, "--set", "window=1.5"], "window"),
        (["prove", "natten2d", *PROVE], "width"),
        (["ir", "causal", "--after", "nonsense"], "nonsense"),
        (["variants", "nonsense"], "nonsense"),
        (["fmt", "missing.attn"], "missing.attn"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_wrong_calls_exit_with_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    answer = capsys.readouterr()
    assert said in answer.err and answer.out == ""


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["check"],
        ["prove", "causal"],
        ["prove", "causal", *PROVE, "--set", "window"],
        ["check", "--x"],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_malformed_calls_exit_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)


def test_fmt_rewrites_in_place_and_check_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "messy.attn"
    path.write_text("attention   messy # kept\nmask=q>=k\n")
    assert main(["fmt", "--check", str(path)]) == 1
    assert path.read_text().startswith("attention   messy")
    assert main(["fmt", "--stdout", str(path)]) == 0
    formatted = capsys.readouterr().out
    assert main(["fmt", str(path)]) == 0
    assert path.read_text() == formatted
    assert "# kept" in formatted and "q >= k" in formatted
    assert main(["fmt", "--check", str(path)]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["messy.attn"]


def test_fmt_leaves_a_wrong_text_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.attn"
    path.write_text("attention broken\nmask = (q >=\n")
    assert main(["fmt", str(path)]) == 1
    assert path.read_text() == "attention broken\nmask = (q >=\n"
    assert "error[E" in capsys.readouterr().err


def test_fmt_of_standard_input_goes_to_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "attention a\nmask=q>=k", "fmt", "-") == 0
    assert "mask = q >= k\n" in capsys.readouterr().out


def test_shipped_variants_are_formatted() -> None:
    folder = Path(__file__).parent.parent / "attn_dsl" / "variants"
    assert main(["fmt", "--check", *(str(folder / f"{name}.attn") for name in SHIPPED)]) == 0


def test_explain_expands_the_code_of_an_error(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", wrong, "--format", "json"])
    code = json.loads(capsys.readouterr().out)[0]["code"]
    assert main(["explain", code.lower()]) == 0
    assert code in capsys.readouterr().out


def test_ir_prints_the_checked_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ir", "sliding_window"]) == 0
    assert "window" in capsys.readouterr().out


def test_ir_after_simplify(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ir", "alibi", "--after", "simplify"]) == 0
    assert "slope" in capsys.readouterr().out


def test_ir_binds_constants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ir", "bigbird", "--after", "bake", "--set", "random=2"]) == 0


def test_prove_counts_the_tiles_of_causal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "causal", *PROVE, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["block"] == [128, 128]
    assert report["tiles"] == {"empty": 120, "partial": 16, "full": 120}
    assert report["pairs"] == {"kept": 2048 * 2049 // 2, "computed": 136 * 128 * 128, "total": 2048 * 2048}
    for claim in report["claims"]:
        assert claim.keys() >= {"kind", "clause", "condition", "rule", "exact", "span"}


def test_prove_shows_claims_and_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "sliding_window", *PROVE, "--set", "window=512"]) == 0
    text = capsys.readouterr().out
    assert "EMPTY" in text.upper() and "q - k" in text


def test_prove_as_svg(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "causal", *PROVE, "--format", "svg"]) == 0
    assert capsys.readouterr().out.startswith("<svg")


def test_prove_verifies_with_independent_solvers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("islpy")
    pytest.importorskip("z3")
    assert main(["prove", "sliding_window", *PROVE, "--set", "window=512", "--verify"]) == 0


def test_cost_compares_dense_with_scheduled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "causal", *PROVE, "--heads", "2", "--head-dim", "8", "--format", "json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["pairs"] == 2 * 2048 * 2048
    assert counted["visited"] == 2 * 136 * 128 * 128
    assert counted["flops"] < counted["flops_dense"]


def test_emit_prints_functions_with_the_lines_that_they_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emit", "alibi"]) == 0
    source = capsys.readouterr().out
    compile(source, "emitted.py", "exec")
    assert "def score" in source and "def kv_ranges" in source and "alibi.attn:" in source


def test_variants_lists_all_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SHIPPED)
    assert all(len(line.split()) > 3 for line in lines)


def test_variants_prints_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants", "causal"]) == 0
    assert "mask = q >= k" in capsys.readouterr().out


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = f"{sys.executable} -m attn_dsl variants natten3d | true"
    answer = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stderr) == (0, "")
