"""Value types of expressions and storage types of captured tensors."""

from __future__ import annotations

from enum import Enum


class Type(Enum):
    """What an expression evaluates to. Widths belong to the backend: integers are 32-bit unless they need 64."""

    BOOL = "bool"
    INT = "int"
    FLOAT = "float"

    def __repr__(self) -> str:
        return self.value


class DType(Enum):
    """Storage type of a captured tensor, by its PyTorch name."""

    BOOL = "bool"
    UINT8 = "uint8"
    INT8 = "int8"
    INT16 = "int16"
    INT32 = "int32"
    INT64 = "int64"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"

    @property
    def type(self) -> Type:
        """The type of a loaded element."""
        if self is DType.BOOL:
            return Type.BOOL
        return Type.FLOAT if "float" in self.value else Type.INT
