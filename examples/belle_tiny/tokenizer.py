"""The tokenizer: byte-level BPE that never merges Chinese characters, punctuation marks or digits.

So text is copied character by character and numbers digit by digit, which a small model learns easily. Characters
outside the vocabulary are split into bytes, as in large models.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .generate import dialogues, prompt

VOCABULARY = 3072
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
EOS, PAD = 2, 3
ALONE = "[\\u3000-\\u303f\\uff00-\\uffef\\u4e00-\\u9fff\\u2010-\\u2027×0-9]"


def common_characters() -> list[str]:
    """The 3,755 characters of level 1 of GB 2312, so that the vocabulary is filled with common characters."""
    rows = range(0xB0, 0xD8)
    return [bytes((r, c)).decode("gb2312", "ignore") for r in rows for c in range(0xA1, 0xFF)]


def train_tokenizer(seed: int = 0, samples: int = 60_000) -> Tokenizer:
    """Train a tokenizer on the start of the training stream."""
    tokenizer = Tokenizer(models.BPE())
    alone = pre_tokenizers.Split(Regex(ALONE), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [alone, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [common_characters() * 2]
    for _, turns in islice(dialogues(seed, "train"), samples):
        texts.append([t["value"] if t["from"] == "assistant" else prompt(t["value"], "llama") for t in turns])
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json, and a configuration for transformers 4 and 5."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    unk, bos, eos, pad = SPECIAL
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "add_bos_token": False,
        "add_eos_token": False,
        "padding_side": "left",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names = {"unk_token": unk, "bos_token": bos, "eos_token": eos, "pad_token": pad}
    (out / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
