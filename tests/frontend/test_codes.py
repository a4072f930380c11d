"""Every code that can be raised is explained, and its examples tell the truth."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import attn_dsl
from attn_dsl.errors import CompileError
from attn_dsl.frontend import load
from attn_dsl.frontend.codes import CODES, Entry, explain

PACKAGE = Path(attn_dsl.__file__).parent


def raised() -> set[str]:
    files = (path for path in PACKAGE.rglob("*.py") if path.name != "codes.py")
    return {code for path in files for code in re.findall(r"\"(E\d{3})\"", path.read_text(encoding="utf-8"))}


def test_every_code_that_is_raised_has_an_entry_and_no_other() -> None:
    assert raised() == set(CODES)


@pytest.mark.parametrize("code", sorted(CODES))
def test_examples_tell_the_truth(code: str, tmp_path: Path) -> None:
    entry = CODES[code]
    # The error that too many errors are there comes with those.
    expected = {code, "E004"} if code == "E067" else {code}
    assert found(entry, entry.wrong, tmp_path) == expected
    assert found(entry, entry.right, tmp_path) == set()


def found(entry: Entry, text: str, directory: Path) -> set[str]:
    for name, beside in entry.beside.items():
        (directory / f"{name}.attn").write_text(beside)
    source: str | Path = text
    if "=" in text or "\n" in text:
        source = directory / "example.attn"
        source.write_text(text)
    try:
        load(source)
    except CompileError as error:
        return {d.code for d in error.diagnostics}
    return set()


@pytest.mark.parametrize("code", sorted(CODES))
def test_an_explanation_has_a_title_and_both_examples(code: str) -> None:
    text = explain(code)
    assert text.startswith(f"{code}: ")
    assert text.index("Wrong:") < text.index("Right:")
    assert all(len(line) <= 120 for line in text.splitlines())


def test_an_unknown_code_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        explain("E999")
