"""Schedules that a caller holds: the lists of tiles of calls with tensors that do not change, made once.

Calls find lists by themselves (`portable/listing.py`). Who holds a schedule keeps its lists from being forgotten, may
capture CUDA graphs that read them, and can have calls refused that would need others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_dsl.backend import execute
from attn_dsl.backend.binding import Call
from attn_dsl.backend.execute import CPU, Options, Program
from attn_dsl.backend.kept import Holder
from attn_dsl.errors import BindingError
from attn_dsl.ir.nodes import Load, Param, post_order


@dataclass(frozen=True)
class Schedule:
    """The lists that calls like one call visit tiles by; none where ranges in closed form say it.

    It belongs to the lengths, parameters, `q_offset` and tensors that decide the mask, as they were; the tensors are
    kept. A CUDA graph that was captured with it needs it for as long as it is replayed.
    """

    name: str
    made_for: dict[str, Any]
    holder: Holder | None
    kept: tuple[Any, ...]

    @property
    def bytes(self) -> int:
        """Memory of the lists."""
        return self.holder.bytes if self.holder else 0

    def check(self, program: Program, call: Call) -> None:
        """Raise BindingError where a call decides the mask by something else."""
        if program.variant.name != self.name:
            raise BindingError(f"`schedule`: it was made for `{self.name}`, not `{program.variant.name}`")
        for name, found in decided_by(program, call).items():
            if found != self.made_for.get(name):
                raise BindingError(f"`schedule`: it was made for another `{name}`, or for what `{name}` held before")

    def text(self) -> str:
        """For people; waits for the GPU."""
        lines = [made.text() for made in self.holder.held.values()] if self.holder else []
        return "\n".join(lines) or "ranges in closed form: nothing is stored"


@torch.no_grad()
def make(program: Program, call: Call, options: Options, *, backward: bool) -> Schedule:
    """The schedule of a call. On a GPU its passes run once, which makes the lists that their kernels want."""
    holder = None
    if options.backend != CPU:
        holder = Holder()
        with holder.active():
            outputs = execute.forward(program, call, options)
            if backward:
                execute.backward(program, call, options, outputs, torch.zeros_like(outputs[0]), None, frozenset())
    return Schedule(program.variant.name, decided_by(program, call), holder, (*call.tensors.values(), call.q_offset))


def decided_by(program: Program, call: Call) -> dict[str, Any]:
    """What of a call decides its lists, by name: lengths, and what the mask reads."""
    nodes = list(post_order(program.variant.mask))
    parameters = {node.name for node in nodes if isinstance(node, Param)}
    tensors = {node.tensor for node in nodes if isinstance(node, Load)}
    found: dict[str, Any] = {size: call.sizes[size] for size in ("B", "H", "Q", "KV")}
    given: dict[str, Any] = {
        "q_offset": call.q_offset,
        **{name: x for name, x in call.parameters.items() if name in parameters},
        **{name: x for name, x in call.tensors.items() if name in tensors},
    }
    return found | {name: _identity(x) if isinstance(x, Tensor) else x for name, x in given.items()}


def _identity(x: Tensor) -> tuple[Any, ...]:
    version = None if x.is_inference() else x._version
    return (x.data_ptr(), version, x.shape, x.stride(), x.dtype, x.device)
