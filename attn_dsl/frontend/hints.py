"""What people write who come from Python, PyTorch or C, and how it is spelled here. Data only."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

OPERATORS: dict[str, tuple[str, str]] = {
    # text: (terminal that takes its place so that the statement still parses, help)
    "&": ("AND", "write `and`"),
    "&&": ("AND", "write `and`"),
    "|": ("OR", "write `or`"),
    "||": ("OR", "write `or`"),
    "~": ("NOT", "write `not`"),
    "!": ("NOT", "write `not`"),
    "^": ("POWER", "a power is written `**`; exclusive or of two conditions is `!=`"),
    "<<": ("MULTIPLY", "write `x * 2 ** n`"),
    ">>": ("MULTIPLY", "write `x // 2 ** n`"),
    "=>": ("COMPARE", "write `>=`"),
    "=<": ("COMPARE", "write `<=`"),
    "<>": ("COMPARE", "write `!=`"),
    "===": ("COMPARE", "write `==`"),
    "!==": ("COMPARE", "write `!=`"),
    ":=": ("EQUAL", "name an expression in a statement of its own: `let name = expression`"),
    "->": ("", "types are inferred; a function is `def f(x, y) = expression`"),
    "?": ("", "write `x if condition else y`"),
}

CHARACTERS: dict[str, tuple[str, str]] = {
    "≤": ("COMPARE", "write `<=`"),
    "≥": ("COMPARE", "write `>=`"),
    "≠": ("COMPARE", "write `!=`"),
    "∧": ("AND", "write `and`"),
    "∨": ("OR", "write `or`"),
    "¬": ("NOT", "write `not`"),
    "×": ("MULTIPLY", "write `*`"),
    "·": ("MULTIPLY", "write `*`"),
    "÷": ("MULTIPLY", "write `/`"),
    "−": ("SIGN", "write `-`"),
    "–": ("SIGN", "write `-`"),
    "{": ("", "there are no braces: an expression is grouped by `( )`, a statement ends with its line"),
    "}": ("", "there are no braces: an expression is grouped by `( )`, a statement ends with its line"),
    "\\": ("", "an expression goes on over line ends inside `( )`"),
    "@": ("", "there are no decorators and no matrix products"),
}

NAMES: dict[str, str] = {
    **dict.fromkeys(["q_idx", "q_index", "query_idx", "q_pos", "m_idx", "qi", "row"], "q"),
    **dict.fromkeys(["kv_idx", "kv_index", "k_idx", "key_idx", "kv", "kv_pos", "n_idx", "ki", "col"], "k"),
    **dict.fromkeys(["head", "head_idx", "h_idx", "hq", "head_index"], "h"),
    **dict.fromkeys(["kv_head", "kv_head_idx", "hkv", "h_kv"], "hk"),
    **dict.fromkeys(["batch", "batch_idx", "b_idx", "z", "batch_index"], "b"),
    **dict.fromkeys(["Q_LEN", "q_len", "M", "Sq", "seqlen_q"], "Q"),
    **dict.fromkeys(["KV_LEN", "kv_len", "K", "Sk", "seqlen_k", "S", "seq_len", "seqlen", "KV_len"], "KV"),
    **dict.fromkeys(["num_heads", "n_heads", "Hq", "NH"], "H"),
    **dict.fromkeys(["num_kv_heads", "Hkv", "H_KV"], "HK"),
    **dict.fromkeys(["batch_size"], "B"),
    **dict.fromkeys(["head_dim", "d_k", "dim"], "D"),
    **dict.fromkeys(["True"], "true"),
    **dict.fromkeys(["False"], "false"),
    **dict.fromkeys(["scores", "logit", "logits", "attn", "qk"], "score"),
}
"""Names of flex_attention and its kin. Only looked up when nothing of that name is declared."""

ADVICE: dict[str, str] = {
    "None": "there is no `None`; what is left out keeps its default",
    "lambda": "a function is `def f(x, y) = expression`",
    "inf": "to drop a pair, make `mask` false for it instead of adding minus infinity to `score`",
    "nan": "there is no `nan`",
    "pi": "write the number: 3.141592653589793",
    "scale": "`score` is scaled already; the scale is an argument of the call",
    "range": "a reduction is `sum(d in 0..n: expression)`",
    "len": "sizes have names: B, H, HK, Q, KV, D, and every name in the extents of a tensor",
    "is": "write `==`",
    "elif": "write `x if a else y if b else z`",
    "xor": "exclusive or of two conditions is `!=`",
}

FUNCTIONS: dict[str, str] = {
    "absolute": "abs", "fabs": "abs", "minimum": "min", "maximum": "max", "fmin": "min", "fmax": "max",
    "clip": "clamp", "power": "pow", "logical_and": "and", "logical_or": "or", "logical_not": "not",
    "expit": "sigmoid", "swish": "silu", "sgn": "sign", "ln": "log", "rsqrtf": "rsqrt", "sqrtf": "sqrt",
    "bitwise_and": "and", "bitwise_or": "or", "bitwise_not": "not", "floor_divide": "//", "remainder": "%",
    "fmod": "%", "div": "/", "true_divide": "/", "add": "+", "sub": "-", "mul": "*", "eq": "==", "ne": "!=",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "multiply": "*", "subtract": "-", "cdiv": "//",
}  # fmt: skip
"""Functions of torch, numpy and math by other names: a function or an operator of this language."""

NAMESPACES = frozenset({"torch", "np", "numpy", "math", "jnp", "jax", "F", "tl", "triton", "nn", "functional", "cmath"})
"""Modules whose functions are written bare here: `torch.tanh(x)` is `tanh(x)`."""

STATEMENTS: dict[str, str] = {
    "if": "a choice is an expression: `x if condition else y`",
    "elif": "a choice is an expression: `x if a else y if b else z`",
    "else": "a choice is an expression: `x if condition else y`",
    "for": "there are no loops; a sum over a static range is `sum(d in 0..n: expression)`",
    "while": "there are no loops; a sum over a static range is `sum(d in 0..n: expression)`",
    "return": "a variant assigns its result: `score = ...`, `mask = ...`; a function is `def f(x) = expression`",
    "from": "write `import name, name`",
    "class": "a file is one variant: `attention name(parameter: type = default)`",
    "lambda": "a function is `def f(x, y) = expression`",
    "var": "write `let name = expression`",
    "const": "`const` belongs before a parameter of the header; a name for an expression is `let name = expression`",
    "fn": "a function is `def f(x, y) = expression`",
    "func": "a function is `def f(x, y) = expression`",
    "function": "a function is `def f(x, y) = expression`",
    "variant": "a file begins with `attention name`",
    "param": "parameters stand in the header: `attention name(window: int = 128)`",
    "assert": "promises on a tensor are `nondecreasing over AXIS` and `in [lo, hi)`",
    "print": "there are no side effects",
    "and": "an expression goes on over line ends inside `( )`",
    "or": "an expression goes on over line ends inside `( )`",
}
"""First words of statements of other languages."""

DTYPES: dict[str, str] = {
    "int": "int32", "float": "float32", "half": "float16", "double": "float64", "long": "int64", "short": "int16",
    "fp32": "float32", "fp16": "float16", "fp64": "float64", "bf16": "bfloat16", "f32": "float32", "f16": "float16",
    "f64": "float64", "i32": "int32", "i64": "int64", "byte": "uint8", "boolean": "bool", "char": "int8",
    "i8": "int8", "u8": "uint8",
}  # fmt: skip

PARAMETER_TYPES: dict[str, str] = {
    **dict.fromkeys(["int8", "int16", "int32", "int64", "uint8", "integer", "long", "index"], "int"),
    **dict.fromkeys(["float16", "float32", "float64", "bfloat16", "double", "number", "real"], "float"),
    **dict.fromkeys(["boolean"], "bool"),
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, or None where none is like it."""
    known = sorted(set(known))
    lower = {name.lower(): name for name in known}
    if word.lower() in lower:
        return lower[word.lower()]
    found = get_close_matches(word[:80], known, n=1, cutoff=0.6 if len(word) > 3 else 0.65)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A help text that suggests the nearest known word; empty where none is near."""
    found = nearest(word, known)
    return f"did you mean `{found}`?" if found else ""
