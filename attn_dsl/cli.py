"""The command line, `attn-dsl COMMAND`.

Exit codes: 0, 1 (the input is wrong: a text with errors, a claim refuted), 2 (the call is wrong: an unknown option, a
missing file). Answers go to standard output, everything else to standard error. Each command imports what it needs
when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from attn_dsl.errors import AttnError, BindingError, CompileError, Diagnostic, Source

if TYPE_CHECKING:
    import torch

    from attn_dsl.ir.variant import Variant

SHIPPED = Path(__file__).parent / "variants"
FILE = "a .attn file, the name of a shipped variant, or - for standard input"


class CallError(Exception):
    """The command was called wrongly; answered with exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Wrong input is answered, never a traceback."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except CompileError as error:
        _show(error.diagnostics)
        return 1
    except (CallError, BindingError) as error:
        print(f"attn-dsl: {error}", file=sys.stderr)
        return 2
    except AttnError as error:
        print(f"attn-dsl: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `attn-dsl ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    return code


# --- commands


def check(arguments: argparse.Namespace) -> int:
    """Report every error of each text."""
    found: list[Diagnostic] = []
    for file in arguments.files:
        try:
            _load(file)
        except CompileError as error:
            found += error.diagnostics
        else:
            if arguments.format == "text":
                print(f"{file}: no errors")
    if arguments.format == "json":
        _print_json([_as_data(diagnostic) for diagnostic in found])
    else:
        _show(found)
    return 1 if found else 0


def fmt(arguments: argparse.Namespace) -> int:
    """Rewrite texts in the one layout; comments stay."""
    from attn_dsl.frontend.format import format_text

    changed = []
    for file in arguments.files:
        text = _read(file)
        formatted = format_text(text, file)
        if arguments.check:
            changed += [file] if formatted != text else []
        elif arguments.stdout or file == "-":
            sys.stdout.write(formatted)
        elif formatted != text:
            _replace(Path(file), formatted)
    for file in changed:
        print(f"{file}: would be formatted", file=sys.stderr)
    return 1 if changed else 0


def explain(arguments: argparse.Namespace) -> int:
    """Expand the code of an error."""
    from attn_dsl.frontend import codes

    try:
        print(codes.explain(arguments.code.upper()))
    except KeyError:
        raise CallError(f"there is no error code {arguments.code}") from None
    return 0


def ir(arguments: argparse.Namespace) -> int:
    """Print the typed expression graph, as checked or as a pass leaves it."""
    from attn_dsl.passes import pipeline

    program = pipeline.Program(_load(arguments.file))
    if arguments.after is not None:

        def on_pass(step: pipeline.Pass, program: pipeline.Program, seconds: float) -> None:
            if arguments.time:
                print(f"{step.name:14}{seconds * 1000:8.2f} ms", file=sys.stderr)

        constants = dict(arguments.parameters)
        program = pipeline.run(program.variant, constants, stop_after=arguments.after, on_pass=on_pass)
    sys.stdout.write(pipeline.dump(program, arguments.after))
    return 0


def prove(arguments: argparse.Namespace) -> int:
    """Print what is proved of the tiles: claims, counts and a picture."""
    from attn_dsl.report import report

    found = report(
        _load(arguments.file),
        arguments.q_len,
        arguments.kv_len,
        block=tuple(arguments.block),
        q_offset=arguments.q_offset,
        parameters=dict(arguments.parameters),
    )
    if arguments.verify:
        found = found.verified()
    if arguments.format == "json":
        _print_json(found.json())
    elif arguments.format == "svg":
        print(found.svg())
    else:
        sys.stdout.write(found.text(color=_has_color(sys.stdout)))
    return 1 if found.is_refuted else 0


def cost(arguments: argparse.Namespace) -> int:
    """Print operations, bytes and memory of a call, dense against scheduled."""
    from attn_dsl.api import Attention

    counted = Attention(_load(arguments.file), dict(arguments.parameters)).cost(
        arguments.batch,
        arguments.heads,
        arguments.q_len,
        arguments.kv_len,
        arguments.head_dim,
        HK=arguments.kv_heads,
        q_offset=arguments.q_offset,
        dtype=_dtype(arguments.dtype),
        block=tuple(arguments.block),
    )
    if arguments.format == "json":
        _print_json(vars(counted))
    else:
        print(counted)
    return 0


def emit(arguments: argparse.Namespace) -> int:
    """Print the source that a variant becomes for one kind of device."""
    from attn_dsl.api import Attention

    attention = Attention(_load(arguments.file), dict(arguments.parameters))
    kernels = arguments.which is not None or arguments.target is not None or arguments.standalone
    text = attention.source(
        "cuda" if kernels else arguments.device,
        _dtype(arguments.dtype),
        which=arguments.which,
        target=arguments.target,
        standalone=arguments.standalone,
    )
    print(text.rstrip())
    return 0


def build(arguments: argparse.Namespace) -> int:
    """Compile kernels for a GPU that need not be at hand; a later run on it compiles nothing."""
    from attn_dsl.api import Attention
    from attn_dsl.backend.build import DTYPES

    kernels = Attention(_load(arguments.file), dict(arguments.parameters)).build(
        arguments.target,
        dtype=DTYPES[arguments.dtype],
        head_dim=arguments.head_dim,
        value_head_dim=arguments.value_head_dim,
        backward=not arguments.forward_only,
        gradients=None if arguments.gradients is None else (frozenset(arguments.gradients),),
        offsets=arguments.offsets,
        decode=arguments.decode,
        precise=arguments.precise,
        deterministic=arguments.deterministic,
    )
    for kernel in kernels:
        print(f"{kernel.name:28} {kernel.shared:7} bytes shared {kernel.seconds:8.2f} s")
    return 0


def cache(arguments: argparse.Namespace) -> int:
    """List or clear the disk cache, or say what made the key of an entry."""
    from attn_dsl.backend import cache as store
    from attn_dsl.backend.cache_report import listing, why

    if arguments.action == "clear":
        print(f"{store.clear()} entries removed from {store.folder()}")
    elif arguments.action == "ls":
        entries = list(store.entries())
        if arguments.format == "json":
            _print_json([{"entry": e.path.name, "kind": e.kind, "bytes": e.size, "inputs": e.inputs} for e in entries])
        else:
            sys.stdout.write(listing(entries))
    elif arguments.key is None:
        raise CallError("cache why: name an entry, or the beginning of a name or key (`attn-dsl cache ls` has them)")
    else:
        found = why(list(store.entries()), arguments.key)
        if found is None:
            raise CallError(f"no entry of {store.folder()} has a name or key that begins with {arguments.key}")
        sys.stdout.write(found)
    return 0


def variants(arguments: argparse.Namespace) -> int:
    """List the shipped variants, or print the text of one."""
    if arguments.name is not None:
        sys.stdout.write(_shipped(arguments.name).read_text(encoding="utf-8"))
        return 0
    summaries = {path.stem: _summary(path) for path in sorted(SHIPPED.glob("*.attn"))}
    if arguments.format == "json":
        _print_json(summaries)
    else:
        width = max(map(len, summaries))
        print("\n".join(f"{name:{width}}  {summary}" for name, summary in summaries.items()))
    return 0


# --- the parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attn-dsl",
        description="A compiler for attention variants: check a text, prove its schedule, look at its code.",
        epilog="FILE is " + FILE + ". Exit codes: 0, 1 (the input is wrong), 2 (the call is wrong).",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        summary = (run.__doc__ or "").splitlines()[0]
        added = commands.add_parser(run.__name__, help=summary, description=summary)
        added.set_defaults(run=run)
        return added

    _add_text_commands(command)
    _add_call_commands(command)
    _add_kernel_commands(command)
    return parser


Command = Callable[[Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""Adds a command, named and described as its function."""


def _add_text_commands(command: Command) -> None:
    checker = command(check)
    checker.add_argument("files", nargs="+", metavar="FILE", help=FILE)
    _add_format(checker, "text", "json")

    formatter = command(fmt)
    formatter.add_argument("files", nargs="+", metavar="FILE", help="a .attn file, rewritten in place, or -")
    formatter.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file would change")
    formatter.add_argument("--stdout", action="store_true", help="write to standard output instead")

    command(explain).add_argument("code", metavar="CODE", help="an error code, such as E012")

    printer = command(ir)
    printer.add_argument("file", metavar="FILE", help=FILE)
    printer.add_argument("--after", metavar="PASS", help="run the passes up to this one and show what it made")
    printer.add_argument("--time", action="store_true", help="say how long each pass took")
    _add_set(printer)


def _add_call_commands(command: Command) -> None:
    prover = command(prove)
    _add_call(prover)
    prover.add_argument("--verify", action="store_true", help="also hand each claim to islpy and z3")
    _add_format(prover, "text", "json", "svg")

    coster = command(cost)
    _add_call(coster)
    coster.add_argument("--batch", type=_at_least(1), default=1, metavar="B", help="(default: %(default)s)")
    coster.add_argument("--heads", type=_at_least(1), default=1, metavar="H", help="query heads (default: %(default)s)")
    coster.add_argument("--kv-heads", type=_at_least(1), metavar="HK", help="key/value heads (default: H)")
    coster.add_argument("--head-dim", type=_at_least(1), default=64, metavar="D", help="(default: %(default)s)")
    _add_dtype(coster)
    _add_format(coster, "text", "json")


def _add_kernel_commands(command: Command) -> None:
    emitter = command(emit)
    emitter.add_argument("file", metavar="FILE", help=FILE)
    emitter.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    emitter.add_argument(
        "--which", choices=("forward", "backward"), help="what GPU kernels call in one pass (default: forward)"
    )
    emitter.add_argument("--target", metavar="SM", help="for GPUs such as sm_80 (default: functions for any)")
    emitter.add_argument(
        "--standalone", action="store_true", help="a file that runs with torch and triton alone, kernels and launchers"
    )
    _add_dtype(emitter)
    _add_set(emitter)

    builder = command(build)
    builder.add_argument("file", metavar="FILE", help=FILE)
    builder.add_argument("--target", default="sm_90", metavar="SM", help="such as sm_80 (default: %(default)s)")
    builder.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="(default: %(default)s)")
    builder.add_argument("--head-dim", type=_at_least(1), default=128, metavar="D", help="(default: %(default)s)")
    builder.add_argument("--value-head-dim", type=_at_least(1), metavar="DV", help="(default: D)")
    builder.add_argument("--forward-only", action="store_true", help="no backward kernels")
    builder.add_argument(
        "--gradients", nargs="*", metavar="NAME", help="captures that want a gradient (default: none, and all tensors)"
    )
    builder.add_argument("--offsets", action="store_true", help="for calls that give q_offset as a tensor")
    builder.add_argument("--decode", action="store_true", help="also the kernels for few queries")
    builder.add_argument("--precise", action="store_true", help="exact instead of hardware functions")
    builder.add_argument("--deterministic", action="store_true", help="for deterministic gradients of captures")
    _add_set(builder)

    keeper = command(cache)
    keeper.add_argument("action", choices=("ls", "clear", "why"))
    keeper.add_argument("key", nargs="?", metavar="KEY", help="for `why`: the beginning of a name or key")
    _add_format(keeper, "text", "json")

    lister = command(variants)
    lister.add_argument("name", nargs="?", metavar="NAME", help="print the text of this one")
    _add_format(lister, "text", "json")


def _add_call(parser: argparse.ArgumentParser) -> None:
    """The options that say what is called: a file, lengths, tiles, parameters."""
    parser.add_argument("file", metavar="FILE", help=FILE)
    parser.add_argument("--q-len", type=_at_least(1), required=True, metavar="N", help="number of queries")
    parser.add_argument("--kv-len", type=_at_least(1), required=True, metavar="N", help="number of keys")
    parser.add_argument(
        "--block", type=_at_least(1), nargs=2, default=[128, 128], metavar=("BM", "BN"), help="tile, queries by keys"
    )
    parser.add_argument("--q-offset", type=_at_least(0), default=0, metavar="O", help="position of the first query")
    _add_set(parser)


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    dtypes = ("float16", "bfloat16", "float32", "float64")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="(default: %(default)s)")


def _add_format(parser: argparse.ArgumentParser, *formats: str) -> None:
    parser.add_argument("--format", choices=formats, default=formats[0], help="(default: %(default)s)")


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="parameters",
        type=_assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="bind a parameter",
    )


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if not least <= value < 2**31:
            raise argparse.ArgumentTypeError(f"{value} is not in [{least}, 2**31)")
        return value

    return parse


def _assignment(text: str) -> tuple[str, bool | int | float]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"{value!r} is not a number, true or false")


def _version() -> str:
    from attn_dsl import __version__

    return f"attn-dsl {__version__}"


# --- input and output


def _load(file: str) -> Variant:
    """The checked variant that a FILE argument names."""
    from attn_dsl.frontend import load

    if file == "-":
        return load(Source("<stdin>", _read(file)))
    if Path(file).is_file():
        return load(Path(file))
    path = _shipped(file)
    return load(Source(path.name, _read(str(path))))


def _read(file: str) -> str:
    """The text of a file or of standard input. CallError where there is none, AttnError where it is not UTF-8."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode()
    except OSError as error:
        raise CallError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise AttnError(f"{file}: not UTF-8, at byte {error.start}") from None


def _shipped(name: str) -> Path:
    path = SHIPPED / f"{name}.attn"
    if name.isidentifier() and path.is_file():
        return path
    from difflib import get_close_matches

    near = get_close_matches(name, [path.stem for path in SHIPPED.glob("*.attn")], n=1)
    raise CallError(f"no file and no shipped variant is named {name}" + (f"; did you mean {near[0]}?" if near else ""))


def _summary(path: Path) -> str:
    """What the first line says after `# NAME.attn:`."""
    with path.open(encoding="utf-8") as file:
        return file.readline().partition(": ")[2].strip()


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is never seen half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(path.stat().st_mode)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CallError(f"{path}: {error.strerror}") from None


def _show(diagnostics: Sequence[Diagnostic]) -> None:
    if diagnostics:
        from attn_dsl.frontend.render import render

        print(render(diagnostics, color=_has_color(sys.stderr)), file=sys.stderr)


def _has_color(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _as_data(diagnostic: Diagnostic) -> dict[str, Any]:
    span = diagnostic.span
    place = {"file": span.source.name, "line": span.line, "column": span.column, "text": span.text}
    texts = {"message": diagnostic.message, "label": diagnostic.label, "help": diagnostic.help}
    return {"code": diagnostic.code, **texts, **place}


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2))
