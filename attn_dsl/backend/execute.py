"""One bound call on one backend, forward and backward, as plain functions of tensors.

A `Program` is known by the printed form of its variant, so that an exported graph, which holds that text, needs nothing
else. What is bound is taken to be valid: the API checks it, and the fake implementation of the operator.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_dsl.backend.binding import Binder, Call
from attn_dsl.errors import BindingError
from attn_dsl.ir.nodes import Const, Q
from attn_dsl.ir.parser import parse_ir
from attn_dsl.ir.printer import print_ir
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.schedule import Schedule, derive_schedule
from attn_dsl.passes.separate import separate

if TYPE_CHECKING:
    from attn_dsl.backend.hopper.launch import Kernels as HopperKernels
    from attn_dsl.backend.hopper.launch_backward import Kernels as HopperBackwardKernels
    from attn_dsl.backend.order import Choice, Ordered, StripsOfKeys
    from attn_dsl.backend.portable.launch import Call as PortableCall
    from attn_dsl.backend.portable.launch import Kernels
    from attn_dsl.passes.order import Residues
    from attn_dsl.passes.order_by_data import Sorted
    from attn_dsl.passes.order_grid import Boxes, Strips
    from attn_dsl.passes.prove import Proof

CPU, GPU, PORTABLE, HOPPER, DECODE = "cpu", "gpu", "portable", "hopper", "decode"


@dataclass(frozen=True)
class Options:
    """What a call may ask for beside its arguments; `text` is the same for graphs.

    backend: `cpu`; `gpu`, which is `decode` for few queries, else `hopper` where it takes the call, else `portable`; or
    one of these three, to insist.
    precise: exact instead of hardware functions. deterministic: the same bits in every run, gradients of captured
    tensors too. float32_precision: `ieee` or `tf32`.
    """

    backend: str
    precise: bool = False
    deterministic: bool = False
    float32_precision: str = "ieee"
    text: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        chosen = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        object.__setattr__(self, "text", json.dumps(chosen))

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(text: str) -> Options:
        return Options(**json.loads(text))


class Program:
    """A simplified variant without `const` parameters, ready to run; schedules and kernels are made on first use."""

    def __init__(self, variant: Variant, proof: Proof | None = None) -> None:
        self.variant = variant
        # One line, since PyTorch shows arguments of graphs in comments of generated code; nothing else has a bar.
        self.text = print_ir(replace(variant, doc=""), locations=False).replace("\n", "|")
        self.binder = Binder(variant)
        self.tensor_names = tuple(tensor.name for tensor in variant.tensors)
        self.reordered: dict[tuple[Any, ...], Program] = {}
        """This program in other orders of positions, by what tells them apart."""
        self.strips: tuple[Strips, int] | None = None
        """Of what grid, with how many columns of keys, where the program is one over strips of it."""
        self.is_sorted = False
        """Whether the program is one over sorted positions, whose forward pass finds rows by `Call.rows`."""
        self.choices: dict[tuple[Any, ...], Choice] = {}
        """Which order calls take, by kind."""
        self.strips_of_keys: dict[tuple[Any, ...], StripsOfKeys | None] = {}
        """How their backward pass goes by strips of a grid, by kind; None where it does not."""
        self._proof = proof

    @functools.cached_property
    def orders(self) -> tuple[Residues | Sorted | Strips, ...]:
        """The orders of positions that the mask speaks of."""
        from attn_dsl.passes.order import residues
        from attn_dsl.passes.order_by_data import sorts
        from attn_dsl.passes.order_grid import strips

        return (*residues(self.variant), *strips(self.variant), *sorts(self.variant))

    @functools.cached_property
    def schedule(self) -> Schedule:
        """For tiles that are clipped to the lengths."""
        return derive_schedule(self.variant, self._proof)

    @functools.cached_property
    def kernels(self) -> Kernels:
        from attn_dsl.backend.portable.launch import Kernels

        return Kernels(self.variant, derive_schedule(self.variant, self._proof, padded=True))

    @functools.cached_property
    def hopper(self) -> HopperKernels:
        from attn_dsl.backend.hopper.launch import Kernels

        return Kernels(self.kernels, self._boxes)

    @functools.cached_property
    def hopper_backward(self) -> HopperBackwardKernels:
        from attn_dsl.backend.hopper.launch_backward import Kernels

        return Kernels(self.kernels, self._proof, self._boxes)

    @property
    def _boxes(self) -> Boxes | None:
        return None if self.strips is None else self.strips[0].boxes(self.strips[1])

    @functools.cached_property
    def has_row_term(self) -> bool:
        """Whether kernels drop a term of the score, so that their log-sum-exp is not the caller's."""
        dropped = separate(self.variant.score).dropped(Q)
        return not (isinstance(dropped, Const) and dropped.value == 0.0)


