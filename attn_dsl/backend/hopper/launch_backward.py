"""Launch the Hopper backward kernels for a bound call, or say why the call is not for them.

Arguments and results are those of `portable.launch.backward`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.experimental.gluon import language as gl
from triton.runtime.errors import PTXASError

from attn_dsl.backend.hopper import check
from attn_dsl.backend.hopper.backward import attention_backward
from attn_dsl.backend.hopper.backward_rows import finish_queries, prepare_rows
from attn_dsl.backend.hopper.configs_backward import KEYS, Config, candidates
from attn_dsl.backend.hopper.emit_backward import FUNCTIONS, Emitted, emit_module
from attn_dsl.backend.hopper.launch import Block, Compile, compile_ahead, compile_here, padded
from attn_dsl.backend.hopper.launch import _Shape as BlockShape
from attn_dsl.backend.hopper.launch import refusal as forward_refusal
from attn_dsl.backend.portable import launch as portable
from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.launch import LAYOUTS, Call, Gradients
from attn_dsl.backend.portable.load import load
from attn_dsl.backend.portable.run import Options, Runner, launch
from attn_dsl.passes.prove import Proof, prove
from attn_dsl.passes.schedule import Schedule, derive_schedule

ROWS = 64
"""Of a program that prepares rows."""
_NUMBERS = gl.NVMMASharedLayout(0, 32, rank=2)
_SUMS = gl.NVMMASharedLayout(128, 32, rank=2)
_lock = threading.Lock()


@dataclass(frozen=True)
class Choice:
    """The configuration that calls of a kind run with, and what the assembler said of it; None where none is good.

    `rejected` are the configurations that were to come first, each with the reason.
    """

    config: Config | None
    build: check.Build | None
    rejected: tuple[tuple[Config, str], ...] = ()


@dataclass
class Kernels:
    """The Hopper backward kernels of a variant: emitted functions, and what was decided for each kind of call."""

    portable: portable.Kernels
    proof: Proof | None = None
    choices: dict[tuple[Any, ...], Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._modules: dict[bool, tuple[Emitted, ModuleType]] = {}
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        self._schedule: Schedule | None = None

    @property
    def schedule(self) -> Schedule:
        """Which tiles are visited; all of them count as masked, so pieces are not cut any further."""
        if self._schedule is None:
            proof = prove(self.portable.variant) if self.proof is None else self.proof
            self._schedule = derive_schedule(self.portable.variant, replace(proof, masked=()))
        return self._schedule

    def emitted(self, precise: bool) -> tuple[Emitted, ModuleType]:
        if precise not in self._modules:
            text = emit_module(self.portable.variant, self.schedule, fast_tanh=not precise)
            self._modules[precise] = text, load(text.source, f"hopper_backward_{self.portable.variant.name}")
        return self._modules[precise]

    def choice(self, call: Call, compile: Compile | None = None) -> Choice:
        """The configuration for calls like this one: the first candidate whose compiled kernel has no defect."""
        kind = self.kind(call)
        found = self.choices.get(kind)
        if found is None:
            with _lock:
                found = self.choices[kind] = self.choices.get(kind) or self._settle(call, compile or compile_here)
        return found

    def plan(self, call: Call, config: Config) -> _Plan:
        """What launches with a configuration have in common."""
        key = (config, self.kind(call))
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = _Plan.of(self, call, config)
        return found

    def kind(self, call: Call) -> tuple[Any, ...]:
        """What of a call decides the kernel that Triton compiles for a configuration."""
        query = call.query
        numbers = [isinstance(x, Tensor) for x in (call.q_offset, *call.parameters)]
        dims = (query.shape[3], call.value.shape[3])
        return (query.dtype, *dims, call.precise, self.masked(call), *numbers)

    def masked(self, call: Call) -> bool:
        """Whether some pair that is visited does not count."""
        text = self.emitted(call.precise)[0]
        return "mask" in text.functions or text.positional or call.key.shape[2] % KEYS != 0

    def _settle(self, call: Call, compile: Compile) -> Choice:
        rejected: list[tuple[Config, str]] = []
        for config in candidates(padded(call.query.shape[3]), padded(call.value.shape[3])):
            try:
                compiled = _compiled(self, call, config, compile)
            except (CompilationError, PTXASError) as error:
                defect: str | None = f"it does not compile ({type(error).__name__})"
            else:
                build = check.inspected(self.portable.variant.name, compiled)
                defect = build.defect
                if defect is None:
                    return Choice(config, build, tuple(rejected))
            rejected.append((config, str(defect)))
        return Choice(None, None, tuple(rejected))


def refusal(kernels: Kernels, call: Call, wanted: frozenset[str], deterministic: bool) -> str | None:
    """Why the gradients of a call are not for these kernels, or None."""
    if reason := forward_refusal(kernels.portable, call):
        return reason
    if max(call.query.shape[3], call.value.shape[3]) > 128:
        return "the head dimension is above 128: dK and dV do not fit the registers"
    if deterministic:
        return "dQ is summed in the order in which programs come, and `deterministic` is asked for"
    if names := ", ".join(f"`{name}`" for name in sorted(wanted)):
        return f"a gradient of {names} is wanted"
    return None


@dataclass(frozen=True)
class _Layout:
    """What of a launch follows from shapes and strides.

    `inputs`: of query, key, value and output gradient; `outputs`: of the gradients of key and value.
    """

    programs: int
    inputs: tuple[BlockShape, ...]
    outputs: tuple[BlockShape, ...]
    strides: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    extents: tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    """What launches of one kernel have in common; `dims` are the head dimensions of the tiles."""

    config: Config
    dims: tuple[int, int]
    prepare: Options
    options: Options
    finish: Options
    layouts: dict[tuple[Any, ...], _Layout]

    @staticmethod
    def of(kernels: Kernels, call: Call, config: Config) -> _Plan:
        text, module = kernels.emitted(call.precise)
        functions = {name: getattr(module, name) if name in text.functions else None for name in FUNCTIONS}
        dim, value_dim = call.query.shape[3], call.value.shape[3]
        d, dv = padded(dim), padded(value_dim)
        tiles = {"QUERIES": config.queries, "D": d}
        prepare = {
            "SLOPE": functions["slope"], "ROWS": ROWS, **tiles, "DV": dv, "VALUE_DIM": value_dim, "UNIT": 8,
            "num_warps": 8,
        }  # fmt: skip
        names = {name: name.upper() for name in FUNCTIONS} | {"keys": "KEY_TERMS"}
        options = {
            **{names[name]: function for name, function in functions.items()}, "DERIVATIVE": text.has_derivative,
            "MASKED": kernels.masked(call), "POSITIONAL": text.positional, **tiles, "DV": dv,
            "QUERY_STAGES": config.query_stages, "GRAD_STAGES": config.grad_stages, "REGISTERS": config.registers,
            "num_warps": 4,
        }  # fmt: skip
        finish = {**tiles, "DIM": dim, "num_warps": 4}
        return _Plan(config, (d, dv), Options(prepare), Options(options), Options(finish), {})

    def layout(self, call: Call, out: Tensor, grad_out: Tensor) -> _Layout:
        tensors = (call.query, call.key, call.value, out, grad_out)
        at = (*(x.shape for x in tensors), *(x.stride() for x in tensors), call.extents)
        found = self.layouts.get(at)
        if found is None:
            if len(self.layouts) >= LAYOUTS:
                self.layouts.clear()
            found = self.layouts[at] = self._layout(call, out, grad_out)
        return found

    def _layout(self, call: Call, out: Tensor, grad_out: Tensor) -> _Layout:
        (d, dv), rows = self.dims, self.config.queries
        dk, dv_out = (torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (call.key, call.value))
        batch, kv_heads, kv_len, _ = call.key.shape
        return _Layout(
            batch * kv_heads * -(-kv_len // KEYS),
            (BlockShape.of(call.query, rows, d), BlockShape.of(call.key, 64, d), BlockShape.of(call.value, 64, dv),
             BlockShape.of(grad_out, rows, dv)),
            (BlockShape.of(dk, 64, d), BlockShape.of(dv_out, 64, dv)),
            tuple((*(plain(stride // 8) for stride in x.stride()[:3]), plain(1)) for x in (out, grad_out)),
            call.sizes[:6], tuple(map(plain, call.sizes[6:])),
        )  # fmt: skip


def backward(
    kernels: Kernels,
    call: Call,
    out: Tensor,
    shifted: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    config: Config,
    run: Runner = launch,
) -> Gradients:
    """Gradients of query, key and value for a call of which `refusal` has nothing to say."""
    out, grad_out = _loadable(out), _loadable(grad_out)
    plan = kernels.plan(call, config)
    layout = plan.layout(call, out, grad_out)
    query, device = call.query, call.query.device
    batch, heads, q_len, _ = query.shape
    rows = -(-q_len // config.queries) * config.queries
    d = plan.dims[0]
    numbers = torch.empty(2, batch * heads, rows, dtype=torch.float32, device=device)
    sums = torch.empty(batch * heads * rows * d // 32, 32, dtype=torch.float32, device=device)
    dq = torch.empty(query.shape, dtype=query.dtype, device=device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (call.key, call.value))

    parameters = tuple(plain(p) if isinstance(p, int) and not isinstance(p, bool) else p for p in call.parameters)
    captured = tuple((t, tuple(map(plain, t.shape)), tuple(map(plain, t.stride()))) for t in call.tensors)
    sizes = tuple(map(plain, layout.sizes))
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    scale = float(call.scale)
    run(
        prepare_rows,
        batch * heads * (rows // ROWS),
        (out, grad_out, grad_lse, shifted, numbers, sums, *layout.strides, parameters, (*sizes, *layout.extents),
         captured, scale),
        plan.prepare,
    )  # fmt: skip
    inputs = [shape(x) for shape, x in zip(layout.inputs, (query, call.key, call.value, grad_out), strict=True)]
    outputs = [shape(x) for shape, x in zip(layout.outputs, (dk, dv), strict=True)]
    lines = [Block(x, [batch * heads, rows], [rows, 1], [1, config.queries], _NUMBERS) for x in numbers]
    half = d if config.queries == 128 else d // 2
    target = Block(sums, list(sums.shape), [32, 1], [2 * half, 32], _SUMS)
    run(
        attention_backward,
        layout.programs,
        (
            *inputs,
            *lines,
            target,
            *outputs,
            call.q_offset,
            parameters,
            *layout.sizes,
            layout.extents,
            captured,
            scale,
            0,
        ),
        plan.options,
    )
    run(finish_queries, batch * heads * (rows // config.queries) * 2, (sums, dq, sizes, scale), plan.finish)
    return Gradients(dq, dk, dv, {})


def _loadable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that the bulk copy engine takes."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    aligned = tensor.device.type == "meta" or tensor.data_ptr() % 16 == 0
    if aligned and tensor.stride(3) == 1 and all(stride > 0 and stride % 8 == 0 for stride in strides[:-1]):
        return tensor
    return (
        tensor.contiguous()
        if aligned and not tensor.is_contiguous()
        else tensor.clone(memory_format=torch.contiguous_format)
    )


# ---------------------------------------------------------------- compiling without a launch


def build(kernels: Kernels, call: Call, config: Config | None = None) -> Any:
    """The backward kernel compiled ahead of time, with the configuration that is found good unless one is given."""
    config = config or kernels.choice(call, compile_ahead).config
    assert config is not None, "no configuration fits"
    return _compiled(kernels, call, config, compile_ahead)


def _compiled(kernels: Kernels, call: Call, config: Config, compile: Compile) -> Any:
    compiled: list[Any] = []

    def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        if kernel is attention_backward:
            compiled.append(compile(kernel, arguments, options))

    batch, heads, q_len, _ = call.query.shape
    out = torch.empty(batch, heads, q_len, call.value.shape[3], dtype=call.query.dtype, device="meta")
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device="meta")
    backward(kernels, call, out, lse, out, None, config, run)
    return compiled[0]
