"""Attention as operators that PyTorch knows: autograd, fake tensors, `torch.compile`, `torch.export`, autocast.

    attn_dsl::attention            (out, lse, shifted)
    attn_dsl::attention_backward   gradients of the above

Everything that decides what is computed is an argument: the variant by its printed form, parameters as numbers (which
may be symbolic, so that a new window recompiles nothing) or tensors, captured tensors as a list. `integers` begin with
`q_offset`, `floats` with `scale`; `given` says where each parameter is: a t(ensor), i(nteger), b(ool) or f(loat), or a
n(umber) in a tensor of the CPU, which is how a float stays symbolic in a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attn_dsl.backend import transforms
from attn_dsl.backend.binding import Call
from attn_dsl.backend.execute import CPU, Gradients, Options, Outputs, Program, backward, forward, program_of
from attn_dsl.ir.types import Type

_LIBRARY: Any = torch.library.Library("attn_dsl", "DEF")  # type: ignore[no-untyped-call]
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor[] tensors, Tensor[] scalars, SymInt[] integers, float[] floats, "
    "Tensor? offsets, str given, str variant, str options"
)
_LIBRARY.define(f"attention({_ARGUMENTS}) -> (Tensor out, Tensor lse, Tensor shifted)")
_LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor shifted, bool[] wanted, "
    f"{_ARGUMENTS}) -> (Tensor query, Tensor key, Tensor value, Tensor[] captured)"
)
_PLAIN = (Tensor, torch.nn.Parameter)


def attention(program: Program, call: Call, options: Options) -> tuple[Tensor, Tensor]:
    """`(out [B, H, Q, DV], lse [B, H, Q])` of a checked call, differentiable once."""
    if torch.compiler.is_compiling():
        out, lse, _ = torch.ops.attn_dsl.attention(*_arguments(program, call, options))
        return out, lse
    transforms.refuse_tangents(_tensors(call))
    if _unwatched(call):
        return _directly(program, call, options)
    operator = transforms.attention if transforms.transformed() else torch.ops.attn_dsl.attention
    out, lse, _ = operator(*_arguments(program, call, options))
    return out, lse


def _arguments(program: Program, call: Call, options: Options) -> tuple[Any, ...]:
    """The call as the operators take it."""
    offsets, start = (call.q_offset, 0) if isinstance(call.q_offset, Tensor) else (None, call.q_offset)
    integers: list[int] = [start]  # int() would pin a symbolic number
    scalars, floats, given = [], [call.scale], ""
    for declared in program.variant.parameters:
        x = call.parameters[declared.name]
        if isinstance(x, Tensor):
            scalars.append(x)
            given += "t"
        elif declared.type is Type.FLOAT and torch.compiler.is_compiling():
            scalars.append(x * torch.ones((), dtype=torch.float64, device="cpu"))
            given += "n"
        elif declared.type is Type.FLOAT:
            floats.append(float(x))
            given += "f"
        else:
            integers.append(x if declared.type is Type.INT else int(x))  # type: ignore[arg-type]
            given += "i" if declared.type is Type.INT else "b"
    tensors = list(call.tensors.values())
    whole = (call.query, call.key, call.value, tensors, scalars, integers, floats, offsets, given)
    return (*whole, program.text, options.text)


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as `scaled_dot_product_attention` takes them under autocast; captured tensors stay."""
    if not all(isinstance(x, Tensor) for x in (query, key, value)):  # what that means is the binder's to say
        return query, key, value
    device = query.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return _lowered(query, dtype), _lowered(key, dtype), _lowered(value, dtype)


def _lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype is not torch.float64 else x


def _unwatched(call: Call) -> bool:
    """Whether no mode, transform or subclass wants to see the operator."""
    return not transforms.watched() and all(type(x) in _PLAIN for x in _tensors(call))


def _tensors(call: Call) -> list[Tensor]:
    """Every tensor of a call: query, key, value; what is captured; parameters and offsets that are tensors."""
    given = (*call.tensors.values(), *call.parameters.values(), call.q_offset)
    return [call.query, call.key, call.value, *(x for x in given if isinstance(x, Tensor))]


def _directly(program: Program, call: Call, options: Options) -> tuple[Tensor, Tensor]:
    """What the operator does, without PyTorch's dispatcher, which costs more than a short call."""
    tensors = _tensors(call)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        out, lse = _Direct.apply(program, call, options, *tensors)  # type: ignore[no-untyped-call]
        return out, lse
    return forward(program, call, options)[:2]


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: Program, call: Call, options: Options, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, shifted = forward(program, call, options)
        kept = (shifted,) if shifted.numel() else ()
        ctx.save_for_backward(out, lse, *kept, *tensors)  # as a repeated call does: a checkpoint may compare the two
        offset = None if isinstance(call.q_offset, Tensor) else call.q_offset
        ctx.rest = program, options, call.scale, offset, call.sizes, call.parameters, tuple(call.tensors)
        ctx.has_shifted = bool(kept)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        program, options, scale, offset, sizes, parameters, named = ctx.rest
        out, lse, *saved = ctx.saved_tensors
        shifted = saved.pop(0) if ctx.has_shifted else lse.new_empty(0)
        query, key, value, *others = saved
        given = iter(others)
        tensors = {name: next(given) for name in named}
        parameters = {name: next(given) if isinstance(x, Tensor) else x for name, x in parameters.items()}
        q_offset = next(given) if offset is None else offset
        call = Call(query, key, value, scale, q_offset, sizes, parameters, tensors)
        names = [*tensors, *(name for name, x in parameters.items() if isinstance(x, Tensor))]
        needed = dict(zip(names, ctx.needs_input_grad[6:], strict=False))
        wanted = frozenset(name for name, needs in needed.items() if needs)
        transforms.refuse_batches(grad_out, grad_lse)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        found = differentiate(program, call, options, (out, lse, shifted), grad_out, grad_lse, wanted)
        captured = [found.captured.get(name) for name in names]
        last = [None] if offset is None else []
        return (None, None, None, found.query, found.key, found.value, *captured, *last)


