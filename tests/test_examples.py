"""The examples run, in small, and find what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), "--threads", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_what_is_served_from_pages_is_what_the_unbatched_model_says() -> None:
    """With so few pages that some request has to give its own up and start again."""
    said = run(
        "serve_lm.py", "--steps", "2", "--length", "64", "--width", "32", "--heads", "2", "--layers", "2", "--window",
        "24", "--requests", "6", "--prompt", "40", "--answer", "40", "--batch", "4", "--pages", "10",
    )  # fmt: skip
    assert "6 of 6 answers are the same; 0 pages are left behind" in said and re.search(r"[1-9]\d*\s+restarts", said)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers needs Python 3.11")
def test_a_llama_generates_what_it_does_on_sdpa() -> None:
    assert "3 of 3 are the same" in run("transformers_llama.py", "--batch", "3", "--tokens", "8", "--width", "64")
