"""Checksums of the pages in vLLM's blocks: what was damaged or not written is found before it is read."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soak
import torch
from engines import NEEDS, answers, random_llama, started, tokens

from turboattention.errors import IntegrityError, InvalidInputError
from turboattention.integrations.vllm.integrity import BlockChecksums
from turboattention.integrations.vllm.settings import resolve_integrity

NBYTES, HEADS, BLOCKS = 256, 2, 8


def step(*sequences: tuple[int, int, list[int]]) -> Any:
    """Numbers of sequences (tokens before, after, blocks)."""
    table = torch.zeros(len(sequences), HEADS, 3, dtype=torch.int32)
    for row, (_, _, blocks) in zip(table, sequences, strict=True):
        row[:, : len(blocks)] = torch.tensor(blocks) * HEADS + torch.arange(HEADS)[:, None]
    before, after = (torch.tensor([x[i] for x in sequences], dtype=torch.int32) for i in (0, 1))
    return SimpleNamespace(decoding=SimpleNamespace(before=before, after=after, table=table), prefilling=None)


def pool() -> torch.Tensor:
    return torch.randint(256, (BLOCKS, HEADS, 64, NBYTES // 64), dtype=torch.uint8)


def test_pages_are_remembered_when_they_are_full():
    sums, blocks = BlockChecksums(NBYTES, 1), pool()
    first = step((0, 100, [3, 5]), (0, 63, [1]))
    sums.verify("layer", blocks, first)
    sums.written(blocks, first)
    blocks[[5, 1]] += 1  # open pages are no pages yet
    sums.verify("layer", blocks, step((100, 128, [3, 5]), (63, 64, [1])))
    sums.written(blocks, step((100, 128, [3, 5]), (63, 64, [1])))
    sums.verify("layer", blocks, step((128, 129, [3, 5, 6]), (64, 65, [1, 2])))
    blocks[5, 1, 0, 0] ^= 4
    message = "layer, block 5, head 1, tokens 64 to 127: other bytes than were written"
    with pytest.raises(IntegrityError, match=message) as error:
        sums.verify("layer", blocks, step((64, 65, [1, 2]), (128, 129, [3, 5, 6])))
    assert "block 1" not in str(error.value)
    sums.verify("layer", blocks, step((100, 101, [3, 5])))  # a sequence that has only the other page


def test_a_page_that_nothing_has_written_is_found():
    sums, blocks = BlockChecksums(NBYTES, 1), pool()
    with pytest.raises(IntegrityError, match="block 4, head 0, tokens 0 to 63"):
        sums.verify("layer", blocks, step((64, 65, [4, 2])))
    sums.written(blocks, step((0, 64, [3])))
    with pytest.raises(IntegrityError, match="block 4, head 0, tokens 0 to 63"):
        sums.verify("layer", blocks, step((64, 65, [4, 2])))


def test_one_step_of_some_is_verified():
    sums, blocks = BlockChecksums(NBYTES, 3), pool()
    bad, found = step((64, 65, [4, 2])), 0
    for _ in range(9):
        try:
            sums.verify("layer", blocks, bad)
        except IntegrityError:
            found += 1
    assert found == 3


@pytest.mark.parametrize(("given", "steps"), [(True, 16), (False, 0), (1, 1), (0, 0), (None, 0)])
def test_option(given: object, steps: int):
    section = {} if given is None else {"integrity": given}
    assert resolve_integrity({"turboattention": section}) == steps


@pytest.mark.parametrize("given", ["yes", -1, 1.5])
def test_option_refused(given: object):
    with pytest.raises(InvalidInputError, match="integrity: expected true, or a number of steps"):
        resolve_integrity({"turboattention": {"integrity": given}})


# --- in an engine ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm", reason=NEEDS)
    return random_llama(tmp_path_factory.mktemp("checksums"))


def section(policy: str, **more: Any) -> dict[str, Any]:
    return {"turboattention": {"policy": policy, **more}}


@pytest.mark.slow
def test_a_flipped_bit_in_an_engine(model: Path):
    """Each step is verified; what was flipped is named, and without damage the answers are those without sums."""
    prompt = [[3 + 7 * i % 290 for i in range(150)]]
    found = []
    for more in ({}, {"integrity": 1}):
        llm = None
        llm = started(model, skip_tokenizer_init=True, additional_config=section("turbo4", **more))
        found.append(tokens(answers(llm, prompt, 80)))
    assert found[0] == found[1]
    engine = llm.llm_engine
    context = engine.vllm_config.compilation_config.static_forward_context
    layer = context["model.layers.1.self_attn.attn"]
    assert llm.reset_prefix_cache()
    layer.impl.checksums._known = torch.zeros_like(layer.impl.checksums._known)  # the next are this request's
    engine.add_request("0", {"prompt_token_ids": prompt[0]}, soak.parameters(80))
    for _ in range(5):
        engine.step()
    place = int(layer.impl.checksums._known.nonzero()[0])
    with torch.inference_mode():
        layer.kv_cache.view(torch.uint8).view(-1, layer.impl.pages.layout.nbytes)[place, 100] ^= 1
    with pytest.raises(IntegrityError, match=rf"model.layers.1.self_attn.attn, block {place // 2}, head {place % 2}, "):
        [engine.step() for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 5])  # in this order: vLLM 0.32 starts no engine after one with drafts
def test_nothing_is_found_where_nothing_is_wrong(model: Path, drafts: int):
    """Hits, preemption, drafts taken back, blocks that go from one to another: each read page is what was written."""
    different = soak.requests(30)
    expected = soak.alone(model, different)
    llm = soak.engine_of(model, additional_config=section("int8", integrity=1), **soak.pressed(drafts))
    counts = soak.soak(llm, different, expected, 150)
    assert counts.wrong == {}
    assert counts.finished > 80
    metrics = soak.metric_values(llm)
    assert metrics["vllm:num_preemptions"] > 0
    assert metrics["vllm:prefix_cache_hits"] > 0