_programs: dict[str, Program] = {}


def program_for(variant: Variant, proof: Proof | None = None) -> Program:
    """The program of a simplified variant; among equals the first to come stays, with its source locations."""
    program = Program(variant, proof)
    return _programs.setdefault(program.text, program)


def program_of(text: str) -> Program:
    """The program that a graph names by the printed form of its variant."""
    found = _programs.get(text)
    return program_for(parse_ir(text.replace("|", "\n"))) if found is None else found


Outputs = tuple[Tensor, Tensor, Tensor]
"""out [B, H, Q, DV]; lse [B, H, Q]; what backward wants beside: lse without the row terms of the score, or nothing."""


@dataclass(frozen=True)
class Gradients:
    """In the shapes and dtypes of what they belong to; `captured` by name, those wanted."""

    query: Tensor
    key: Tensor
    value: Tensor
    captured: Mapping[str, Tensor]


def forward(program: Program, call: Call, options: Options) -> Outputs:
    """Run the forward pass; nothing is saved."""
    if options.backend not in (CPU, GPU, PORTABLE, HOPPER, DECODE):
        raise BindingError(f"no backend `{options.backend}`; the backends are cpu, gpu, portable, hopper, decode")
    ordered = reordered(program, call, options)
    return run_forward(program, call, options) if ordered is None else ordered.forward()


def run_forward(
    program: Program,
    call: Call,
    options: Options,
    results: Mapping[str, Tensor] | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
) -> Outputs:
    """`forward` in the order of the call; a GPU writes `out` where `results` say, and finds rows as in `Call.rows`."""
    if options.backend == CPU:
        with made_on_cpu():
            return _cpu_forward(program, call)
    return _gpu_forward(program, call, options, results or {}, rows)


def backward(
    program: Program,
    call: Call,
    options: Options,
    outputs: Outputs,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
) -> Gradients:
    """Gradients of query, key, value and of the captured tensors and parameters named in `wanted`."""
    if program.binder.stored:
        raise BindingError(f"{program.binder.stored}: such a call has no backward pass")
    if grad_out.stride(-1) != 1:  # that of a sum is one number everywhere; no kernel is compiled for that
        grad_out = grad_out.contiguous()
    ordered = reordered(program, call, options)
    if ordered is not None:
        found = ordered.backward(outputs, grad_out, grad_lse, wanted)
    else:
        found = run_backward(program, call, options, outputs, grad_out, grad_lse, wanted)
    given: dict[str, Any] = {**call.tensors, **call.parameters}
    captured = {name: fitted(found.captured.get(name), given[name]) for name in wanted}
    return Gradients(
        fitted(found.query, call.query), fitted(found.key, call.key), fitted(found.value, call.value), captured
    )


def run_backward(
    program: Program,
    call: Call,
    options: Options,
    outputs: Outputs,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
    results: Mapping[str, Tensor] | None = None,
) -> Gradients:
    """`backward` in the order of the call; a GPU writes `dq`, `dk` and `dv` where `results` say, if it can."""
    if options.backend == CPU:
        with made_on_cpu():
            return _cpu_backward(program, call, options, outputs, grad_out, grad_lse, wanted)
    return _gpu_backward(program, call, options, outputs, grad_out, grad_lse, wanted, results or {})


def reordered(program: Program, call: Call, options: Options) -> Ordered | None:
    """The call in another order of positions, where one is better than its own."""
    if not program.orders:
        return None
    from attn_dsl.backend.order import ordered

    return ordered(program, call, options)


