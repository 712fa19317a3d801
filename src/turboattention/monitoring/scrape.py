"""From the text of a /metrics page to the measurements since the last one."""

import math
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from turboattention.errors import MissingDependencyError, invalid
from turboattention.monitoring.limits import ALL_LAYERS
from turboattention.monitoring.settings import NO_CLIENT

try:
    from prometheus_client.parser import text_string_to_metric_families
except ImportError as error:
    raise MissingDependencyError(NO_CLIENT) from error

_BLOCK = 2**16
_PREFIX = "turboattention_"
LARGEST_PAGE = 64 * 2**20  # bytes of a /metrics page
_MOST = 2.0**53  # of a count: beyond that floats skip numbers


class Measured(NamedTuple):
    """Of one layer and measure: a sum, what to divide it by, the checks it comes from."""

    total: float
    weight: float
    checks: int


Totals = dict[tuple[str, str], Measured]


def fetch(url: str, timeout: float) -> str:
    """The page at ``url``; raises InvalidInputError with the reason when there is none. timeout: seconds."""
    try:
        end = time.monotonic() + timeout
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            page = b""
            while (part := answer.read1(_BLOCK)) and len(page) <= LARGEST_PAGE:
                page += part
                if time.monotonic() > end:  # the limit of a socket starts anew with each byte
                    raise TimeoutError("timed out")
    except (OSError, ValueError) as error:
        status = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else None
        reason = status or getattr(error, "reason", None) or error
        raise invalid("metrics", "an answer", reason, "is the server up, and is this its /metrics?") from None
    if len(page) > LARGEST_PAGE:
        raise invalid("metrics", f"at most {LARGEST_PAGE} bytes", "more")
    return page.decode("utf-8", "replace")


def totals(page: str) -> Totals:
    """Sums since the start of the server, of all ranks together.

    Raises InvalidInputError for a page that is no Prometheus text, and for one without the numbers of a watch.
    """
    sums: dict[tuple[str, str, str], float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families(page):
            if family.name.startswith(_PREFIX):
                for sample in family.samples:
                    labels = sample.labels
                    key = sample.name[len(_PREFIX) :], labels.get("layer", ALL_LAYERS), labels.get("tensor", "")
                    sums[key] += float(sample.value)
    # The parser raises whatever its slices and lookups happen to raise.
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise invalid("metrics", "Prometheus text", f"a page that breaks off ({error})"[:300]) from error
    broken = next((key for key, x in sums.items() if key[0].endswith("_count") and not 0 <= x <= _MOST), None)
    if broken is not None:
        raise invalid("metrics", "counts from 0", f"{sums[broken]} of {_PREFIX}{broken[0]}"[:300])
    if not any(math.isfinite(x) and name == "watched_steps_total" for (name, _, _), x in sums.items()):
        raise invalid(
            "metrics", f"the numbers of a watch ({_PREFIX}watched_steps_total)", "a page without them",
            "start the server with turboattention serve --watch 0.01",
        )  # fmt: skip
    return {key: measured for key, measured in _measured(sums) if math.isfinite(measured.total)}


def _measured(sums: dict[tuple[str, str, str], float]) -> Iterator[tuple[tuple[str, str], Measured]]:
    for (name, layer, tensor), value in sums.items():
        if name in ("shadow_relative_error_sum", "shadow_kl_sum", "shadow_drift_sum"):
            count = sums.get((f"{name.removesuffix('_sum')}_count", layer, tensor), 0.0)
            plain = name.removesuffix("_sum").removeprefix("shadow_")
            yield (layer, f"{tensor}_drift" if tensor else plain), Measured(value, count, int(count))
        elif name in ("page_clipped_total", "page_saturated_total"):
            checks = int(sums.get(("shadow_relative_error_count", layer, ""), 0.0))
            plain = name.removeprefix("page_").removesuffix("_total")
            of = sums.get(("page_values_total", layer, tensor), 0.0)
            yield (layer, f"{tensor}_{plain}"), Measured(value, of, checks)
    # Each look at the faults is a check of its own, whether or not anything happened.
    faults = sum(value for (name, _, _), value in sums.items() if name == "faults_total")
    yield (ALL_LAYERS, "faults"), Measured(faults, 0.0, 0)


def difference(before: Totals, now: Totals) -> Totals:
    """What came between; all of ``now`` where a sum has become smaller: the server has started anew."""
    both = [(before[key], new) for key, new in now.items() if key in before]
    restarted = any(new.weight < old.weight or new.total < old.total for old, new in both)
    found: Totals = {}
    for key, new in now.items():
        old = Measured(0.0, 0.0, 0) if restarted else before.get(key, Measured(0.0, 0.0, 0))
        delta = Measured(new.total - old.total, new.weight - old.weight, new.checks - old.checks)
        found[key] = Measured(delta.total, 1.0, 1) if key == (ALL_LAYERS, "faults") else delta
    return found
