"""Compile ahead of time, on a machine without a GPU, what calls on a GPU will ask for.

A kernel is compiled for an architecture, a dtype, head dimensions, and the captured tensors that want a gradient; for
no length, batch, number of heads or run-time parameter. Results go into the disk cache under the keys that a call
computes, so a process that finds them there compiles nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from attn_dsl.backend.binding import checked
from attn_dsl.backend.cache_triton import compiling
from attn_dsl.backend.execute import Program
from attn_dsl.backend.gpu import backward_route, route, run_backward
from attn_dsl.backend.order import programs
from attn_dsl.backend.portable import launch, launch_decode
from attn_dsl.backend.portable.run import Compiler
from attn_dsl.backend.sorting import DTYPES as DTYPES_OF_ORDERS
from attn_dsl.backend.tuning import chosen
from attn_dsl.errors import BindingError
from attn_dsl.ir.nodes import Size
from attn_dsl.ir.types import DType, Type

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTHS = (128, 127)
"""Of the calls that are compiled for, whole tiles and ragged ones; any other gives the same kernels."""


@dataclass(frozen=True)
class Request:
    """What to compile for.

    gradients: sets of names, the captured tensors and float parameters that want a gradient together; parameters that
    want one are taken to be tensors. offsets: whether `q_offset` is a tensor. decode: also what few queries take.
    """

    target: str
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    value_head_dim: int | None = None
    backward: bool = True
    gradients: tuple[frozenset[str], ...] | None = None
    offsets: bool = False
    decode: bool = False
    precise: bool = False
    deterministic: bool = False
    float32_precision: str = "ieee"


def requested(target: str, fields: Mapping[str, Any]) -> Request:
    """A request of these fields. Raises BindingError for one that there is not, or a dimension that is none."""
    known = {field.name for field in dataclasses.fields(Request)}
    if unknown := [name for name in fields if name not in known]:
        raise BindingError(f"`{unknown[0]}`: expected one of {', '.join(sorted(known))}")
    request = Request(target, **fields)
    checked("head_dim", request.head_dim, 1)
    checked("value_head_dim", request.value_head_dim or request.head_dim, 1)
    return request


@dataclass(frozen=True)
class Built:
    """One kernel. `key` is that of its cache entry, `shared` its bytes of shared memory."""

    name: str
    key: str
    seconds: float
    shared: int


def build(program: Program, request: Request) -> Iterator[Built]:
    """Compile one kernel after the other, those of other orders of positions too.

    Raises BindingError where the request fits neither variant nor a target.
    """
    done: set[str] = set()
    for each in (program, *programs(program)):
        yield from _built(each, request, done)


def _built(program: Program, request: Request, done: set[str]) -> Iterator[Built]:
    capability = parse_target(request.target)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    for wanted, length in itertools.product(_gradient_sets(program, request), LENGTHS):
        call = _call(program, request, capability, wanted, length)
        for step in _steps(program, request, call, wanted):
            compiler = Compiler(target)
            start = time.perf_counter()
            step(compiler)
            seconds = time.perf_counter() - start
            for kernel in compiler.compiled:
                if kernel.hash in done:
                    continue
                done.add(kernel.hash)
                _build_launcher(program.variant.name, kernel)
                yield Built(kernel.name, kernel.hash, seconds / len(compiler.compiled), kernel.metadata.shared)


def parse_target(text: str) -> tuple[int, int]:
    """`sm_90` as the compute capability (9, 0)."""
    found = re.fullmatch(r"sm_(\d{1,2})(\d)a?", text) if isinstance(text, str) else None
    if found is None:
        raise BindingError(f"`target`: expected sm_80, sm_90 or the like, got {text!r}")
    return int(found[1]), int(found[2])


def _gradient_sets(program: Program, request: Request) -> Iterable[frozenset[str]]:
    """Without captured gradients, and with those of all float tensors, unless the request names the sets."""
    floats = frozenset(t.name for t in program.variant.tensors if t.dtype.type is Type.FLOAT)
    if request.gradients is None:
        return (frozenset(), floats) if floats and request.backward else (frozenset(),)
    known = floats | {p.name for p in program.variant.parameters if p.type is Type.FLOAT}
    for name in itertools.chain.from_iterable(request.gradients):
        if name not in known:
            raise BindingError(f"`{name}`: `{program.variant.name}` has no such float tensor or parameter")
    return request.gradients


def _call(
    program: Program, request: Request, capability: tuple[int, int], wanted: frozenset[str], length: int
) -> launch.Call:
    """A call of tensors without storage."""
    variant = program.variant
    if request.dtype not in DTYPES.values():
        raise BindingError(f"`dtype`: expected fp32, bf16 or fp16, got {request.dtype}")
    dims = (request.head_dim, request.value_head_dim or request.head_dim)
    key, value = (torch.empty(1, 1, length, dim, dtype=request.dtype, device="meta") for dim in dims)
    sizes = {"B": 1, "H": 1, "HK": 1, "Q": length, "KV": length, "D": dims[0]}
    numbers: dict[str, Any] = {p.name: _some(p.type) if p.default is None else p.default for p in variant.parameters}
    for node in program.binder.signature.scalars:
        if isinstance(node, Size):
            sizes.setdefault(node.name, length)
    scalars = tuple({**sizes, **numbers}[name] for name in program.binder.scalars)
    extents = program.binder.extents(scalars)
    tensors = tuple(_tensor(t.dtype, shape) for t, shape in zip(variant.tensors, extents, strict=True))
    numbers |= {name: torch.empty((), device="meta") for name in wanted if name in numbers}
    return launch.Call(
        key, key, value, tuple(numbers.values()), tensors,
        tuple(sizes[extent.name] for extent in program.kernels.extents), 1 / math.sqrt(dims[0]),
        torch.empty(1, dtype=torch.int64, device="meta") if request.offsets else 0,
        request.precise, request.float32_precision, chosen(program, key, value, capability), capability,
    )  # fmt: skip


def _some(kind: Type) -> bool | int | float:
    return {Type.BOOL: True, Type.INT: 1, Type.FLOAT: 1.0}[kind]


def _tensor(dtype: DType, shape: tuple[int, ...]) -> Tensor:
    return torch.empty([max(1, size) for size in shape], dtype=getattr(torch, dtype.value), device="meta")


def _steps(program: Program, request: Request, call: launch.Call, wanted: frozenset[str]) -> Iterator[Any]:
    """The passes of a call, each a function of the runner that is to take its kernels."""
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    places: list[Tensor | None] = [None]
    if program.is_sorted:
        places = [call.query.new_empty(call.query.shape[:3], dtype=dtype) for dtype in DTYPES_OF_ORDERS]
    for rows in places:
        yield lambda run, rows=rows: outputs.append(_forward(program, replace(call, rows=rows), run))
    if request.backward:
        out, lse, shifted = outputs[0]
        for grad_lse in (None, lse):
            yield lambda run, grad_lse=grad_lse: _backward(program, request, call, out, shifted, grad_lse, wanted, run)
    if request.decode:
        for tokens, splits in itertools.product((1, 32, 64), (1, 2)):  # tiles of 16, 32 and 64 rows
            few = replace(call, query=call.query.new_empty((1, 1, tokens, call.query.shape[3])))
            layout = launch_decode.layout_of(program.kernels, few, splits)
            yield lambda run, few=few, layout=layout: launch_decode.forward(program.kernels, few, run, layout)


def _forward(program: Program, call: launch.Call, run: Compiler) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernels that the call would take on the GPU."""
    found = route(program, call, call.capability, _ahead)
    if found.choice is not None and found.choice.config is not None:
        from attn_dsl.backend.hopper import launch as hopper

        return hopper.forward(program.hopper, call, run, found.choice.config)
    return launch.forward(program.kernels, call, run)


