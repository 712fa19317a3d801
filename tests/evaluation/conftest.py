"""A random Llama of two layers and a tokeniser with one token per character."""

import string
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from turboattention.integrations.models import LoadedModel

CONTEXT = 16_384
VOCABULARY = 200


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    characters = {character: index + 2 for index, character in enumerate(string.printable)}
    core = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1, **characters}, unk_token="<unk>"))
    core.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def loaded(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(model, tokenizer, "tiny", CONTEXT)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and then it does so again. " * 60, encoding="utf-8")
    return path
