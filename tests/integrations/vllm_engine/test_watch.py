"""The watch in an engine: which sequences it follows (no vLLM needed), and what it finds in a running one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from engines import NEEDS, answers, random_llama, started, tokens

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed (extra 'watch')")

from turboattention.errors import InvalidInputError
from turboattention.integrations.vllm.settings import resolve_policy, resolve_watch
from turboattention.integrations.vllm.watch import GONE, EngineWatch
from turboattention.monitoring.settings import WatchSettings
from turboattention.policy import Policy


def watch(share: float = 1.0, prompts_only: bool = False) -> EngineWatch:
    settings = WatchSettings(share=share, heads=4)
    layers = {"model.layers.0.attn": 0, "model.layers.1.attn": 1}
    return EngineWatch(settings, Policy.from_preset("turbo4"), layers, 2, prompts_only=prompts_only)


def plan(
    of: EngineWatch, sequences: Sequence[tuple[int, int, list[int]]], decodes: int = 0
) -> list[tuple[int, int, int, int]]:
    """Rows of a step of sequences (tokens before, new tokens, blocks): number, first, end, tokens after it."""
    table = torch.zeros(len(sequences), 8, dtype=torch.int32)
    for row, (_, _, blocks) in zip(table, sequences, strict=True):
        row[: len(blocks)] = torch.tensor(blocks)
    new = np.array([x[1] for x in sequences])
    found = of.plan(new, np.array([x[0] for x in sequences]) + new, decodes, table)
    return [] if found is None else [(i, first, end, x.tokens) for i, first, end, x in found.rows]


def test_a_sequence_is_followed_by_its_blocks_wherever_it_stands():
    of = watch()
    assert plan(of, [(0, 100, [5, 6]), (128, 1, [1, 2, 3])]) == [(0, 0, 100, 100)]  # the other began before
    assert plan(of, [(100, 1, [7, 8]), (100, 1, [5, 6])]) == [(1, 1, 2, 101)]
    assert plan(of, [(101, 27, [5, 6]), (0, 10, [9])], decodes=0) == [(0, 0, 27, 128), (1, 27, 37, 10)]
    assert plan(of, [(128, 64, [5, 9, 10]), (10, 0, [9])]) == []  # another one with as many tokens; one that waits
    assert plan(of, [(128, 64, [5, 6, 10])]) == [(0, 0, 64, 192)]
    assert (of.watcher.steps, of.watcher.checked_steps) == (7, 4)


def test_finished_sequences_are_forgotten_and_prompts_alone_are_followed_where_graphs_decode():
    of = watch(prompts_only=True)
    assert plan(of, [(0, 1, [1]), (0, 70, [2, 3])], decodes=1) == [(1, 1, 71, 70)]
    for _ in range(GONE):
        assert plan(of, [(70, 1, [2, 3])], decodes=1) == []
    assert plan(of, [(70, 20, [2, 3])]) == [(0, 0, 20, 90)]  # preempted in the middle of its prompt, say
    for _ in range(GONE + 1):
        plan(of, [(90, 1, [2, 3])], decodes=1)
    assert plan(of, [(90, 20, [2, 3])]) == []


def test_the_share_is_of_sequences():
    of, taken = watch(share=0.1), 0
    for number in range(2000):
        taken += len(plan(of, [(0, 64, [number + 1])]))
    assert abs(taken - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5
    assert of.watcher.checked_steps == taken


def test_settings_of_additional_config():
    given: dict[str, Any] = {"turboattention": {"policy": "int8", "watch": {"share": 0.5, "heads": 2}}}
    assert resolve_watch(given) == WatchSettings(share=0.5, heads=2)
    assert resolve_policy("turbo_int4", given).name == "int8"
    assert resolve_watch({}) is None
    for wrong in ({"share": 7}, {"shares": 1}, 3):
        with pytest.raises(InvalidInputError, match="watch"):
            resolve_watch({"turboattention": {"watch": wrong}})


@pytest.mark.slow
def test_a_running_engine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """The same tokens with a watch; errors of 8 bits in prompts, chunks and decode; a corrupted layer shows.

    With little memory (preemption), chunks of odd sizes and a prompt that begins as another one.
    """
    pytest.importorskip("vllm", reason=NEEDS)
    folder = random_llama(tmp_path_factory.mktemp("watched"))
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (n,), generator=draw).tolist() for n in (150, 64, 5, 333)]
    prompts.append(prompts[0][:130] + prompts[3][:20])
    checks: list[Any] = []
    inner = EngineWatch.__init__
    engines: list[EngineWatch] = []

    def remembered(self: EngineWatch, *arguments: Any, **more: Any) -> None:
        inner(self, *arguments, **more)
        engines.append(self)
        check = self.watcher._checked

        def record(*given: Any) -> Any:
            checks.append(check(*given))
            return checks[-1]

        self.watcher._checked = record  # type: ignore[method-assign]

    monkeypatch.setattr(EngineWatch, "__init__", remembered)
    found, engine = [], None
    for settings in (None, {"share": 1.0, "heads": 8}):
        section: dict[str, Any] = {"policy": "int8", **({} if settings is None else {"watch": settings})}
        engine = None  # the one before must be gone first
        engine = started(
            folder, additional_config={"turboattention": section}, max_num_batched_tokens=96,
            num_gpu_blocks_override=14, skip_tokenizer_init=True,
        )  # fmt: skip
        found.append(tokens(answers(engine, prompts, 40)))
    assert found[0] == found[1]
    [of] = engines
    assert {(c.layer, c.head) for c in checks} == {(layer, head) for layer in (0, 1) for head in (0, 1)}
    errors = sorted(c.relative_error for c in checks)  # scores of random weights this large feel 8 bits
    assert errors[len(errors) // 2] < 0.02
    assert errors[-1] < 0.06
    assert len(checks) > 300
    assert not of.watcher.skipped
    layers = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    impl = layers.vllm_config.compilation_config.static_forward_context["model.layers.1.self_attn.attn"].impl
    append = impl._append

    def corrupted(view: Any, *arguments: Any, **more: Any) -> None:
        append(view, *arguments, **more)
        layout, pool = view.groups[0].layout, view.groups[0].pool
        layout.write(pool, "value_page_scale", layout.read(pool, "value_page_scale").clamp(max=0.001))

    impl._append = corrupted
    del checks[:]
    answers(engine, [prompts[3][::-1]], 40)
    worst = {layer: max(c.relative_error for c in checks if c.layer == layer) for layer in (0, 1)}
    assert worst[0] < 0.06
    assert worst[1] > 0.3
