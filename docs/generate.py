"""Write the pages that are made from the shipped files: docs/variants/*.md and the marked parts of the README.

`python docs/generate.py` writes what is stale; with `--check` it writes nothing and exits with 1 if anything is.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from attn_dsl.cli import main as attn_dsl
from attn_dsl.errors import CompileError, Source
from attn_dsl.frontend import load
from attn_dsl.frontend.render import render
from attn_dsl.ir.variant import Parameter, Variant

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "attn_dsl" / "variants").glob("*.attn"))

PICTURED: Mapping[str, Mapping[str, int]] = {
    "sliding_window": {"window": 256},
    "prefix_lm": {"prefix": 200},
    "longformer": {"reach": 96, "globals": 40},
    "dilated_window": {"window": 512},
    "natten2d": {"width": 32, "height": 32},
    "natten3d": {"width": 8, "height": 16, "depth": 8},
    "shared_prefix": {"prefix": 200},
    "block_diffusion": {"length": 512, "block": 32},
    "gemma2_local": {"window": 300},
    "gpt_oss": {"window": 128},
}
"""Parameters of the pictures, where the defaults would show nothing at 1024 positions."""


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = {path: text for path, text in _pages() if not path.exists() or path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)} {'is stale; `make docs` writes it' if check else 'written'}", file=sys.stderr)
    return 1 if check and stale else 0


def _pages() -> Iterator[tuple[Path, str]]:
    for file in SHIPPED:
        yield ROOT / "docs" / "variants" / f"{file.stem}.md", variant_page(file)
    readme = ROOT / "README.md"
    yield readme, readme_with_parts(readme.read_text(encoding="utf-8"))


# --- one page a variant


def variant_page(file: Path) -> str:
    """What it is, its text, its arguments, what is proved of its tiles, and a picture of them."""
    name, text = file.stem, file.read_text(encoding="utf-8")
    summary, prose, meanings = _comment(text)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#")).strip()
    parts = [f"# {name}", summary[0].upper() + summary[1:] + ".", *prose, f"```\n{body}\n```"]
    parts += [*_parameters(load(name), meanings), *_tensors(body, meanings)]
    options = [f"--set {k}={v}" for k, v in PICTURED.get(name, {}).items()]
    command = " ".join(["prove", name, "--q-len 1024 --kv-len 1024 --block 64 64", *options])
    parts += ["## Tiles", f"```\n$ attn-dsl {command}\n{answer(command)}```"]
    return "\n\n".join(parts) + "\n"


def _comment(text: str) -> tuple[str, list[str], dict[str, str]]:
    """The comment at the top: summary, paragraphs, and what each parameter and tensor means."""
    lines = [line[2:] for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())]
    summary = lines[0].partition(": ")[2]
    entries = [re.match(r"  (\w+): (.*)", line) for line in lines]
    meanings = {entry[1]: entry[2] for entry in entries if entry}
    prose = "\n".join(line for line, entry in zip(lines[1:], entries[1:], strict=True) if not entry)
    return summary, [paragraph.strip() for paragraph in prose.split("\n\n") if paragraph.strip()], meanings


def _parameters(variant: Variant, meanings: Mapping[str, str]) -> list[str]:
    if not variant.parameters:
        return []

    def row(p: Parameter) -> str:
        kind = ("const " if p.const else "") + p.type.value
        default = "" if p.default is None else str(p.default)
        return f"| `{p.name}` | {kind} | {default} | {meanings[p.name]} |"

    rows = ["| parameter | type | default | meaning |", "|---|---|---|---|", *map(row, variant.parameters)]
    return ["## Parameters", "\n".join(rows)]


def _tensors(body: str, meanings: Mapping[str, str]) -> list[str]:
    declared = re.findall(r"^tensor (\w+): (\w+\[.*?\])(?: (.*))?$", body, re.MULTILINE)
    if not declared:
        return []
    rows = [f"| `{name}` | `{kind}` | {promise} | {meanings[name]} |" for name, kind, promise in declared]
    return ["## Tensors", "\n".join(["| tensor | elements | promise | meaning |", "|---|---|---|---|", *rows])]


# --- parts of the README


def readme_with_parts(text: str) -> str:
    """Replace what stands between `<!-- NAME -->` and `<!-- end -->`."""
    summaries = {file.stem: _comment(file.read_text(encoding="utf-8"))[0] for file in SHIPPED}
    made = {
        "variants": "\n".join(f"- [{name}](docs/variants/{name}.md): {said}" for name, said in summaries.items()),
        "errors": _errors(),
        "proof": _fenced("prove causal --q-len 2048 --kv-len 2048 --block 128 128"),
        "help": _fenced("--help"),
    }
    for name, part in made.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        text = before + mark + part + "\n" + rest[rest.index("<!-- end -->") :]
    return text


_WRONG = """attention packed_causal(window: int = 128)
tensor doc: int32[B, KV] nondecreasing over KV
mask = q >= k & doc[q] == doc[b, k] and q - kv_idx < windw
"""


def _fenced(command: str) -> str:
    return f"```\n$ attn-dsl {command}\n{answer(command)}```"


def _errors() -> str:
    try:
        load(Source("packed.attn", _WRONG))
    except CompileError as error:
        return f"```\n{render(error.diagnostics, color=False).rstrip()}\n```"
    raise AssertionError("the text is right")


def answer(command: str) -> str:
    """What the command line prints, on either stream, on a terminal of 110 columns."""
    os.environ["COLUMNS"] = "110"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        attn_dsl(command.split())
    return said.getvalue()


if __name__ == "__main__":
    sys.exit(main())
