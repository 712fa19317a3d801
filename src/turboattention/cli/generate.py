"""``turboattention generate``: run a prompt with a preset or policy and stream the text."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from turboattention.cli.options import (
    PRESET_HELP,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SeedOption,
    check_device,
    check_outputs,
    choose_policies,
    progress_bar,
    to_json,
)
from turboattention.cli.requirements import require
from turboattention.config import DEFAULT_PRESET
from turboattention.errors import invalid
from turboattention.files import write_atomic
from turboattention.policy import Policy
from turboattention.report.figures import size
from turboattention.report.words import printable

if TYPE_CHECKING:
    from transformers import TextStreamer

    from turboattention.integrations.models import LoadedModel


def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="Text that the model goes on with.")],
    model: ModelOption = "smollm2-135m",
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="PRESET", help=f"{PRESET_HELP} Default: {DEFAULT_PRESET}.")
    ] = None,
    policy: Annotated[Path | None, typer.Option("--policy", metavar="FILE", help="Policy file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Give the prompt as a chat message.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to write.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: always the most likely token; above: sampling.")
    ] = 0.0,
    seed: SeedOption = 0,
    json_path: JsonOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Write text with a compressed cache, token by token to stdout; sizes and speed go to stderr."""
    require("transformers")
    if preset is not None and policy is not None:
        raise invalid("generate", "--preset or --policy", "both")
    chosen = choose_policies([preset] if preset is not None else [], [policy] if policy is not None else [])[0]
    if not prompt.strip():
        raise invalid("--prompt", "text", "nothing but white space" if prompt else "nothing")
    check_outputs(json_path)
    check_device(device)

    from turboattention.integrations.models import load_model

    with progress_bar("Loading the model"):
        loaded = load_model(model, dtype=getattr(torch, dtype), device=device)
    inputs = _encode(loaded, prompt, chat, max_new_tokens)
    torch.manual_seed(seed)
    result = {
        "schema": 1,
        "model": model,
        "preset": chosen.name if isinstance(chosen, Policy) else chosen,
        "prompt": prompt,
        "chat": chat,
        "temperature": temperature,
        "seed": seed,
        **_run(loaded, inputs, chosen, max_new_tokens, temperature),
    }
    if json_path:
        write_atomic(json_path, to_json(result))
    Console(stderr=True).print(
        f"{result['new_tokens']} tokens, {result['tokens_per_s']:.1f} tokens/s with the prompt; "
        f"cache {size(result['kv_bytes'])}, {result['bits_per_value']:.2f} bits per value ({result['preset']})",
        markup=False,
        highlight=False,
    )


def _encode(loaded: "LoadedModel", prompt: str, chat: bool, max_new_tokens: int) -> dict[str, Any]:
    tokenizer = loaded.tokenizer
    if chat and not tokenizer.chat_template:
        raise invalid("--chat", "a model with a chat template", loaded.name, "leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    # A chat template writes the special tokens itself.
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) if chat else prompt
    encoded = tokenizer(text, add_special_tokens=not chat, return_tensors="pt").to(loaded.model.device)
    inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    tokens = inputs["input_ids"].shape[1]
    if tokens + max_new_tokens > loaded.context_length:
        raise invalid(
            "prompt and --max-new-tokens",
            f"at most {loaded.context_length} tokens together (the model's context)",
            f"{tokens} + {max_new_tokens}",
        )
    return inputs


def _run(
    loaded: "LoadedModel", inputs: dict[str, Any], policy: str | Policy, max_new_tokens: int, temperature: float
) -> dict[str, Any]:
    from turboattention.integrations.transformers import TurboCache, enable

    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    model: Any = loaded.model  # what transformers annotates `generate` with hides that it is a method
    with enable(model, policy):
        cache = TurboCache(model.config, policy)
        start = time.perf_counter()
        output = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=max_new_tokens, streamer=_streamer(loaded), **sampling
        )
        seconds = time.perf_counter() - start
    written = output[0, inputs["input_ids"].shape[1] :]
    return {
        "text": loaded.tokenizer.decode(written, skip_special_tokens=True),
        "new_tokens": len(written),
        "tokens_per_s": len(written) / seconds,
        "kv_bytes": cache.nbytes,
        "bits_per_value": cache.bits_per_value,
    }


def _streamer(loaded: "LoadedModel") -> "TextStreamer":
    from transformers import TextStreamer

    class PrintableStreamer(TextStreamer):  # type: ignore[misc, unused-ignore]
        """Control characters that a model writes do not reach the terminal."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(printable(text), end="\n" if stream_end else "", flush=True)

    return PrintableStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
