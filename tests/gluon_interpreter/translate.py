"""Kernels as functions of Python: the text is the kernel's own, the names in it mean what the interpreter does."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._layouts import DistributedLayout
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.runtime.jit import ConstexprFunction, JITFunction

from attn_dsl.backend.hopper import versions
from gluon_interpreter import language
from gluon_interpreter.tensors import Descriptor, Tensors
from gluon_interpreter.values import Value

Function = Callable[..., Any]
_MEANINGS: list[tuple[Any, Any]] = [
    (tl, language), (gl, language), (hopper.tma, language.tma), (hopper.mbarrier, language.mbarrier),
    (hopper.fence_async_shared, language.fence_async_shared), (hopper.warpgroup_mma, language.warpgroup_mma),
    (hopper.warpgroup_mma_wait, language.warpgroup_mma_wait), (versions.async_load, language.async_load),
    (versions.async_store, language.async_store), (versions.async_add, language.async_add),
    (versions.thread_barrier, language.thread_barrier), (versions.reinterpret, language.reinterpret),
    (async_copy, language.async_copy), (versions.copy_rows, language.async_copy.async_load),
]  # fmt: skip
_meanings = {id(known): meaning for known, meaning in _MEANINGS}
_translated: dict[int, Any] = {}


def function_of(function: JITFunction[Any] | ConstexprFunction, device: bool = True) -> Function:
    """What a function of Triton does; `device`: its loops count in numbers of the device."""
    found = _translated.get(id(function))
    if found is None:
        plain = function.fn
        names: dict[str, Any] = {}
        found = types.FunctionType(plain.__code__, names, plain.__name__, None, plain.__closure__)
        _translated[id(function)] = found  # before its names are: functions may call each other
        found.__defaults__ = tuple(map(meaning, plain.__defaults__ or ())) or None
        given = plain.__globals__
        names.update({name: meaning(given[name]) for name in _names(plain.__code__) if name in given})
        names["__builtins__"] = given["__builtins__"]
        if device:
            names["range"] = language.device_range
    return found  # type: ignore[no-any-return]


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def meaning(x: Any) -> Any:
    """What a global name of a kernel's module stands for."""
    if id(x) in _meanings:
        return _meanings[id(x)]
    if isinstance(x, tl.constexpr):
        return meaning(x.value)
    if isinstance(x, DistributedLayout):
        return language.warps_of(x)
    if isinstance(x, JITFunction):
        return function_of(x)
    if isinstance(x, ConstexprFunction):
        return function_of(x, device=False)
    if getattr(x, "__triton_aggregate__", False):
        return _class_of(x)
    return x


def _class_of(aggregate: Any) -> type:
    """A class with the methods of a Triton aggregate."""
    found = _translated.get(id(aggregate))
    if found is None:
        found = _translated[id(aggregate)] = type(aggregate.__name__, (), {})
        setattr(found, "__init__", function_of(aggregate.hash_attrs[0], device=False))
        for method in aggregate.hash_attrs[1:]:
            setattr(found, method.fn.__name__, meaning(method))
    return found  # type: ignore[no-any-return]


def handed(x: Any, tensors: Tensors) -> Any:
    """An argument of a launch as the kernel finds it."""
    if isinstance(x, torch.Tensor):
        return tensors.pointer(x)
    if hasattr(x, "block_shape"):
        return Descriptor(x)
    if isinstance(x, tuple):
        return tuple(handed(item, tensors) for item in x)
    if isinstance(x, bool):
        return Value(x, tl.int1)
    if isinstance(x, int):
        return Value(x, tl.int32 if -(2**31) <= x < 2**31 else tl.int64)
    if isinstance(x, float):
        return Value(x, tl.float32)
    return meaning(x)
