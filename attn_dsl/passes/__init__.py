"""From a checked variant to what kernels want to know of it. `pipeline` has the order.

    bake, simplify (rules, fold, ranges), unroll     the variant itself, smaller
    prove (formula, logic, project, derivation)      which tiles are empty, which full; `certificate` checks it
    verify (verify_questions, verify_z3, verify_islpy), prove_text     the same claims for solvers, and for people
    schedule (leading, monotone), summaries, runs    the tiles to visit: ranges in closed form, or claims for each tile
    specialize, separate, hoist, differentiate       the score, split by what it depends on, and its gradients
    order, order_by_data, order_grid, lengths        variants made of a variant: other orders, caches, packed sequences

Polynomials are `polynomial`'s; SymPy stands behind `symbolic`; `concrete` computes with plain numbers. Between what an
expression lies is asked in four ways: by literals alone (`ranges`), in closed form over a tile (`monotone`), as
conditions that kernels evaluate for each tile (`summaries`), and with the numbers of a call (`backend/cpu/intervals`).
"""
