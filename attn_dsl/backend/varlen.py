"""Packed sequences: rows of all of them one behind the other, and where each begins.

    packed [T, H, D]   ->   [B, H, longest, D]   ->   attention that ends where each sequence does   ->   [T, H, DV]

Sequences become entries of a batch, so positions are local and `b` is the number of the sequence. What lies past an end
is neither visited nor read; it only takes memory, B times the longest. Nothing waits for a GPU if the longest is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attn_dsl.errors import BindingError


@dataclass(frozen=True)
class Packing:
    """Where the rows of packed sequences stand in a batch of them.

    rows: int64 [T], of the T packed rows, the row in [B * longest]. lengths: int32 [B].
    """

    rows: Tensor
    lengths: Tensor
    longest: int

    @staticmethod
    def of(name: str, packed: Tensor, ends: Tensor, longest: int | None) -> Packing:
        """`ends` are cumulative lengths [B + 1], from 0 to the rows of `packed`. Raises BindingError."""
        total, device = packed.shape[0], packed.device
        _check(name, ends, total, device)
        ends = ends.to(torch.int64)
        lengths = ends.diff()
        if longest is None:
            longest = int(lengths.max())
        if isinstance(longest, bool) or not isinstance(longest, int | torch.SymInt) or longest < 1:
            raise BindingError(f"the longest sequence of `{name}`: expected an int of at least 1, got {longest!r}")
        if _readable(ends) and int(lengths.max()) > longest:
            raise BindingError(f"the longest sequence of `{name}`: expected {int(lengths.max())}, got {longest}")
        numbers = torch.arange(lengths.shape[0], device=device)
        sequence = torch.repeat_interleave(numbers, lengths, output_size=total)
        rows = sequence * longest + torch.arange(total, device=device) - ends[sequence]
        return Packing(rows, lengths.to(torch.int32), longest)

    def batch(self, packed: Tensor) -> Tensor:
        """[T, H, D] as [B, H, longest, D]; zeros past the ends. Differentiable."""
        batch = self.lengths.shape[0]
        rows = packed.new_zeros((batch * self.longest, *packed.shape[1:])).index_copy(0, self.rows, packed)
        return rows.view(batch, self.longest, *packed.shape[1:]).transpose(1, 2)

    def pack(self, batched: Tensor) -> Tensor:
        """The converse: [B, H, longest, ...] as [T, H, ...]."""
        return batched.transpose(1, 2).flatten(0, 1).index_select(0, self.rows)


def check_packed(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises BindingError unless they have three axes, and key and value as many rows."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            got = f"{x.dim()}, shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise BindingError(f"`{name}`: expected 3 axes [rows of all sequences, heads, dimension], got {got}")
    if key.shape[0] != value.shape[0]:
        raise BindingError(f"`value`: expected {key.shape[0]} rows, those of `key`, got {value.shape[0]}")


def _check(name: str, ends: Tensor, total: int, device: torch.device) -> None:
    what = f"int cumulative lengths [B + 1] on {device}, from 0 to {total}, the rows of `{name}`"
    fits = isinstance(ends, Tensor) and ends.dtype in (torch.int32, torch.int64) and ends.device == device
    if not fits or ends.dim() != 1 or ends.shape[0] < 2:
        got = f"{ends.dtype} {list(ends.shape)} on {ends.device}" if isinstance(ends, Tensor) else type(ends).__name__
        raise BindingError(f"the ends of `{name}`: expected {what}, got {got}")
    if _readable(ends):
        found = ends.tolist()
        if found[0] != 0 or found[-1] != total or sorted(found) != found:
            raise BindingError(f"the ends of `{name}`: expected {what}, got {found}")


def _readable(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a GPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)
