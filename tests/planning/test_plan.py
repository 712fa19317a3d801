"""The planner: bytes against the caches themselves, times against vLLM's rows, refusals, and the command."""

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from turboattention.cli.main import main
from turboattention.config import presets
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.integrations.vllm.pool import OpenPages
from turboattention.integrations.vllm.settings import page_layout, policy_of_dtype
from turboattention.kvcache.contiguous import LayerCache
from turboattention.planning.calibration import load_calibration
from turboattention.planning.gpu import find_gpu, load_gpus
from turboattention.planning.kv_bytes import BF16, FP8, all_forms, library_bytes, sequence_bytes, token_bytes
from turboattention.planning.model import ModelFacts, facts
from turboattention.planning.plan import Workload, largest_batch, largest_context, plan
from turboattention.planning.roofline import decode_step

ROOT = Path(__file__).parents[2]
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "rope_theta": 500000.0,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma3_text", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 300, "sliding_window": 100,
    "max_position_embeddings": 8192, "sliding_window_pattern": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> ModelFacts:
    return facts("8B", dict(LLAMA_8B))


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_benchmark", ROOT / "benchmarks" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", list(presets()))
def test_bytes_are_those_of_the_cache_while_it_generates(name: str) -> None:
    cache = presets()[name].cache
    heads, dim = 4, 64
    layer = LayerCache(cache, [(cache.key, cache.value)] * heads)
    for tokens in (1, 63, 1, 1, 126, 1, 1):
        x = torch.randn(1, heads, tokens, dim).half()
        layer.append(x, torch.randn_like(x))
        layer.observe(x)
        layer.settle()
        if tokens == 1:  # after longer steps more tokens stay exact until the next
            assert library_bytes(cache, heads, dim, layer.length) == layer.nbytes, layer.length


def test_bytes_of_an_engine_are_those_of_its_pages(llama: ModelFacts) -> None:
    for form in all_forms():
        if form.kind != "pages":
            continue
        layout = page_layout(policy_of_dtype(form.name).cache, 128)
        row = OpenPages.allocate(layout, 1, 8, torch.bfloat16, torch.device("cpu"))
        for tokens, pages in ((1, 1), (64, 1), (65, 2), (8192, 128)):
            assert sequence_bytes(form, llama, tokens) == 32 * (pages * 8 * layout.nbytes + row.nbytes)
        assert token_bytes(form, llama) == 32 * 8 * layout.nbytes / 64
    assert token_bytes(BF16, llama) == 2 * token_bytes(FP8, llama) == 131072  # 128 KiB, the known figure of this model
    assert llama.parameters == 8_030_261_248


def test_sliding_windows_stay_at_16_bits_and_are_bounded() -> None:
    model = facts("gemma", dict(GEMMA))
    assert model.windows == (100, 100, 100, 100, 100, None)
    turbo = next(form for form in all_forms() if form.name == "turbo_int4")
    grown = sequence_bytes(turbo, model, 6400) - sequence_bytes(turbo, model, 3200)
    assert grown == 50 * page_layout(policy_of_dtype("turbo_int4").cache, 64).nbytes
    sixteen = sequence_bytes(BF16, model, 6400)
    assert sixteen == 6400 * 256 + 5 * 112 * 256  # blocks of 16 tokens


def test_experts_are_read_as_far_as_a_batch_uses_them() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1,
             "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 100}  # fmt: skip
    model = facts("moe", {"model_type": "mixtral", **sizes, "num_local_experts": 8, "num_experts_per_tok": 2})
    assert model.expert_parameters == 8 * 3 * 64 * 128
    rest = model.read_parameters - model.expert_parameters
    assert model.active_parameters(1) == pytest.approx(rest + model.expert_parameters / 4)
    assert model.active_parameters(1000) == pytest.approx(model.read_parameters)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "deepseek_v3"}, "latent attention"),
        ({"model_type": "qwen3_next", "num_hidden_layers": 4}, "layer 0 has a cache of kind LinearAttention"),
        ({"model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": 2}, "learned attention sinks"),
        ({"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 4096}, "every layer has a sliding window"),
    ],
)
def test_caches_that_cannot_be_compressed_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        facts("model", config)


def test_times_are_within_a_fifth_of_vllm(benchmark: ModuleType) -> None:
    """Of the rows in the repository, as docs/planning.md shows them; sizes within 1 %, prompts within 10 %.

    A single run of long prompts can't tell more than its noise.
    """
    rows = benchmark.comparison()
    for card in ("H100", "H200"):
        assert {row["form"] for row in rows if row["gpu"] == card} >= {"bf16", "fp8", "turbo_int4"}
    for row in rows:
        case = (row["gpu"], row["cards"], row["form"], row["layers"], row["requests"], row["tokens"])
        assert row["predicted_fits"] == pytest.approx(row["fits"], rel=0.01), case
        if row["prefill"] is not None:
            assert row["predicted_prefill"] == pytest.approx(row["prefill"], rel=0.1), case
        assert row["predicted_ms"] == pytest.approx(row["ms"], rel=0.2, abs=row["noise_ms"]), case


