"""What the plugin does, said once at the start of each worker."""

import logging
from dataclasses import dataclass, field

from turboattention.integrations.vllm.pool import OpenPages
from turboattention.policy import Policy
from turboattention.quant.layout import PageLayout

log = logging.getLogger("vllm.turboattention")  # a child of vLLM's logger, so that it appears in its log


@dataclass
class Started:
    """Layers of this process that have been set up so far."""

    layers: int = 0
    pool_bytes: int = 0
    policies: set[str] = field(default_factory=set)


started = Started()


def note_layer(policy: Policy, layout: PageLayout, pages: OpenPages, kv_heads: int) -> None:
    """Count a compressed layer; the first of a policy is described."""
    started.layers += 1
    started.pool_bytes += pages.nbytes
    if policy.name in started.policies:
        return
    started.policies.add(policy.name)
    tokens = layout.page_size
    exact = 2 * layout.head_dim * 2 * tokens
    log.info(
        "TurboAttention: policy %s, %.1f bytes a token and KV head (16 bits: %d, %.2fx as many tokens); "
        "open pages of a layer: %.1f MiB for %d rows",
        policy.name, layout.nbytes / tokens, exact // tokens, exact / layout.nbytes, pages.nbytes / 2**20,
        pages.key.shape[0],
    )  # fmt: skip
