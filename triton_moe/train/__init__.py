"""`triton-moe train`: a byte-level GPT with variable-width MoE layers, on real text."""
