"""The public API: `compile` a variant, call it, ask it what it does.

attn = attn_dsl.compile("sliding_window", window=512)
out = attn(query, key, value)                       # [B, H, Q, DV], as scaled_dot_product_attention
out, lse = attn(query, key, value, return_lse=True)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor

from attn_dsl.backend import operators
from attn_dsl.backend.binding import Call, check_dtype, checked, checked_block, lengths, page_table, slab_scales
from attn_dsl.backend.cost import Cost, cost, visited_pairs
from attn_dsl.backend.cpu.functions import schedule_functions
from attn_dsl.backend.execute import made_on_cpu, program_for, reordered
from attn_dsl.backend.operators import autocast
from attn_dsl.backend.packed import check_packed, checked_ends
from attn_dsl.backend.replay import Replays
from attn_dsl.backend.schedules import Schedule
from attn_dsl.backend.schedules import make as make_schedule
from attn_dsl.backend.select import options, select
from attn_dsl.backend.validate import validate as validate_call
from attn_dsl.errors import BindingError
from attn_dsl.frontend import load
from attn_dsl.ir.parser import parse_ir
from attn_dsl.ir.printer import print_ir
from attn_dsl.ir.variant import Variant
from attn_dsl.passes import pipeline
from attn_dsl.passes.lengths import (
    KEY_ENDS,
    KV_LEN,
    LONGEST_KEY,
    LONGEST_QUERY,
    OF_PACKED,
    PAGE_TABLE,
    QUERY_ENDS,
    check_names,
    with_lengths,
    with_packing,
    with_pages,
    with_scales,
)
from attn_dsl.passes.prove import Proof
from attn_dsl.report import Report, report

if TYPE_CHECKING:  # they load Triton
    from attn_dsl.backend.build import Built
    from attn_dsl.backend.tuning import Tuned

Value = bool | int | float | Tensor
Precision = Literal["ieee", "tf32"]


def compile(source: str | Path, **constants: bool | int | float) -> Attention:
    """Compile a variant.

    source: a path that ends in `.attn`, the name of a shipped variant, or a text. constants: values for parameters;
    those of `const` parameters are baked in, the others become defaults of the call.

    Raises CompileError with every error of the text, BindingError where the constants do not fit.
    """
    variant = load(source)
    check_names(variant)
    return Attention(variant, constants)


def _compiled(text: str, constants: dict[str, bool | int | float]) -> Attention:
    """What was pickled as the printed form of its variant."""
    return Attention(parse_ir(text), constants)


class Attention:
    """A compiled variant: a callable on PyTorch tensors, differentiable once.

    The gradients of query, key, value, captured float tensors, and of float parameters and sinks given as tensors are
    supported; a second derivative raises.
    """

    def __init__(self, variant: Variant, constants: dict[str, bool | int | float]) -> None:
        self._written, self._constants = variant, constants
        self._program = pipeline.run(variant, constants, stop_after="schedule")
        self._executable = program_for(self._program.variant, self._program.proof)
        self._binder = self._executable.binder
        self._replays = Replays(self._executable)
        self._of_caches: dict[tuple[bool, bool, bool], Attention] = {}
        self._of_packed: Attention | None = None

    @property
    def variant(self) -> Variant:
        """The checked, simplified variant, its `const` parameters bound."""
        return self._program.variant

    @overload
    def __call__(
        self,
        /,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = ...,
        q_offset: int | Tensor = ...,
        kv_len: int | Tensor | None = ...,
        page_table: Tensor | None = ...,
        key_scale: Tensor | None = ...,
        value_scale: Tensor | None = ...,
        return_lse: Literal[False] = ...,
        validate: bool = ...,
        deterministic: bool | None = ...,
        precise: bool = ...,
        float32_precision: Precision = ...,
        schedule: Schedule | None = ...,
        **bindings: Value,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        /,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = ...,
        q_offset: int | Tensor = ...,
        kv_len: int | Tensor | None = ...,
        page_table: Tensor | None = ...,
        key_scale: Tensor | None = ...,
        value_scale: Tensor | None = ...,
        return_lse: Literal[True],
        validate: bool = ...,
        deterministic: bool | None = ...,
        precise: bool = ...,
        float32_precision: Precision = ...,
        schedule: Schedule | None = ...,
        **bindings: Value,
    ) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self,
        /,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        q_offset: int | Tensor = 0,
        kv_len: int | Tensor | None = None,
        page_table: Tensor | None = None,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
        return_lse: bool = False,
        validate: bool = False,
        deterministic: bool | None = None,
        precise: bool = False,
        float32_precision: Precision = "ieee",
        schedule: Schedule | None = None,
        **bindings: Value,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of `query [B, H, Q, D]` to `key [B, HK, KV, D]` and `value [B, HK, KV, DV]`.

        float32, bfloat16, float16 or, on the CPU, float64, any strides; H is a multiple of HK, and query head h reads
        key/value head h // (H // HK). A batch of 1 of key and value is broadcast.

        scale       factor of the logits, 1 / sqrt(D) unless given
        q_offset    absolute position of the first query: an int, or an int tensor [B]
        kv_len      how many keys there are, where key and value are a cache with room for more: an int, or an int
                    tensor [B]; none from there on is seen or read, and `KV` is still the room. All unless given
        page_table  key and value are a cache in pages, `[pages, HK, page, D]`, a page of 16, 32, 64, 128 or 256 keys:
                    int32 [B, pages of a sequence], whose row `b` names the pages of entry `b` in order
        key_scale, value_scale  key and value are float8_e4m3fn, and stand for so many times what they hold: float32
                    [HK], or [slabs, HK], a slab being a page or, without pages, a batch entry
        return_lse  return also the log-sum-exp of the logits [B, H, Q] (natural logarithm; float32, or float64 for
                    float64 inputs; minus infinity where a row sees nothing, and its output is 0)
        validate    check promises of tensors and index ranges first, and name the first offender
        deterministic      gradients have the same bits in every run, also those of captured tensors; unless given, what
                           `torch.use_deterministic_algorithms` says
        precise            exact functions, where a GPU has approximate ones
        float32_precision  `ieee` or `tf32`: how a GPU multiplies float32
        schedule    what `schedule` gave for a call like this one, which must be decided by the same; calls find what
                    was made before without it
        bindings    parameters (numbers; floats also as 0-d tensors, for their gradient) and captured tensors, by name

        Returns the output [B, H, Q, DV] in the dtype of `query`. Raises BindingError, before any work.
        """
        choice = (deterministic, precise, float32_precision)
        runs = self._of_cache(query, key, kv_len, page_table, key_scale, value_scale, bindings)
        if schedule is not None and not torch.compiler.is_compiling():
            if not isinstance(schedule, Schedule):
                raise BindingError(f"`schedule`: expected what `schedule` gave, got {type(schedule).__name__}")
            schedule.check(runs._executable, runs._binder.bind(query, key, value, scale, q_offset, bindings))
        return runs._run(query, key, value, scale, q_offset, return_lse, validate, choice, bindings)

    def _of_cache(
        self,
        query: Tensor,
        key: Tensor,
        kv_len: int | Tensor | None,
        table: Tensor | None,
        key_scale: Tensor | None,
        value_scale: Tensor | None,
        bindings: dict[str, Value],
    ) -> Attention:
        """What runs a call on such a cache; what it captures for that goes to `bindings`."""
        scaled = key_scale is not None or value_scale is not None
        kind = (kv_len is not None, scaled, table is not None)
        if kind == (False, False, False):
            return self
        if table is not None:
            bindings[PAGE_TABLE] = page_table(table, query)
        if kv_len is not None:
            bindings[KV_LEN] = lengths(kv_len, query, key, table)
        if scaled:
            bindings.update(slab_scales(key_scale, value_scale, key))
        self._take(kind)
        return self._of_caches[kind]

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _take(self, kind: tuple[bool, bool, bool]) -> bool:
        """Make what runs calls with lengths, scales, pages, which it captures; a trace does not look inside."""
        if kind not in self._of_caches:
            variant = self._written
            for wanted, extend in zip(kind, (with_lengths, with_scales, with_pages), strict=True):
                variant = extend(variant) if wanted else variant
            self._of_caches[kind] = Attention(variant, self._constants)
        return True

    def _run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        q_offset: int | Tensor,
        return_lse: bool,
        validate: bool,
        choice: tuple[bool | None, bool, str],
        bindings: dict[str, Value],
    ) -> Tensor | tuple[Tensor, Tensor]:
        known = None
        if not torch.compiler.is_compiling() and not validate:
            known = self._replays.key(query, key, value, scale, q_offset, bindings, choice)
            again = self._replays.known.get(known) if known is not None else None
            if again is not None:
                tensors = [cast(Tensor, bindings[name]) for name in self._replays.names]
                out, lse = again.run(query, key, value, tensors, q_offset)
                return (out, lse) if return_lse else out
        if validate and torch.compiler.is_compiling():
            raise BindingError("`validate`: expected False in a compiled graph, which holds no values to look at")
        query, key, value = autocast(query, key, value)
        bind = self._binder.assume if torch.compiler.is_compiling() else self._binder.bind
        call = bind(query, key, value, scale, q_offset, bindings)
        if validate:
            validate_call(self.variant, call)
        chosen = options(call.query.device, *choice)
        out, lse = operators.attention(self._executable, call, chosen)
        if known is not None:
            self._replays.remember(known, call, chosen)
        return (out, lse) if return_lse else out

    def varlen(
        self,
        /,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_ends: Tensor,
        key_ends: Tensor | None = None,
        *,
        longest_query: int | None = None,
        longest_key: int | None = None,
        scale: float | None = None,
        return_lse: bool = False,
        deterministic: bool | None = None,
        precise: bool = False,
        float32_precision: Precision = "ieee",
        **bindings: Value,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of packed sequences, each to itself: `query [T, H, D]`, `key [TK, HK, D]`, `value [TK, HK, DV]`.

        query_ends, key_ends        cumulative lengths, int [B + 1], from 0 to T and TK; `key_ends` are those of the
                                    queries unless given
        longest_query, longest_key  the longest sequences, or more; unless given they are read, and waited for on a GPU

        Positions are local to the sequence, `b` is its number, and `Q` and `KV` are the longest, also in the extents of
        captured tensors. Returns `out [T, H, DV]` and, if asked for, `lse [T, H]`; differentiable. Rows are read where
        they stand, and nothing is padded. The other arguments are those of a call.
        """
        check_packed(query, key, value)
        if key_ends is None and key.shape[0] == query.shape[0] and longest_key is None:
            key_ends, longest_key = query_ends, longest_query = checked_ends("query", query, query_ends, longest_query)
        else:
            key_ends = query_ends if key_ends is None else key_ends
            query_ends, longest_query = checked_ends("query", query, query_ends, longest_query)
            key_ends, longest_key = checked_ends("key", key, key_ends, longest_key)
        if query_ends.shape != key_ends.shape:
            got = f"{query_ends.shape[0] - 1} and {key_ends.shape[0] - 1}"
            raise BindingError(f"the ends of `key`: expected as many sequences as those of `query`, got {got}")
        self._take_packing()
        assert self._of_packed is not None
        bindings |= {QUERY_ENDS: query_ends, KEY_ENDS: key_ends}
        bindings |= {LONGEST_QUERY: longest_query, LONGEST_KEY: longest_key}
        choice = (deterministic, precise, float32_precision)
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        out, lse = self._of_packed._run(query, key, value, scale, 0, True, False, choice, bindings)
        out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)
        return (out, lse) if return_lse else out

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _take_packing(self) -> bool:
        """As `_take`, for packed sequences."""
        if self._of_packed is None:
            check_names(self._written, OF_PACKED)
            self._of_packed = Attention(with_packing(self._written), self._constants)
        return True

    def ir(self, after: str | None = None) -> str:
        """The typed expression graph as written, or what the pass `after` made of it."""
        if after is None:
            return pipeline.dump(pipeline.Program(self._written))
        return pipeline.dump(pipeline.run(self._written, self._constants, stop_after=after), after)

    @property
    def proof(self) -> Proof:
        """The checked claims about the mask, symbolic in lengths, positions and parameters."""
        assert self._program.proof is not None
        return self._program.proof

    def prove(
        self, /, q_len: int, kv_len: int, *, block: tuple[int, int] = (128, 128), q_offset: int = 0, **bindings: Value
    ) -> Report:
        """The claims about the mask, and how many tiles of a call are empty, partial and full.

        `block` is the tile shape (queries, keys); a parameter of that name is given to `compile`. Counts that need a
        tensor which is not given are None, with a note.
        `print(report.text())`, `report.json()`, `report.verified()`.
        """
        tensors = {name: x for name, x in bindings.items() if name in {t.name for t in self.variant.tensors}}
        parameters = {name: x for name, x in bindings.items() if name not in tensors}
        return report(
            self._written,
            q_len,
            kv_len,
            block=block,
            q_offset=q_offset,
            parameters={**self._constants, **parameters},
            tensors=cast("dict[str, Tensor]", tensors),
        )

    def schedule(
        self,
        /,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        q_offset: int | Tensor = 0,
        backward: bool = True,
        validate: bool = False,
        **bindings: Value,
    ) -> Schedule:
        """Which tiles calls like this one visit, found now and kept for as long as the result is held.

        Where a mask reads tensors at positions, a GPU lists the tiles, once for tensors that do not change: later
        calls, in other layers too, find the lists by the tensors' storage and version. Held, they may be read by a CUDA
        graph; else a graph makes its own, in each replay. What is written past PyTorch (by a kernel of one's own, by
        the replay of a graph) does not change a tensor's version: `torch.autograd.graph.increment_version` does.

        `backward` says whether the lists of the backward pass are wanted. The passes run once. The other arguments are
        those of a call.
        """
        call = self._binder.bind(query, key, value, None, q_offset, bindings)
        if validate:
            validate_call(self.variant, call)
        return make_schedule(self._executable, call, options(query.device), backward=backward)

    def explain(
        self,
        /,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        q_offset: int | Tensor = 0,
        kv_len: int | Tensor | None = None,
        page_table: Tensor | None = None,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
        **bindings: Value,
    ) -> str:
        """Which backend a call would use, which tiles it would visit, and why. Arguments as for a call."""
        runs = self._of_cache(query, key, kv_len, page_table, key_scale, value_scale, bindings)
        call = runs._binder.bind(query, key, value, scale, q_offset, bindings)
        with made_on_cpu():
            said = select(call.query.device).explain(runs._program, call)
        stored = runs._binder.stored
        return f"{said}\ncache      {stored}; only those that a row may see are read" if stored else said

    def source(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        which: Literal["forward", "backward"] | None = None,
        target: str | None = None,
        standalone: bool = False,
    ) -> str:
        """The text emitted for tensors of a device and dtype.

        which       for kernels of a GPU: what they call in the `forward` pass, or in the `backward` pass with the
                    gradients of all captured float tensors
        target      for kernels of a GPU: the architecture, `sm_90` or the like, for which the functions are
        standalone  a file that runs with torch and triton alone, on any GPU that Triton serves: kernels, functions and
                    their launch; with `which="backward"` both passes, differentiable
        """
        try:
            device = torch.device(device)
        except RuntimeError:
            raise BindingError(f"`device`: expected cpu or cuda, got {device!r}") from None
        check_dtype(dtype)
        if device.type == "cuda" and dtype is torch.float64:
            raise BindingError("`dtype`: expected float32, bfloat16 or float16, which a GPU computes in; got float64")
        if which not in (None, "forward", "backward"):
            raise BindingError(f"`which`: expected forward or backward, got {which!r}")
        if which is None and target is None and not standalone:
            return select(device).source(self._program, dtype)
        from attn_dsl.backend.build import parse_target
        from attn_dsl.backend.portable.standalone import functions
        from attn_dsl.backend.portable.standalone import standalone as whole_file

        if device.type != "cuda":
            raise BindingError(f"`device`: expected cuda, since only kernels of a GPU have that source; got {device}")
        capability = None if target is None else parse_target(target)
        make = whole_file if standalone else functions
        return make(self._executable, which or "forward", dtype, capability)

    def cost(
        self,
        /,
        B: int,
        H: int,
        Q: int,
        KV: int,
        D: int,
        *,
        HK: int | None = None,
        DV: int | None = None,
        q_offset: int = 0,
        dtype: torch.dtype = torch.float32,
        block: tuple[int, int] = (128, 128),
        **bindings: Value,
    ) -> Cost:
        """Operations, bytes and memory of a call, dense against scheduled with tiles of `block` (rows, keys).

        HK is H and DV is D unless given. Captured tensors are asked for only where the schedule reads them.
        """
        given = {"B": B, "H": H, "HK": H if HK is None else HK, "Q": Q, "KV": KV, "D": D, "DV": D if DV is None else DV}
        sizes = {name: checked(name, size, 1) for name, size in given.items()}
        value_dim, q_offset, block = sizes.pop("DV"), checked("q_offset", q_offset, 0), checked_block(block)
        if sizes["H"] % sizes["HK"]:
            raise BindingError(f"`HK`: expected a number of heads that divides the {H} of `H`, got {HK}")
        check_dtype(dtype)
        assert self._program.schedule is not None
        functions = schedule_functions(self.variant, self._program.schedule)
        scalars, lists = self._binder.bind_schedule(sizes, bindings, functions.slots)
        visited = visited_pairs(functions, sizes, scalars, lists, q_offset, block)
        return cost(visited, sizes, value_dim, dtype)

    def build(self, target: str = "sm_90", **request: Any) -> list[Built]:
        """Compile for GPUs of an architecture, which need not be at hand; a later call on one compiles nothing.

        `request` has the fields of `attn_dsl.backend.build.Request`: dtype, head_dim, value_head_dim, backward,
        gradients, offsets, decode, precise, deterministic, float32_precision. Returns what was compiled, or found
        compiled.
        """
        from attn_dsl.backend.build import build, requested

        return list(build(self._executable, requested(target, request)))

    def tune(
        self,
        /,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        q_offset: int | Tensor = 0,
        backward: bool = True,
        **bindings: Value,
    ) -> Tuned:
        """Search the fastest tiles for calls like this one on its GPU, and keep them for every later process.

        A progress bar shows the best so far. Each trial is saved; Ctrl-C ends the search, and the next call goes on
        where it stopped. Later calls with these head dimensions, dtype and architecture use what was found.
        """
        from attn_dsl.backend import tuning

        call = self._binder.bind(query, key, value, scale, q_offset, bindings)
        if not query.is_cuda:
            raise BindingError(f"`query`: expected a tensor on a GPU, since only those have tiles; got {query.device}")
        given = {**call.tensors, **call.parameters}
        wanted = frozenset(name for name, x in given.items() if isinstance(x, Tensor) and x.requires_grad)
        self._replays.known.clear()  # they hold the tiles of before
        program, chosen = self._executable, options(query.device)
        ordered = reordered(program, call, chosen)
        if ordered is not None and ordered.layout.both_passes:
            program, call = ordered.program, ordered.in_order(ordered.call)
        with torch.cuda.device(query.device):
            return tuning.run(program, call, chosen, wanted=wanted, backward=backward)

    def __copy__(self) -> Attention:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Attention:
        """Itself: what a call changes of it is what it remembers."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its variant, which is compiled again; what it remembers stays behind."""
        return _compiled, (print_ir(self._written), self._constants)

    def __repr__(self) -> str:
        variant = self.variant
        names = [
            *(p.name if p.default is None else f"{p.name}={p.default!r}" for p in variant.parameters),
            *(f"{t.name}: {t.dtype.value}[{len(t.extents)} axes]" for t in variant.tensors),
        ]
        return f"Attention({variant.name}({', '.join(names)}))"


__all__ = ["Attention", "Call", "Cost", "Schedule", "compile"]
