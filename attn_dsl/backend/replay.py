"""Calls that were made before: no second check, no second plan, only new tensors.

A call is known by its numbers and by what its tensors are but for their values. What was checked and worked out for the
first of its kind holds for all; the host then only allocates and launches, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attn_dsl.backend import execute
from attn_dsl.backend.binding import Call
from attn_dsl.backend.execute import PORTABLE, Gradients, Options, Program, fitted, portable_call, reordered
from attn_dsl.backend.transforms import NO_SECOND, refuse_batches, watched

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
        self.names = program.tensor_names
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


class Saved(Protocol):
    def outputs(
        self, query: Tensor, key: Tensor, value: Tensor, tensors: Sequence[Tensor], q_offset: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(out, lse, shifted) of a call of the kind, in the order of the call."""


def _forward(program: Program, call: Call, options: Options) -> Replay | None:
    """What repeats the forward pass."""
    from attn_dsl.backend.gpu import route
    from attn_dsl.backend.portable import launch_decode

    ordered = reordered(program, call, options)
    if ordered is not None:
        from attn_dsl.backend.replay_order import Forward

        return Forward(ordered, _of_rows)
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
    """Whether a mode or transform wants to see operators, or tensors may have tangents."""
    return watched() or forward_ad._current_level >= 0


def _lowers(*inputs: Tensor) -> bool:
    """Whether autocast changes a dtype."""
    dtype = torch.get_autocast_dtype("cuda")
    return any(x.dtype is not dtype for x in inputs if isinstance(x, Tensor))


# ---------------------------------------------------------------- with gradients


class Backward:
    """The backward pass of calls of one kind; what runs it is found on the first with tensors of such strides.

    chosen: whether the order of positions is chosen, too; else it is that of the call.
    """

    def __init__(self, program: Program, call: Call, options: Options, *, chosen: bool = True) -> None:
        self.program, self.options, self.chosen = program, options, chosen
        self.scale, self.sizes, self.parameters = call.scale, call.sizes, call.parameters
        self.known: dict[Key, HopperBackward | None] = {}

    def gradients(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tensors: Sequence[Tensor],
        q_offset: int | Tensor,
        out: Tensor,
        shifted: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        wanted: frozenset[str],
        results: Sequence[Tensor] = (),
    ) -> Gradients:
        """Of query, key, value and what is `wanted`; the first three are `results` where kernels can write these."""
        given = [grad_out, out, shifted, query, key, value, *tensors, *results]
        if grad_lse is not None:
            given.append(grad_lse)
        # What hooks put away and brought back may have other strides than what was saved.
        known = (wanted, len(given), *[(x.stride(), x.dtype, x.data_ptr() % 16) for x in given])
        again = self.known.get(known)
        if again is not None:
            rows = out, shifted, grad_out, grad_lse
            found = again.run(query, key, value, tensors, q_offset, *rows, results)
            return Gradients(found.query, found.key, found.value, found.captured)
        named = dict(zip(self.program.tensor_names, tensors, strict=True))
        call = Call(query, key, value, self.scale, q_offset, self.sizes, self.parameters, named)
        named_results = dict(zip(("dq", "dk", "dv"), results, strict=False))
        if known not in self.known:
            if len(self.known) >= KEPT:
                self.known.clear()
            self.known[known] = self._prepared(call, out, grad_out, wanted, named_results)
        outputs = (out, shifted, shifted)
        if self.chosen:
            return execute.backward(self.program, call, self.options, outputs, grad_out, grad_lse, wanted)
        given_too = grad_out, grad_lse, wanted, named_results
        return execute.run_backward(self.program, call, self.options, outputs, *given_too)

    def _prepared(
        self, call: Call, out: Tensor, grad_out: Tensor, wanted: frozenset[str], results: Mapping[str, Tensor]
    ) -> HopperBackward | None:
        """What repeats the backward pass, if Hopper's kernels alone run it and read its tensors as they are."""
        from attn_dsl.backend.gpu import backward_route

        if self.options.backend == PORTABLE:
            return None
        from attn_dsl.backend.hopper.launch import loadable
        from attn_dsl.backend.hopper.launch_backward import Replay

        if loadable(out) is not out or loadable(grad_out) is not grad_out:
            return None
        ordered = reordered(self.program, call, self.options) if self.chosen else None
        strips = None if ordered is None else ordered.strips_of_keys(wanted)
        if strips is not None:
            return strips.replay(call, out, grad_out)
        bound = replace(portable_call(self.program, call, self.options), results=results)
        route = backward_route(self.program, bound, wanted, self.options.deterministic)
        if route.choice is None or route.choice.config is None or route.fused != wanted:
            return None
        given = (route.choice.config, self.options.deterministic, route.fused)
        return Replay(self.program.hopper_backward, bound, out, grad_out, *given)


class Differentiable:
    """Calls of one kind whose gradients are wanted."""

    def __init__(self, program: Program, call: Call, options: Options, forward: Saved) -> None:
        self.forward, self.backward = forward, Backward(program, call, options)
        self.names = tuple(call.tensors)

    @staticmethod
    def of(program: Program, call: Call, options: Options, forward: Replay | None) -> Replay | None:
        """None where few queries have a kernel of their own."""
        from attn_dsl.backend.hopper import launch as hopper
        from attn_dsl.backend.portable import launch
        from attn_dsl.backend.replay_order import Differentiable as InOrder
        from attn_dsl.backend.replay_order import Forward

        if call.key.stride(0) == 0 and call.key.shape[0] > 1:  # by the binder, which autograd must see
            return None
        if isinstance(forward, Forward) and forward.both_passes:
            return InOrder(forward, Backward(forward.backward_program, forward.call, options, chosen=False))
        if not isinstance(forward, launch.Replay | hopper.Replay | Forward):
            return None
        return Differentiable(program, call, options, forward)

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, tensors: Sequence[Tensor], q_offset: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out, lse), differentiable once."""
        out, lse = _Again.apply(self, q_offset, query, key, value, *tensors)  # type: ignore[no-untyped-call]
        return out, lse


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
        return once(_Again.gradients, ctx, *grads)

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
        wanted = wanted_of(replay.names, needs)
        rows = out, shifted, grad_out, grad_lse
        found = replay.backward.gradients(query, key, value, rest, q_offset, *rows, wanted)
        return (None, None, found.query, found.key, found.value, *shares_of(found, replay.names, rest, needs))


def wanted_of(names: Sequence[str], needs: Sequence[bool]) -> frozenset[str]:
    """The captured tensors whose gradients are asked for."""
    return frozenset([name for name, needed in zip(names, needs, strict=True) if needed])


def shares_of(
    found: Gradients, names: Sequence[str], tensors: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of captured tensors as autograd takes them, None where none is asked for."""
    given = zip(names, tensors, needs, strict=True)
    return [fitted(found.captured.get(name), x) if needed else None for name, x, needed in given]


def once(
    gradients: Callable[..., tuple[Tensor | None, ...]], ctx: Any, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients that know no derivative of their own: whoever asks for one where autograd records is told so.

    `ctx` saved the output first.
    """
    refuse_batches(*grads)
    if not torch.is_grad_enabled():
        return gradients(ctx, *grads)
    with torch.no_grad():
        found = gradients(ctx, *grads)
    made = iter(_Refused.apply(ctx.saved_tensors[0], *[x for x in found if x is not None]))  # type: ignore[no-untyped-call]
    return tuple(None if x is None else next(made) for x in found)


class _Refused(torch.autograd.Function):
    """Gradients as they are, which depend on what the output does."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple([x.detach() for x in grads])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(NO_SECOND)
