"""The pages of `spec/`: each `attn` block has the output of `check` in the `text` block after it.

`pytest tests/frontend/test_spec.py --update-golden` writes what the front end says now; read the difference.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attn_dsl.errors import CompileError, Source
from attn_dsl.frontend import load
from attn_dsl.frontend.library import SHIPPED
from attn_dsl.frontend.render import render

PAGES = sorted((Path(__file__).parent / "spec").glob("*.md"))
BLOCK = re.compile(r"```attn\n(?P<program>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)


def output(program: str) -> str:
    try:
        load(Source("example.attn", program))
    except CompileError as error:
        return render(error.diagnostics).replace(str(SHIPPED), "attn_dsl/variants") + "\n"
    return "ok\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_shows_what_check_says(page: Path, request: pytest.FixtureRequest) -> None:
    text = page.read_text(encoding="utf-8")
    now = BLOCK.sub(lambda m: f"```attn\n{m['program']}```\n\n```text\n{output(m['program'])}```\n", text)
    if request.config.getoption("--update-golden"):
        page.write_text(now, encoding="utf-8")
    assert now == page.read_text(encoding="utf-8"), "run with --update-golden and read the difference"


def test_pages_exist() -> None:
    assert len(PAGES) >= 6
