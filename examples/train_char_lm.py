"""Train a small character-level GPT whose attention is `char_lm.attn`, on the English of Python's own manual.

    python examples/train_char_lm.py [--steps 240] [--seed 0] [--save FILE]

Ends with the loss beside the unigram entropy of the text, a sample, and tokens/s beside the same model on
`scaled_dot_product_attention` with a dense mask. Exit code 1 if the loss is not well below the unigram entropy.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import attn_dsl

TARGET = 0.75
"""The validation loss must end below this share of the unigram entropy."""


@dataclass(frozen=True)
class Config:
    vocabulary: int
    context: int = 256
    layers: int = 3
    heads: int = 4
    width: int = 128
    window: int = 128
    reach: int = 64


class Attend(Protocol):
    """query, key, value [B, H, S, D], table [H, reach + 1] -> [B, H, S, D]."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor: ...


def proved(config: Config) -> Attend:
    """The attention from the `.attn` file: visits the tiles that the proofs leave, holds no mask."""
    attention = attn_dsl.compile(Path(__file__).with_name("char_lm.attn"), window=config.window, reach=config.reach)
    return lambda query, key, value, table: attention(query, key, value, table=table)


def dense(config: Config) -> Attend:
    """The same attention with a dense bias and mask, as PyTorch offers it."""
    distance = torch.arange(config.context)[:, None] - torch.arange(config.context)[None, :]
    hidden = (distance < 0) | (distance >= config.window)
    index = distance.clamp(0, config.reach)

    def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        length = query.shape[2]
        bias = table[:, index[:length, :length]].masked_fill(hidden[:length, :length], -math.inf)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))

    return attend


class Block(nn.Module):
    def __init__(self, config: Config, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = config.heads, attend
        self.before, self.between = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.table = nn.Parameter(torch.zeros(config.heads, config.reach + 1))
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.before(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        seen = self.attend(query, key, value, self.table).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(seen)
        return x + self.mlp(self.between(x))


class GPT(nn.Module):
    """Positions come from the attention's bias alone; there is no position embedding."""

    def __init__(self, config: Config, attend: Attend) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.Sequential(*(Block(config, attend) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, S] -> logits [B, S, vocabulary]."""
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(tokens))))
        return logits

    def loss(self, tokens: Tensor) -> Tensor:
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Text:
    """Characters of the manual as tokens; the last tenth is held out."""

    def __init__(self) -> None:
        text = "\n".join(topics[name] for name in sorted(topics))
        self.characters = sorted(set(text))
        number = {character: i for i, character in enumerate(self.characters)}
        self.tokens = torch.tensor([number[character] for character in text])
        cut = len(self.tokens) * 9 // 10
        self.train, self.held_out = self.tokens[:cut], self.tokens[cut:]
        counts = Counter(text)
        self.unigram = -sum(n / len(text) * math.log(n / len(text)) for n in counts.values())

    def batch(self, tokens: Tensor, size: int, length: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(tokens) - length - 1, (size,), generator=generator)
        return torch.stack([tokens[s : s + length + 1] for s in starts.tolist()])


def train(model: GPT, text: Text, steps: int, batch: int, seed: int, show: Progress | None = None) -> float:
    """Train in place; the tokens a second, without the first step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.1 + 0.45 * (1 + math.cos(math.pi * i / max(1, steps))))
    )
    task = None if show is None else show.add_task("training", total=steps, loss="")
    start = time.perf_counter()
    for step in range(steps):
        if step == 1:
            start = time.perf_counter()
        loss = model.loss(text.batch(text.train, batch, model.config.context, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if show is not None and task is not None:
            show.update(task, advance=1, loss=f"loss {loss.item():.3f}")
    return (steps - 1) * batch * model.config.context / (time.perf_counter() - start)


@torch.no_grad()
def validate(model: GPT, text: Text, batches: int = 8) -> float:
    generator = torch.Generator().manual_seed(1)
    losses = [model.loss(text.batch(text.held_out, 16, model.config.context, generator)) for _ in range(batches)]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def sample(model: GPT, text: Text, length: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    tokens = text.held_out[:32][None]
    for _ in range(length):
        logits = model(tokens[:, -model.config.context :])[0, -1] / 0.7
        chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, chosen[None]], dim=1)
    return "".join(text.characters[i] for i in tokens[0, 32:].tolist())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--compare-steps", type=int, default=25, help="steps that time the dense rival")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write the trained model here")
    arguments = parser.parse_args()
    console = Console()
    text = Text()
    config = Config(len(text.characters))

    torch.manual_seed(arguments.seed)
    model = GPT(config, proved(config))
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[loss]}")
    with Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns), console=console) as progress:
        ours = train(model, text, arguments.steps, arguments.batch, arguments.seed, progress)
    loss = validate(model, text)

    torch.manual_seed(arguments.seed)
    theirs = train(GPT(config, dense(config)), text, arguments.compare_steps, arguments.batch, arguments.seed)

    console.print(f"\nsample\n{sample(model, text, 300, arguments.seed)}\n", markup=False, highlight=False)
    console.print(f"validation loss   {loss:.3f} nats a character; unigram entropy {text.unigram:.3f}")
    console.print(f"tokens a second   {ours:,.0f} with attn_dsl, {theirs:,.0f} with SDPA and a dense mask")
    if arguments.save:
        torch.save({"model": model.state_dict(), "config": config, "characters": text.characters}, arguments.save)
    if loss >= TARGET * text.unigram:
        console.print(f"the loss is not below {TARGET:.0%} of the unigram entropy", style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
