"""vLLM: a plugin that adds the backend TURBO_ATTENTION and its KV dtypes to a stock engine (docs/vllm.md).

vLLM finds `register` through the entry point ``turboattention`` of the group ``vllm.general_plugins``.
"""

from turboattention.integrations.vllm.plugin import register

__all__ = ["register"]