def differentiate(
    program: Program,
    call: Call,
    options: Options,
    outputs: Outputs,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
) -> Gradients:
    """`execute.backward` in a backward pass of autograd. Where that records (`create_graph`) or is mapped, it is an
    operator, which refuses a second derivative and knows `vmap`."""
    if not (torch.is_grad_enabled() or transforms.transformed()):
        return backward(program, call, options, outputs, grad_out, grad_lse, wanted)
    names = [*call.tensors, *(name for name, x in call.parameters.items() if isinstance(x, Tensor))]
    asked = [name in wanted for name in names]
    arguments = _arguments(program, call, options)
    query, key, value, found = transforms.attention_backward(grad_out, grad_lse, *outputs, asked, *arguments)
    captured = dict(zip([name for name in names if name in wanted], found, strict=True))
    return Gradients(query, key, value, captured)


# ---------------------------------------------------------------- implementations


def _bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: Sequence[Tensor],
    scalars: Sequence[Tensor],
    integers: Sequence[int],
    floats: Sequence[float],
    offsets: Tensor | None,
    given: str,
    variant: str,
    options: str,
) -> tuple[Program, Call, Options]:
    """The arguments of the operators, put together again."""
    program = program_of(variant)
    whole, tensor = iter(integers), iter(scalars)
    sources: dict[str, Any] = {
        "t": tensor,
        "n": (x if isinstance(x, FakeTensor) else x.item() for x in tensor),
        "f": iter(floats),
        "i": whole,
        "b": map(bool, whole),
    }
    q_offset, scale = next(whole), next(sources["f"])
    parameters = {p.name: next(sources[kind]) for p, kind in zip(program.variant.parameters, given, strict=True)}
    captured = {t.name: x for t, x in zip(program.variant.tensors, tensors, strict=True)}
    start = q_offset if offsets is None else offsets
    call = program.binder.bind(query, key, value, scale, start, {**parameters, **captured})
    return program, call, Options.parse(options)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """With the strides that the fake tensors have: contiguous, since another order of positions may give others; those
    of packed sequences are row by row."""
    program, call, options = _bound(*arguments)
    found = forward(program, call, options)
    if program.binder.packed:
        return found
    out, lse, shifted = found
    return out.contiguous(), lse.contiguous(), shifted.contiguous()


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    program, call, options = _bound(*arguments)
    batch, heads, q_len, _ = call.query.shape
    rows = (batch, q_len, heads) if program.binder.packed else (batch, heads, q_len)
    out = call.query.new_empty((*rows, call.value.shape[3]))
    lse = call.query.new_empty(rows, dtype=_lse_dtype(call.query.dtype))
    if program.binder.packed:
        out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    keeps = options.backend != CPU and program.has_row_term
    return out, lse, torch.empty_like(lse) if keeps else lse.new_empty(0)


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    shifted: Tensor,
    wanted: Sequence[bool],
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    program, call, options = _bound(*arguments)
    names = [name for name, needed in zip(_captured(program, *arguments), wanted, strict=True) if needed]
    found = backward(program, call, options, (out, lse, shifted), grad_out, grad_lse, frozenset(names))
    inputs = (found.query.contiguous(), found.key.contiguous(), found.value.contiguous())
    return (*inputs, [found.captured[name] for name in names])


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    shifted: Tensor,
    wanted: Sequence[bool],
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    query, key, value, tensors, scalars, *_ = arguments
    found = [x.new_empty(x.shape) for x, needed in zip((*tensors, *scalars), wanted, strict=True) if needed]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), found


def _captured(program: Program, *arguments: Any) -> list[str]:
    """The names of the operators' `tensors`, then those of `scalars`."""
    given = arguments[8]
    kinds = zip(program.variant.parameters, given, strict=True)
    return [t.name for t in program.variant.tensors] + [p.name for p, kind in kinds if kind in "tn"]


# ---------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, tensors, scalars, integers, floats, offsets, *rest = inputs
    out, lse, shifted = output
    ctx.mark_non_differentiable(shifted)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, out, lse, shifted, offsets, *tensors, *scalars)
    ctx.counts, ctx.numbers, ctx.rest = (len(tensors), len(scalars)), (integers, floats), rest


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Any, ...]:
    query, key, value, out, lse, shifted, offsets, *captured = ctx.saved_tensors
    count = ctx.counts[0]
    needs = [*ctx.needs_input_grad[3], *ctx.needs_input_grad[4]]
    wanted = [bool(needed and x.is_floating_point()) for needed, x in zip(needs, captured, strict=True)]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    d_query, d_key, d_value, found = torch.ops.attn_dsl.attention_backward(
        grad_out, grad_lse, out, lse, shifted, wanted, query, key, value, captured[:count], captured[count:],
        *ctx.numbers, offsets, *ctx.rest,
    )  # fmt: skip
    grads = iter(found)
    captured_grads = [next(grads) if needed else None for needed in wanted]
    return (d_query, d_key, d_value, captured_grads[:count], captured_grads[count:]) + (None,) * 6


def _refuse(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(transforms.NO_SECOND)


_LIBRARY.impl("attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("attn_dsl::attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("attn_dsl::attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("attn_dsl::attention", _differentiate, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("attn_dsl::attention_backward", _refuse, lib=_LIBRARY)
