"""LoRA files of every trainer, as changes to the weights of our networks (arXiv 2106.09685, and what followed it).

A family says how other programs name its modules (`Names`); everything else is the same for all families: which
spelling a file uses, how it scales, and the weight change that each kind of adapter stands for.

    lora   W + s up @ down                            s = alpha / rank; rsLoRA (arXiv 2312.03732): alpha / sqrt(rank)
    dora   m (W + s up @ down) / |W + s up @ down|    m and the length per output or per input (arXiv 2402.09353)
    loha   W + s (w1_a @ w1_b) * (w2_a @ w2_b)        (arXiv 2108.06098)
    lokr   W + s kron(w1, w2)                         w1 and w2 whole, or each a product (LyCORIS, arXiv 2309.14859)
    oft    R^T W, in blocks of rows                   R = (I + Q) / (I - Q), Q = B - B^T (OFT, arXiv 2306.07280)
    diff   W + s diff
"""
from __future__ import annotations

from .adapter import Layer, Lora, Names, Target, names_of, rank_of, size_of
from .reading import METADATA_KEY, bare, beside, family_of, is_lora, own_layers, read, sizes, spelled
from .weights import delta, turn
from .writing import FORMATS, write, write_own

__all__ = ["FORMATS", "METADATA_KEY", "Layer", "Lora", "Names", "Target", "bare", "beside", "delta", "family_of",
           "is_lora", "names_of", "own_layers", "rank_of", "read", "size_of", "sizes", "spelled", "turn", "write",
           "write_own"]
