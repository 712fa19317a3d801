"""Softmax in low precision: the paper's SAS and its base-2 successor. README.md holds the maths."""

from turboattention.ops.softmax.reference import (
    Base2Softmax,
    OnlineAttention,
    SasWeights,
    base2_softmax,
    exp2_poly,
    online_base2,
    sas_exp,
    sas_softmax,
    sas_weights,
    skip_threshold,
)

__all__ = [
    "Base2Softmax",
    "OnlineAttention",
    "SasWeights",
    "base2_softmax",
    "exp2_poly",
    "online_base2",
    "sas_exp",
    "sas_softmax",
    "sas_weights",
    "skip_threshold",
]
