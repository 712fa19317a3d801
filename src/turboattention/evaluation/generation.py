"""The greedy continuation of a prompt, for reading two caches side by side."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboattention.evaluation.caches import attention_of, make_cache
from turboattention.integrations.models import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from turboattention.policy import Policy

PROMPT_TOKENS = 200
NEW_TOKENS = 48


@torch.inference_mode()
def continuation(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Tensor,
    policy: "str | Policy | None" = None,
    new_tokens: int = NEW_TOKENS,
) -> str:
    """Text of at most ``new_tokens`` most likely tokens after ``prompt``, int64 ``[1, tokens]``.

    The prompt is continued as plain text, without a chat template, so that base and chat models do the same thing.
    """
    prompt = prompt.to(model.device)
    with quiet(), attention_of(model, policy):
        tokens = model.generate(  # type: ignore[operator]  # nn.Module.__getattr__ hides the method
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=make_cache(model, policy),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=_padding(tokenizer),
        )
    return str(tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True))


def _padding(tokenizer: "PreTrainedTokenizerBase") -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
