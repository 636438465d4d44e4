"""The benchmark's model: random weights, but big enough for a prompt's length to be felt on a CPU core."""

from __future__ import annotations

import json
import keyword
import os
import random
import shutil
from pathlib import Path
from typing import Any

from deploy.tiny_model import VOCAB_SIZE, make_tiny_model

NAME = "bench"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton"
_WORDS = keyword.kwlist


def make_bench_model() -> Path:
    """A 27M-parameter Llama with the demo model's tokenizer, made once and kept in the user's cache."""
    directory = CACHE / "bench-model-27m"
    if (directory / "config.json").exists():
        return directory
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = make_tiny_model(CACHE / "tiny-model")
    scratch = CACHE / f".bench-model-{os.getpid()}"
    shutil.copytree(tiny, scratch, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    ids = json.loads((tiny / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        **{key: ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(scratch)
    scratch.rename(directory)
    return directory


class PromptMaker:
    """Prompts of a wanted length whose first block is never the same, so no prefix cache ever helps."""

    def __init__(self, model_dir: Path, seed: int) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self._random = random.Random(seed)
        sample = " ".join(self._random.choices(_WORDS, k=500))
        self._tokens_per_word = len(self._tokenizer.encode(sample)) / 500

    def chat(self, num_tokens: int, **parameters: Any) -> dict[str, Any]:
        """A streaming chat request of about ``num_tokens`` prompt tokens, template included."""
        words = self._random.choices(_WORDS, k=max(1, round((num_tokens - 25) / self._tokens_per_word)))
        text = f"{self._random.getrandbits(48):012x} {' '.join(words)}"
        return {
            "model": NAME,
            "messages": [{"role": "user", "content": text}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "ignore_eos": True,
            **parameters,
        }
