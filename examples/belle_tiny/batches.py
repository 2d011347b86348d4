"""Training rows: dialogues of the stream, tokenized, packed into rows of equal length, with a weight a token."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer

from .generate import Turn, dialogue, prompt
from .tokenizer import EOS, PAD

PROMPT_SHARE = 0.12  # of the prompt's tokens, drawn anew each time: enough for a sane perplexity of whole texts


def pieces(turns: list[Turn], style: str) -> list[str]:
    """Prompt, answer, prompt, answer: tokenized apart, as at generation."""
    return [prompt(t["value"], style) if t["from"] == "human" else t["value"] for t in turns]


def encode(tokenizer: Tokenizer, texts: list[str], rng: random.Random) -> tuple[list[int], list[bool]]:
    """Token ids of alternating prompts and answers, each answer closed by eos, and which of them count in the loss."""
    ids: list[int] = []
    counts: list[bool] = []
    for index, encoding in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False)):
        piece = encoding.ids + [EOS] * (index % 2)
        ids += piece
        counts += [index % 2 == 1 or rng.random() < PROMPT_SHARE for _ in piece]
    return ids, counts


def batch(
    tokenizer: Tokenizer, style: str, seed: int, step: int, tokens: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and loss mask (rows, length) of a step: a function of (seed, step) alone, so a resumed run sees the same.

    Rows start with a new dialogue and the last one in a row is cut.
    """
    rng = random.Random(f"{seed}/batch/{step}")
    rows, masks = [], []
    for _ in range(tokens // length):
        row: list[int] = []
        mask: list[bool] = []
        while len(row) < length:
            ids, counts = encode(tokenizer, pieces(dialogue(rng, "train")[1], style), rng)
            row, mask = row + ids, mask + counts
        rows.append(row[:length])
        masks.append([False] + mask[1:length])
    return torch.tensor(rows), torch.tensor(masks)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask
