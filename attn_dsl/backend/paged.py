"""A cache of keys and values in pages, for serving many sequences from one memory.

    cache = PagedKVCache(pages=4096, page_size=64, kv_heads=8, head_dim=128, layers=32, device="cuda")
    sequence = cache.allocate()
    step = cache.extend([sequence], tokens=5)          # room for five more tokens of each
    step.write(key, value, layer=0)                    # [B, HK, 5, D]
    out = attn(query, **step.layer(0))                 # sees what was there and the five

A page belongs to as many sequences as share it: `fork` copies nothing, and whoever appends to a shared page gets a copy
of it first. What belongs to whom is kept on the host; nothing here waits for a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attn_dsl.backend.binding import EIGHT_BITS, PAGE_SIZES, checked
from attn_dsl.errors import BindingError, CacheFullError

DTYPES = (torch.bfloat16, torch.float16, torch.float32, EIGHT_BITS)
LARGEST = torch.finfo(EIGHT_BITS).max


class PagedKVCache:
    """`pages` pages of `page_size` keys and values of `kv_heads` heads, for each of `layers` layers.

    page_size       16, 32, 64, 128 or 256
    dtype           bfloat16, float16, float32, or float8_e4m3fn with scales
    scales          for 8 bits: `head`, one for each layer and head, 1 unless given as `key_scale` and `value_scale`
                    [HK] or [layers, HK]; or `page`, one for each page besides, which follows what is written to it

    `key [layers, pages, HK, page, D]` and `value [layers, pages, HK, page, DV]` are the memory.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        scales: Literal["head", "page"] = "head",
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> None:
        numbers = {"pages": pages, "kv_heads": kv_heads, "head_dim": head_dim, "layers": layers}
        for name, number in numbers.items():
            checked(name, number, 1)
        checked("value_head_dim", head_dim if value_head_dim is None else value_head_dim, 1)
        if page_size not in PAGE_SIZES:
            raise BindingError(f"`page_size`: expected one of {', '.join(map(str, PAGE_SIZES))}, got {page_size}")
        if dtype not in DTYPES:
            raise BindingError(f"`dtype`: expected bfloat16, float16, float32 or float8_e4m3fn, got {dtype}")
        if scales not in ("head", "page"):
            raise BindingError(f"`scales`: expected head or page, got {scales!r}")
        self.page_size, self.layers, self.dtype, self.device = page_size, layers, dtype, torch.device(device)
        rows = (layers, pages, kv_heads, page_size)
        self.key = torch.zeros((*rows, head_dim), dtype=dtype, device=device)
        self.value = torch.zeros((*rows, value_head_dim or head_dim), dtype=dtype, device=device)
        self.scaled, self.by_page = dtype is EIGHT_BITS, dtype is EIGHT_BITS and scales == "page"
        if (self.by_page or not self.scaled) and (key_scale is not None or value_scale is not None):
            raise BindingError("`key_scale`, `value_scale`: expected none, since only heads in 8 bits have given ones")
        self.key_scale = self._scales("key_scale", key_scale)
        self.value_scale = self._scales("value_scale", value_scale)
        self._free = list(range(pages - 1, -1, -1))
        self._owners = [0] * pages
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0

    def _scales(self, name: str, given: Tensor | None) -> Tensor | None:
        layers, pages, heads = self.key.shape[:3]
        if not self.scaled:
            return None
        if self.by_page:
            return torch.ones((layers, pages, heads), device=self.device)
        if given is None:
            return torch.ones((layers, heads), device=self.device)
        if tuple(given.shape) not in ((heads,), (layers, heads)):
            raise BindingError(f"`{name}`: expected [{heads}] or [{layers}, {heads}], got {list(given.shape)}")
        return given.to(self.device, torch.float32).expand(layers, heads).contiguous()

    # ------------------------------------------------------------ whose pages

    @property
    def free_pages(self) -> int:
        """How many pages belong to nobody."""
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences that there are."""
        return tuple(self._lengths)

    def length(self, sequence: int) -> int:
        """How many tokens a sequence has."""
        self._check(sequence)
        return self._lengths[sequence]

    def pages_of(self, sequence: int) -> tuple[int, ...]:
        """The pages of a sequence, in order; some may be shared."""
        self._check(sequence)
        return tuple(self._tables[sequence])

    def allocate(self) -> int:
        """A new sequence, without tokens, which takes no page yet."""
        sequence, self._next = self._next, self._next + 1
        self._tables[sequence], self._lengths[sequence] = [], 0
        return sequence

    def fork(self, sequence: int) -> int:
        """A new sequence of the same tokens, in the same pages."""
        self._check(sequence)
        new = self.allocate()
        self._tables[new], self._lengths[new] = list(self._tables[sequence]), self._lengths[sequence]
        for page in self._tables[new]:
            self._owners[page] += 1
        return new

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages that no other shares are free again."""
        self._check(sequence)
        self._release(self._tables.pop(sequence))
        del self._lengths[sequence]

    def trim(self, sequence: int, length: int) -> None:
        """Forget the tokens of a sequence from `length` on, such as those of a draft that were rejected."""
        self._check(sequence)
        if not 0 <= length <= self._lengths[sequence]:
            raise BindingError(f"`length`: expected 0 to {self._lengths[sequence]}, got {length}")
        table, kept = self._tables[sequence], -(-length // self.page_size)
        self._release(table[kept:])
        del table[kept:]
        self._lengths[sequence] = length

    def _release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)

    def _check(self, *sequences: int) -> None:
        for sequence in sequences:
            if sequence not in self._lengths:
                raise BindingError(f"there is no sequence {sequence}: it was never allocated, or is freed")
        if len(set(sequences)) < len(sequences):
            raise BindingError(f"expected different sequences, got {list(sequences)}")

    # ------------------------------------------------------------ tokens

    def append(self, sequences: Sequence[int], key: Tensor, value: Tensor) -> Step:
        """`extend` and `write`: keys `[B, HK, tokens, D]` and values of the sequences, behind an axis of layers unless
        there is one layer."""
        if self.layers == 1 and key.dim() == 4:
            key, value = key[None], value[None]
        if key.dim() != 5 or key.shape[0] != self.layers or value.shape[:4] != key.shape[:4]:
            expected = f"keys and values [{self.layers}, B, HK, tokens, D]"
            raise BindingError(f"expected {expected}, got {list(key.shape)} and {list(value.shape)}")
        step = self.extend(sequences, key.shape[3])
        for layer in range(self.layers):
            step.write(key[layer], value[layer], layer)
        return step

    def extend(
        self, sequences: Sequence[int], tokens: int, *, width: int | None = None, into: Step | None = None
    ) -> Step:
        """Make room for `tokens` more tokens of each sequence, whose keys and values are then written layer by layer.

        width: pages of a row of the page table; enough for the longest sequence, a power of two, unless given.
        into: a step of as many sequences and tokens whose tensors take the new numbers in place, for CUDA graphs.

        Raises CacheFullError where the pages do not suffice, and changes nothing.
        """
        if isinstance(sequences, int) or not sequences:
            raise BindingError(f"`sequences`: expected some sequences, got {sequences!r}")
        self._check(*sequences)
        checked("tokens", tokens, 0)
        self._check_room(sequences, tokens, width if into is None else into.page_table.shape[1])
        copied: list[tuple[int, int]] = []
        for sequence in sequences:
            table, length = self._tables[sequence], self._lengths[sequence]
            if tokens and length % self.page_size and self._owners[table[-1]] > 1:
                copied.append((table[-1], self._take()))
                self._owners[table[-1]] -= 1
                table[-1] = copied[-1][1]
            self._lengths[sequence] = length + tokens
            while len(table) * self.page_size < length + tokens:
                table.append(self._take())
        if copied:
            self._copy(copied)
        return self._step(sequences, tokens, width, into)

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _check_room(self, sequences: Sequence[int], tokens: int, width: int | None) -> None:
        needed, size = 0, self.page_size
        shared: Counter[int] = Counter()
        for sequence in sequences:
            table, length = self._tables[sequence], self._lengths[sequence]
            pages = -(-(length + tokens) // size)
            if width is not None and pages > width:
                raise BindingError(f"`width`: expected at least {pages}, the pages of sequence {sequence}, got {width}")
            needed += pages - len(table)
            if tokens and length % size:
                shared[table[-1]] += 1
        needed += sum(min(count, self._owners[page] - 1) for page, count in shared.items())
        if needed > len(self._free):
            raise CacheFullError(
                f"{tokens} more tokens of {len(sequences)} sequences need {needed} pages of {size}, and "
                f"{len(self._free)} of {len(self._owners)} are free: free a sequence, or make a larger cache"
            )

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        old, new = self._sent(pairs, torch.int64).unbind(1)
        by_page = (self.key_scale, self.value_scale) if self.by_page else ()
        for pool in (_bytes(self.key), _bytes(self.value), *by_page):
            assert pool is not None
            pool[:, new] = pool[:, old]

    def _sent(self, numbers: Any, dtype: torch.dtype) -> Tensor:
        """Numbers on the device, without waiting for it."""
        if self.device.type != "cuda":
            return torch.tensor(numbers, dtype=dtype, device=self.device)
        return torch.tensor(numbers, dtype=dtype, device="cpu").pin_memory().to(self.device, non_blocking=True)

    def _step(self, sequences: Sequence[int], tokens: int, width: int | None, into: Step | None) -> Step:
        tables, lengths = [self._tables[s] for s in sequences], [self._lengths[s] for s in sequences]
        if into is not None:
            width = into.page_table.shape[1]
        elif width is None:
            width = 1 << max(max(map(len, tables)) - 1, 0).bit_length()
        rows = [[length, *table, *[0] * (width - len(table))] for length, table in zip(lengths, tables, strict=True)]
        numbers = self._sent(rows, torch.int32)
        offsets = numbers[:, 0].long() - tokens
        places = offsets[:, None] + torch.arange(tokens, device=self.device)
        page = numbers[:, 1:].gather(1, places // self.page_size).long()
        first, last = [(x - tokens) // self.page_size for x in lengths], [(x - 1) // self.page_size for x in lengths]
        most = max(b - a + 1 for a, b in zip(first, last, strict=True))
        made = Step(self, numbers[:, 1:], numbers[:, 0].clone(), offsets, page, places % self.page_size, most)
        return made if into is None else into.take(made)


@dataclass
class Step:
    """Some tokens of a batch of sequences, each behind what the sequence had: where they go and what they see.

    page_table: int32 [B, width]. kv_len: int32 [B], with the tokens. q_offset: int64 [B], without them. page, within:
    int64 [B, tokens], where each token goes. touched: the most pages of a sequence that they go to.
    """

    of: PagedKVCache
    page_table: Tensor
    kv_len: Tensor
    q_offset: Tensor
    page: Tensor
    within: Tensor
    touched: int

    def layer(self, layer: int = 0) -> dict[str, Tensor]:
        """What a call on the tokens of a layer takes beside the query, by name."""
        cache = self.of
        self._check_layer(layer)
        found = {"key": cache.key[layer], "value": cache.value[layer], "page_table": self.page_table}
        found |= {"kv_len": self.kv_len, "q_offset": self.q_offset}
        if cache.key_scale is not None and cache.value_scale is not None:
            found |= {"key_scale": cache.key_scale[layer], "value_scale": cache.value_scale[layer]}
        return found

    def _check_layer(self, layer: int) -> None:
        layers = self.of.layers
        if not isinstance(layer, int) or not 0 <= layer < layers:
            raise BindingError(f"`layer`: expected 0 to {layers - 1}, got {layer!r}")

    @torch.no_grad()
    def write(self, key: Tensor, value: Tensor, layer: int = 0) -> None:
        """Put keys `[B, HK, tokens, D]` and values `[B, HK, tokens, DV]` into a layer. Raises BindingError."""
        cache = self.of
        self._check_layer(layer)
        for name, new, pool in (("key", key, cache.key), ("value", value, cache.value)):
            expected = (self.page.shape[0], pool.shape[2], self.page.shape[1], pool.shape[4])
            if not isinstance(new, Tensor) or tuple(new.shape) != expected:
                got = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise BindingError(f"`{name}`: expected {list(expected)}, got {got}")
        for new, pool, scale in ((key, cache.key, cache.key_scale), (value, cache.value, cache.value_scale)):
            tokens = new.transpose(1, 2)
            if scale is not None and cache.by_page:
                tokens = _narrowed(tokens, self._rescaled(pool[layer], scale[layer], tokens)[..., None])
            elif scale is not None:
                tokens = _narrowed(tokens, scale[layer][:, None])
            _bytes(pool[layer])[self.page, :, self.within] = _bytes(tokens.to(pool.dtype))

    def _rescaled(self, pool: Tensor, scale: Tensor, tokens: Tensor) -> Tensor:
        """Let the scales of the touched pages `[pages, HK]` reach what the tokens `[B, T, HK, D]` hold; what the pages
        hold of earlier tokens is scaled with them. Scales are powers of two, so that this rounds only what falls below
        the smallest normal number. Returns the scales of the tokens `[B, T, HK]`."""
        size = self.of.page_size
        first = (self.q_offset // size)[:, None]
        numbers = first + torch.arange(self.touched, device=first.device)
        last = (self.kv_len.long()[:, None] - 1) // size
        slots = (self.q_offset[:, None] + torch.arange(tokens.shape[1], device=first.device)) // size - first
        peaks = scale.new_zeros((tokens.shape[0], self.touched, tokens.shape[2]))
        slots = slots[..., None].expand(-1, -1, tokens.shape[2])
        peaks.scatter_reduce_(1, slots, tokens.abs().amax(3).float(), "amax")
        pages = self.page_table.gather(1, torch.minimum(numbers, last)).long()
        held = numbers * size < self.q_offset[:, None]  # a page that begins with these tokens holds nothing yet
        old = torch.where(held[..., None], scale[pages], 0.0)
        new = torch.maximum(old, torch.exp2(torch.frexp(peaks / LARGEST).exponent))
        there = torch.minimum(numbers, last) - first  # slots past the last page say what that one says
        old, new = (x.gather(1, there[..., None].expand_as(x)) for x in (old, new))
        blocks = pool[pages].float() * (old / new)[..., None, None]
        _bytes(pool)[pages] = _bytes(blocks.nan_to_num().to(pool.dtype))
        scale[pages] = new
        return new.gather(1, slots)

    def take(self, other: Step) -> Step:
        """The step with the numbers of another, in its own tensors."""
        for name in ("page_table", "kv_len", "q_offset", "page", "within"):
            mine, new = getattr(self, name), getattr(other, name)
            if mine.shape != new.shape:
                raise BindingError(f"`into`: expected a step of {list(new.shape)} as `{name}`, got {list(mine.shape)}")
            mine.copy_(new)
        self.touched = other.touched
        return self


def _narrowed(tokens: Tensor, scale: Tensor) -> Tensor:
    """Tokens as 8 bits that stand for `scale` times what they hold."""
    return (tokens.float() / scale).clamp(-LARGEST, LARGEST).to(EIGHT_BITS)


def _bytes(x: Tensor) -> Tensor:
    """8 bits as bytes, for which every operation there is works."""
    return x.view(torch.uint8) if x.dtype is EIGHT_BITS else x
