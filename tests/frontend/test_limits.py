"""Every limit is a diagnostic, just above it, and none just below."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

from attn_dsl.errors import CompileError
from attn_dsl.frontend import limits, load


def codes(text: str | Path) -> set[str]:
    try:
        load(text)
    except CompileError as error:
        return {d.code for d in error.diagnostics}
    return set()


def test_file_size(tmp_path: Path) -> None:
    text = "attention a\n#"
    text += "é" * ((limits.FILE_BYTES - len(text)) // 2)
    text += "." * (limits.FILE_BYTES - len(text.encode()))
    assert codes(text) == set()
    assert codes(text + ".") == {"E060"}
    path = tmp_path / "big.attn"
    path.write_text(text + ".", encoding="utf-8")
    assert codes(path) == {"E000"}


def test_name_length() -> None:
    assert codes(f"attention a\nlet {'x' * limits.NAME_LENGTH} = 1") == set()
    assert codes(f"attention a\nlet {'x' * (limits.NAME_LENGTH + 1)} = 1") == {"E060"}


def test_parameters_tensors_and_axes() -> None:
    def header(n: int) -> str:
        return f"attention a({', '.join(f'p{i}: int' for i in range(n))})"

    def tensors(n: int) -> str:
        return "attention a\n" + "\n".join(f"tensor t{i}: float32[B]" for i in range(n))

    def axes(n: int) -> str:
        return f"attention a\ntensor t: float32[{', '.join('B' * n)}]"

    for text, limit in ((header, limits.PARAMETERS), (tensors, limits.TENSORS), (axes, limits.AXES)):
        assert codes(text(limit)) == set()
        assert codes(text(limit + 1)) == {"E066"}


@pytest.mark.parametrize(("opened", "closed"), [("(", ")"), ("abs(", ")"), ("t[", "]")])
def test_brackets(opened: str, closed: str) -> None:
    def text(n: int) -> str:
        return f"attention a\ntensor t: int32[KV]\nmask = {opened * n}q{closed * n} > 0"

    assert codes(text(limits.NESTING)) == set()
    assert codes(text(limits.NESTING + 1)) == {"E061"}
    assert codes(text(20_000 // len(opened))) == {"E061"}


@pytest.mark.parametrize("prefix", ["-", "not ", "2.0 ** ", "1 if q > k else "])
def test_nesting_without_brackets(prefix: str) -> None:
    tail = "q" if prefix != "not " else "q > k"
    start = "let x =" if prefix != "not " else "mask ="
    assert codes(f"attention a\n{start} {prefix * (limits.CHECK_DEPTH // 2)}{tail}") == set()
    for n in (limits.CHECK_DEPTH, 1000, 60_000 // len(prefix)):
        assert codes(f"attention a\n{start} {prefix * n}{tail}") == {"E061"}


def test_chains_are_long_before_they_are_too_deep() -> None:
    assert codes("attention a\nlet x = " + "q + " * (limits.NODE_DEPTH - 2) + "q") == set()
    assert codes("attention a\nlet x = " + "q + " * limits.NODE_DEPTH + "q") == {"E062"}
    assert codes("attention a\nmask = " + "q < " * 15_000 + "q") == {"E062"}


def test_lets_that_double() -> None:
    def text(n: int) -> str:
        lets = "\n".join(f"let x{i + 1} = x{i} + x{i}" for i in range(n))
        return f"attention a\nlet x0 = q\n{lets}\nmask = x{n} > 0"

    assert codes(text(18)) == set()
    assert codes(text(20)) == {"E062"}
    assert codes(text(2000)) == {"E062"}


def test_functions_that_double() -> None:
    def text(n: int) -> str:
        functions = "\n".join(f"def f{i + 1}(x) = f{i}(x * 2) + f{i}(x * 3)" for i in range(n))
        return f"attention a\ndef f0(x) = x\n{functions}\nmask = f{n}(q) > 0"

    assert codes(text(8)) == set()
    assert codes(text(20)) == {"E062"}
    assert codes(text(200)) <= {"E061", "E062"} != set()


def test_a_chain_of_functions() -> None:
    functions = "\n".join(f"def f{i + 1}(x) = f{i}(x)" for i in range(500))
    assert codes(f"attention a\ndef f0(x) = x\n{functions}\nmask = f500(q) > 0") == {"E061"}


def test_constants() -> None:
    assert codes(f"attention a\nlet x = {limits.INTEGER}") == set()
    for wrong in (limits.INTEGER + 1, "9" * 60_000, f"{limits.INTEGER} + 1", "2 ** 63", "2 ** 64", "10 ** 60", "1e309"):
        assert codes(f"attention a\nlet x = {wrong}") == {"E063"}
    assert codes("attention a\nlet x = 2 ** 62") == set()
    assert codes("attention a\nlet x = 9 ** 9 ** 9 ** 9") == {"E063"}


def test_a_caller_deep_in_its_stack_gets_a_diagnostic() -> None:
    text = "attention a\nlet x = " + "abs(" * 60 + "q" + ")" * 60

    def deep(n: int) -> set[str]:
        return codes(text) if n == 0 else deep(n - 1)

    assert codes(text) == set()
    assert deep(sys.getrecursionlimit() - len(inspect.stack(0)) - 150) == {"E061"}


def test_trips() -> None:
    assert codes(f"attention a\nlet x = sum(d in 0..{limits.TRIPS}: d)") == set()
    assert codes(f"attention a\nlet x = sum(d in 0..{limits.TRIPS + 1}: d)") == {"E064"}
    assert codes("attention a\nlet x = sum(d in 0..32: sum(e in 0..32: d + e))") == set()
    assert codes("attention a\nlet x = sum(d in 0..32: sum(e in 0..33: d + e))") == {"E064"}
    assert codes("attention a\ndef f(x) = sum(e in 0..33: x + e)\nlet x = sum(d in 0..32: f(d))") == {"E064"}
    lines = "def f(x) = sum(e in 0..33: x + e)\nlet x = sum(d in 0..2: f(3)) + sum(d in 0..32: f(3))"
    assert codes(f"attention a\n{lines}") == {"E064"}


def test_import_depth(tmp_path: Path) -> None:
    for i in range(30):
        lines = f"import i{i + 1}\nmask = i{i + 1}.mask()" if i < 29 else "mask = q >= k"
        (tmp_path / f"i{i}.attn").write_text(f"attention i{i}\n{lines}")
    assert codes(tmp_path / f"i{29 - limits.IMPORT_DEPTH}.attn") == set()
    assert codes(tmp_path / f"i{28 - limits.IMPORT_DEPTH}.attn") == {"E065"}


def test_imported_files(tmp_path: Path) -> None:
    for i in range(limits.IMPORTED_FILES + 1):
        (tmp_path / f"i{i}.attn").write_text(f"attention i{i}")
    main = tmp_path / "main.attn"
    names = ", ".join(f"i{i}" for i in range(limits.IMPORTED_FILES))
    main.write_text(f"attention main\nimport {names}")
    assert codes(main) == set()
    main.write_text(f"attention main\nimport {names}, i{limits.IMPORTED_FILES}")
    assert codes(main) == {"E065"}


def test_number_of_errors() -> None:
    with pytest.raises(CompileError) as caught:
        load("attention a\nmask = q" + " & q" * 10_000)
    assert len(caught.value.diagnostics) == limits.DIAGNOSTICS + 1
    assert caught.value.diagnostics[-1].code == "E067"
