"""Numerics alone: formats, codes, packing and page layout, in plain PyTorch. Knows nothing of attention."""
