"""Other libraries, measured where they are installed; README.md says how to get each. None of their code is here."""

from peers import sage, vllm_flash, vllm_int4, vllm_turboquant
from turboattention.bench.baselines import DecodeBaseline, PrefillBaseline


def decode_peers() -> list[DecodeBaseline]:
    """Decode over a quantised cache, as other libraries do it. Each says why when it can't run."""
    return [
        DecodeBaseline("vLLM int4_per_token_head", vllm_int4.prepare, quantised=True),
        DecodeBaseline("vLLM turboquant_4bit_nc", vllm_turboquant.prepare, quantised=True),
    ]


def prefill_peers() -> list[PrefillBaseline]:
    """Prefill of other libraries."""
    return [
        PrefillBaseline("SageAttention 1", sage.prepare, quantised=True),
        PrefillBaseline("FlashAttention 3", vllm_flash.prepare),
        PrefillBaseline("FlashAttention 3 FP8", vllm_flash.prepare_fp8, quantised=True),
    ]
