"""Tokenized examples as AutoGPTQ takes them, to rows of calibration tokens without padding."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_belle.errors import InputError
from gptq_belle.quantization.calibration import Calibration

Example = Mapping[str, Sequence[int] | Tensor]


def calibration(examples: Sequence[Example], config: Any) -> Calibration:
    """Rows of the examples' tokens; little text is accepted, as AutoGPTQ does.

    Args:
        examples: see `BaseGPTQForCausalLM.quantize`.
        config: transformers' configuration of the model, for its end-of-sequence token.
    Raises:
        InputError: there are none, or one is not token ids.
    """
    eos = config.eos_token_id
    rows = token_rows(examples, eos[0] if isinstance(eos, list) else eos)
    return Calibration(rows, rows.shape[0], rows.shape[1], allow_short=True)


def token_rows(examples: Sequence[Example], eos: int | None) -> Tensor:
    """(rows, T) int64: the examples themselves where all are of one length; else packed, eos between them, T the
    longest one's length, and what fills no row left out."""
    documents = [document for number, example in enumerate(examples) for document in _documents(number, example)]
    if not documents:
        raise InputError("there are no examples with tokens to calibrate on", "Give quantize() a list of examples.")
    length = max(len(document) for document in documents)
    if all(len(document) == length for document in documents):
        return torch.stack(documents)
    stream = torch.cat([_ended(document, eos) for document in documents])
    count = len(stream) // length
    return stream[: count * length].view(count, length)


def _documents(number: int, example: Example) -> list[Tensor]:
    """The rows of one example, their padding left out."""
    try:
        ids = torch.atleast_2d(torch.as_tensor(example["input_ids"]))
        mask = torch.atleast_2d(torch.as_tensor(example.get("attention_mask", torch.ones_like(ids)))).bool()
        if ids.is_floating_point() or ids.dim() != 2 or ids.shape != mask.shape:
            raise ValueError(f"input_ids {ids.dtype} {tuple(ids.shape)}, attention_mask {tuple(mask.shape)}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"example {number} is not tokenized text: {error}",
                         "An example is what a tokenizer returns: input_ids and attention_mask.") from error
    kept = [row[where].long().cpu() for row, where in zip(ids, mask, strict=True)]
    return [row for row in kept if len(row)]


def _ended(document: Tensor, eos: int | None) -> Tensor:
    return document if eos is None or int(document[-1]) == eos else torch.cat((document, torch.tensor([eos])))
