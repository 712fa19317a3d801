"""Time of a decode step and of a prompt.

A step is the slower of the host and the card. The card reads the weights once (or multiplies them, whichever is
longer), and in each layer reads the cache of every sequence and does the rest (norms, rotary embedding, launches):

    step  = max(host, max(weights / bandwidth, flops / compute)
                      + layers * (rest + latency + cache / bandwidth [+ append] [+ exchanges between cards]))

Bandwidth and compute are the card's data sheet times measured shares; latencies are taken over as they are. Where the
kernel has more to do for each value than to read it (FP8), compute takes the place of the cache's bandwidth. The prompt
is compute and exchanges alone. Of several cards that share every layer (tensor parallelism) all do the same at once.
"""

from typing import NamedTuple

from turboattention.planning.calibration import Calibration, Fit
from turboattention.planning.gpu import FP8_FROM, KERNELS_FROM, Gpu
from turboattention.planning.kv_bytes import BF16, FP8, Form, read_bytes
from turboattention.planning.model import ModelFacts


class Step(NamedTuple):
    """Milliseconds of one decode step, and what they are spent on most."""

    ms: float
    bound: str


def without_time(form: Form, model: ModelFacts, gpu: Gpu, calibration: Calibration) -> str | None:
    """None where times of a form can be predicted for a model on a card, else why not."""
    if gpu.capability == 0 or gpu.dense_tflops is None:
        return "no engine was measured on a CPU"
    if not form.serves:
        return "not a form of an engine"
    if form.kind == "pages" and gpu.capability < KERNELS_FROM:
        return f"its kernels need compute capability {KERNELS_FROM}"
    if form.kind == "pages" and model.soft_capped:
        return "the plugin refuses soft-capped scores"
    if form == FP8 and gpu.capability < FP8_FROM:
        return f"needs compute capability {FP8_FROM}"
    if model.ranks > 1 and gpu.link_gbs is None:
        return "link_gbs of the card is not known"
    return None if calibration.fit(form) else "was not measured"


def decode_step(
    form: Form, model: ModelFacts, gpu: Gpu, calibration: Calibration, batch: int, tokens: int, weight_bits: float
) -> Step:
    """One new token of ``batch`` sequences that hold ``tokens`` tokens each. `without_time` must be None."""
    fit, plain = calibration.attention[form.name], calibration.attention[BF16.name]
    active = model.active_parameters(batch)
    reading = active * weight_bits / 8 / (gpu.bandwidth * plain.share_of_bandwidth)
    multiplying = 2 * model.active_parameters(1) * batch / (_tflops(gpu) * 1e12 * calibration.prefill_share)
    rest = model.layers * calibration.layer_us * 1e-6
    cache = sum(
        count * _attention(form, fit if window is None else plain, model, gpu, calibration, batch, tokens, window)
        for window, count in model.kinds.items()
    )
    exchanging = exchange_seconds(model, gpu, calibration, batch)
    device = max(reading, multiplying) + rest + cache + exchanging
    host = calibration.host_ms * 1e-3
    parts = {"weights": reading, "compute": multiplying, "cache": cache, "launches": rest, "exchanges": exchanging}
    return Step(max(device, host) * 1e3, "host" if host >= device else max(parts, key=lambda name: parts[name]))


def _attention(
    form: Form, fit: Fit, model: ModelFacts, gpu: Gpu, calibration: Calibration, batch: int, tokens: int,
    window: int | None,
) -> float:  # fmt: skip
    """Seconds of one layer."""
    read = batch * read_bytes(form, model, tokens, window)
    reading = read / (gpu.bandwidth * fit.share_of_bandwidth)
    if form.kind == "plain" or window is not None:
        working = read * 8 / form.bits * fit.flops_per_value / (_tflops(gpu) * 1e12)
        return fit.latency_us * 1e-6 + max(reading, working)
    units = batch * model.kv_heads * calibration.unit_us * 1e-6
    return (fit.latency_us + calibration.append_us) * 1e-6 + max(reading, units)


def prompt_seconds(model: ModelFacts, gpu: Gpu, calibration: Calibration, tokens: int) -> float:
    """Reading a prompt; the way to store the cache changes nothing in it."""
    computing = prompt_flops(model, tokens) / (_tflops(gpu) * 1e12 * calibration.prefill_share)
    return computing + exchange_seconds(model, gpu, calibration, tokens)


def exchange_bytes(model: ModelFacts, tokens: int) -> float:
    """What a card sends in one sum over all cards, in a ring, for ``tokens`` tokens in 16 bits."""
    return 2 * (model.ranks - 1) / model.ranks * tokens * model.hidden * 2


def exchange_seconds(model: ModelFacts, gpu: Gpu, calibration: Calibration, tokens: int) -> float:
    """The sums over all cards behind attention and MLP of every layer; none with one card."""
    if model.ranks == 1:
        return 0.0
    assert gpu.link_gbs is not None  # `without_time` has said why where it is
    sending = exchange_bytes(model, tokens) / (gpu.link_gbs * 1e9 * calibration.link_share)
    return 2 * model.layers * (calibration.exchange_us * 1e-6 + sending)


def prompt_flops(model: ModelFacts, tokens: int) -> float:
    """Floating-point operations of a prompt: two for each parameter and token, four for each score and channel."""
    width = 4 * model.query_heads * model.head_dim
    scores = sum(width * count * _seen(tokens, window) for window, count in model.kinds.items())
    return 2 * model.active_parameters(1) * tokens + scores


def _seen(tokens: int, window: int | None) -> float:
    """Pairs of a token and one that it sees."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window


def _tflops(gpu: Gpu) -> float:
    assert gpu.dense_tflops is not None  # `without_time` has said why where it is
    return gpu.dense_tflops
