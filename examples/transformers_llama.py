"""A Llama of Hugging Face's transformers whose attention is a `.attn` text, through the library's own registry.

    pip install 'attn-dsl[transformers]'
    python examples/transformers_llama.py
    python examples/transformers_llama.py --device cuda --dtype bfloat16 --layers 16 --width 2048

The weights are random, the configuration is a Llama's: grouped heads, rotary positions, a batch of prompts of different
lengths, padded on the left. Generates with `sdpa` and with `attn_dsl`, then compares the texts, and the logits for one
of them. Exits with 1 unless they are the same within what the dtype rounds away.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

import attn_dsl

TEXT = """# A causal decoder over a batch of prompts that are padded on the left.
#   begin: position of the first real token of each
attention llama
tensor begin: int32[B]

mask = begin[b] <= k <= q
"""
ATTENTION = attn_dsl.compile(TEXT)


def first_tokens(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, attention_mask: Tensor | None = None, **more: Any
) -> Tensor:
    """What transformers hands to each layer as its mask: here where the tokens of each prompt begin, int32 [B]."""
    if more.get("local_size") is not None or int(q_offset) + q_length != kv_length:
        raise ValueError("this example takes causal models whose cache grows with the text (DynamicCache)")
    if attention_mask is None:
        return torch.zeros(batch_size, dtype=torch.int32, device=more.get("device"))
    real = attention_mask[:, -kv_length:].to(torch.int32)
    if (real.diff(dim=1).abs().sum(1) > 1 + (real[:, -1] == 0)).any():
        raise ValueError("expected padding at the ends of the prompts only")
    return real.argmax(1).to(torch.int32)


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, begin: Tensor, scaling: float | None = None,
    dropout: float = 0.0, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of a layer: query [B, H, Q, D], key and value [B, HK, KV, D] -> [B, Q, H, D]."""
    if dropout > 0.0:
        raise ValueError("attn_dsl has no dropout")
    out = ATTENTION(query, key, value, scale=scaling, q_offset=key.shape[2] - query.shape[2], begin=begin)
    return out.transpose(1, 2), None


AttentionInterface.register("attn_dsl", attend)
AttentionMaskInterface.register("attn_dsl", first_tokens)


def main() -> int:
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    config = LlamaConfig(
        vocab_size=1000, hidden_size=arguments.width, intermediate_size=2 * arguments.width,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    lengths = torch.arange(arguments.batch) * 7 % arguments.prompt + 1
    lengths[0] = arguments.prompt
    real = torch.arange(arguments.prompt) >= arguments.prompt - lengths[:, None]
    prompts = torch.where(real, torch.randint(2, 1000, real.shape), 0).to(device)
    real = real.long().to(device)

    texts: dict[str, Tensor] = {}
    logits: dict[str, Tensor] = {}
    for name in ("sdpa", "attn_dsl"):
        model.set_attn_implementation(name)
        options = {"attention_mask": real, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        model.generate(prompts, max_new_tokens=2, **options)
        start = time.perf_counter()
        texts[name] = model.generate(prompts, max_new_tokens=arguments.tokens, **options)
        elapsed = time.perf_counter() - start
        print(f"{name:8} {arguments.batch * arguments.tokens / elapsed:8,.0f} tokens/s")
        whole = torch.cat([real, real.new_ones(arguments.batch, arguments.tokens)], dim=1)
        with torch.no_grad():
            found = model(texts["sdpa"], attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp(min=0))
        logits[name] = found.logits.float()[:, arguments.prompt - 1 :]

    error = (logits["sdpa"] - logits["attn_dsl"]).abs().max().item()
    allowed = 32 * torch.finfo(dtype).eps * logits["sdpa"].abs().max().item()
    changed = texts["sdpa"] != texts["attn_dsl"]
    # Where a text leaves the other's, the other's logits must leave the choice open.
    first = changed.int().argmax(1)[changed.any(1)] - arguments.prompt
    top = logits["sdpa"][changed.any(1)].topk(2, dim=2).values[torch.arange(len(first), device=device), first]
    gaps = (top[:, 0] - top[:, 1]).tolist()
    print(f"logits   differ by {error:.2g} at most, {allowed:.2g} are allowed in {arguments.dtype}")
    print(f"texts    {arguments.batch - len(gaps)} of {arguments.batch} are the same")
    if gaps:
        print(f"         the others part where the best two logits are {max(gaps):.2g} apart at most")
    return 0 if error <= allowed and all(gap <= 2 * allowed for gap in gaps) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("batch", 6, "prompts"),
        ("prompt", 30, "tokens of the longest prompt"),
        ("tokens", 40, "tokens to generate"),
        ("width", 256, "channels"),
        ("layers", 3, "layers"),
        ("heads", 8, "query heads"),
        ("kv-heads", 2, "key/value heads"),
        ("threads", 2, "threads"),
        ("seed", 0, "seed of weights and prompts"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
