"""From the arguments of a call to a checked call: everything that can be wrong is found here, before any work.

What a variant asks for is worked out once, in `Binder`; a call then costs some microseconds. Each error is a
BindingError that names the argument, what was expected and what came.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat, SupportsIndex, cast

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor

from attn_dsl.backend.printer import Signature, emit
from attn_dsl.backend.python_dialect import PythonDialect
from attn_dsl.errors import BindingError
from attn_dsl.ir.nodes import Binary, BinaryOp, Const, Load, Node, Param, Size, post_order
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Parameter, Variant
from attn_dsl.passes.bake import coerce
from attn_dsl.passes.concrete import evaluate
from attn_dsl.passes.lengths import (
    KEY_SCALE,
    LONGEST_KEY,
    LONGEST_QUERY,
    PAGE_TABLE,
    QUERY_ENDS,
    VALUE_SCALE,
    is_packed,
    is_paged,
    is_scaled,
)

RESERVED = (
    "query", "key", "value", "scale", "q_offset", "return_lse", "validate", "deterministic", "precise",
    "float32_precision", "backward", "schedule",
)  # fmt: skip
_CPU = torch.device("cpu")
EIGHT_BITS = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUT = {"query": "[B, H, Q, D]", "key": "[B, HK, KV, D]", "value": "[B, HK, KV, DV]"}
PAGED_LAYOUT = {"query": "[B, H, Q, D]", "key": "[pages, HK, page, D]", "value": "[pages, HK, page, DV]"}
PAGE_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Call:
    """A call that fits its variant.

    `query [B, H, Q, D]`, `key [B, HK, KV, D]`, `value [B, HK, KV, DV]` of one dtype on one device, unless the binder
    says otherwise (`layout`); `q_offset` is a number or int64 [B]; `sizes` has `B H HK Q KV D` and the extents that
    tensors bind; `parameters` are numbers or, floats only, 0-d tensors.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    q_offset: int | Tensor
    sizes: Mapping[str, int]
    parameters: Mapping[str, bool | int | float | Tensor]
    tensors: Mapping[str, Tensor]

    @property
    def numbers(self) -> dict[str, Any]:
        """Parameters and sizes as Python numbers."""
        parameters = {name: v.item() if isinstance(v, Tensor) else v for name, v in self.parameters.items()}
        return {**parameters, **self.sizes}


