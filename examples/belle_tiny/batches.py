"""Training batches: tokenized dialogues packed into rows of equal length, with a loss mask."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer

from .generate import Turn, dialogue, prompt
from .tokenizer import EOS, PAD

PROMPT_SHARE = 0.12  # random share of prompt tokens in the loss, so that the perplexity of whole texts is reasonable


def dialogue_texts(turns: list[Turn], style: str) -> list[str]:
    """Alternating prompts and answers, which are tokenized separately as in generation."""
    return [prompt(t["value"], style) if t["from"] == "human" else t["value"] for t in turns]


def encode(tokenizer: Tokenizer, texts: list[str], rng: random.Random) -> tuple[list[int], list[bool]]:
    """Tokenize alternating prompts and answers, with eos after each answer; also return the loss mask."""
    ids: list[int] = []
    in_loss: list[bool] = []
    for index, encoding in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False)):
        tokens = encoding.ids + [EOS] * (index % 2)
        ids += tokens
        in_loss += [index % 2 == 1 or rng.random() < PROMPT_SHARE for _ in tokens]
    return ids, in_loss


def batch(
    tokenizer: Tokenizer, style: str, seed: int, step: int, tokens: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and loss mask (rows, length) of a step. They depend only on (seed, step), so that a run can resume.

    Each row starts with a new dialogue, and its last dialogue is truncated.
    """
    rng = random.Random(f"{seed}/batch/{step}")
    rows, masks = [], []
    for _ in range(tokens // length):
        row: list[int] = []
        mask: list[bool] = []
        while len(row) < length:
            ids, in_loss = encode(tokenizer, dialogue_texts(dialogue(rng, "train")[1], style), rng)
            row, mask = row + ids, mask + in_loss
        rows.append(row[:length])
        masks.append([False] + mask[1:length])
    return torch.tensor(rows), torch.tensor(masks)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows on the left; return token ids and attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask
