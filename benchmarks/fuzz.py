"""Differential fuzzing of the caches for as long as one likes: the state machines of `tests/kvcache`, many seeds.

    python benchmarks/fuzz.py --steps 100000 --seed 0 --device cpu

Random operations (append, crop, fork, reorder, free, reuse, preempt, drafts taken back, shared pages, packed chunks)
on the contiguous and the paged cache beside plain ones that keep the exact tokens; after every step lengths, pages,
tails and sinks must match byte for byte, attention within the error of the kernel and of the format. Needs the packages
of `make test`. Ends with status 1 at the first difference and prints the steps that lead there and its seed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS / "kvcache"), str(TESTS)]

import torch  # noqa: E402  (the path of the machines comes first)
from cache_machine import CacheMachine  # noqa: E402
from hypothesis import HealthCheck, Phase, seed, settings  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test  # noqa: E402
from paged_machine import PagedMachine  # noqa: E402
from plain_cache import CASES  # noqa: E402
from plain_paged import CONFIGS  # noqa: E402

from turboattention.ops.append.paged import append_paged  # noqa: E402

STEPS = 30  # of a history
Machines = dict[str, Callable[[], RuleBasedStateMachine]]


def machines(device: str, triton: bool) -> Machines:
    """All machines by name; on CPUs the paged ones by the C++ kernels (where they are built) and by the definition.

    triton: those of the Triton kernels alone, on a CPU in the interpreter.
    """
    if triton:
        from turboattention.ops.append.triton_paged import append_paged as kernel  # needs Triton

        return {
            f"paged {name}, Triton": (lambda name=name: PagedMachine(name, kernel, "triton", device))
            for name in CONFIGS
            if not name.startswith("kivi")
        }
    found: Machines = {
        f"contiguous {name}": (lambda name=name, case=case: CacheMachine(case, name, device))
        for name, case in CASES.items()
    }
    for name in CONFIGS:
        if device == "cpu" or not name.startswith("kivi"):  # a GPU has no append for it
            found[f"paged {name}"] = lambda name=name: PagedMachine(name, device=device)
        if device == "cpu":
            found[f"paged {name}, definition"] = lambda name=name: PagedMachine(name, append_paged, "reference")
    return found


def run(make: Callable[[], RuleBasedStateMachine], number: int, histories: int) -> int:
    """So many histories from one seed; returns their steps."""
    steps = 0

    @seed(number)
    def counted() -> RuleBasedStateMachine:
        machine = make()
        check = machine.check_invariants

        def count(*arguments: object) -> None:
            nonlocal steps
            steps += 1
            check(*arguments)

        machine.check_invariants = count
        return machine

    # No shrinking: the steps printed are those that happened.
    chosen = settings(
        max_examples=histories, stateful_step_count=STEPS, phases=[Phase.generate], database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(counted, settings=chosen)
    return steps


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="steps of all machines together, at least")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; each round takes the next")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--histories", type=int, default=20, help="of each machine with one seed")
    parser.add_argument("--triton", action="store_true", help="the Triton kernels alone; TRITON_INTERPRET=1 on a CPU")
    parser.add_argument("--only", default="", help="machines whose name contains this")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA GPU, torch sees none; use cpu")
    torch.set_num_threads(1)  # small tensors: more threads only wait for one another
    every = machines(arguments.device, arguments.triton)
    chosen = {name: make for name, make in every.items() if arguments.only in name}
    places = {name: place for place, name in enumerate(every)}  # so that no two machines see the same histories
    if not chosen:
        parser.error(f"--only: no machine has {arguments.only!r} in its name")
    begin, number, steps = time.monotonic(), arguments.seed, dict.fromkeys(chosen, 0)
    while sum(steps.values()) < arguments.steps:
        for name, make in chosen.items():
            try:
                steps[name] += run(make, 1000 * number + places[name], arguments.histories)
            except BaseException:
                print(f"found by: python benchmarks/fuzz.py --seed {number} --steps 1 --only '{name}'", flush=True)
                raise
        number += 1
        print(f"seeds {arguments.seed} to {number - 1}: {sum(steps.values())} steps, "
              f"{time.monotonic() - begin:.0f} s, no difference", flush=True)  # fmt: skip
    for name, count in steps.items():
        print(f"{name}: {count}")


if __name__ == "__main__":
    main()
