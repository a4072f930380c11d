"""What an installed package promises: quick starts, complete data files, examples that run, pages that are current."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import attn_dsl

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "sympy", "triton", "lark", "rich", "numpy", "islpy", "z3"}


def loaded_after(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded once `code` ran."""
    script = f"import sys\n{code}\nprint('\\n' + ' '.join({HEAVY!r} & sys.modules.keys()))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(answer.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import attn_dsl") == set()


@pytest.mark.parametrize("command", [["--help"], ["prove", "--help"], ["variants"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = f"from attn_dsl.cli import main\ntry: main({command!r})\nexcept SystemExit: pass"
    assert loaded_after(code) == set()


def test_help_takes_less_than_150_ms() -> None:
    """Of the processor: the machine may be busy with other tests."""

    def spent() -> float:
        times = os.times()
        return times.children_user + times.children_system

    before = spent()
    for _ in range(5):
        subprocess.run([sys.executable, "-m", "attn_dsl", "--help"], capture_output=True, check=True, timeout=60)
    each = (spent() - before) / 5
    assert each < 0.150, f"{each * 1000:.0f} ms"


def test_checking_and_showing_the_ir_need_no_torch() -> None:
    code = "from attn_dsl.cli import main\nmain(['check', 'causal'])\nmain(['ir', 'alibi', '--after', 'hoist'])"
    assert "torch" not in loaded_after(code)


@pytest.mark.parametrize("name", attn_dsl.__all__)
def test_public_names_load_on_first_use(name: str) -> None:
    assert getattr(attn_dsl, name) is not None
    assert name in dir(attn_dsl)


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = attn_dsl.nonsense


def test_every_data_file_is_packaged() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    patterns = re.findall(r'"(.*?)"', next(line for line in text.splitlines() if line.startswith("attn_dsl = [")))
    package = ROOT / "attn_dsl"
    files = (path for path in package.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"})
    names = [path.relative_to(package).as_posix() for path in files]
    assert [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


def test_versions_agree() -> None:
    assert f'version = "{attn_dsl.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_example_of_the_readme_runs() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    exec(compile(code[1], "README.md", "exec"), names)
    assert all(names[x].grad is not None for x in "qkv")  # type: ignore[attr-defined]


def test_generated_pages_are_current() -> None:
    """`make docs` writes them."""
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
