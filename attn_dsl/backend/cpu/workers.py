"""Tiles over threads: each thread works through tiles of its own with single-threaded operations.

torch would split every operation over the threads and wait for all of them before the next one, thousands of times a
second. Tiles need no such waiting, keep to the cache of one core, and do not stall when another process takes a core.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def operations_on(threads: int) -> Iterator[None]:
    """Let each torch operation use so many threads; the matrix library's setting holds for all callers meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spread(work: Callable[[Iterator[T]], None], items: Iterator[T], threads: int) -> None:
    """Run `work(items)` on several threads that share the items, each item once. Raises what a worker raises.

    To be called where operations are on one thread.
    """
    shared = _Shared(items)
    futures = [_pool(threads).submit(_quiet, work, shared) for _ in range(threads - 1)]
    try:
        work(shared)
    finally:
        shared.stop()
        errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


class _Shared(Iterator[T]):
    """An iterator that several threads draw from."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._lock = threading.Lock()
        self._stopped = False

    def __next__(self) -> T:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._items)

    def stop(self) -> None:
        """Hand out nothing more: one worker has failed, or there is nothing left."""
        with self._lock:
            self._stopped = True


def _quiet(work: Callable[[Iterator[T]], None], items: Iterator[T]) -> None:
    with torch.no_grad():
        work(items)


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "attn_dsl", initializer=torch.set_num_threads, initargs=(1,))
