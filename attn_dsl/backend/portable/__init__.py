"""Attention for any GPU that Triton serves: forward and backward kernels in `triton.language`.

The kernels (`forward.py`, `backward.py`) are ordinary modules, written once. What belongs to a variant reaches them as
arguments: the functions that `emit.py` writes (score, mask, ranges, gradients), and tuples of scalars and of tensors.

    forward, backward, decode     attention; `device` has what kernels and emitted functions call
    classify, permute, sort       tiles that are visited, and rows and positions in another order
    emit, emit_lists, algebra, bounds, width, load     a variant's own functions
    launch, launch_decode, launch_permute, launch_sort, listing, tiles, host     launches
    run, start, tape              what becomes of a launch: compiled elsewhere, started, played again
    standalone, alone             files that need torch and triton alone
"""
