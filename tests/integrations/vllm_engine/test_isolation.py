"""Nothing of one request reaches another: answers are the same, bit by bit, whatever was in the blocks before."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import NEEDS, random_llama, started

pytestmark = pytest.mark.slow
vllm = pytest.importorskip("vllm", reason=NEEDS)

BLOCKS = 6  # one is vLLM's own: every request takes the blocks of the one before
PROBES = (1, 63, 64, 65, 130, 200)
SECRETS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("isolation"))


def words(seed: object, count: int) -> list[int]:
    chosen = random.Random(str(seed))
    return [chosen.randrange(3, 300) for _ in range(count)]


def ask(llm: Any, prompt: list[int], new: int = 20, **more: Any) -> Any:
    parameters = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=5, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt, **more}], parameters, use_tqdm=False)
    return output


def bits(output: Any) -> list[Any]:
    """Tokens and log-probabilities as they are, with nothing rounded."""
    answer = output.outputs[0]
    steps = [sorted((token, x.logprob) for token, x in step.items()) for step in answer.logprobs]
    return [list(answer.token_ids), steps]


def pages(llm: Any) -> dict[str, Any]:
    """Bytes of the pages of every layer."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {name: layer.kv_cache for name, layer in context.items() if hasattr(layer, "kv_cache")}


def probe_after(llm: Any, before: Callable[[], None]) -> list[Any]:
    found = []
    for length in PROBES:
        before()
        found.append(bits(ask(llm, words("probe", length))))
    return found


def test_answers_do_not_depend_on_who_had_the_blocks_before(model: Path) -> None:
    """Six secrets of different lengths, each a constant token, in all blocks, open pages and rows; then the probes."""
    llm = started(
        model, "turbo4", skip_tokenizer_init=True, max_num_seqs=2, max_model_len=300, num_gpu_blocks_override=BLOCKS,
        enable_prefix_caching=False,
    )  # fmt: skip
    reference = probe_after(llm, lambda: None)
    changed = 0
    for secret in range(SECRETS):
        token, length = 3 + 40 * secret, (200, 255, 64, 127, 129, 250)[secret]
        before = {name: x.clone() for name, x in pages(llm).items()}
        ask(llm, [token] * length, 40)
        changed += any(not bool((x == before[name]).all()) for name, x in pages(llm).items())
        assert probe_after(llm, lambda token=token, length=length: ask(llm, [token] * length, 40)) == reference
    assert changed == SECRETS  # the secrets were there to be read
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == BLOCKS - 1


def test_prefix_caching_joins_equal_content_alone(model: Path) -> None:
    llm = started(
        model, "turbo4", skip_tokenizer_init=True, max_num_seqs=2, max_model_len=400, num_gpu_blocks_override=200,
        enable_prefix_caching=True,
    )  # fmt: skip
    base = words("base", 250)
    assert ask(llm, base).num_cached_tokens == 0
    # One token differs; only the whole blocks before it may be shared, though later blocks hold the same tokens.
    for place in (0, 1, 63, 64, 100, 127, 128, 191, 192, 249):
        other = list(base)
        other[place] = 2
        assert ask(llm, other).num_cached_tokens == place // 64 * 64, place
    assert ask(llm, base[64:]).num_cached_tokens == 0  # the same blocks at other positions
    # The same prompt under another salt is other content: nobody learns by time what somebody else asked.
    assert ask(llm, base).num_cached_tokens == 192
    for salt in ("a", "b"):
        assert ask(llm, base, cache_salt=salt).num_cached_tokens == 0
        assert ask(llm, base, cache_salt=salt).num_cached_tokens == 192


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("policy", ["int8", "turbo4", "turbo2"])
def test_a_shared_prefix_depends_on_itself_alone(model: Path, policy: str, together: bool) -> None:
    """Answers after a hit, when other requests wrote different things behind the same prefix, also in its chunk.

    Which channels of K a page refines is chosen by queries: by none that come after the page.
    """
    llm = started(
        model, policy, skip_tokenizer_init=True, max_num_seqs=2, max_model_len=400, num_gpu_blocks_override=40,
        enable_prefix_caching=True,
    )  # fmt: skip
    base, found = words("base", 128), []
    for secret in range(3):
        assert llm.reset_prefix_cache()
        if not together:
            ask(llm, base, 1)
        ask(llm, base + words(("secret", secret), 100))
        output = ask(llm, base + words("probe", 50))
        assert output.num_cached_tokens == 128
        found.append(bits(output))
    assert found[0] == found[1] == found[2]