def test_the_calibration_file_is_that_of_the_rows(benchmark: ModuleType) -> None:
    """Within a tenth: new rows need not be fitted at once, but a file that has gone stale is found."""
    stored, found = asdict(load_calibration()), benchmark.fit()
    hint = "new rows changed the numbers: run python benchmarks/plan.py fit"
    for name in (
        "unit_us",
        "append_us",
        "layer_us",
        "host_ms",
        "prefill_share",
        "exchange_us",
        "link_share",
        "shared_bytes",
        "reserve_bytes",
    ):
        assert stored[name] == pytest.approx(found[name], rel=0.1), f"{name}: {hint}"
    assert stored["attention"].keys() == found["attention"].keys()
    for form, fit in stored["attention"].items():
        for name in ("latency_us", "share_of_bandwidth", "flops_per_value"):
            assert fit[name] == pytest.approx(found["attention"][form][name], rel=0.1), f"{form} {name}: {hint}"


def test_the_roofline(llama: ModelFacts) -> None:
    gpu, measured = load_gpus()["H100"], load_calibration()
    ours = next(form for form in all_forms() if form.name == "turbo_int4")

    def ms(form: Any, batch: int, tokens: int, card: Any = gpu) -> float:
        return decode_step(form, llama, card, measured, batch, tokens, 16).ms

    assert ms(BF16, 32, 32768) > ms(FP8, 32, 32768) > ms(ours, 32, 32768)
    assert ms(BF16, 1, 64) <= ms(ours, 1, 64)  # nothing is gained there
    assert ms(BF16, 8, 8192, replace(gpu, bandwidth_gbs=2 * gpu.bandwidth_gbs)) < ms(BF16, 8, 8192)
    # An FP8 cache is converted value by value: more bandwidth than the H200's makes that no faster.
    slow, fast = (replace(load_gpus()["H200"], bandwidth_gbs=x) for x in (4800, 9600))
    gains = [ms(form, 32, 32768, slow) - ms(form, 32, 32768, fast) for form in (BF16, FP8)]
    share = measured.attention["bf16"].share_of_bandwidth
    weights = llama.active_parameters(32) * 2 * (1 / slow.bandwidth - 1 / fast.bandwidth) / share * 1e3
    assert gains[1] == pytest.approx(weights)
    assert gains[0] > 3 * weights
    # Weights are read once for a batch: twice the batch at an empty cache takes hardly longer.
    assert ms(BF16, 2, 1) < 1.02 * ms(BF16, 1, 1)


