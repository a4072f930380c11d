"""Which kernels run a call on a GPU: few queries take the decode kernel, others those for Hopper where these take the
call, else the portable ones; and why.

The forward and the backward pass choose apart. Nothing falls back unseen: `explain` says what a call runs on and what
stood in the way.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_dsl.backend import execute
from attn_dsl.backend.execute import DECODE, GPU, HOPPER, PORTABLE, Options
from attn_dsl.backend.portable import launch as portable
from attn_dsl.backend.portable import launch_decode as decode
from attn_dsl.backend.portable.run import Runner, launch
from attn_dsl.errors import BindingError
from attn_dsl.passes.summaries import reads_at_positions

if TYPE_CHECKING:
    from attn_dsl.backend.binding import Call
    from attn_dsl.backend.hopper.configs import Config
    from attn_dsl.backend.hopper.configs_backward import Config as BackwardConfig
    from attn_dsl.backend.hopper.launch import Choice, Compile
    from attn_dsl.passes.pipeline import Program

name = GPU


@dataclass(frozen=True)
class Route:
    """The backend of a forward pass, and what kept it from Hopper's, if anything did; `choice` is Hopper's, and
    `layout` that of the decode kernel."""

    backend: str
    reason: str | None
    choice: Choice[Config] | None = None
    layout: decode.Layout | None = None


def forward(program: execute.Program, call: portable.Call, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, shifted) as `portable.launch.forward`, by the kernels that `backend` names or allows.

    Raises BindingError where `hopper` is asked for and does not take the call.
    """
    if backend == PORTABLE:
        return portable.forward(program.kernels, call)
    if backend == DECODE:
        return decode.forward(program.kernels, call)
    found = route(program, call, decodes=backend != HOPPER and not call.results and call.rows is None)
    if found.layout is not None:
        return decode.forward(program.kernels, call, layout=found.layout)
    if found.choice is not None and found.choice.config is not None:
        from attn_dsl.backend.hopper import launch

        return launch.forward(program.hopper, call, config=found.choice.config)
    if backend == HOPPER:
        raise BindingError(f"the Hopper kernels do not take the call: {found.reason}")
    assert call.grid is None, "boxes are for the Hopper kernels"
    return portable.forward(program.kernels, call)


def route(
    program: execute.Program,
    call: portable.Call,
    capability: tuple[int, int] | None = None,
    compile: Compile | None = None,
    decodes: bool = True,
) -> Route:
    """Which kernels a call takes; `capability` is that of the tensors' GPU unless given.

    The decode kernel is considered if `decodes`; shapes alone decide about it. For Hopper's kernels, the first call of
    a kind compiles candidates until one is good, with `compile` or for the GPU at hand.
    """
    if program.binder.scaled and ((capability or _capability(call.query.device) or (8, 9)) < (8, 9)):
        raise BindingError("`key`: float8_e4m3fn needs a GPU of compute capability 8.9 or later")
    if decodes and not program.binder.packed and (reason := decode.reason(call)):
        return Route(DECODE, reason, layout=decode.layout_of(program.kernels, call))
    if program.binder.scaled:
        return Route(PORTABLE, f"{program.binder.stored}, which the Hopper kernels do not read")
    reason = unavailable(_capability(call.query.device) if capability is None else capability)
    if reason is not None:
        return Route(PORTABLE, reason)
    from attn_dsl.backend.hopper import launch

    if reason := launch.refusal(program.kernels, call):
        return Route(PORTABLE, reason)
    choice = program.hopper.choice(call, compile)
    return Route(PORTABLE if choice.config is None else HOPPER, choice.reason, choice)


def has_grids(device: torch.device) -> bool:
    """Whether there are kernels that read boxes of a grid."""
    return unavailable(_capability(device)) is None


def takes_grids(program: execute.Program, call: portable.Call) -> bool:
    """Whether the Hopper forward kernel takes a call over strips of a grid."""
    return has_grids(call.query.device) and route(program, call, decodes=False).backend == HOPPER


def backward_config_of_grid(program: execute.Program, call: portable.Call, options: Options) -> BackwardConfig | None:
    """How the Hopper backward kernel takes a call over strips of a grid; None where it does not."""
    if not has_grids(call.query.device):
        return None
    choice = backward_route(program, call, deterministic=options.deterministic).choice
    return None if choice is None else choice.config


@dataclass(frozen=True)
class BackwardRoute:
    """`Route` of a backward pass.

    wanted: what has a gradient beside query, key and value. Hopper's kernels sum what is `fused` themselves; what they
    do not, since `apart` says, takes a pass of the portable ones.
    """

    backend: str
    reason: str | None
    choice: Choice[BackwardConfig] | None = None
    wanted: frozenset[str] = frozenset()
    fused: frozenset[str] = frozenset()
    apart: str = ""


