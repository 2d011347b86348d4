"""How likely a model finds a text that it is given."""

from collections.abc import Sequence

import torch

from gptq_belle.runtime.attention import Whole
from gptq_belle.runtime.engine import Model

LOGITS_BYTES = 1 << 26  # of logits at a time: 67 rows of BLOOM's vocabulary


@torch.inference_mode()
def score(model: Model, ids: Sequence[int], top: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """Of every token but the first: the natural logarithm of its probability behind those in front of it.

    Logits are made for some positions at a time: all of them at once are 2 GB for BLOOM and 2,000 tokens.

    Args:
        model: what reads.
        ids: token ids, within the context.
        top: how many of the likeliest tokens to name at each place.
    Returns:
        (logprob, [(token, logprob), ...]) a token.
    """
    row = torch.tensor(list(ids), device=model.device)
    attend = Whole(model.decoder.heads, 1, len(row), model.device, model.dtype)
    hidden = model.decoder.through(model.decoder.embed(row), attend)
    found: list[tuple[float, list[tuple[int, float]]]] = []
    rows = max(1, LOGITS_BYTES // (4 * model.settings.sizes.vocabulary))
    for states, targets in zip(hidden[:-1].split(rows), row[1:].split(rows), strict=True):
        logprobs = model.decoder.logits(states).float().log_softmax(-1)
        own = logprobs.gather(1, targets[:, None])[:, 0].tolist()
        values, indices = logprobs.topk(top)
        found += [(one, list(zip(names, likely, strict=True)))
                  for one, names, likely in zip(own, indices.tolist(), values.tolist(), strict=True)]
    return found
