"""Serve the small GPT of `train_char_lm.py` with continuous batching over a paged cache.

    python examples/serve_lm.py
    python examples/serve_lm.py --device cuda --requests 64 --batch 32 --pages 400

The model, and the `.attn` file of its attention, are those that were trained. Requests share the pages of one preamble;
their prompts enter in chunks, and each step decodes one token of all that run. Where the pages run out, the youngest
request gives up its own and starts again later. Afterwards the unbatched model, without a cache, is asked for every
token that was served. Exits with 1 unless it would have chosen the same.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads sleep while they wait: a busy neighbour costs less

import torch
from rich.console import Console
from torch import Tensor
from train_char_lm import Attend, CharacterModel, english_characters, train, unigram_entropy

import attn_dsl
from attn_dsl.backend.paged import Step

PREAMBLE = "The Python Language Reference. "


@dataclass
class Request:
    """What is asked for, and what was answered. `noise` [tokens, characters] makes the choice among characters."""

    number: int
    prompt: list[int]
    noise: Tensor
    answer: list[int] = field(default_factory=list)
    sequence: int | None = None

    @property
    def text(self) -> list[int]:
        """What the model has been told so far, behind the preamble."""
        return self.prompt + self.answer

    def choose(self, logits: Tensor) -> None:
        """Take the next character: the largest of the logits with Gumbel noise, which samples the softmax."""
        self.answer.append(int((logits + self.noise[len(self.answer)]).argmax()))

    @property
    def done(self) -> bool:
        return len(self.answer) == len(self.noise)


class Server:
    """Runs as many requests at a time as the batch and the pages allow."""

    def __init__(
        self,
        model: CharacterModel,
        attention: attn_dsl.Attention,
        preamble: list[int],
        arguments: argparse.Namespace,
    ) -> None:
        self.model, self.attention, self.batch, self.chunk = model, attention, arguments.batch, arguments.chunk
        self.device = torch.device(arguments.device)
        heads, layers = model.blocks[0].heads, len(model.blocks)
        self.cache = attn_dsl.PagedKVCache(
            arguments.pages, arguments.page_size, heads, arguments.width // heads, layers=layers, dtype=torch.float32,
            device=self.device,
        )  # fmt: skip
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.restarts = self.steps = 0
        self.preamble = self.cache.allocate()
        self.feed([self.preamble], [preamble])

    @torch.no_grad()
    def feed(self, sequences: list[int], tokens: list[list[int]]) -> Tensor:
        """Take the next tokens of some sequences, as many of each; the logits behind the last, `[B, characters]`."""
        step = self.cache.extend(sequences, len(tokens[0]))
        return self.model(torch.tensor(tokens, device=self.device), self.through(step))[:, -1].cpu()

    def through(self, step: Step) -> Attend:
        """Attention of each layer in turn, through the cache."""
        layers = itertools.count()

        def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
            layer = next(layers)
            step.write(key, value, layer)
            return self.attention(query, **step.layer(layer), bias=bias, sinks=sinks)

        return attend

    def serve(self, requests: list[Request]) -> None:
        self.waiting.extend(requests)
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.batch:
                if not self.start(self.waiting[0]):
                    break
                self.running.append(self.waiting.popleft())
                self.finish()
            if self.running:
                self.decode()
            self.finish()

    def start(self, request: Request) -> bool:
        """Let the prompt, and what was answered before the request gave up its pages, enter the cache in chunks."""
        sequence = self.cache.fork(self.preamble)
        try:
            for first in range(0, len(request.text), self.chunk):
                logits = self.feed([sequence], [request.text[first : first + self.chunk]])
        except attn_dsl.CacheFullError as error:
            self.cache.free(sequence)
            if not self.running:
                sys.exit(f"request {request.number} does not fit alone: {error}")
            return False
        request.sequence = sequence
        request.choose(logits[0])
        return True

    def decode(self) -> None:
        """One more token of every request that runs."""
        while True:
            sequences = [request.sequence for request in self.running if request.sequence is not None]
            try:
                logits = self.feed(sequences, [request.answer[-1:] for request in self.running])
                break
            except attn_dsl.CacheFullError as error:
                if len(self.running) == 1:
                    sys.exit(f"request {self.running[0].number} does not fit alone: {error}")
                self.release(youngest := self.running.pop())
                self.waiting.appendleft(youngest)
                self.restarts += 1
        for request, row in zip(self.running, logits, strict=True):
            request.choose(row)
        self.steps += 1

    def finish(self) -> None:
        for request in self.running:
            if request.done:
                self.release(request)
        self.running = [request for request in self.running if request.sequence is not None]

    def release(self, request: Request) -> None:
        assert request.sequence is not None
        self.cache.free(request.sequence)
        request.sequence = None


@torch.no_grad()
def agrees(model: CharacterModel, attend: Attend, preamble: list[int], request: Request) -> bool:
    """Whether the unbatched model, told what was served so far, chooses each token that was served next."""
    tokens = torch.tensor([preamble + request.text], device=model.embed.weight.device)
    logits = model(tokens, attend)[0, -len(request.answer) - 1 : -1].cpu()
    return (logits + request.noise).argmax(1).tolist() == request.answer


def main() -> int:
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    console = Console()
    alphabet, data = english_characters()
    attention = attn_dsl.compile(Path(__file__).with_name("sink_window.attn"), window=arguments.window)

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
        return attention(query, key, value, bias=bias, sinks=sinks)

    model = CharacterModel(len(alphabet), arguments.width, arguments.heads, arguments.layers, arguments.window)
    _, loss = train(model, attend, data, arguments, console, unigram_entropy(data))
    console.print(f"model     loss {loss:.3f} after {arguments.steps} steps, {attention}")
    model = model.to(arguments.device).eval()

    preamble = [alphabet.index(character) for character in PREAMBLE]
    requests = list(_requests(data, len(alphabet), arguments))
    server = Server(model, attention, preamble, arguments)
    start = time.perf_counter()
    server.serve(requests)
    elapsed = time.perf_counter() - start
    answered = sum(len(request.answer) for request in requests)
    told = sum(len(request.prompt) for request in requests)
    console.print(
        f"served    {len(requests)} requests on {arguments.device}, {told} tokens told and {answered} answered in "
        f"{server.steps} steps, {server.restarts} restarts: {answered / elapsed:,.0f} tokens/s"
    )
    console.rule("an answer")
    console.print("".join(alphabet[i] for i in requests[0].text), highlight=False, markup=False)
    console.rule()
    server.cache.free(server.preamble)
    kept = arguments.pages - server.cache.free_pages
    same = sum(agrees(model, attend, preamble, request) for request in requests)
    console.print(f"unbatched {same} of {len(requests)} answers are the same; {kept} pages are left behind")
    return 0 if same == len(requests) and kept == 0 else 1


def _requests(data: Tensor, characters: int, arguments: argparse.Namespace) -> list[Request]:
    """Pieces of the text as prompts, of lengths by chance, with answers of other lengths."""
    make = torch.Generator().manual_seed(arguments.seed + 1)

    def chance(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=make))

    found = []
    for i in range(arguments.requests):
        first = chance(0, len(data) - 500)
        prompt = data[first : first + chance(1, arguments.prompt)].tolist()
        uniform = torch.rand(chance(1, arguments.answer), characters, generator=make)
        found.append(Request(i, prompt, -(-uniform.clamp(min=1e-30).log()).log() * 0.8))
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("requests", 16, "requests"),
        ("prompt", 150, "the longest prompt, in characters"),
        ("answer", 120, "the longest answer, in characters"),
        ("batch", 8, "requests that run at a time"),
        ("chunk", 64, "tokens of a prompt that enter at a time"),
        ("pages", 60, "pages of the cache"),
        ("page-size", 16, "tokens of a page"),
        ("steps", 60, "training steps"),
        ("length", 512, "characters of a piece of training text"),
        ("window", 64, "visible keys"),
        ("width", 128, "channels"),
        ("heads", 4, "attention heads"),
        ("layers", 3, "blocks"),
        ("threads", 2, "threads"),
        ("seed", 0, "seed of weights, batches and requests"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
