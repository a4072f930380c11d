"""A compiler for attention variants: write the variant, get a proved schedule and fused kernels.

The public names load on first use, so that importing the package loads neither torch nor sympy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_dsl.api import Attention, compile
    from attn_dsl.backend.merge import merge
    from attn_dsl.backend.paged import PagedKVCache
    from attn_dsl.errors import AttnError, BindingError, CacheFullError, CompileError, ProofError

__version__ = "0.1.0"
__all__ = [
    "Attention",
    "AttnError",
    "BindingError",
    "CacheFullError",
    "CompileError",
    "PagedKVCache",
    "ProofError",
    "__version__",
    "compile",
    "merge",
]

_MODULE_OF = {
    "Attention": "attn_dsl.api",
    "compile": "attn_dsl.api",
    "merge": "attn_dsl.backend.merge",
    "PagedKVCache": "attn_dsl.backend.paged",
    "AttnError": "attn_dsl.errors",
    "BindingError": "attn_dsl.errors",
    "CacheFullError": "attn_dsl.errors",
    "CompileError": "attn_dsl.errors",
    "ProofError": "attn_dsl.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
