"""Calls that were made before: no second check, no second plan, only new tensors.

A call without gradients is known by its numbers and by what its tensors are but for their values. What was
checked and worked out for the first of its kind holds for all; the host then only allocates and launches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from attn_dsl.backend.binding import Call
from attn_dsl.backend.execute import PORTABLE, Options, Program, portable_call, reordered

if TYPE_CHECKING:
    from attn_dsl.backend.order import Inner
    from attn_dsl.backend.portable.launch import Call as PortableCall

KEPT = 4096
"""So many kinds of calls are remembered; lengths that change with every call must not fill the memory."""
_PLAIN = (Tensor, torch.nn.Parameter)
Key = tuple[Any, ...]


class Replays:
    """The kinds of calls of one program that were seen."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names = tuple(tensor.name for tensor in program.variant.tensors)
        self.known: dict[Key, Replay] = {}

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
        """What a call is known by; None where it must go the long way: a gradient, a mode, a subclass, the CPU."""
        if not (isinstance(query, Tensor) and query.is_cuda) or _watched():
            return None
        grad = torch.is_grad_enabled()
        found: list[Any] = [scale, type(scale), *chosen]
        for x in (query, key, value, q_offset, *bindings.values()):
            kind = type(x)
            if kind in _PLAIN:
                if grad and x.requires_grad:
                    return None
                found += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)
            elif kind is int or kind is float or kind is bool:
                found += (kind, x)
            else:
                return None
        found += bindings
        return tuple(found)

    def remember(self, key: Key, call: Call, options: Options) -> None:
        """Let later calls of this kind, which was bound as `call`, be replayed."""
        if self.program.binder.packed or any(isinstance(x, Tensor) for x in call.parameters.values()):
            return
        from attn_dsl.backend.gpu import route
        from attn_dsl.backend.portable import launch_decode

        if len(self.known) >= KEPT:
            self.known.clear()
        ordered = reordered(self.program, call, options)
        if ordered is not None:
            if (found := ordered.replay(_of_rows)) is not None:
                self.known[key] = found
            return
        bound = portable_call(self.program, call, options)
        layout = None if options.backend == PORTABLE else route(self.program, bound).layout
        if layout is not None:
            self.known[key] = launch_decode.Replay.of(self.program.kernels, bound, layout)
        else:
            self.known[key] = _of_rows(self.program, bound, options)


def _of_rows(program: Program, bound: PortableCall, options: Options) -> Inner:
    """For calls that are not for the decode kernel."""
    from attn_dsl.backend.gpu import route
    from attn_dsl.backend.portable import launch

    found = None if options.backend == PORTABLE else route(program, bound, decodes=False)
    if found is None or found.choice is None or found.choice.config is None:
        return launch.Replay.of(program.kernels, bound)
    from attn_dsl.backend.hopper import launch as hopper

    return hopper.Replay(program.hopper, bound, found.choice.config)


class Replay(Protocol):
    def run(
        self, query: Tensor, key: Tensor, value: Tensor, tensors: Sequence[Tensor], q_offset: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of a call of the kind, not differentiable."""


def _watched() -> bool:
    """Whether a mode wants to see operators, or autocast to change dtypes."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.is_autocast_enabled("cuda")
    )
