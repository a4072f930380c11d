"""Attention for Hopper GPUs (sm_90a): warp-specialized kernels in Gluon.

The kernels are ordinary modules, written once. What belongs to a variant reaches them as arguments, as in the portable
backend: the functions that `emit.py` writes, and tuples of scalars and of tensors. Where a call does not fit these
kernels (float32, 64-bit positions, addresses that the bulk copy engine does not take), `launch.py` says why.

    forward, backward, backward_rows, backward_boxes     kernels
    channels, device, versions     what these are made of
    emit, emit_backward, emit_shares, bounds     a variant's own functions
    launch, launch_backward, launch_boxes        launches
    configs, configs_backward, check     tile shapes, and whether a kernel that was compiled is worth a launch
"""
