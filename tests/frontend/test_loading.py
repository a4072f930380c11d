"""Where texts and imports come from, and what they cannot reach."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from attn_dsl.errors import CompileError, Diagnostic, Source
from attn_dsl.frontend import load, parse, shipped


def errors(source: str | Path | Source) -> tuple[Diagnostic, ...]:
    with pytest.raises(CompileError) as caught:
        load(source)
    return caught.value.diagnostics


def write(directory: Path, name: str, *lines: str) -> Path:
    path = directory / f"{name}.attn"
    path.write_text("\n".join([f"attention {name}", *lines]))
    return path


def test_a_source_is_a_path_a_name_or_a_text(tmp_path: Path) -> None:
    path = write(tmp_path, "mine", "mask = q >= k")
    variants = [
        load(path),
        load(str(path)),
        load("causal"),
        load("attention a; mask = q >= k"),
        load(Source("x", path.read_text())),
    ]
    assert {v.mask for v in variants} == {variants[0].mask}
    assert variants[0].source is not None and variants[0].source.name == str(path)


def test_every_shipped_variant_loads() -> None:
    assert {load(name).name for name in shipped()} == set(shipped())


@pytest.mark.parametrize(
    ("source", "help"),
    [
        ("causl", "`causal`"),
        ("no/such/sliding_windw.attn", "`sliding_window`"),
        ("zzzzzzzz", "begins with `attention`"),
    ],
)
def test_what_is_not_there_suggests_what_is(source: str, help: str) -> None:
    (error,) = errors(source)
    assert error.code == "E000"
    assert help in error.help


def test_a_directory_a_pipe_and_binary_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "directory.attn").mkdir()
    os.mkfifo(tmp_path / "pipe.attn")
    (tmp_path / "binary.attn").write_bytes(b"\xff\xfe\x00")
    for name in ("directory", "pipe", "binary"):
        assert [e.code for e in errors(tmp_path / f"{name}.attn")] == ["E000"]
        assert [e.code for e in errors(write(tmp_path, "main", f"import {name}"))] == ["E050"]
    assert [e.code for e in errors("a\0b.attn")] == ["E000"]


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "mark.attn").write_bytes(b"\xef\xbb\xbfattention mark\r\nmask = q >= k\r\n")
    assert load(tmp_path / "mark.attn").mask is load("causal").mask


def test_files_beside_come_before_the_library(tmp_path: Path) -> None:
    write(tmp_path, "causal", "mask = q > k")
    main = write(tmp_path, "main", "import causal", "mask = causal.mask()")
    assert load(main).mask is load("attention a; mask = q > k").mask


def test_a_text_without_a_place_imports_from_the_library_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "beside")
    monkeypatch.chdir(tmp_path)
    assert [e.code for e in errors("attention a\nimport beside")] == ["E050"]


def test_symbolic_links_do_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    secret = write(tmp_path, "secret", "mask = q >= k")
    (tmp_path / "inside" / "link.attn").symlink_to(secret)
    main = write(tmp_path / "inside", "main", "import link", "mask = link.mask()")
    (error,) = errors(main)
    assert (error.code, error.span.text) == ("E050", "link")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a.b", "'secret'", ".."])
def test_an_import_is_an_identifier_and_no_path(tmp_path: Path, name: str) -> None:
    write(tmp_path, "secret")
    (tmp_path / "inside").mkdir()
    assert errors(write(tmp_path / "inside", "main", f"import {name}"))


def test_a_cycle_shows_its_chain(tmp_path: Path) -> None:
    write(tmp_path, "a", "import c")
    write(tmp_path, "c", "import a")
    found = errors(write(tmp_path, "main", "import a", "mask = a.mask()"))
    assert [(e.code, e.help) for e in found] == [("E051", "a -> c -> a")]
    assert [(e.code, e.help) for e in errors(write(tmp_path, "me", "import me"))] == [("E051", "me -> me")]


def test_a_diamond_is_no_cycle_and_is_checked_once(tmp_path: Path) -> None:
    for level in range(12):
        lines = [f"import l{level + 1}, r{level + 1}", f"mask = l{level + 1}.mask() or r{level + 1}.mask()"]
        for side in "lr":
            write(tmp_path, f"{side}{level}", *lines)
    for side in "lr":
        write(tmp_path, f"{side}12", "mask = q >= k")
    assert errors(write(tmp_path, "main", "import l0", "mask = l0.mask()"))[0].code in ("E062", "E061")
    assert load(write(tmp_path, "main", "import l9", "mask = l9.mask()")).mask.depends == {"q", "k"}


def test_errors_of_an_imported_file_are_shown_there_and_once(tmp_path: Path) -> None:
    write(tmp_path, "wrong", "let a = oops", "mask = q - k")
    main = write(tmp_path, "main", "import wrong", "mask = wrong.mask() and wrong.mask()", "let z = uups")
    found = errors(main)
    assert [(Path(e.span.source.name).stem, e.code) for e in found] == [
        ("main", "E010"),
        ("wrong", "E010"),
        ("wrong", "E020"),
    ]


def test_parse_raises_every_syntax_error() -> None:
    with pytest.raises(CompileError) as caught:
        parse(Source("x", "attention a\nlet = 3\nmask q\nscore = score +"))
    assert [d.span.line for d in caught.value.diagnostics] == [2, 3, 4]
