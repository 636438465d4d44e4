"""A random-weight Llama of a few million parameters with a real tokenizer and chat template.

It answers nonsense, but it runs through every part of the stack in milliseconds on a CPU, needs no
download, and is the same on every machine.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile
import textwrap
from pathlib import Path

CHAT_TEMPLATE = (
    "{%- if tools %}<|system|>\nTools: {{ tools | tojson }}<|end|>\n{% endif -%}"
    "{%- for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] if message['content'] is not none else '' }}<|end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|assistant|>\n{% endif -%}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
VOCAB_SIZE = 2048


def make_tiny_model(directory: Path, *, seed: int = 0, max_position_embeddings: int = 8192) -> Path:
    """Writes the model into ``directory`` unless it is already there.

    Args:
        directory: where config, weights and tokenizer go; made with its parents.
        seed: seed of the weights; two seeds are two models with one tokenizer.
        max_position_embeddings: longest sequence, in tokens.

    Returns:
        The directory, a Hugging Face model directory.
    """
    if (directory / "config.json").exists():
        return directory
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".tiny-model-"))
    scratch.chmod(0o755)
    tokenizer = _train_tokenizer()
    tokenizer.save_pretrained(scratch)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # Wider weights than the default: the gap between the best two logits stays far above the
        # noise of float32 arithmetic, so greedy decoding has no ties.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(3.0)
    model.save_pretrained(scratch)
    (scratch / "generation_config.json").write_text(
        json.dumps({"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id})
    )
    try:
        scratch.rename(directory)
    except OSError:
        if not (directory / "config.json").exists():  # somebody else made it meanwhile
            raise
    return directory


def _train_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Any text serves; the standard library's is on every machine.
    corpus = [inspect.getsource(module) for module in (inspect, json, tempfile, textwrap, os)]
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
