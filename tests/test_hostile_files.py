"""Every file that is read from outside: whatever it holds, either it can be used or one clear error says why not."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hostile import contents
from hypothesis import HealthCheck, given, settings

import turboattention.files as files
from turboattention.calibration.measure import point_from_dict
from turboattention.calibration.result import Point
from turboattention.calibration.state import State
from turboattention.errors import InvalidInputError, TurboAttentionError, UnsupportedError
from turboattention.evaluation.result import Interval, Series
from turboattention.monitoring.reference import Reference, expected_errors
from turboattention.planning.gpu import load_gpus
from turboattention.planning.model import facts, read_model
from turboattention.policy import ModelShape, Override, Policy, asdict_policy
from turboattention.report.review import render_review
from turboattention.serving.answer import Answer
from turboattention.serving.events import BrokenStreamError, Stream
from turboattention.serving.prompts import Request, fingerprint, read_requests
from turboattention.serving.result import Measured
from turboattention.serving.review.pairs import read_pairs
from turboattention.serving.review.result import Counts, ReviewResult
from turboattention.serving.store import ANSWERS, RUN, Store

FOLDER = Path(files.__file__).parent
MEMORY = 2**31  # bytes that a reader may take beside what the process has: far more than any of these files needs


class Reader(NamedTuple):
    """valid: what a good file holds, as JSON or as its bytes. read: reads a path and uses all of what it got."""

    valid: Any
    read: Callable[[Path], object]
    lines: bool = False
    examples: int = 90


def use_policy(path: Path) -> None:
    policy = Policy.load(path)
    policy.save(path.with_name("again.json"))
    assert asdict_policy(Policy.load(path.with_name("again.json"))).keys() == asdict_policy(policy).keys()
    policy.head_formats(0, 2)
    with suppress(InvalidInputError, UnsupportedError):
        policy.validate_for(ModelShape("llama", 2, 2, 64))


def use_state(path: Path) -> None:
    state = State(path, "run")
    for name in ("point", "seconds"):
        if state.get(name) is not None:
            state.read(name, point_from_dict if name == "point" else dict)


def use_sealed(path: Path) -> None:
    """Results that nobody's calibration gave, under a right sum."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return  # of files that are no JSON the reader above is asked
    state = State(path.with_name("state.json"), "run")
    for name, value in (data if isinstance(data, dict) else {"point": data}).items():
        state.put(name, value)
    use_state(path.with_name("state.json"))


def use_reference(path: Path) -> None:
    reference = Reference.load(path)
    reference.check(1, 1, 2)


def use_run(path: Path) -> None:
    """``path`` is the file of a run; its answers are beside it."""
    (path.parent / ANSWERS).write_text(json.dumps(ANSWER) + "\n")
    path.replace(path.parent / RUN)
    with Store(path.parent, {"seed": 0}) as store:
        assert all(isinstance(remark, str) for remark in store.remarks)
        store.pin("baseline", {"kind": "x"}, ["remark"])


def use_answers(path: Path) -> None:
    (path.parent / RUN).write_text(json.dumps({"schema": 1, "seed": 0}))
    path.replace(path.parent / ANSWERS)
    with Store(path.parent, {"seed": 0}) as store:
        for answer in store.answers.values():
            assert answer.ttft_s is None or answer.ttft_s >= 0
            assert answer.tpot_s is None or answer.completion_tokens > 1
            json.dumps(answer.to_dict(), ensure_ascii=False)
        store.save_pairs([Request("a", "p")])


def use_requests(path: Path) -> None:
    good, bad = read_requests(path)
    assert all(len(line.reason) < 1000 for line in bad)
    for request in good:
        (request.text() + "".join(request.references) + request.id).encode()  # goes into the files of a run
    fingerprint(good)


def use_pairs(path: Path) -> None:
    found = read_pairs(path)
    assert found.pairs
    assert len(found.fingerprint) == 64


def use_review(path: Path) -> None:
    result = ReviewResult.load(path)
    json.dumps(result.to_dict())
    render_review(result)


def use_model(path: Path) -> None:
    found = read_model(str(path))
    assert 0 < found.layers <= 4096
    assert found.active_parameters(1) >= 0


def use_stream(path: Path) -> None:
    """The events of a server, one of them the file."""
    stream = Stream()
    text = path.read_bytes().decode("utf-8", "replace").replace("\n", " ")
    try:
        stream.line(f"data: {text}", 0.1)
    except BrokenStreamError:
        return
    json.dumps([stream.text, stream.reasoning, stream.tokens, stream.logprobs, stream.finish])
    assert stream.finish is None or isinstance(stream.finish, str)


POLICY = json.loads(json.dumps(
    {"turboattention_policy": 1}
    | asdict_policy(Policy("p", Policy.from_preset("turbo4").cache, overrides=(Override(8, 1, 0, "key"),),
                           model=ModelShape("llama", 2, 2, 64), provenance={"kl": 0.1}))
))  # fmt: skip
POINT = Point("p", "chosen", 4.2, 0.1, Interval(0.0, 0.2), 0.1, Interval(0.0, 0.2), 0.9, {"t": 0.1}, Series([0], [1]))
NUMBERS = {"count": 3, "mean": [[0.5, 1.0]], "squares": [[1.0, 2.0]], "low": [[0.0, 0.0]], "high": [[1.0, 1.0]]}
ANSWER = {
    "id": "a", "side": "baseline", "text": "x", "started_at": 1.0, "total_s": 0.5, "times_s": [0.1, 0.2],
    "completion_tokens": 2, "counted": "usage", "prompt_tokens": 3, "finish": "stop", "reasoning": "",
    "tokens": ["x", "y"], "logprobs": [-0.1, -0.2], "error": {"kind": "http", "message": "m", "status": 500},
}  # fmt: skip
SHARE = Measured(0.5, 0.4, 0.6, 10)
REVIEW = ReviewResult(
    4, 3, Counts(1, 1, 1, 0), {"Ann": Counts(1, 1, 1, 0)}, SHARE, SHARE, SHARE, 0.0, 0.5, SHARE, SHARE, ("line 3",),
    "pairs.jsonl", "f" * 64, 0,
).to_dict()  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100,
    "max_position_embeddings": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "layer_types": ["full_attention", "full_attention"],
}  # fmt: skip

