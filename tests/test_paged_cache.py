"""The paged cache: whose pages are whose, what they hold, and what calls see of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_model import Modelled
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

import attn_dsl
from attn_dsl import BindingError, CacheFullError, PagedKVCache

TEXTS: dict[str, dict[str, Any]] = {
    "noop": {},
    "causal": {},
    "sliding_window": {"window": 21},
    "alibi": {"slope": torch.tensor([0.5, 0.1, 0.2, 0.3])},
    "gpt_oss": {"window": 40, "sinks": torch.tensor([0.5, -0.1, 0.2, 3.0])},
}


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = Modelled.of(pages=10, page_size=16)

    @rule()
    @precondition(lambda self: len(self.model.tokens) < 6)
    def allocate(self) -> None:
        self.model.allocate()

    @rule(data=st.data(), count=st.integers(0, 40))
    @precondition(lambda self: self.model.tokens)
    def append(self, data: st.DataObject, count: int) -> None:
        several = data.draw(st.lists(st.sampled_from(sorted(self.model.tokens)), min_size=1, max_size=3, unique=True))
        self.model.append(several, count)

    @rule(data=st.data())
    @precondition(lambda self: 0 < len(self.model.tokens) < 6)
    def fork(self, data: st.DataObject) -> None:
        self.model.fork(data.draw(st.sampled_from(sorted(self.model.tokens))))

    @rule(data=st.data())
    @precondition(lambda self: self.model.tokens)
    def trim(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.model.tokens)))
        self.model.trim(sequence, data.draw(st.integers(0, len(self.model.tokens[sequence]))))

    @rule(data=st.data())
    @precondition(lambda self: self.model.tokens)
    def free(self, data: st.DataObject) -> None:
        self.model.free(data.draw(st.sampled_from(sorted(self.model.tokens))))

    @invariant()
    def agrees(self) -> None:
        self.model.check_all()


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestAnyOperations = Machine.TestCase


def test_ten_thousand_operations_lose_no_page() -> None:
    model, choose = Modelled.of(pages=40, page_size=16), random.Random(0)
    for _ in range(10_000):
        model.random_step(choose)
    model.check_all()
    assert model.refused > 100
    for sequence in list(model.tokens):
        model.free(sequence)
    assert model.cache.free_pages == 40


def test_forks_share_pages_until_one_of_them_writes() -> None:
    cache = PagedKVCache(8, 16, 1, 4)
    first = cache.allocate()
    cache.extend([first], 20)
    second, third = cache.fork(first), cache.fork(first)
    assert cache.free_pages == 6 and cache.pages_of(second) == cache.pages_of(first)
    cache.extend([second, third], 1)
    assert cache.free_pages == 4
    tables = [cache.pages_of(s) for s in (first, second, third)]
    assert len({table[0] for table in tables}) == 1 and len({table[1] for table in tables}) == 3
    cache.extend([first], 1)  # nobody shares its last page any more
    assert cache.free_pages == 4


def test_what_is_wrong_is_said() -> None:
    cache = PagedKVCache(2, 16, 1, 4)
    one = cache.allocate()
    with pytest.raises(CacheFullError, match=r"33 more tokens of 1 sequences need 3 pages of 16, and 2 of 2 are free"):
        cache.extend([one], 33)
    assert cache.length(one) == 0 and cache.free_pages == 2
    with pytest.raises(BindingError, match="no sequence 7"):
        cache.length(7)
    with pytest.raises(BindingError, match="expected different sequences"):
        cache.extend([one, one], 1)
    with pytest.raises(BindingError, match="`length`: expected 0 to 0, got 1"):
        cache.trim(one, 1)
    with pytest.raises(BindingError, match=r"`key`: expected \[1, 1, 2, 4\], got \[1, 1, 3, 4\]"):
        cache.extend([one], 2).write(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 2, 4))
    with pytest.raises(BindingError, match="`width`: expected at least 2, the pages of sequence 0, got 1"):
        cache.extend([one], 20, width=1)
    with pytest.raises(BindingError, match="`page_size`: expected one of 16, 32, 64, 128, 256, got 48"):
        PagedKVCache(2, 48, 1, 4)
    with pytest.raises(BindingError, match="`dtype`: expected"):
        PagedKVCache(2, 16, 1, 4, dtype=torch.float64)
    cache.free(one)
    with pytest.raises(BindingError, match="is freed"):
        cache.free(one)


def rows(tokens: int, batch: int = 1, seed: int = 0) -> list[Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, 4, tokens, 16), (batch, 2, tokens, 16), (batch, 2, tokens, 8)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def store(**options: Any) -> PagedKVCache:
    given = {"pages": 40, "page_size": 16, "kv_heads": 2, "head_dim": 16, "value_head_dim": 8}
    return PagedKVCache(**{**given, "dtype": torch.float32, **options})


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("page", [16, 64, 256])
def test_prompts_in_chunks_and_tokens_one_by_one_see_what_a_whole_call_sees(name: str, page: int) -> None:
    attention, cache = attn_dsl.compile(name if name != "noop" else "causal"), store(page_size=page)
    prompts = {cache.allocate(): rows(length, seed=length) for length in (70, 33)}
    wholes = {s: attention(*tensors, **TEXTS[name]) for s, tensors in prompts.items()}
    for sequence, (query, key, value) in prompts.items():
        for first in range(0, 30, 13):
            last = min(first + 13, 30)
            step = cache.append([sequence], key[:, :, first:last], value[:, :, first:last])
            out = attention(query[:, :, first:last], **step.layer(), **TEXTS[name])
            torch.testing.assert_close(out, wholes[sequence][:, :, first:last])
    for at in range(30, 33):
        query, key, value = (torch.cat([x[i][:, :, at : at + 1] for x in prompts.values()]) for i in range(3))
        out = attention(query, **cache.append(list(prompts), key, value).layer(), **TEXTS[name])
        expected = torch.cat([whole[:, :, at : at + 1] for whole in wholes.values()])
        torch.testing.assert_close(out, expected)


def test_a_fork_sees_the_prompt_and_its_own_tokens() -> None:
    attention, cache = attn_dsl.compile("causal"), store()
    query, key, value = rows(40)
    prompt = cache.allocate()
    cache.append([prompt], key[:, :, :37], value[:, :, :37])
    fork = cache.fork(prompt)
    cache.append([fork], key[:, :, 37:39] + 1, value[:, :, 37:39] + 1)
    cache.trim(fork, 37)  # a draft that was rejected
    step = cache.append([prompt, fork], *(x[:, :, 37:].expand(2, -1, -1, -1) for x in (key, value)))
    expected = attention(query, key, value)[:, :, 37:]
    found = attention(query[:, :, 37:].expand(2, -1, -1, -1), **step.layer())
    torch.testing.assert_close(found, expected.expand(2, -1, -1, -1))


@pytest.mark.parametrize("scales", ["head", "page"])
def test_eight_bits_keep_what_eight_bits_can(scales: str) -> None:
    attention = attn_dsl.compile("causal")
    query, key, value = rows(60)
    key[:, :, 10:20] *= 30
    value[:, :, 40:] *= 100
    peaks = {f"{n}_scale": x.abs().amax((0, 2, 3)) / 448 for n, x in (("key", key), ("value", value))}
    cache = store(dtype=torch.float8_e4m3fn, scales=scales, **(peaks if scales == "head" else {}))
    sequence = cache.allocate()
    for first, last in ((0, 7), (7, 8), (8, 45), (45, 60)):  # pages are written to more than once
        step = cache.append([sequence], key[:, :, first:last], value[:, :, first:last])
    kept = []
    for pool, scale, x in ((cache.key, cache.key_scale, key), (cache.value, cache.value_scale, value)):
        assert scale is not None
        whole = pool[0].float() * (scale[0][:, :, None, None] if scales == "page" else scale[0][:, None, None])
        kept.append(whole[list(cache.pages_of(sequence))].transpose(0, 1).flatten(1, 2)[None, :, :60])
        peak = x.abs().amax((2, 3), keepdim=True) if scales == "head" else None
        if peak is None:  # of its page, whose scale follows it without another rounding of normal numbers
            padded = torch.nn.functional.pad(x, (0, 0, 0, 4)).unflatten(2, (-1, 16))
            peak = padded.abs().amax((3, 4), keepdim=True).expand_as(padded).flatten(2, 3)[:, :, :60]
        assert ((kept[-1] - x).abs() <= 0.0625 * x.abs() + peak / 448 / 64).all()
    query = query[:, :, 55:]
    found = attention(query, **{**step.layer(), "q_offset": torch.tensor([55])})
    torch.testing.assert_close(found, attention(query, *kept, q_offset=55))


def test_a_step_in_place_serves_a_graph() -> None:
    """Its tensors stay where they are, and take the numbers of the next tokens."""
    attention, cache = attn_dsl.compile("causal"), store()
    query, key, value = rows(40)
    sequence = cache.allocate()
    cache.append([sequence], key[:, :, :14], value[:, :, :14])
    step = cache.extend([sequence], 1, width=4)
    held = {name: x.data_ptr() for name, x in step.layer().items()}
    expected = attention(query, key, value)
    for at in range(14, 40):
        if at > 14:
            assert cache.extend([sequence], 1, into=step) is step
        step.write(key[:, :, at : at + 1], value[:, :, at : at + 1])
        out = attention(query[:, :, at : at + 1], **step.layer())
        torch.testing.assert_close(out, expected[:, :, at : at + 1])
    assert held == {name: x.data_ptr() for name, x in step.layer().items()}


def test_a_compiled_graph_serves_a_cache_that_grows() -> None:
    attention, cache = attn_dsl.compile("sliding_window", window=20), store()
    query, key, value = rows(40)
    sequence = cache.allocate()
    step = cache.append([sequence], key[:, :, :14], value[:, :, :14])
    graph = torch.compile(lambda query, given: attention(query, **given), fullgraph=True, dynamic=False)
    expected = attention(query, key, value)
    for at in (14, 15, 16, 17):
        one = slice(at, at + 1)
        step = cache.extend([sequence], 1, width=4)
        step.write(key[:, :, one], value[:, :, one])
        torch.testing.assert_close(graph(query[:, :, one], step.layer()), expected[:, :, one])
    assert "cache      keys and values are in pages" in attention.explain(query[:, :, :1], **step.layer())


def test_layers_have_pages_of_their_own() -> None:
    attention, cache = attn_dsl.compile("causal"), store(layers=3)
    tensors = [rows(20, seed=layer) for layer in range(3)]
    one, other = cache.allocate(), cache.allocate()
    cache.extend([other], 3)
    step = cache.append([one], *(torch.stack([x[i] for x in tensors]) for i in (1, 2)))
    for layer, (query, key, value) in enumerate(tensors):
        torch.testing.assert_close(attention(query, **step.layer(layer)), attention(query, key, value))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"page_table": torch.zeros(1, 4)}, "`page_table`: expected an int32 tensor .*dtype float32"),
        ({"page_table": torch.zeros(2, 4, dtype=torch.int32)}, r"`page_table`: expected .*shape \[2, 4\]"),
        ({"key": torch.zeros(8, 2, 24, 16)}, "`key`: expected pages of 16, 32, 64, 128, 256 keys, got 24"),
        ({"kv_len": 65}, "`kv_len`: expected an int from 0 to 64"),
        ({"key_scale": torch.ones(2)}, "`value_scale`: expected a float32 tensor .*, got nothing"),
        ({"key_scale": torch.ones(2), "value_scale": torch.ones(3)}, r"`value_scale`: expected .*shape \[3\]"),
        ({"key_scale": torch.ones(2), "value_scale": torch.ones(2)}, "`key`: expected dtype float8_e4m3fn"),
        ({"key": torch.zeros(8, 2, 16, 16, dtype=torch.float8_e4m3fn)}, "`key`: expected `key_scale` with dtype"),
    ],
)
def test_calls_that_do_not_fit_are_refused(wrong: dict[str, Any], said: str) -> None:
    given = {"key": torch.zeros(8, 2, 16, 16), "value": torch.zeros(8, 2, 16, 8)}
    given |= {"page_table": torch.zeros(1, 4, dtype=torch.int32), "kv_len": 5, **wrong}
    with pytest.raises(BindingError, match=said):
        attn_dsl.compile("causal")(torch.zeros(1, 4, 1, 16), **given)


def test_a_table_is_validated_as_far_as_there_are_keys() -> None:
    attention, table = attn_dsl.compile("causal"), torch.tensor([[3, 7, 8, -5]], dtype=torch.int32)
    query, key, value = torch.zeros(1, 4, 1, 16), torch.zeros(8, 2, 16, 16), torch.zeros(8, 2, 16, 8)
    attention(query, key, value, page_table=table, kv_len=32, validate=True)
    with pytest.raises(BindingError, match=r"`page_table`: expected pages from 0 to 7, got 8 at \[0, 2\]"):
        attention(query, key, value, page_table=table, kv_len=33, validate=True)


@pytest.mark.parametrize("page", [-1, 8])
def test_no_other_page_is_read_for_one_that_is_not(page: int) -> None:
    attention, table = attn_dsl.compile("causal"), torch.tensor([[3, page, -1, -1]], dtype=torch.int32)
    query, key, value = torch.zeros(1, 4, 1, 16), torch.zeros(8, 2, 16, 16), torch.zeros(8, 2, 16, 8)
    attention(query, key, value, page_table=table, kv_len=16, q_offset=15)
    with pytest.raises(
        BindingError, match=f"`page_table`: expected pages from 0 to 7 where there are keys, got {page}"
    ):
        attention(query, key, value, page_table=table, kv_len=17, q_offset=16)


CACHE = {"pages": 8, "page_size": 16, "kv_heads": 2, "head_dim": 16}
MISUSE: list[tuple[str, Callable[[PagedKVCache], object]]] = [
    ("pages", lambda cache: PagedKVCache(**{**CACHE, "pages": 2.0})),
    ("value_head_dim", lambda cache: PagedKVCache(**CACHE, value_head_dim=0)),
    ("sequences", lambda cache: cache.extend(0, tokens=1)),
    ("sequences", lambda cache: cache.extend([], tokens=1)),
    ("tokens", lambda cache: cache.extend([0], tokens=1.0)),
    ("tokens", lambda cache: cache.extend([0], tokens=-1)),
    ("layer", lambda cache: cache.extend([0], tokens=1).layer(1)),
    ("layer", lambda cache: cache.extend([0], tokens=1).write(torch.ones(1), torch.ones(1), layer=-1)),
    ("key", lambda cache: cache.extend([0], tokens=1).write([1.0], torch.ones(1))),
]


@pytest.mark.parametrize(("name", "call"), MISUSE, ids=lambda x: x if isinstance(x, str) else "")
def test_misuse_names_the_argument_and_changes_nothing(name: str, call: Callable[[PagedKVCache], object]) -> None:
    cache = PagedKVCache(**CACHE)
    cache.allocate()
    with pytest.raises(BindingError, match=f"`{name}`: expected"):
        call(cache)
    assert cache.length(0) in (0, 1) and isinstance(cache.length(0), int)


def test_there_is_no_backward_pass() -> None:
    query, key, value = rows(20)
    cache = store()
    step = cache.append([cache.allocate()], key, value)
    out = attn_dsl.compile("causal")(query.requires_grad_(), **step.layer())
    with pytest.raises(BindingError, match="in pages: such a call has no backward pass"):
        out.sum().backward()


def test_the_names_are_taken() -> None:
    with pytest.raises(BindingError, match="`page_table`, which is an argument of every call: rename it"):
        attn_dsl.compile("attention mine(page_table: int)\nmask = k < page_table\n")