def fitted(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient in the shape and dtype of what it belongs to; none is zeros."""
    if grad is None:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    if grad.dtype is like.dtype and grad.shape == like.shape and grad.device == like.device and grad.is_contiguous():
        return grad
    return grad.to(like.device, like.dtype).reshape(like.shape).contiguous()


def made_on_cpu() -> AbstractContextManager[Any]:
    """New tensors are on the CPU, whatever the caller's default device; without one this costs nothing."""
    return torch.device("cpu") if torch._C._len_torch_function_stack() else nullcontext()


# ---------------------------------------------------------------- the CPU backend


def _cpu_forward(program: Program, call: Call) -> Outputs:
    from attn_dsl.backend.cpu import attention as cpu

    if program.binder.packed:
        from attn_dsl.backend.packed import forward as packed_forward

        out, lse = packed_forward(program, call)
        return out, lse, lse.new_empty(0)
    problem = cpu.problem_of(program.variant, program.schedule, call)
    if program.binder.stored:
        from attn_dsl.backend.cpu.pages import gathered

        call = gathered(problem, call)
    out, lse = cpu.forward(problem, call)
    return out, lse, lse.new_empty(0)


def _cpu_backward(
    program: Program,
    call: Call,
    options: Options,
    outputs: Outputs,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
) -> Gradients:
    from attn_dsl.backend.cpu import attention as cpu

    if program.binder.packed:
        from attn_dsl.backend.packed import backward as packed_backward

        return packed_backward(program, call, outputs, grad_out, grad_lse, wanted)
    problem = cpu.problem_of(program.variant, program.schedule, call)
    found = cpu.backward(problem, call, *outputs[:2], grad_out, grad_lse, wanted)
    return Gradients(found.query, found.key, found.value, found.tensors | found.parameters)


# ---------------------------------------------------------------- the GPU backends


def _gpu_forward(
    program: Program, call: Call, options: Options, results: Mapping[str, Tensor], rows: tuple[Tensor, Tensor] | None
) -> Outputs:
    from attn_dsl.backend.gpu import forward

    bound = replace(portable_call(program, call, options), results=results, rows=rows)
    out, lse, shifted = forward(program, bound, options.backend)
    return out, lse, lse.new_empty(0) if shifted is lse else shifted


def _gpu_backward(
    program: Program,
    call: Call,
    options: Options,
    outputs: Outputs,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
    results: Mapping[str, Tensor],
) -> Gradients:
    from attn_dsl.backend.gpu import backward

    out, lse, shifted = outputs
    device = call.query.device
    if any(isinstance(x, Tensor) for x in call.parameters.values()):
        leaves = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in call.parameters.items()}
        call = replace(call, parameters=leaves)
    bound = portable_call(program, call, options)
    if results:
        bound = replace(bound, results=results)
    shifted = shifted if program.has_row_term else lse
    found = backward(program, bound, options, out, shifted, grad_out, grad_lse, wanted)
    return Gradients(found.query, found.key, found.value, found.captured)


def portable_call(program: Program, call: Call, options: Options) -> PortableCall:
    """The call as the kernels of a GPU take it, with portable tiles that a search found."""
    from attn_dsl.backend.portable.launch import Call as PortableCall
    from attn_dsl.backend.tuning import chosen

    query, value, sizes = call.query, call.value, call.sizes
    return PortableCall(
        call.query,
        call.key,
        call.value,
        tuple(_placed(x, query.device) for x in call.parameters.values()),
        tuple(call.tensors.values()),
        tuple(call.sizes[extent.name] for extent in program.kernels.extents),
        call.scale,
        call.q_offset,
        options.precise,
        options.float32_precision,
        chosen(program, query, value, _capability(query.device)) if query.is_cuda else None,
        dims=(sizes["B"], sizes["H"], sizes["HK"], sizes["Q"], sizes["KV"], sizes["D"]),
        grid=None if program.strips is None else program.strips[0].grid(program.strips[1], call.parameters),
    )


def _placed(x: Any, device: torch.device) -> Any:
    """A parameter where a kernel can read it: a tensor of the device, or a number, for which the CPU need not wait."""
    return x.item() if isinstance(x, Tensor) and x.device != device else x


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
