"""A random Llama and a tokeniser with one token per character."""

import string

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 16_384
VOCABULARY = 200


def character_tokenizer() -> PreTrainedTokenizerFast:
    characters = {character: index + 2 for index, character in enumerate(string.printable)}
    core = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1, **characters}, unk_token="<unk>"))
    core.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")


def tiny_llama(layers: int = 2, heads: int = 2, kv_heads: int = 1, spread: float = 0.02) -> LlamaForCausalLM:
    """spread: standard deviation of the weights; larger ones attend to few tokens, as trained models do."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=spread,
    )
    return LlamaForCausalLM(config).eval()