def _backward(
    program: Program,
    request: Request,
    call: launch.Call,
    out: Tensor,
    shifted: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
    run: Compiler,
) -> None:
    found = backward_route(program, call, wanted, request.deterministic, call.capability, _ahead)
    given = (call, out, shifted, torch.empty_like(out), grad_lse)
    run_backward(program, found, *given, deterministic=request.deterministic, run=run)


def _ahead(kernel: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    from attn_dsl.backend.hopper.launch import compile_ahead

    return compile_ahead(kernel, arguments, options)


# ---------------------------------------------------------------- Triton's launcher


def _build_launcher(name: str, kernel: Any) -> None:
    """Triton 3.6 writes a C function for each kernel signature and compiles it where the kernel is first launched.

    Do it here, linked against a library that only has the driver's names. Later releases have no such function.
    """
    from triton.backends.nvidia import driver

    compiler = shutil.which("gcc") or shutil.which("clang")
    if not hasattr(driver, "make_launcher") or compiler is None:
        return
    from triton.runtime.build import _build, platform_key
    from triton.runtime.cache import get_cache_manager

    described = getattr(kernel.metadata, "tensordesc_meta", None)
    text = driver.make_launcher(kernel.src.constants, dict(kernel.src.signature), described)
    key = hashlib.sha256((text + platform_key()).encode()).hexdigest()
    with compiling(name, dict):
        manager = get_cache_manager(key)
        file = f"__triton_launcher{_suffix()}"
        if manager.get_file(file) is not None:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            (path / "main.c").write_text(text)
            used = sorted(set(re.findall(r"\bcu[A-Z]\w*(?=\()", text)))
            (path / "stub.c").write_text("".join(f"void {function}(void) {{}}\n" for function in used))
            stub = [compiler, "-shared", "-o", str(path / "libcuda.so.1"), str(path / "stub.c")]
            subprocess.run([*stub, "-Wl,-soname,libcuda.so.1"], check=True, capture_output=True)
            built = _build(
                "__triton_launcher", str(path / "main.c"), folder, [folder], driver.include_dirs, driver.libraries, []
            )
            manager.put(Path(built).read_bytes(), file)


def _suffix() -> str:
    import sysconfig

    return str(sysconfig.get_config_var("EXT_SUFFIX"))
