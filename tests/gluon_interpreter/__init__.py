"""Gluon kernels for Hopper, executed without a GPU.

Triton's interpreter knows no Gluon. This one executes a kernel's own text on numpy arrays: partitions of warps run
against each other in an order that a seed decides, what the copy engine, the tensor cores and the asynchronous copies
of threads do happens at any time between issue and wait, memory that nobody has written holds no numbers. Beside wrong
results it finds

- deadlocks, with what each partition waits for;
- races: accesses of shared memory that no barrier orders, whether or not they happened to come in a good order;
- missing fences between what a warp writes and what the copy engine or the tensor cores read;
- results of products that are used before they were waited for;
- accesses outside of the tensors that a kernel was given, and promises to the compiler that do not hold.

Not told apart: the threads of a partition, between which the compiler puts its own barriers, and the layouts of
registers, which it checks, but for the number of their warps.

    Machine(seed).run(kernel, programs, arguments, options)    # a runner, as `portable.run.launch` is
"""

from gluon_interpreter.faults import Deadlock, Fault, OutOfBounds, Race
from gluon_interpreter.machine import Machine

__all__ = ["Deadlock", "Fault", "Machine", "OutOfBounds", "Race"]
