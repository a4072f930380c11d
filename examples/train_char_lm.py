"""Train a small character-level GPT, its attention from a `.attn` file, on English text that comes with Python.

    python examples/train_char_lm.py

The text is `pydoc_data.topics`, the language reference. Positions enter by the attention alone: a causal sliding
window, a learned bias for each distance and a learned sink for each head, see `sink_window.attn`. Afterwards the same
model runs on scaled_dot_product_attention with a dense mask, for its speed and to see that it computes the same. Exits
with 1 if the loss misses its target.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads sleep while they wait: a busy neighbour costs less

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import attn_dsl

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(query, key, value [B, H, S, D], bias [H, window], sinks [H]) -> [B, H, S, D]`"""


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_forward = nn.RMSNorm(width), nn.RMSNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.forward_layer = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        # ALiBi's slopes to begin with; the table is free to leave them.
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
        self.bias = nn.Parameter(-slopes[:, None] * torch.arange(window))
        self.sinks = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        batch, length, width = x.shape
        projected = self.project(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        mixed = attend(query, key, value, self.bias, self.sinks)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.forward_layer(self.norm_forward(x))


class CharacterModel(nn.Module):
    def __init__(self, characters: int, width: int, heads: int, layers: int, window: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.blocks = nn.ModuleList(Block(width, heads, window) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, characters, bias=False)

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, attend)
        return self.head(self.norm(x))


def dense_attention(length: int, window: int) -> Attend:
    """The same attention on SDPA: bias and mask as one matrix [H, S, S + 1], the sink as a key of its own."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    keep = (distance >= 0) & (distance < window)

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
        logits = torch.where(keep, bias[:, distance.clamp(0, window - 1)], -math.inf)
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, length, 1)], dim=-1)
        nothing = key.new_zeros(*key.shape[:2], 1, key.shape[3])
        key, value = torch.cat([key, nothing], dim=2), torch.cat([value, nothing], dim=2)
        return scaled_dot_product_attention(query, key, value, attn_mask=logits)

    return attend


def main() -> int:
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    console = Console()
    alphabet, data = english_characters()
    unigram = unigram_entropy(data)
    target = arguments.target * unigram
    console.print(f"text      {len(data):,} characters of pydoc_data.topics, {len(alphabet)} different")

    attention = attn_dsl.compile(Path(__file__).with_name("sink_window.attn"), window=arguments.window)

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
        return attention(query, key, value, bias=bias, sinks=sinks)

    model = CharacterModel(len(alphabet), arguments.width, arguments.heads, arguments.layers, arguments.window)
    console.print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters, {attention}")
    dim = arguments.width // arguments.heads
    cost = attention.cost(arguments.batch, arguments.heads, arguments.length, arguments.length, dim)
    console.print(f"attention {100 * cost.visited / cost.pairs:.1f}% of the pairs are visited, the rest proved masked")

    rate, loss = train(model, attend, data, arguments, console, unigram)
    console.rule("sample")
    console.print(sample(model, attend, alphabet, arguments), highlight=False, markup=False)
    console.rule()
    compare(model, attend, data, arguments, console, rate)
    console.print(
        f"\nloss      {loss:.3f} nats a character; unigram entropy {unigram:.3f}, target {target:.3f}: "
        + ("reached" if loss <= target else "MISSED")
    )
    return 0 if loss <= target else 1


def english_characters() -> tuple[list[str], Tensor]:
    """The characters that a text in English has, and the text as their numbers."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    return alphabet, torch.tensor([number[character] for character in text])


def unigram_entropy(data: Tensor) -> float:
    """Entropy of the characters' frequencies, in nats: the loss of a model that knows nothing of context."""
    frequency = torch.bincount(data).double() / len(data)
    frequency = frequency[frequency > 0]
    return -(frequency * frequency.log()).sum().item()


def train(
    model: CharacterModel, attend: Attend, data: Tensor, arguments: argparse.Namespace, console: Console, unigram: float
) -> tuple[float, float]:
    """Tokens a second, and the mean loss over the batches of the last tenth of the steps, each before its update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, betas=(0.9, 0.95), fused=True)
    make = torch.Generator().manual_seed(arguments.seed)
    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=arguments.steps)
        for step in range(arguments.steps):
            warm = min(1.0, (step + 1) / 20)
            decay = 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
            for group in optimizer.param_groups:
                group["lr"] = arguments.rate * warm * (0.1 + 0.9 * decay)
            loss = _loss(model, attend, _batch(data, arguments, make))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            recent = sum(losses[-20:]) / len(losses[-20:])
            progress.update(task, advance=1, description=f"training  loss {recent:.3f} (unigram {unigram:.3f})")
    elapsed = time.perf_counter() - start
    tail = losses[-max(arguments.steps // 10, 1) :]
    return arguments.steps * arguments.batch * arguments.length / elapsed, sum(tail) / len(tail)


def compare(
    model: CharacterModel, attend: Attend, data: Tensor, arguments: argparse.Namespace, console: Console, rate: float
) -> None:
    """Train-step speed of both attentions on the same batches, in turn, and how far their losses are apart."""
    make = torch.Generator().manual_seed(arguments.seed + 1)
    rivals = {"attn_dsl": attend, "SDPA, dense mask": dense_attention(arguments.length, arguments.window)}
    seconds = dict.fromkeys(rivals, 0.0)
    losses: dict[str, float] = {}
    for step in range(arguments.compare_steps + 1):
        batch = _batch(data, arguments, make)
        for name, attention in rivals.items():
            start = time.perf_counter()
            loss = _loss(model, attention, batch)
            loss.backward()
            seconds[name] += (time.perf_counter() - start) if step else 0.0  # the first one warms up
            losses[name] = loss.item()
            model.zero_grad(set_to_none=True)
    for name, spent in seconds.items():
        tokens = arguments.compare_steps * arguments.batch * arguments.length / max(spent, 1e-9)
        console.print(f"speed     {tokens:8,.0f} tokens/s forward and backward, {name}; loss {losses[name]:.5f}")
    console.print(f"          {rate:8,.0f} tokens/s while training, optimizer included")


@torch.no_grad()
def sample(model: CharacterModel, attend: Attend, alphabet: list[str], arguments: argparse.Namespace) -> str:
    """Text drawn from the model, one character after the other."""
    make = torch.Generator().manual_seed(arguments.seed)
    tokens = torch.tensor([[alphabet.index(c) for c in "The "]])
    for _ in range(arguments.sample):
        context = tokens[:, -arguments.layers * arguments.window :]
        logits = model(context, attend)[:, -1] / 0.8
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=make)], dim=1)
    return "".join(alphabet[i] for i in tokens[0].tolist())


def _batch(data: Tensor, arguments: argparse.Namespace, make: torch.Generator) -> Tensor:
    """Random pieces of the text, `[batch, length + 1]`."""
    starts = torch.randint(0, len(data) - arguments.length - 1, (arguments.batch,), generator=make)
    return data[starts[:, None] + torch.arange(arguments.length + 1)]


def _loss(model: CharacterModel, attend: Attend, batch: Tensor) -> Tensor:
    return cross_entropy(model(batch[:, :-1], attend).flatten(0, 1), batch[:, 1:].flatten())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("steps", 220, "training steps"),
        ("batch", 2, "pieces of text in a step"),
        ("length", 1024, "characters of a piece"),
        ("window", 64, "visible keys"),
        ("width", 128, "channels"),
        ("heads", 4, "attention heads"),
        ("layers", 3, "blocks"),
        ("sample", 300, "characters to sample"),
        ("compare-steps", 10, "steps to compare the speed over"),
        ("threads", min(2, os.cpu_count() or 1), "threads"),
        ("seed", 0, "seed of weights and batches"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate (default: %(default)s)")
    parser.add_argument(
        "--target",
        type=float,
        default=0.75,
        help="largest loss, as a part of the unigram entropy (default: %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
