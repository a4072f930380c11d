"""From the IR and a call to results. A call takes this way:

    binding, validate              arguments to a checked call; whatever can be wrong is found here
    operators, transforms          what PyTorch is told: autograd, torch.compile, torch.func
    select, execute                where it runs, and both passes as plain functions of tensors
    order, layouts, sorting        another order of positions, where one makes the mask dense
    cpu/, or gpu: portable/, hopper/     the kernels
    replay, replay_order           calls like one before: only addresses change

Beside it stand

    printer, python_dialect, torch_dialect, triton_dialect     IR to source text
    tile_kinds, kept, schedules, work     tiles by what tensors hold: found, kept, held by the caller, spread over a GPU
    packed, paged, merge           sequences one behind the other, a cache in pages, parts of the keys joined
    build, tuning, cache, cache_triton, cache_report     kernels ahead of time, tile shapes by search, and the disk
    cost, counts, picture          a call for people
"""
