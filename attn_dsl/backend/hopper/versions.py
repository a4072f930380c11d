"""What of Gluon has other names, or none, in other versions of Triton: 3.6 and 3.9 are known here."""

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
copy_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@builtin
def async_add(target, place, source, _semantic=None):
    """target[place] += source by the copy engine."""
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, target.handle, place, source.handle)


@builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):
    """Shared memory as that of another dtype, shape and layout."""
    change = memory.reinterpret if hasattr(memory, "reinterpret") else memory._reinterpret
    return change(dtype, shape, layout, _semantic=_semantic)
