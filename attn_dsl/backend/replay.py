"""Calls that were made before: no second check, no second plan, only new tensors.

A call is known by its numbers and by what its tensors are but for their values. What was checked and worked out for the
first of its kind holds for all; the host then only allocates and launches, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_dsl.backend import execute
from attn_dsl.backend.binding import Call
from attn_dsl.backend.execute import PORTABLE, Options, Program, fitted, portable_call, reordered

if TYPE_CHECKING:
    from attn_dsl.backend.hopper.launch import Replay as HopperForward
    from attn_dsl.backend.hopper.launch_backward import Replay as HopperBackward
    from attn_dsl.backend.portable.launch import Call as PortableCall
    from attn_dsl.backend.portable.launch import Replay as PortableForward

KEPT = 4096
"""So many kinds of calls are remembered; lengths that change with every call must not fill the memory."""
_PLAIN = (Tensor, torch.nn.Parameter)
Key = tuple[Any, ...]


class Replays:
    """The kinds of calls of one program that were seen."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names = tuple(tensor.name for tensor in program.variant.tensors)
        self.parameters = frozenset(parameter.name for parameter in program.variant.parameters)
        self.known: dict[Key, Replay | None] = {}
        """None where such calls go the long way each time."""

    def key(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        q_offset: int | Tensor,
        bindings: Mapping[str, Any],
        chosen: Key,
    ) -> Key | None:
        """What a call is known by; None where it must go the long way: a mode, a subclass, autocast to another dtype, a
        parameter in a tensor, the CPU."""
        if not (isinstance(query, Tensor) and query.is_cuda) or _watched():
            return None
        if torch.is_autocast_enabled("cuda") and _lowers(query, key, value):
            return None
        grad = torch.is_grad_enabled()
        found: list[Any] = [scale, type(scale), *chosen, grad and torch.are_deterministic_algorithms_enabled()]
        for x in (query, key, value, q_offset, *bindings.values()):
            kind = type(x)
            if kind in _PLAIN:
                found += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, grad and x.requires_grad)
            elif kind is int or kind is float or kind is bool:
                found += (kind, x)
            else:
                return None
        for name in bindings:
            if name in self.parameters and type(bindings[name]) in _PLAIN:
                return None
            found.append(name)
        return tuple(found)

    def remember(self, key: Key, call: Call, options: Options) -> None:
        """Let later calls of this kind, which was bound as `call`, be replayed where that can be."""
        if key in self.known:
            return
        if len(self.known) >= KEPT:
            self.known.clear()
        found = None if self.program.binder.packed else _forward(self.program, call, options)
        given = (call.query, call.key, call.value, *call.tensors.values())
        if torch.is_grad_enabled() and any(x.requires_grad for x in given):
            found = Differentiable.of(self.program, call, options, found)
        self.known[key] = found


