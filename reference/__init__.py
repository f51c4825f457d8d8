"""The layer as block-sparse MoE libraries compute it: the baseline that the benchmarks measure against.

`moe.py` is the layer, stage by stage; `topology_var.py` says which blocks of its intermediate matrix exist;
`block_sparse.py` multiplies them in plain PyTorch, and `stk_moe.py` by the library `stanford-stk`. In the repository
only, not in the wheel. The oracle is another one, `triton_moe/reference.py`.
"""