class Binder:
    """Checks the calls of one variant (without `const` parameters)."""

    def __init__(self, variant: Variant) -> None:
        names = [*(p.name for p in variant.parameters), *(t.name for t in variant.tensors)]
        for name in names:
            if name in RESERVED:
                raise BindingError(f"`{variant.name}` declares `{name}`, which is an argument of every call: rename it")
        self.variant = variant
        self.paged, self.scaled = is_paged(variant), is_scaled(variant)
        self.packed = is_packed(variant)
        self.names = frozenset(names)
        self.floats = frozenset(p.name for p in variant.parameters if p.type is Type.FLOAT)
        self.dtypes = {t.name: cast(torch.dtype, getattr(torch, t.dtype.value)) for t in variant.tensors}
        self.signature = Signature.of(variant)
        self.scalars = tuple(cast(Param | Size, node).name for node in self.signature.scalars)
        self.divisors = _divisors(variant)
        for divisor in self.divisors:
            if isinstance(divisor, Const):
                what = f"`{variant.name}` divides by {divisor.value}"
                raise BindingError(f"{what}: a divisor of `//` or `%` must be positive")
        extents = [tensor.extents for tensor in variant.tensors]
        self.extents = self._function("extents", extents)
        self._divisors = self._function("divisors", self.divisors)

    @property
    def stored(self) -> str | None:
        """How keys and values are stored, where that is not `[B, HK, KV, D]` in the dtype of the query."""
        if self.paged:
            return "keys and values are in pages" + " of 8 bits" * self.scaled
        return "keys and values are of 8 bits" if self.scaled else None

    @property
    def layout(self) -> str | None:
        """How the tensors of a call are laid out, where they are not `[B, H, Q, D]`, `[B, HK, KV, D]` of one dtype."""
        return "sequences are packed" if self.packed else self.stored

    def _function(self, name: str, results: Sequence[Any]) -> Any:
        source = "import math\n" + emit(name, ("scalars",), tuple(results), self.signature, PythonDialect())
        names: dict[str, Any] = {}
        exec(source, names)
        return names[name]

    def bind(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        q_offset: int | Tensor,
        bindings: Mapping[str, Any],
    ) -> Call:
        """The checked call. Raises BindingError."""
        key, value = _inputs(query, key, value, self.paged, self.scaled)
        batch, heads, q_len, dim = query.shape
        sizes = {"B": batch, "H": heads, "HK": key.shape[1], "Q": q_len, "KV": key.shape[2], "D": dim}
        if self.paged:
            sizes["KV"] *= bindings[PAGE_TABLE].shape[1]
        if self.packed:
            batch = sizes["B"] = bindings[QUERY_ENDS].shape[0] - 1
            sizes |= {"Q": bindings[LONGEST_QUERY], "KV": bindings[LONGEST_KEY]}
        if bindings.keys() - self.names:
            raise BindingError(self._unknown(next(name for name in bindings if name not in self.names)))
        parameters = {p.name: self._parameter(p, bindings, query.device) for p in self.variant.parameters}
        tensors = {t.name: self._tensor(t.name, bindings, query.device) for t in self.variant.tensors}
        bound = self._bind_extents(sizes, tensors)
        self._check_divisors(sizes, parameters)
        self._check_extents(sizes, parameters, tensors, bound)
        return Call(
            query, key, value, _scale(scale, dim), _q_offset(q_offset, batch, query.device), sizes, parameters, tensors
        )

    def assume(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        q_offset: int | Tensor,
        bindings: Mapping[str, Any],
    ) -> Call:
        """The call, unchecked, for `torch.compile` to trace through: the operator that gets it binds and checks it."""
        for name in bindings:
            if name not in self.names:
                raise BindingError(self._unknown(name))
        parameters = {p.name: bindings.get(p.name, p.default) for p in self.variant.parameters}
        for name, value_of in parameters.items():
            if value_of is None:
                raise BindingError(f"`{name}`: expected a value, got nothing; it has no default")
            if isinstance(value_of, Tensor) and name not in self.floats:
                raise BindingError(f"`{name}`: expected a number in a compiled graph, got a tensor")
        tensors = {t.name: bindings.get(t.name) for t in self.variant.tensors}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise BindingError(f"`{name}`: expected a tensor, got {type(tensor).__name__}")
        if key.shape[0] != query.shape[0] and not self.paged:
            key, value = key.expand(query.shape[0], -1, -1, -1), value.expand(query.shape[0], -1, -1, -1)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return Call(query, key, value, scale, q_offset, {}, parameters, cast("dict[str, Tensor]", tensors))

    def bind_schedule(
        self, sizes: Mapping[str, int], bindings: Mapping[str, Any], slots: frozenset[int]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Scalars and nested lists for the schedule's functions without a call; `slots` are the tensors they read."""
        if bindings.keys() - self.names:
            raise BindingError(self._unknown(next(name for name in bindings if name not in self.names)))
        parameters = {p.name: self._parameter(p, bindings, _CPU) for p in self.variant.parameters}
        numbers = {name: v.item() if isinstance(v, Tensor) else v for name, v in parameters.items()}
        self._check_divisors({**dict.fromkeys(self.scalars, 1), **sizes}, numbers)
        tensors = (
            self._tensor(tensor.name, bindings, _CPU) if i in slots else None
            for i, tensor in enumerate(self.variant.tensors)
        )
        lists = tuple(None if tensor is None else tensor.tolist() for tensor in tensors)
        return tuple({**dict.fromkeys(self.scalars, 1), **numbers, **sizes}[name] for name in self.scalars), lists

    def _unknown(self, name: str) -> str:
        known = [other for other in (*self.names, *RESERVED) if other != name]
        near = [] if torch.compiler.is_compiling() else difflib.get_close_matches(name, known, n=1)
        if near:
            return f"`{name}`: `{self.variant.name}` has no such argument; did you mean `{near[0]}`?"
        expected = ", ".join(f"`{known}`" for known in sorted(self.names)) or "no parameters or tensors"
        return f"`{name}`: `{self.variant.name}` has no such argument; expected {expected}, got `{name}`"

    def _parameter(
        self, parameter: Parameter, bindings: Mapping[str, Any], device: torch.device
    ) -> bool | int | float | Tensor:
        name = parameter.name
        value = bindings.get(name, parameter.default)
        if value is None:
            got = "got None" if name in bindings else "got nothing"
            raise BindingError(f"`{name}`: expected {_a(parameter.type)}, {got}; it has no default")
        if isinstance(value, Tensor):
            return _tensor_parameter(parameter, value, device)
        if isinstance(value, torch.SymInt | torch.SymFloat):  # of a trace, checked when it is a number
            return cast(int, value)
        try:
            number = coerce(parameter, value)
        except BindingError:
            raise _error(name, _a(parameter.type), f"{value!r} ({type(value).__name__})") from None
        if parameter.type is Type.INT and not -(2**63) <= number < 2**63:
            raise _error(name, "a 64-bit int", number)
        return number

    def _tensor(self, name: str, bindings: Mapping[str, Any], device: torch.device) -> Tensor:
        tensor, dtype = bindings.get(name), self.dtypes[name]
        if tensor is None:
            raise _error(name, f"a {_name(dtype)} tensor", "None" if name in bindings else "nothing")
        if not isinstance(tensor, Tensor):
            raise _error(name, f"a {_name(dtype)} tensor", type(tensor).__name__)
        if tensor.dtype is not dtype:
            raise _error(name, f"dtype {_name(dtype)}", _name(tensor.dtype))
        if tensor.layout is not torch.strided:
            raise _error(name, "a dense tensor", f"one of layout {_name(tensor.layout)}")
        if tensor.device != device:
            raise _error(name, f"device {device}, that of `query`", tensor.device)
        extents = self.variant.tensor(name).extents
        if tensor.dim() != len(extents):
            raise _error(name, f"{len(extents)} axes", f"{tensor.dim()}, shape {list(tensor.shape)}")
        return tensor

    def _bind_extents(self, sizes: dict[str, int], tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Extents that name no size yet are bound to what they meet first; by which tensor, by name."""
        bound: dict[str, str] = {}
        for declared in self.variant.tensors:
            for axis, extent in enumerate(declared.extents):
                if isinstance(extent, Size) and extent.name not in sizes:
                    sizes[extent.name] = tensors[declared.name].shape[axis]
                    bound[extent.name] = declared.name
        return bound

    def _check_extents(
        self,
        sizes: Mapping[str, int],
        parameters: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        bound: Mapping[str, str],
    ) -> None:
        """The extents of all tensors must agree."""
        if not tensors:
            return
        expected = self.extents(self._scalars(sizes, parameters))
        for declared, extents in zip(self.variant.tensors, expected, strict=True):
            shape = tensors[declared.name].shape
            if tuple(shape) == extents:
                continue
            axis = next(i for i, (size, extent) in enumerate(zip(shape, extents, strict=True)) if size != extent)
            node = declared.extents[axis]
            why = f" ({node.name})" if isinstance(node, Size) else ""
            if isinstance(node, Size) and node.name in bound:
                why = f" ({node.name}, bound by `{bound[node.name]}`)"
            raise _error(declared.name, f"{extents[axis]} elements{why} on axis {axis}", f"shape {list(shape)}")

    def _check_divisors(self, sizes: Mapping[str, int], parameters: Mapping[str, Any]) -> None:
        if not self.divisors:
            return
        for node, value in zip(self.divisors, self._values_of_divisors(sizes, parameters), strict=True):
            if value <= 0:
                named = [part.name for part in post_order(node) if isinstance(part, Param | Size)]
                what = "a positive number" if isinstance(node, Param) else "a positive divisor"
                raise BindingError(
                    f"{', '.join(f'`{name}`' for name in named)}: expected {what}, since `//` or `%` divides by it,"
                    f" got {value}"
                )

    def _values_of_divisors(self, sizes: Mapping[str, int], parameters: Mapping[str, Any]) -> Iterable[int]:
        """Of divisors within others, which come first, too."""
        try:
            return cast("tuple[int, ...]", self._divisors(self._scalars(sizes, parameters)))
        except ZeroDivisionError:
            known = dict(zip(self.signature.scalars, self._scalars(sizes, parameters), strict=True))
            return [evaluate(node, known) for node in self.divisors]

    def _scalars(self, sizes: Mapping[str, int], parameters: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(sizes[name] if name in sizes else parameters[name] for name in self.scalars)


def _divisors(variant: Variant) -> tuple[Node, ...]:
    """What `//` and `%` divide integers by, where sizes and parameters alone decide it."""
    found: dict[Node, None] = {}
    for node in post_order(*variant.roots, *(extent for tensor in variant.tensors for extent in tensor.extents)):
        match node:
            case Binary(BinaryOp.FLOORDIV | BinaryOp.MOD, _, Const(value) as y) if y.type is Type.INT:
                if value <= 0:
                    found[y] = None
            case Binary(BinaryOp.FLOORDIV | BinaryOp.MOD, _, y) if y.type is Type.INT:
                if not y.depends and not any(isinstance(part, Load) for part in post_order(y)):
                    found[y] = None
    return tuple(found)


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, paged: bool = False, scaled: bool = False
) -> tuple[Tensor, Tensor]:
    """Key and value, a batch of 1 broadcast to that of the query, once all three fit."""
    layout = PAGED_LAYOUT if paged else LAYOUT
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise _error(name, f"a tensor {layout[name]}", type(x).__name__)
        if x.layout is not torch.strided or x.is_nested:
            kind = "a nested one" if x.is_nested else f"one of layout {_name(x.layout)}"
            raise _error(name, f"a dense tensor {layout[name]}", kind)
        if x.dim() != 4:
            raise _error(name, f"4 axes {layout[name]}", f"{x.dim()}, shape {list(x.shape)}")
        if 0 in x.shape:
            raise _error(name, "no empty axis", f"shape {list(x.shape)}")
        if scaled and name != "query":
            if x.dtype is not EIGHT_BITS:
                raise _error(name, f"dtype {_name(EIGHT_BITS)}, since there are scales", _name(x.dtype))
        elif x.dtype is EIGHT_BITS and name != "query":
            raise _error(name, f"`{name}_scale` with dtype {_name(EIGHT_BITS)}", "nothing")
        elif x.dtype not in FLOATS:
            raise _error(name, "dtype float32, bfloat16, float16 or float64", _name(x.dtype))
        elif x.dtype is not query.dtype:
            raise _error(name, f"dtype {_name(query.dtype)}, that of `query`", _name(x.dtype))
        if x.device != query.device:
            raise _error(name, f"device {query.device}, that of `query`", x.device)
    if query.dtype is torch.float64 and query.is_cuda:
        raise _error("query", "dtype float32, bfloat16 or float16 on a GPU", "float64, which the CPU computes in")
    batch, heads, _, dim = query.shape
    if key.shape[0] not in (1, batch) and not paged:
        raise _error("key", f"batch {batch}, that of `query`, or 1", key.shape[0])
    if paged and key.shape[2] not in PAGE_SIZES:
        raise _error("key", f"pages of {', '.join(map(str, PAGE_SIZES))} keys", key.shape[2])
    if heads % key.shape[1]:
        raise _error("key", f"a number of heads that divides the {heads} of `query`", key.shape[1])
    if key.shape[3] != dim:
        raise _error("key", f"head dimension {dim}, that of `query`", key.shape[3])
    for axis, what in enumerate(("pages" if paged else "batch", "heads", "length")):
        if value.shape[axis] != key.shape[axis]:
            raise _error("value", f"{what} {key.shape[axis]}, that of `key`", value.shape[axis])
    if key.shape[0] != batch and not paged:
        return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
    return key, value


def _scale(scale: float | None, dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(dim)
    number = None if isinstance(scale, bool | Tensor) else as_number(scale)
    if number is None or not math.isfinite(number):
        raise _error("scale", "a finite number or None", repr(scale) if not isinstance(scale, Tensor) else "a tensor")
    return number


def _q_offset(q_offset: int | Tensor, batch: int, device: torch.device) -> int | Tensor:
    expected = f"an int >= 0 or an int tensor [{batch}] (one for each batch)"
    if isinstance(q_offset, Tensor):
        if q_offset.dtype not in (torch.int32, torch.int64):
            raise _error("q_offset", expected, f"dtype {_name(q_offset.dtype)}")
        if tuple(q_offset.shape) != (batch,):
            raise _error("q_offset", expected, f"shape {list(q_offset.shape)}")
        if q_offset.device != device:
            raise _error("q_offset", f"device {device}, that of `query`", q_offset.device)
        if readable(q_offset) and int(q_offset.min()) < 0:
            raise _error("q_offset", expected, f"{int(q_offset.min())}")
        return q_offset.to(torch.int64)
    start = as_integer(q_offset)
    if start is None or not 0 <= start < 2**62:
        raise _error("q_offset", expected, repr(q_offset))
    return start


def readable(x: Tensor) -> bool:
    """Whether values can be looked at: no GPU need be waited for, and they are there."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    return not is_functorch_wrapped_tensor(x)


def page_table(table: Tensor, query: Tensor) -> Tensor:
    """A call's page table, checked but for its numbers. Raises BindingError."""
    if not isinstance(query, Tensor) or query.dim() != 4:
        _inputs(query, query, query, paged=True)
    batch, expected = query.shape[0], f"an int32 tensor [{query.shape[0]}, pages of a sequence]"
    if not isinstance(table, Tensor):
        raise _error(PAGE_TABLE, expected, type(table).__name__)
    if table.dtype is not torch.int32:
        raise _error(PAGE_TABLE, expected, f"dtype {_name(table.dtype)}")
    if table.dim() != 2 or table.shape[0] != batch or table.shape[1] == 0:
        raise _error(PAGE_TABLE, expected, f"shape {list(table.shape)}")
    return table


def slab_scales(key_scale: Tensor | None, value_scale: Tensor | None, key: Tensor) -> dict[str, Tensor]:
    """A call's scales, those of heads `[HK]` as scales of each slab (a page, else a batch entry) and head
    `[slabs, HK]`. Raises BindingError."""
    slabs, heads = key.shape[:2]
    found: dict[str, Tensor] = {}
    for name, scale in ((KEY_SCALE, key_scale), (VALUE_SCALE, value_scale)):
        expected = f"a float32 tensor [{heads}], of heads, or [{slabs}, {heads}]"
        if not isinstance(scale, Tensor):
            raise _error(name, expected, "nothing" if scale is None else type(scale).__name__)
        if scale.dtype is not torch.float32:
            raise _error(name, expected, f"dtype {_name(scale.dtype)}")
        if tuple(scale.shape) not in ((heads,), (slabs, heads)):
            raise _error(name, expected, f"shape {list(scale.shape)}")
        found[name] = scale if scale.dim() == 2 else scale.expand(slabs, -1)
    return found


def lengths(kv_len: int | Tensor, query: Tensor, key: Tensor, table: Tensor | None = None) -> Tensor:
    """A call's `kv_len` as int32 [B] on the device of `query`. Raises BindingError; nothing on a GPU is waited for."""
    if not isinstance(query, Tensor) or not isinstance(key, Tensor) or query.dim() != 4 or key.dim() != 4:
        _inputs(query, key, key, table is not None)
    batch, room, device = query.shape[0], key.shape[2], query.device
    if table is not None:
        room *= table.shape[1]
    expected = f"an int from 0 to {room}, the keys that there is room for, or an int tensor [{batch}] of such"
    if not isinstance(kv_len, Tensor):
        length = as_integer(kv_len)
        if length is None or not 0 <= length <= room:
            raise _error("kv_len", expected, repr(kv_len))
        return torch.full((batch,), length, dtype=torch.int32, device=device)
    if kv_len.dtype not in (torch.int32, torch.int64):
        raise _error("kv_len", expected, f"dtype {_name(kv_len.dtype)}")
    if tuple(kv_len.shape) != (batch,):
        raise _error("kv_len", expected, f"shape {list(kv_len.shape)}")
    if kv_len.device != device:
        raise _error("kv_len", f"device {device}, that of `query`", kv_len.device)
    if readable(kv_len):
        for length in kv_len.tolist():
            if not 0 <= length <= room:
                raise _error("kv_len", expected, length)
    return kv_len.to(torch.int32)


def _tensor_parameter(parameter: Parameter, value: Tensor, device: torch.device) -> bool | int | Tensor:
    """A float parameter may be a 0-d tensor, for its gradient; for the others it is read."""
    kinds = {Type.FLOAT: value.is_floating_point(), Type.BOOL: value.dtype is torch.bool}
    integral = not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool)
    if value.dim() or not kinds.get(parameter.type, integral):
        raise _error(
            parameter.name,
            f"{_a(parameter.type)} or a 0-d {parameter.type.value} tensor",
            f"a {_name(value.dtype)} tensor of shape {list(value.shape)}",
        )
    if value.device != device and value.device.type != "cpu":
        raise _error(parameter.name, f"device {device}, that of `query`", value.device)
    return value if parameter.type is Type.FLOAT else cast(bool | int, value.item())


def as_integer(value: object) -> int | None:
    """An int, or what stands for one, such as NumPy's; None for anything else, `bool` among it."""
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        return cast(int, value)
    if isinstance(value, bool | Tensor) or not isinstance(value, SupportsIndex):
        return None
    return operator.index(value)


def as_number(value: object) -> float | None:
    """A float, or what stands for one, such as NumPy's; None for anything else, ints past all floats among it."""
    try:
        return float(value) if isinstance(value, SupportsFloat | SupportsIndex) else None
    except OverflowError:
        return None


def check_dtype(dtype: object) -> None:
    """Raises BindingError for what no call computes in."""
    if dtype not in FLOATS:
        raise _error("dtype", "float32, bfloat16, float16 or float64 of torch", repr(dtype))


def checked(name: str, value: object, least: int) -> int:
    """An argument that counts something. Raises BindingError."""
    number = as_integer(value)
    if number is None or number < least:
        raise _error(name, f"an int of at least {least}", repr(value))
    return number


def checked_block(block: object) -> tuple[int, int]:
    """The shape of a tile, (queries, keys). Raises BindingError."""
    sizes = [as_integer(size) for size in block] if isinstance(block, tuple | list) else []
    if len(sizes) != 2 or any(size is None or size < 1 for size in sizes):
        raise _error("block", "the shape of a tile, (queries, keys), each at least 1", repr(block))
    return cast("tuple[int, int]", tuple(sizes))


def _error(name: str, expected: str, got: object) -> BindingError:
    return BindingError(f"`{name}`: expected {expected}, got {got}")


def _a(kind: Type) -> str:
    return f"{'an' if kind is Type.INT else 'a'} {kind.value}"


def _name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")