class Replay(Protocol):
    def run(
        self, query: Tensor, key: Tensor, value: Tensor, tensors: Sequence[Tensor], q_offset: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of a call of the kind."""


def _forward(program: Program, call: Call, options: Options) -> Replay | None:
    """What repeats the forward pass."""
    from attn_dsl.backend.gpu import route
    from attn_dsl.backend.portable import launch_decode

    ordered = reordered(program, call, options)
    if ordered is not None:
        return ordered.replay(_of_rows)
    bound = portable_call(program, call, options)
    layout = None if options.backend == PORTABLE else route(program, bound).layout
    if layout is not None:
        return launch_decode.Replay.of(program.kernels, bound, layout)
    return _of_rows(program, bound, options)


def _of_rows(program: Program, bound: PortableCall, options: Options) -> PortableForward | HopperForward:
    """For calls that are not for the decode kernel."""
    from attn_dsl.backend.gpu import route
    from attn_dsl.backend.portable import launch

    found = None if options.backend == PORTABLE else route(program, bound, decodes=False)
    if found is None or found.choice is None or found.choice.config is None:
        return launch.Replay.of(program.kernels, bound)
    from attn_dsl.backend.hopper import launch as hopper

    return hopper.Replay(program.hopper, bound, found.choice.config)


def _watched() -> bool:
    """Whether a mode or transform wants to see operators."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None)


def _lowers(*inputs: Tensor) -> bool:
    """Whether autocast changes a dtype."""
    dtype = torch.get_autocast_dtype("cuda")
    return any(x.dtype is not dtype for x in inputs if isinstance(x, Tensor))


# ---------------------------------------------------------------- with gradients


class Differentiable:
    """Calls of one kind whose gradients are wanted; what a backward pass takes is found on the first of its kind."""

    def __init__(
        self, program: Program, call: Call, options: Options, forward: PortableForward | HopperForward
    ) -> None:
        self.program, self.options, self.forward = program, options, forward
        self.scale, self.sizes, self.parameters = call.scale, call.sizes, call.parameters
        self.names = tuple(call.tensors)
        self.backwards: dict[Key, HopperBackward | None] = {}

    @staticmethod
    def of(program: Program, call: Call, options: Options, forward: Replay | None) -> Differentiable | None:
        """None where the kernels run in another order, or few queries have one of their own."""
        from attn_dsl.backend.hopper import launch as hopper
        from attn_dsl.backend.portable import launch

        broadcast = call.key.stride(0) == 0 and call.key.shape[0] > 1  # by the binder, which autograd must see
        if broadcast or not isinstance(forward, launch.Replay | hopper.Replay):
            return None
        return Differentiable(program, call, options, forward)

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, tensors: Sequence[Tensor], q_offset: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out, lse), differentiable once."""
        out, lse = _Again.apply(self, q_offset, query, key, value, *tensors)  # type: ignore[no-untyped-call]
        return out, lse

    def backward(
        self,
        call: Call,
        out: Tensor,
        shifted: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        wanted: frozenset[str],
        known: Key,
    ) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]:
        """Gradients of query, key, value and what is `wanted`, the long way, which later ones with the same key need
        not go."""
        if known not in self.backwards:
            if len(self.backwards) >= KEPT:
                self.backwards.clear()
            self.backwards[known] = self._prepared(call, out, grad_out, wanted)
        outputs = (out, shifted, shifted)
        found = execute.backward(self.program, call, self.options, outputs, grad_out, grad_lse, wanted)
        return found.query, found.key, found.value, found.captured

    def _prepared(self, call: Call, out: Tensor, grad_out: Tensor, wanted: frozenset[str]) -> HopperBackward | None:
        """What repeats the backward pass, if Hopper's kernels alone run it and read its tensors as they are."""
        from attn_dsl.backend.gpu import backward_route

        if self.options.backend == PORTABLE:
            return None
        bound = portable_call(self.program, call, self.options)
        route = backward_route(self.program, bound, wanted, self.options.deterministic)
        if route.choice is None or route.choice.config is None or route.fused != wanted:
            return None
        from attn_dsl.backend.hopper.launch_backward import Replay, loadable

        if loadable(out) is not out or loadable(grad_out) is not grad_out:
            return None
        given = (route.choice.config, self.options.deterministic, route.fused)
        return Replay(self.program.hopper_backward, bound, out, grad_out, *given)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        replay: Differentiable,
        q_offset: int | Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if isinstance(q_offset, Tensor):
            q_offset = q_offset.to(torch.int64)
        out, lse, shifted = replay.forward.outputs(query, key, value, rest, q_offset)
        own = (q_offset,) if isinstance(q_offset, Tensor) else ()
        kept = () if shifted is lse else (shifted,)
        ctx.save_for_backward(out, lse, *kept, query, key, value, *rest, *own)
        ctx.replay, ctx.start, ctx.has_shifted = replay, None if own else q_offset, bool(kept)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _once(ctx, *grads) if torch.is_grad_enabled() else _Again.gradients(ctx, *grads)

    @staticmethod
    def gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        replay, q_offset, saved = ctx.replay, ctx.start, ctx.saved_tensors
        if q_offset is None:
            *saved, q_offset = saved
        out, lse, *others = saved
        shifted, query, key, value, *rest = others if ctx.has_shifted else (lse, *others)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        needs = ctx.needs_input_grad[5:]
        # What hooks put away and brought back may have other strides than what was saved.
        given = (grad_out, *saved) if grad_lse is None else (grad_out, grad_lse, *saved)
        known = (needs, len(given), *[(x.stride(), x.dtype, x.data_ptr() % 16) for x in given])
        again = replay.backwards.get(known)
        if again is not None:
            found = again.run(query, key, value, rest, q_offset, out, shifted, grad_out, grad_lse)
            dq, dk, dv, captured = found.query, found.key, found.value, found.captured
        else:
            tensors = dict(zip(replay.names, rest, strict=True))
            wanted = frozenset(name for name, needed in zip(replay.names, needs, strict=True) if needed)
            call = Call(query, key, value, replay.scale, q_offset, replay.sizes, replay.parameters, tensors)
            dq, dk, dv, captured = replay.backward(call, out, shifted, grad_out, grad_lse, wanted, known)
        shares = [
            fitted(captured.get(name), x) if needed else None
            for name, x, needed in zip(replay.names, rest, needs, strict=True)
        ]
        return (None, None, dq, dk, dv, *shares)


_once: Callable[..., tuple[Tensor | None, ...]] = once_differentiable(_Again.gradients)
