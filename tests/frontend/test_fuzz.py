"""No text ends in a traceback, hangs, or eats memory."""

from __future__ import annotations

import os
import time
import tracemalloc

from frontend_texts import text

from attn_dsl.errors import CompileError, Source
from attn_dsl.frontend import load
from attn_dsl.frontend.format import format_text
from attn_dsl.frontend.render import render

FIRST = int(os.environ.get("ATTN_DSL_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("ATTN_DSL_FUZZ_COUNT", "10000"))


def check(source: str) -> bool:
    """Whether the text is right; a wrong one must have errors that render, a right one must survive the formatter."""
    try:
        variant = load(Source("fuzz.attn", source))
    except CompileError as error:
        assert error.diagnostics
        for diagnostic in error.diagnostics:
            assert 0 <= diagnostic.span.start <= diagnostic.span.end <= len(diagnostic.span.source.text)
        assert "error[" in render(error.diagnostics)
        return False
    formatted = format_text(source)
    assert format_text(formatted) == formatted
    assert load(Source("fuzz.attn", formatted)) == variant
    return True


def test_only_compile_errors_leave_the_front_end() -> None:
    right = 0
    slowest = (0.0, 0)
    for seed in range(FIRST, FIRST + COUNT):
        source = text(seed)
        start = time.perf_counter()
        try:
            right += check(source)
        except BaseException as error:
            raise AssertionError(f"repeat with ATTN_DSL_FUZZ_SEED={seed} ATTN_DSL_FUZZ_COUNT=1:\n{source!r}") from error
        slowest = max(slowest, (time.perf_counter() - start, seed))
    print(f"{COUNT} texts from seed {FIRST}: {right} right; the slowest took {slowest[0]:.2f} s, seed {slowest[1]}")
    assert slowest[0] < 5, f"seed {slowest[1]} took {slowest[0]:.1f} s"
    assert COUNT < 1000 or COUNT / 100 < right < COUNT / 2, "the texts must be neither all right nor all wrong"


def test_memory_stays_small_whatever_the_text() -> None:
    bombs = [
        "attention a\n" + "let x0 = q\n" + "".join(f"let x{i + 1} = x{i} * x{i}\n" for i in range(1000)),
        "attention a\nmask = " + "(" * 60000,
        "attention a\nmask = " + "-" * 60000 + "q",
        "attention a\nmask = " + "& " * 30000,
        "attention a\n" + "let x = 1;" * 6000,
        "attention a\nmask = " + "q + " * 15000 + "q > 0",
        "attention a\nlet x = " + "9" * 60000,
        "attention a\nlet x = 9 ** 9 ** 9 ** 9",
    ]
    load("causal")
    for bomb in bombs:
        tracemalloc.start()
        try:
            load(bomb)
            raise AssertionError("a bomb passed")
        except CompileError:
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 64 * 2**20, f"{peak / 2**20:.0f} MiB for {bomb[:60]!r}"
