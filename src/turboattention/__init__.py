"""TurboAttention: attention straight from a 4-, 3- or 2-bit key/value cache.

Implements and extends arXiv 2412.08585. Importing this package needs torch alone and changes nothing; transformers is
imported when one of the names that need it is used.
"""

from typing import TYPE_CHECKING, Any

from turboattention.config import AttentionConfig, CacheConfig, presets
from turboattention.errors import TurboAttentionError
from turboattention.functional import attention
from turboattention.policy import Policy

if TYPE_CHECKING:
    from turboattention.calibration.calibrate import calibrate
    from turboattention.evaluation.compare import compare
    from turboattention.integrations.transformers import TurboCache, enable

__version__ = "0.1.0"
__all__ = [
    "AttentionConfig",
    "CacheConfig",
    "Policy",
    "TurboAttentionError",
    "TurboCache",
    "attention",
    "calibrate",
    "compare",
    "enable",
    "presets",
]

_LAZY = {
    "calibrate": "turboattention.calibration.calibrate",
    "TurboCache": "turboattention.integrations.transformers",
    "enable": "turboattention.integrations.transformers",
    "compare": "turboattention.evaluation.compare",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'turboattention' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
