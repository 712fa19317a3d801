"""Q, K, V of every attention layer of a forward pass and, after a backward pass, the gradient of its output.

Any transformers model that uses the attention interface: the registered function stands in for SDPA and computes it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from turboattention.errors import UnsupportedError, invalid

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "turboattention_calibration"


@dataclass
class Captured:
    """One layer: q ``[batch, heads, tokens, head_dim]``, k and v with KV heads; K and Q after RoPE.

    scale: factor of the scores. gradient: of the attention's output, shaped like q; None before a backward pass.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    gradient: Tensor | None = None


@contextmanager
def capturing(model: "PreTrainedModel") -> Iterator[dict[int, Captured]]:
    """Inside it, forward passes fill the dictionary, by layer; the last one counts.

    Raises UnsupportedError for models whose attention has no plain form (soft-capped scores).
    """
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None):
        raise UnsupportedError(f"{type(model).__name__}: calibration has no form for soft-capped scores")
    stock = str(model.config._attn_implementation)
    if stock not in ("eager", "sdpa"):
        raise invalid("model", "eager or SDPA attention", stock, "call disable() on its handle first")
    layers: dict[int, Captured] = {}

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        out, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        captured = Captured(query.detach(), key.detach(), value.detach(), scale)
        layers[int(module.layer_idx)] = captured  # type: ignore[arg-type]  # every decoder layer has a number
        if out.requires_grad:

            def keep(gradient: Tensor) -> None:
                captured.gradient = gradient.transpose(1, 2)

            out.register_hook(keep)
        return out, weights

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)
    try:
        yield layers
    finally:
        model.set_attn_implementation(stock)
        layers.clear()


@contextmanager
def _frozen(model: "PreTrainedModel") -> Iterator[None]:
    """Gradients of activations alone: weights need none, the embeddings begin the graph."""
    wanted = [x for x in model.parameters() if x.requires_grad]
    for x in wanted:
        x.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    try:
        yield
    finally:
        hook.remove()
        for x in wanted:
            x.requires_grad_(True)


def score_gradients(model: "PreTrainedModel", tokens: Tensor, generator: torch.Generator) -> dict[int, Captured]:
    """One forward and backward pass of ``sum over positions of log p(y)`` with ``y`` drawn from the model itself.

    tokens: int64 ``[batch, tokens]``. The mean over y of the outer product of such gradients is the Fisher information,
    half of whose quadratic form is the KL divergence of a small change.
    """
    with _frozen(model), torch.enable_grad(), capturing(model) as layers:
        logits = model(input_ids=tokens, use_cache=False).logits
        logits.backward(_score_of_draws(logits.detach(), generator))
        return dict(layers)


@torch.no_grad()
def _score_of_draws(logits: Tensor, generator: torch.Generator, positions: int = 64) -> Tensor:
    """d log p(y) / d logits = one-hot(y) - p for one draw at each position."""
    gradient = torch.empty_like(logits)
    flat, out = logits.flatten(0, -2), gradient.flatten(0, -2)
    for start in range(0, flat.shape[0], positions):
        probability = flat[start : start + positions].float().softmax(-1)
        # By the cumulative distribution: torch.multinomial takes ten times as long for a large vocabulary.
        cumulative = probability.cumsum(-1)
        uniform = torch.rand(len(cumulative), 1, generator=generator).to(cumulative.device)
        draws = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        draws.clamp_max_(cumulative.shape[-1] - 1)
        out[start : start + positions] = -probability
        out[start : start + positions].scatter_add_(1, draws, torch.ones_like(draws, dtype=out.dtype))
    return gradient
