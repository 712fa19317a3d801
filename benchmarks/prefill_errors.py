"""Errors of the INT8 prefill on Q, K and V of real models beside FP8 and bfloat16, and what a tile skip could gain.

    python benchmarks/prefill_errors.py --model qwen2.5-coder-0.5b --tokens 8192

One forward pass in float32; Q and K after RoPE, and V, rounded to bfloat16, are the inputs of all methods. Errors are
relative RMS against float64 causal attention on them: all heads, the last 512 rows and 512 spread ones. All methods are
computed on the CPU (`prefill_methods.py`). "fp8" is an emulation of FlashAttention-3's FP8 after its source, without
the rounding of the FP8 matrix units' sums.
"""

import csv
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from prefill_methods import METHODS, errors, measured_blocks, skippable
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from turboattention.evaluation.texts import encode, leading_tokens, load_text
from turboattention.integrations.models import load_model
from turboattention.ops.prefill.int8 import quantise_chunk
from turboattention.ops.prefill.sequences import BLOCK

SKIP_BLOCKS = 128  # blocks of 64 queries in which tiles are counted; all of them up to 8,192 tokens
COLUMNS = (
    "model", "layer", "tokens", "heads", "kv_heads", "head_dim", "rows", *(f"{name}_percent" for name in METHODS),
    "int8_rounded_worst_head_percent", "fp8_worst_head_percent", "skippable_final_maximum",
    "skippable_running_maximum", "text", "date", "torch",
)  # fmt: skip


class _AllRecorded(Exception):  # noqa: N818 - no error: it ends the forward pass behind the last wanted layer
    pass


def record(model: PreTrainedModel, ids: Tensor, layers: set[int]) -> dict[int, tuple[Tensor, Tensor, Tensor, float]]:
    """Q, K, V of ``layers`` as bfloat16 ``[1, heads, tokens, head_dim]``, and the factor of the scores; one pass.

    ids: int64 ``[1, tokens]``.
    """
    found: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
        if module.layer_idx in layers:
            found[module.layer_idx] = q.bfloat16(), k.bfloat16(), v.bfloat16(), float(options["scaling"])
            print(f"layer {module.layer_idx} recorded", flush=True)
        if len(found) == len(layers):
            raise _AllRecorded
        return sdpa_attention_forward(module, q, k, v, *args, **options)

    AttentionInterface.register("recording", attention)
    AttentionMaskInterface.register("recording", sdpa_mask)
    model.set_attn_implementation("recording")
    try:
        with torch.inference_mode():
            model.get_decoder()(ids, use_cache=False)
    except _AllRecorded:
        pass
    return found


def main(
    model: Annotated[str, typer.Option(help="a name that the command line knows, or a path")],
    tokens: Annotated[int, typer.Option(help="a multiple of 128")] = 8192,
    layer: Annotated[list[int] | None, typer.Option(help="repeatable; default first, middle and last")] = None,
    text: Annotated[list[str] | None, typer.Option(help="bundled text or file; repeatable, joined")] = None,
    rows: Annotated[int, typer.Option(help="compared at the end, and as many spread over the sequence")] = 512,
    out: Annotated[Path, typer.Option(help="CSV file to append to")] = Path("benchmarks/results/prefill_errors.csv"),
) -> None:
    """Measure and append a row for each layer to OUT."""
    names = text or ["persuasion"]
    loaded = load_model(model, dtype=torch.float32)
    ids = leading_tokens(loaded.tokenizer) + encode(loaded.tokenizer, "\n\n".join(map(load_text, names)))
    if tokens < 128 or tokens % 128 or tokens > min(len(ids), loaded.context_length):
        limit = min(len(ids), loaded.context_length)
        raise typer.BadParameter(f"tokens: expected a multiple of 128 up to {limit} (text, context), received {tokens}")
    if rows < BLOCK:
        raise typer.BadParameter(f"rows: expected at least {BLOCK}, received {rows}")
    count = loaded.model.config.get_text_config().num_hidden_layers
    layers = set(layer or (0, count // 2, count - 1))
    if not layers <= set(range(count)):
        raise typer.BadParameter(f"layer: expected 0 to {count - 1}, received {sorted(layers)}")
    found = record(loaded.model, torch.tensor([ids[:tokens]]), layers)
    fresh = not out.exists()
    with out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for index, (q, k, v, scale) in sorted(found.items()):
            chunk = quantise_chunk(q, k, v, scale)
            measured = errors(q[0], k[0], v[0], scale, chunk, rows)
            final, running = skippable(chunk, every=max(1, tokens // 64 // SKIP_BLOCKS))
            row = {
                "model": loaded.name, "layer": index, "tokens": tokens, "heads": q.shape[1], "kv_heads": k.shape[1],
                "head_dim": q.shape[-1], "rows": BLOCK * len(measured_blocks(tokens, rows)),
                **{f"{name}_percent": f"{100 * measured[name][-1]:.3f}" for name in METHODS},
                **{f"{name}_worst_head_percent": f"{100 * measured[name][:-1].max():.3f}"
                   for name in ("int8_rounded", "fp8")},
                "skippable_final_maximum": f"{final:.4f}", "skippable_running_maximum": f"{running:.4f}",
                "text": "+".join(names), "date": date.today().isoformat(), "torch": torch.__version__,
            }  # fmt: skip
            writer.writerow(row)
            file.flush()
            print(row, flush=True)


if __name__ == "__main__":
    typer.run(main)