def backward(
    program: execute.Program,
    call: portable.Call,
    options: Options,
    out: Tensor,
    shifted: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
) -> portable.Gradients:
    """Gradients as `portable.launch.backward`, by the kernels that `options` name or allow.

    Where the Hopper kernels do not take a backward pass, the portable ones do, also where `hopper` is asked for.
    """
    found = BackwardRoute(PORTABLE, None, None, wanted)
    if options.backend != PORTABLE:
        found = backward_route(program, call, wanted, options.deterministic)
    given = (call, out, shifted, grad_out, grad_lse)
    return run_backward(program, found, *given, deterministic=options.deterministic)


def run_backward(
    program: execute.Program,
    found: BackwardRoute,
    call: portable.Call,
    out: Tensor,
    shifted: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    *,
    deterministic: bool,
    run: Runner = launch,
) -> portable.Gradients:
    """`backward` by a route."""
    given = (call, out, shifted, grad_out, grad_lse)
    if found.choice is None or found.choice.config is None:
        return portable.backward(program.kernels, *given, found.wanted, deterministic=deterministic, run=run)
    from attn_dsl.backend.hopper import launch_backward

    config = found.choice.config
    grads = launch_backward.backward(
        program.hopper_backward, *given, config, ordered=deterministic, fused=found.fused, run=run
    )  # fmt: skip
    rest = found.wanted - found.fused
    if not rest:
        return grads
    captured = portable.captured_gradients(program.kernels, *given, rest, deterministic=deterministic, run=run)
    return replace(grads, captured={**grads.captured, **captured})


def backward_route(
    program: execute.Program,
    call: portable.Call,
    wanted: frozenset[str] = frozenset(),
    deterministic: bool = False,
    capability: tuple[int, int] | None = None,
    compile: Compile | None = None,
) -> BackwardRoute:
    """Which kernels the backward pass of a call takes, as `route`; `wanted` are its gradients of what is captured."""
    if layout := program.binder.layout:
        return BackwardRoute(PORTABLE, f"{layout}, which the Hopper kernels do not read", None, wanted)
    reason = unavailable(_capability(call.query.device) if capability is None else capability)
    if reason is not None:
        return BackwardRoute(PORTABLE, reason, None, wanted)
    from attn_dsl.backend.hopper import launch_backward

    kernels = program.hopper_backward
    able = kernels.fusable(wanted)
    apart = "its sums have no order" if deterministic else "no sum comes first"
    found = BackwardRoute(PORTABLE, None, None, wanted)
    for fused in dict.fromkeys((frozenset() if deterministic else able, frozenset[str]())):
        if reason := launch_backward.refusal(kernels, call, wanted - fused, deterministic):
            return BackwardRoute(PORTABLE, reason, found.choice, wanted)
        choice = kernels.choice(call, deterministic, compile, fused)
        found = BackwardRoute(
            PORTABLE if choice.config is None else HOPPER, choice.reason, choice, wanted, fused, apart
        )
        if choice.config is not None:
            break
        apart = "registers do not suffice"
    return found


@functools.cache
def unavailable(capability: tuple[int, int] | None) -> str | None:
    """Why no Hopper kernel can run on a GPU of a compute capability, or None."""
    if capability is None:
        return "the tensors are not on an NVIDIA GPU"
    if capability != (9, 0):
        return "the GPU has compute capability {}.{}, not 9.0".format(*capability)
    if importlib.util.find_spec("triton.experimental.gluon.nvidia.hopper") is None:
        return "this Triton has no Gluon for Hopper"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.hip is not None or portable.interpreted():
        return None
    return torch.cuda.get_device_capability(device)


# ---------------------------------------------------------------- for people


def explain(program: Program, call: Call) -> str:
    """Which kernels and tiles the call takes, and why; compiles the kernel if that was not done."""
    from attn_dsl.backend import order

    of, lines = execute.program_for(program.variant, program.proof), []
    bound = execute.portable_call(of, call, Options(GPU))
    if chosen := order.choice(of, call, Options(GPU)):
        lines.append(f"order      {chosen.why}")
    if ordered := order.ordered(of, call, Options(GPU)):
        of, bound = ordered.program, ordered.bound
    wanted = frozenset(name for name, x in {**call.tensors, **call.parameters}.items() if _wants_gradient(x))
    capability, found = _capability(call.query.device), route(of, bound, decodes=ordered is None)
    if ordered:
        lines[0] += f"; {ordered.laid_out(found.backend)}"
    lines.append(describe(of, bound, found, capability))
    if ordered and ordered.by is not None:
        of, inner = ordered.in_backward
        bound = execute.portable_call(of, inner, Options(GPU))
    if ordered and not ordered.layout.both_passes:
        of = execute.program_for(program.variant, program.proof)
        strips = ordered.strips_of_keys(wanted)
        if strips is None:
            bound = execute.portable_call(of, call, Options(GPU))
        else:
            ordered = order.in_strips(strips.order, of, call, Options(GPU), strips.count, strips.lead)
            of, bound = ordered.program, execute.portable_call(ordered.program, ordered.call, Options(GPU))
    back = backward_route(of, bound, wanted, torch.are_deterministic_algorithms_enabled())
    lines.append(describe_backward(of, bound, back, capability))
    return "\n".join(lines)