CARDS = (FOLDER / "planning" / "gpus.toml").read_bytes()[:3000].rpartition(b"\n\n")[0]


def sealed_state() -> Any:
    """A state as `State` writes it, its sum included."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        state = State(Path(folder) / "state.json", "run")
        state.put("seconds", {"probes": 1.5})
        state.put("point", asdict(POINT))
        assert state.path is not None
        return json.loads(state.path.read_text())


READERS = {
    "policy": Reader(POLICY, use_policy, examples=120),
    "calibration state": Reader(sealed_state(), use_state),
    "results of a state": Reader({"seconds": {"probes": 1.5}, "point": asdict(POINT)}, use_sealed),
    "watch reference": Reader(
        {"turboattention_calibration": 2,
         "results": {"sensitivity x": {"statistics": [{"key": NUMBERS, "value": NUMBERS}]}}},
        use_reference,
    ),
    "calibration result": Reader({"schema": 1, "heads": [{"layer": 0, "head": 0, "bound": 1.0, "seen": 0.1}]},
                                 expected_errors),
    "run": Reader({"schema": 1, "seed": 0, "found": {"baseline": {"kind": "x"}}, "remarks": ["r"]}, use_run),
    "answers": Reader(ANSWER, use_answers, lines=True),
    "requests": Reader({"id": 1, "messages": [{"role": "user", "content": "x"}], "reference": ["y"], "max_tokens": 3},
                       use_requests, lines=True),
    "pairs": Reader({"id": "a", "prompt": "p", "baseline": {"text": "b"}, "candidate": {"text": "c"}}, use_pairs,
                    lines=True),
    "review": Reader(REVIEW, use_review),
    "model config": Reader(LLAMA, use_model, examples=60),
    "cards": Reader(CARDS, load_gpus),
    "events": Reader(
        {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop",
                      "logprobs": {"content": [{"token": "x", "logprob": -0.1}]}}],
         "usage": {"prompt_tokens": 1, "completion_tokens": 2}}, use_stream),
}  # fmt: skip


@contextmanager
def bounded_memory() -> Iterator[None]:
    """An allocation far beyond the file's size fails instead of taking the machine down."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", READERS)
def test_a_valid_file_is_read(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    path = tmp_path / "file.json"
    path.write_bytes(reader.valid if isinstance(reader.valid, bytes) else json.dumps(reader.valid).encode())
    reader.read(path)


@pytest.mark.parametrize("name", READERS)
def test_whatever_a_file_holds(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    path = tmp_path / "file.json"

    @settings(max_examples=reader.examples, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(contents(reader.valid, reader.lines))
    def read(content: bytes) -> None:
        path.write_bytes(content)
        received = None
        try:
            reader.read(path)
        except TurboAttentionError as error:
            received = error
        assert received is None or len(str(received)) < 3000, "an error is a line, not the file"

    with bounded_memory():
        read()


ENDLESS = {
    name: reader
    for name, reader in READERS.items()
    if name not in ("events", "run", "answers", "results of a state", "model config")
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_file_without_end_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = files.read_bytes

    def smaller(name: str, path: Path, largest: int, *more: Any, **others: Any) -> bytes:
        return read(name, path, min(largest, 3 * 2**20), *more, **others)

    monkeypatch.setattr(files, "read_bytes", smaller)
    for module in (
        "turboattention.policy", "turboattention.serving.prompts", "turboattention.serving.review.pairs",
        "turboattention.planning.gpu",
    ):  # fmt: skip
        monkeypatch.setattr(f"{module}.read_bytes", smaller)
    with pytest.raises(InvalidInputError, match="at most 3145728 bytes"):
        ENDLESS[name].read(Path("/dev/zero"))


def test_configs_that_ask_for_more_than_memory() -> None:
    for change in (
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": 10**6, "layer_types": None}, {"vocab_size": 2**50},
        {"hidden_size": 2**40}, {"max_position_embeddings": 10**18}, {"head_dim": -(10**12)},
        {"model_type": "mixtral", "num_local_experts": 10**8}, {"num_attention_heads": 0}, {"hidden_size": "x"},
    ):  # fmt: skip
        with bounded_memory(), pytest.raises((InvalidInputError, UnsupportedError)):
            facts("x", LLAMA | change)


def test_an_answer_keeps_what_it_needs() -> None:
    assert Answer.from_dict(dict(ANSWER)).error is not None
    for change in (
        {"tokens": "xy"}, {"logprobs": None}, {"times_s": [float("nan")]}, {"times_s": {"a": 1}}, {"total_s": 10**400},
        {"completion_tokens": "2"}, {"completion_tokens": -1}, {"side": "both"},
        {"error": {"kind": "x", "message": ""}}, {"error": 5}, {"finish": 1}, {"extra": 1},
    ):  # fmt: skip
        with pytest.raises(InvalidInputError):
            Answer.from_dict(ANSWER | change)
