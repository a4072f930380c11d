"""Train a small GPT on real text with attn_dsl's attention and with PyTorch's, and compare the curves of their losses.

    python benchmarks/train.py                     200 steps on a GPU, bfloat16 autocast
    python benchmarks/train.py --variant alibi     with learned slopes, beside a dense bias
    python benchmarks/train.py --steps 5 --width 64 --length 64 --batch 2 --device cpu

The text is that of the Python standard library, byte by byte. All runs begin with the same weights and see the same
batches, so that their curves differ by rounding alone. How much rounding moves a curve, the backends of PyTorch's own
attention say: the largest difference of two of them at any step is the noise. Exits with 1 if attn_dsl's curve is
farther from theirs than `--allowed` times the noise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn_dsl

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From query, key, value [B, H, S, D] and slopes [H]."""
HEADS = 6


class Block(nn.Module):
    def __init__(self, width: int, attend: Attend, learned: bool) -> None:
        super().__init__()
        self.attend = attend
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        slopes = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS)
        self.slopes = nn.Parameter(slopes, requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.before(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = self.attend(parts[0], parts[1], parts[2], self.slopes)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.wide(self.between(x))


class Model(nn.Module):
    """A GPT over bytes."""

    def __init__(self, width: int, layers: int, length: int, attend: Attend, learned: bool) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, attend, learned) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.places.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def ours(variant: str) -> Attend:
    attention = attn_dsl.compile(variant)

    def attend(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        return attention(query, key, value, **({"slope": slopes} if variant == "alibi" else {}))

    return attend


def torchs(variant: str, backend: SDPBackend) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        bias = None
        if variant == "alibi":
            place = torch.arange(query.shape[2], device=query.device)
            distance = place[None, :] - place[:, None]
            bias = (slopes[:, None, None] * distance).masked_fill(distance > 0, -torch.inf).to(query.dtype)[None]
        with sdpa_kernel(backend):
            plain = {"is_causal": True} if bias is None else {"attn_mask": bias}
            return functional.scaled_dot_product_attention(query, key, value, **plain)

    return attend


@functools.cache
def corpus() -> Tensor:
    """Some megabytes of Python source text."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def losses(attend: Attend, options: argparse.Namespace) -> list[float]:
    """The loss of each step."""
    torch.manual_seed(0)
    learned = options.variant == "alibi"
    model = Model(options.width, options.layers, options.length, attend, learned).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    draw, text, found = torch.Generator().manual_seed(1), corpus(), list[Tensor]()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * min(1.0, (step + 1) / 20)
        first = torch.randint(len(text) - options.length - 1, (options.batch, 1), generator=draw)
        batch = text[first + torch.arange(options.length + 1)].to(options.device)
        with torch.autocast(options.device, torch.bfloat16):
            guess = model(batch[:, :-1])
        loss = functional.cross_entropy(guess.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=("causal", "alibi"), default="causal")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--allowed", type=float, default=2.0)
    options = parser.parse_args()
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
                "dense": SDPBackend.MATH}  # fmt: skip
    curves = dict[str, list[float]]()
    for name, backend in backends.items():
        with contextlib.suppress(RuntimeError):  # one that does not take the bias, or the device, is left out
            curves[name] = losses(torchs(options.variant, backend), options)
    curve = torch.tensor(losses(ours(options.variant), options))
    theirs = torch.tensor([*curves.values()])
    noise = (theirs.amax(0) - theirs.amin(0)).max().item()
    distance = (curve - theirs).abs().amax(1).min().item()
    at = sorted({0, *range(49, options.steps, 50), options.steps - 1})
    print(json.dumps({
        "variant": options.variant, "steps": [step + 1 for step in at], "noise": round(noise, 4),
        "distance": round(distance, 4), "attn_dsl": [round(curve[step].item(), 4) for step in at],
        **{name: [round(found[step], 4) for step in at] for name, found in curves.items()},
        "last 20": {"attn_dsl": round(curve[-20:].mean().item(), 4),
                    **{name: round(sum(found[-20:]) / len(found[-20:]), 4) for name, found in curves.items()}},
    }))  # fmt: skip
    return int(len(curves) > 1 and distance > options.allowed * noise)


if __name__ == "__main__":
    sys.exit(main())