def test_cards_that_share_every_layer(llama: ModelFacts) -> None:
    """Half of everything on each of two cards, sums between them in every layer; cost and energy are those of both."""
    gpu, measured = load_gpus()["H200"], load_calibration()
    half = llama.split(2)
    assert (half.kv_heads, half.query_heads, half.parameters) == (4, 16, llama.parameters // 2)
    assert (llama.split(16).kv_heads, llama.split(16).query_heads) == (1, 2)  # each KV head on two cards
    for ranks in (0, 3, 64):
        with pytest.raises(InvalidInputError, match="tensor_parallel_size: expected a number of cards that can share"):
            llama.split(ranks)
    quick = replace(measured, exchange_us=0.0, link_share=1e9)
    steps = [decode_step(BF16, half, gpu, numbers, 32, 8192, 16).ms for numbers in (measured, quick)]
    sending = 32 * 4096 * 2 / (450e9 * measured.link_share)  # two cards: all of it once
    assert steps[0] - steps[1] == pytest.approx(64 * (measured.exchange_us / 1e3 + sending * 1e3))
    one, two = (plan(llama, gpu, Workload(tensor_parallel_size=n)) for n in (1, 2))
    assert (two.cards, two.parameters, two.kv_heads) == (2, llama.parameters, 8)
    assert two.weight_bytes == pytest.approx(one.weight_bytes)
    assert two.free_bytes > 2 * one.free_bytes
    assert [form.name for form in two.forms] == [form.name for form in one.forms if form.runs_in == "vLLM"]
    for single, double in zip(one.forms, two.forms, strict=False):
        assert double.sequence_bytes == pytest.approx(single.sequence_bytes, rel=1e-3)
        assert double.largest_batch > 2 * single.largest_batch
        if single.own is not None:
            assert double.own is not None
            assert 1.3 < double.own.tokens_per_s / single.own.tokens_per_s < 2.2
            assert double.own.kwh_per_million == pytest.approx(2e6 * 0.7 / 3600 / double.own.tokens_per_s)
    assert any("2 cards share every layer. What they send" in note for note in two.notes)
    assert any("each KV head is held 2 times" in x for x in plan(llama, gpu, Workload(tensor_parallel_size=16)).notes)
    lonely = plan(llama, replace(gpu, link_gbs=None), Workload(tensor_parallel_size=2)).forms
    assert {form.why_no_speed for form in lonely} == {"link_gbs of the card is not known"}


def test_a_plan_holds_what_its_parts_say(llama: ModelFacts) -> None:
    gpu = load_gpus()["H100"]
    result = plan(llama, gpu, Workload(prompt=8192, output=512))
    forms = {form.name: form for form in result.forms}
    bf16, ours = forms["bf16"], forms["turbo_int4"]
    assert bf16.largest_batch == largest_batch(BF16, llama, result.free_bytes, 8704) == result.batch
    assert (
        bf16.largest_batch * bf16.sequence_bytes <= result.free_bytes < (bf16.largest_batch + 1) * bf16.sequence_bytes
    )
    longest = largest_context(BF16, llama, result.free_bytes, 8)
    assert 8 * sequence_bytes(BF16, llama, longest) <= result.free_bytes < 8 * sequence_bytes(BF16, llama, longest + 1)
    assert ours.largest_batch > 3 * bf16.largest_batch
    assert ours.own is not None
    assert bf16.own is not None
    assert ours.own.tokens_per_s > bf16.own.tokens_per_s
    seconds = 1e6 / ours.own.tokens_per_s
    assert ours.own.dollars_per_million == pytest.approx(seconds / 3600 * 2.69)
    assert ours.own.kwh_per_million == pytest.approx(seconds / 3600 * 0.7)
    assert (forms["turbo4"].own, forms["turbo4"].why_no_speed) == (None, "not a form of an engine")
    gains = {(gain.batch, gain.context): gain for gain in result.gains}
    short, long = gains[1, 512].against_bf16, gains[8, 32768].against_bf16
    assert short is not None
    assert long is not None
    assert short < 1.05 < long
    assert gains[32, 32768].against_bf16 is None  # fits in our pages alone
    assert gains[32, 32768].fits
    assert not gains[128, 131072].fits
    assert any("nothing is gained" in note for note in result.notes)


def test_other_cards(llama: ModelFacts) -> None:
    table = load_gpus()
    old = {form.name: form for form in plan(llama, find_gpu("t4", table), Workload(weight_bits=4.5)).forms}
    assert "compute capability 8.0" in old["turbo_int4"].why_no_speed
    assert old["bf16"].own is not None
    ampere = {form.name: form for form in plan(llama, table["A100"]).forms}
    assert "compute capability 8.9" in ampere["fp8"].why_no_speed
    assert ampere["turbo_int4"].own is not None
    host = plan(llama, table["EPYC9654"])
    assert {form.own for form in host.forms} == {None}
    assert host.gains == ()
    with pytest.raises(InvalidInputError, match="use --weight-bits 8 or 4, a larger card, or more"):
        plan(llama, table["T4"])
    with pytest.raises(InvalidInputError, match="at most 131,072 tokens"):
        plan(llama, table["H100"], Workload(prompt=131072))


def test_tables_of_cards(tmp_path: Path) -> None:
    path = tmp_path / "gpus.toml"
    row = '[Mine]\ntitle="x"\nmemory_mib=1000\nbandwidth_gbs=10\npower_w=9\ncapability=9.0\nsource="me"\n'
    path.write_text(row)
    assert load_gpus(path)["Mine"].price_per_hour is None
    for text, words in (
        (row + "colour=1\n", "GPU Mine: expected the keys"),
        (row.replace("power_w=9\n", ""), "GPU Mine: expected the keys"),
        (row.replace("power_w=9", "power_w=-9"), "GPU Mine: power_w: expected a positive number, received -9"),
        (row.replace("power_w=9", "power_w=nan"), "received nan"),
        ("[Mine", "readable TOML"),
        ("", "at least one card"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidInputError, match=words.replace("(", "\\(")):
            load_gpus(path)
    for gpu in load_gpus().values():
        assert gpu.source
        assert gpu.price_source or gpu.price_per_hour is None


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "plan.json"
    folder.mkdir()
    config = folder / "config.json"
    config.write_text(json.dumps(LLAMA_8B))
    assert main(["plan", str(folder), "--gpu", "h100", "--prompt", "32768", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    data = json.loads(out.read_text())
    assert data["context"] == 33280
    forms = {form["name"]: form for form in data["forms"]}
    assert f"{forms['turbo_int4']['own']['tokens_per_s']:,.0f}" in printed
    for note in data["notes"]:
        assert note[:40] in printed

    def fails(*arguments: object) -> str:
        assert main(["plan", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    assert "GPU: expected one of H100, H200" in fails(config, "--gpu", "H1000")
    assert "a hub name in the local cache" in fails("nobody/nothing-of-this-name")
    assert "prompt: expected at least 1" in fails(config, "--prompt", "0")
    config.write_text(json.dumps({**LLAMA_8B, "quantization_config": {"quant_method": "awq", "bits": 4}}))
    assert "--weight-bits: expected" in fails(config)
    config.write_text("{")
    assert "readable JSON" in fails(folder)
    config.write_text('{"model_type": "no-such-model"}')
    assert "a decoder that transformers knows" in fails(folder)
    config.write_text(json.dumps({**LLAMA_8B, "hidden_size": 4095}))
    assert "error: " in fails(folder)
