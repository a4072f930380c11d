"""The formatter changes nothing but the layout, and nothing at all the second time."""

from __future__ import annotations

import re

import pytest
from frontend_texts import damaged, program
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_dsl.errors import CompileError, Source
from attn_dsl.frontend import load
from attn_dsl.frontend.format import format_text
from attn_dsl.frontend.library import SHIPPED
from attn_dsl.frontend.tokens import scan


def test_layout() -> None:
    text = """

#comment
attention  example( a:int=3 ,
const  c:float = .5 )#on a line
;;let z=- 3;;let y=f( x , score=- 2 ) ;


tensor doc:int32 [ B,KV ]nondecreasing over KV,in [0,a )
mask=(a
and(not(b))
#inside
<2. **-1E5
)
score=sum( d in 0 .. 3:doc [d] )
"""
    assert (
        format_text(text)
        == """# comment
attention example(a: int = 3,
    const c: float = 0.5)  # on a line
let z = -3; let y = f(x, score=-2)

tensor doc: int32[B, KV] nondecreasing over KV, in [0, a)
mask = (a
    and (not (b))
    # inside
    < 2.0 ** -1e5
)
score = sum(d in 0..3: doc[d])
"""
    )


def test_results_on_neighboring_lines_are_aligned() -> None:
    text = "attention a\nscore = 1\nmask = q > k\n\nmask = true\n# between\nsink = 1\n"
    assert format_text(text) == "attention a\nscore = 1\nmask  = q > k\n\nmask = true\n# between\nsink = 1\n"


def test_a_text_that_does_not_parse_is_refused() -> None:
    with pytest.raises(CompileError):
        format_text("attention a\nmask = (")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.attn")), ids=lambda path: path.stem)
def test_shipped_variants_keep_their_meaning(path: object) -> None:
    text = path.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    squeezed = re.sub(r"(?<![\w.]) | (?![\w.])", "", "\n".join(line for line in text.split("\n") if line[:1] != "#"))
    for variation in (text, squeezed, text.replace(" ", "\t  ")):
        formatted = format_text(variation)
        assert format_text(formatted) == formatted
        assert _meaning(formatted) == _meaning(variation)


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([damaged, program]))
def test_comments_and_tokens_survive(random: object, make: object) -> None:
    text = make(random)  # type: ignore[operator]
    try:
        formatted = format_text(text)
    except CompileError:
        return
    assert format_text(formatted) == formatted
    assert _tokens(formatted) == _tokens(text)


def _meaning(text: str) -> object:
    v = load(Source("x.attn", text))
    return v.parameters, v.tensors, v.score, v.mask, v.sink


def _tokens(text: str) -> list[str]:
    kept = [t for t in scan(text) if t.type not in ("NEWLINE", "SEMICOLON")]
    return [re.sub(r"^#\s*", "#", t).rstrip() if t.type == "COMMENT" else _same_number(t) for t in kept]


def _same_number(token: object) -> str:
    return str(float(str(token).replace("_", ""))) if getattr(token, "type", "") == "FLOAT" else str(token)
