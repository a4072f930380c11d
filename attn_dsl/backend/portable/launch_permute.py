"""Launch the kernel that puts rows in another order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import triton
from torch import Tensor

from attn_dsl.backend.portable.device import plain
from attn_dsl.backend.portable.host import dense_columns, empty, in_units, unit_of
from attn_dsl.backend.portable.permute import permute_rows
from attn_dsl.backend.portable.run import Options, Runner, launch
from attn_dsl.backend.portable.tape import Launches, Launching

ROWS = 32
"""Of one program."""
_known: dict[tuple[tuple[int, ...], int, bool, bool], Options] = {}


def permuted(
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor],
    lines: Sequence[Tensor] = (),
    *,
    scatter: bool,
    run: Runner = launch,
) -> list[Tensor]:
    """Row i of each tensor [B, H, S, D] is its row `index[b, h, i]` or, if `scatter`, the other way about; contiguous.

    indices: integers [B, H, S] for each tensor, broadcast or not; each row once. lines: contiguous [B, H, S], put in
    the order of the first tensor. What is made of tensors, then what is made of lines.
    """
    device, unit = tensors[0].device, unit_of(*tensors)
    made = [empty(tuple(x.shape), x.dtype, device) for x in tensors]
    made_lines = [empty(tuple(x.shape), x.dtype, device) for x in lines]
    parts = []
    for i, (x, index) in enumerate(zip(tensors, indices, strict=True)):
        batch, heads, rows, _ = x.shape
        pairs = tuple(zip(made_lines, lines, strict=True)) if i == 0 else ()
        strides = [0 if n == 1 else stride for n, stride in zip(index.shape[:2], index.stride()[:2], strict=True)]
        parts.append((
            x, made[i], pairs, index, in_units(x, unit), tuple(map(plain, (*strides, index.stride(2)))),
            plain(heads), plain(rows), plain(batch * heads * triton.cdiv(rows, ROWS)),
        ))  # fmt: skip
    programs = sum(x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], ROWS) for x in tensors)
    run(permute_rows, programs, (made[0], tuple(parts)), _options(tensors, scatter))
    return made + made_lines


def _options(tensors: Sequence[Tensor], scatter: bool) -> Options:
    key = (tuple(x.shape[3] for x in tensors), unit_of(*tensors), dense_columns(*tensors), scatter)
    if key not in _known:
        dims, unit, dense, _ = key
        _known[key] = Options(
            {"DIMS": dims, "UNIT": unit, "DENSE": dense, "SCATTER": scatter, "ROWS": ROWS, "num_warps": 4}
        )
    return _known[key]


def permuting(count: int, *, scatter: bool) -> Launching:
    """`permuted` of so many tensors, which come first; their indices come next, and then lines."""

    def function(run: Runner, *given: Tensor) -> list[Tensor]:
        return permuted(given[:count], given[count : 2 * count], given[2 * count :], scatter=scatter, run=run)

    return function


class Permuting:
    """`permuted` of so many tensors, of the same kinds in each call."""

    def __init__(self, count: int, *, scatter: bool) -> None:
        self._launches = Launches(permuting(count, scatter=scatter))

    def __call__(
        self, tensors: Sequence[Tensor], indices: Sequence[Tensor], lines: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        return list(self._launches((*tensors, *indices, *lines)))


def scattered(
    scatter: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], list[Tensor]],
    rows: Tensor,
    out: Tensor,
    lse: Tensor,
    shifted: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, shifted) of a forward pass with row i as row `rows[b, h, i]`; `shifted` may be `lse` itself."""
    out, *lines = scatter((out,), (rows,), (lse,) if shifted is lse else (lse, shifted))
    return out, lines[0], lines[-1]
