"""What a model costs: FLOPs, bytes and memory of a decode step or a prompt, by formula; nothing is run.

Shazeer's count for multi-query attention ("Fast Transformer Decoding", 2019, arXiv:1911.02150), extended by grouped
heads, sliding windows, the MLP and an index. With b texts, n new tokens each (1, or the prompt's T), T rows per store,
hidden size d, MLP width f, H query heads on G KV heads of dimension D, and E bytes a number, per layer:

    projections    FLOPs 2bn(2dHD + 2dGD)    bytes E(2dHD + 2dGD) + Ebn(inputs + outputs of each matrix)
    MLP            FLOPs 2bn(3df)            bytes likewise; 2df without a gate
    scores         FLOPs 2bHD pairs          bytes EbGTD (keys) + EbnHD (queries)
    values         FLOPs 2bHD pairs          bytes EbGTD (values) + EbnHD (outputs)
    index          FLOPs 2D a summary or key scored, and head;   bytes of what is scored
    tail           FLOPs 2D a summary that answers, and head;    bytes of its mean value

``pairs`` are (query, row) pairs that see each other: T in a decode step, T(T + 1) / 2 in a prompt, fewer in a window.
Under an index T is the rows that the plan reads, which ``usage`` estimates as it does for the planner. Logits are no
bytes: a fused kernel never stores them, so Shazeer's term bHnT is gone. Softmax, norms, rotary angles and the look-up
of embeddings are vectors' work and left out; so are further rungs that ``max_error`` may climb.
"""

from .crossovers import Crossovers
from .model import Cost, LayerCost, Memory, model_cost
from .operators import Operator
from .shape import ModelShape

__all__ = ["Cost", "Crossovers", "LayerCost", "Memory", "ModelShape", "Operator", "model_cost"]