def _wants_gradient(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def describe(program: execute.Program, call: portable.Call, found: Route, capability: tuple[int, int] | None) -> str:
    """`explain` of a route."""
    dims = f"{str(call.query.dtype)[6:]}, head dimensions {call.query.shape[3]} and {call.value.shape[3]}"
    choice = found.choice
    if found.layout is not None:
        lines = [f"backend    decode, since {found.reason}; {dims}", f"tiles      {found.layout}"]
    elif choice is not None and choice.config is not None and choice.build is not None:
        lines = [
            f"backend    hopper: compute capability 9.0; {dims}",
            f"tiles      {choice.config}",
            f"assembler  {choice.build.spilled} bytes of registers spilled, no product serialized",
        ]
    else:
        tile = program.kernels.tiles(call, capability).forward
        lines = [
            f"backend    portable, since {found.reason}; {dims}",
            f"tiles      {tile.rows} rows x {tile.keys} keys, {tile.warps} warps, {tile.stages} stages"
            + (", found by a search" if call.tiles else ""),
        ]
    if choice is not None:
        lines += [f"rejected   {config}: {why}" for config, why in choice.rejected]
    lines.append(f"schedule   {_schedule(program, call, found, capability)}")
    return "\n".join(lines)


def _schedule(program: execute.Program, call: portable.Call, found: Route, capability: tuple[int, int] | None) -> str:
    """Which tiles a forward pass visits, and who says so."""
    lists, choice = program.kernels.lists, found.choice
    segments = program.kernels.schedule.kv.segments
    full = sum(not segment.masked for segment in segments)
    ranges = f"{len(segments) - full} masked and {full} unmasked ranges of key tiles, in closed form"
    if lists is None or found.layout is not None:
        return ranges
    tile = program.kernels.tiles(call, capability).forward
    rows, keys = tile.rows, tile.keys
    if choice is not None and choice.config is not None:
        rows, keys = choice.config.rows, choice.config.keys
    read = [f"`{name}`" for name in reads_at_positions(program.variant.mask)]
    reason = f"the mask reads {', '.join(read)} at positions" if read else f"{ranges}, hold tiles that are empty"
    made = f"a list of key tiles, since {reason}"
    if call.query.device.type == "meta":
        return made
    kind = program.kernels.kind_of_list(call, rows, keys)
    assert kind is not None
    return f"{made}: {kind.described(call.tensors, call.q_offset, call.query.device)}"


def describe_backward(
    program: execute.Program, call: portable.Call, found: BackwardRoute, capability: tuple[int, int] | None
) -> str:
    """`explain` of the route of a backward pass."""
    if program.binder.stored:
        return f"backward   none, since {program.binder.stored}"
    choice = found.choice
    if choice is not None and choice.config is not None and choice.build is not None:
        spilled = choice.build.spilled
        lines = [f"backward   hopper: {choice.config}; {spilled} bytes of registers spilled, no product serialized"]
        from attn_dsl.backend.hopper.launch_backward import names_of

        if found.fused:
            lines.append(f"captured   hopper: the gradient of {names_of(found.fused)} is summed on the way")
        if rest := found.wanted - found.fused:
            pass_of = f"a pass of its own for the gradient of {names_of(rest)}"
            lines.append(f"captured   portable: {pass_of}, since {found.apart}")
    else:
        tiles = program.kernels.tiles(call, capability)
        keys, queries = tiles.keys, tiles.queries
        lines = [
            f"backward   portable, since {found.reason}: dK and dV {keys.rows} x {keys.keys}, "
            f"dQ {queries.rows} x {queries.keys}"
        ]
    if choice is not None:
        lines += [f"rejected   {config}: {why}" for config, why in choice.rejected]
    return "\n".join(lines)


def source(program: Program, dtype: torch.dtype) -> str:
    """The emitted functions: the portable kernels', and in 16 bits those of the Hopper kernels."""
    from attn_dsl.backend.portable.emit import emit_module

    of = execute.program_for(program.variant, program.proof)
    narrow = dtype in (torch.bfloat16, torch.float16)
    text = emit_module(of.variant, of.kernels.schedule, fast_tanh=narrow).source
    if not narrow or unavailable((9, 0)) is not None:
        return text
    forward, backward = of.hopper.source(), of.hopper_backward.source()
    return f"# portable kernels\n{text}\n\n# Hopper kernels\n{forward}\n\n# Hopper backward\n{backward}"
