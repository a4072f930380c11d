"""Attention for any GPU that Triton serves: forward and backward kernels in `triton.language`.

The kernels (`forward.py`, `backward.py`) are ordinary modules, written once. What belongs to a variant reaches them as
arguments: the functions that `emit.py` writes (score, mask, ranges, gradients), and tuples of scalars and of tensors.
"""
