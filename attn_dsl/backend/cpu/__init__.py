"""Attention on the CPU in torch operations: a running softmax over tiles that stay in the cache.

functions, margin, relative    a variant's own functions: masks as integers, what depends on `q - k` alone
problem, shapes, pieces        a call, its tile shape, the keys that each row of tiles visits
claims, intervals              tiles that the numbers of a call prove empty or full
tiles, forward, backward       the loops
attention, backend, pages      the two passes, what is said of them, caches in pages
workers, scratch, elementary, total     threads, buffers, arithmetic
"""
