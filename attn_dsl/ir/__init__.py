"""The expression graph of a variant, which all other parts share.

nodes, types, variant     what there is; equality is identity
evaluate                  what it means: dense attention in float64, the definition of truth
printer, parser, infix    its text, read back, and its spelling in messages
check                     the laws that hold after every pass
"""
