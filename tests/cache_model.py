"""Random operations on a paged cache beside a model of it: a list of tokens for each sequence, and sets of pages.

python tests/cache_model.py --operations 1000000
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

from attn_dsl import CacheFullError, PagedKVCache


@dataclass
class Modelled:
    """A cache whose keys are the numbers of tokens, and whose values are their negatives."""

    cache: PagedKVCache
    tokens: dict[int, list[int]] = field(default_factory=dict)
    clock: int = 0
    refused: int = 0

    @staticmethod
    def of(pages: int, page_size: int) -> Modelled:
        return Modelled(PagedKVCache(pages, page_size, kv_heads=1, head_dim=1, dtype=torch.float32))

    def allocate(self) -> int:
        new = self.cache.allocate()
        assert new not in self.tokens
        self.tokens[new] = []
        return new

    def fork(self, sequence: int) -> int:
        free = self.cache.free_pages
        new = self.cache.fork(sequence)
        assert new not in self.tokens and self.cache.free_pages == free
        self.tokens[new] = list(self.tokens[sequence])
        return new

    def free(self, sequence: int) -> None:
        self.cache.free(sequence)
        del self.tokens[sequence]

    def trim(self, sequence: int, length: int) -> None:
        self.cache.trim(sequence, length)
        del self.tokens[sequence][length:]

    def append(self, sequences: list[int], count: int) -> None:
        """What does not fit is refused, and leaves everything as it was."""
        needed, free = self.needed(sequences, count), self.cache.free_pages
        new = torch.arange(self.clock, self.clock + len(sequences) * count, dtype=torch.float32)
        key = new.view(len(sequences), 1, count, 1)
        try:
            step = self.cache.append(sequences, key, -key)
        except CacheFullError as error:
            assert needed > free and f"need {needed} pages" in str(error) and f"{free} of" in str(error)
            self.refused += 1
            self.check_counts()
            return
        assert needed <= free and self.cache.free_pages == free - needed
        for row, sequence in zip(new.view(len(sequences), count).tolist(), sequences, strict=True):
            self.tokens[sequence] += [int(x) for x in row]
        self.clock = (self.clock + len(sequences) * count) % 2**23
        assert step.kv_len.tolist() == [len(self.tokens[s]) for s in sequences]
        for sequence in sequences:
            self.check(sequence)

    def needed(self, sequences: list[int], count: int) -> int:
        """Pages that an append takes: those past the ends, and a copy of each shared page that it writes to."""
        size, owners, needed = self.cache.page_size, self.owners(), 0
        for sequence in sequences:
            length, table = len(self.tokens[sequence]), self.cache.pages_of(sequence)
            needed += -(-(length + count) // size) - len(table)
            if count and length % size and owners[table[-1]] > 1:
                owners[table[-1]] -= 1
                needed += 1
        return needed

    def owners(self) -> Counter[int]:
        return Counter(page for s in self.tokens for page in self.cache.pages_of(s))

    def check(self, sequence: int) -> None:
        """The cache holds the tokens of the sequence."""
        tokens, size = self.tokens[sequence], self.cache.page_size
        pages = torch.tensor(self.cache.pages_of(sequence), dtype=torch.int64)
        assert len(pages) == -(-len(tokens) // size)
        for pool, sign in ((self.cache.key, 1), (self.cache.value, -1)):
            found = pool[0, pages, 0, :, 0].flatten()[: len(tokens)] * sign
            assert torch.equal(found, torch.tensor(tokens, dtype=torch.float32)), f"sequence {sequence}"

    def check_counts(self) -> None:
        """A page belongs to nobody or to sequences of the model; none is lost."""
        assert self.cache.sequences == tuple(self.tokens)
        assert self.cache.free_pages + len(self.owners()) == self.cache.key.shape[1]
        for sequence, tokens in self.tokens.items():
            assert self.cache.length(sequence) == len(tokens)

    def check_all(self) -> None:
        self.check_counts()
        for sequence in self.tokens:
            self.check(sequence)

    def random_step(self, choose: random.Random) -> None:
        known = list(self.tokens)
        match choose.choices(("append", "fork", "trim", "free", "allocate"), (60, 12, 8, 12, 8))[0]:
            case "append" if known:
                several = choose.sample(known, min(len(known), choose.randint(1, 3)))
                self.append(several, choose.choice((1, 1, 1, 1, 5, 30)))
            case "fork" if known and len(known) < 24:
                self.fork(choose.choice(known))
            case "trim" if known:
                sequence = choose.choice(known)
                self.trim(sequence, choose.randint(0, len(self.tokens[sequence])))
            case "free" if known:
                self.free(choose.choice(known))
            case _ if len(known) < 24:
                self.allocate()
            case _:
                self.free(choose.choice(known))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--pages", type=int, default=60)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model, choose, start = Modelled.of(chosen.pages, chosen.page_size), random.Random(chosen.seed), time.perf_counter()
    for number in range(chosen.operations):
        model.random_step(choose)
        if number % 100_000 == 0:
            print(f"{number:,} operations, {time.perf_counter() - start:.0f} s", flush=True)
    model.check_all()
    for sequence in list(model.tokens):
        model.free(sequence)
    model.check_counts()
    print(f"{chosen.operations:,} operations, {model.refused:,} refused for want of pages; every page is free again")


if __name__ == "__main__":
    main()
