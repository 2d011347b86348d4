"""The two ends of a decode step, compared with float64: the embedding before its blocks, and the final norm, the
lm_head and the choice of the next tokens after them."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gptq_belle.kernels.triton_config import TENSOR_CORES
from gptq_belle.kernels.triton_launch import Workspace
from gpu_check.agreement import WrongProduct, accepted, relative_error
from gpu_check.folded_checks import EPS, ERRORS, launch_modes
from gpu_check.kernel_recording import Case
from gpu_check.plan import Step
from gpu_check.setting import Setting
from gpu_check.weights import expanded, random_weight

ROWS, ROOM = 5, 8
TEMPERATURE, TOP_K, TOP_P = 0.8, 40, 0.9
SLACK = 1e-3  # of a cumulative probability, which the kernel computes in float32


class Ends(NamedTuple):
    """A model's embedding, which is its lm_head, too."""

    bloom: bool  # in 8 bits, with a norm of the embeddings and layer norms; else dense, with an RMS norm
    dtype: torch.dtype
    sampled: bool  # with temperature, top_k and top_p; else greedily
    pdl: bool

    def __str__(self) -> str:
        return (f"embedding and lm_head {'in 8 bits' if self.bloom else 'dense'}, {str(self.dtype)[6:]}, "
                f"{'sampled' if self.sampled else 'greedy'}{', PDL' if self.pdl else ''}")


def ends(setting: Setting, arch: int) -> list[Ends]:
    """All combinations; none before 8.0."""
    if arch < TENSOR_CORES:
        return []
    return [Ends(bloom, dtype, sampled, pdl) for bloom in (True, False) for dtype in setting.sizes.checked_dtypes
            for sampled in (False, True) for pdl in launch_modes(setting, arch)]


def steps(setting: Setting, arch: int) -> list[Step]:
    """All checks."""
    return [Step(str(one), partial(check, setting, one)) for one in ends(setting, arch)]


def cases(setting: Setting, arch: int) -> list[Case]:
    """Their kernels, for compilation."""
    return [partial(run, setting, one) for one in ends(setting, arch)]


def run(setting: Setting, one: Ends, device: torch.device) -> dict[str, Any]:
    """Launch both ends on random values, one after the other; returns all tensors by name."""
    from gptq_belle.kernels.triton_embedding import TILE, embedding_launch
    from gptq_belle.kernels.triton_head import head_launches, workspace_size
    from gptq_belle.kernels.triton_norm import FoldedNorm, NextNorm
    from gptq_belle.kernels.triton_sampling import new_sampling_state

    width, vocab = setting.sizes.checked[0], setting.sizes.vocabulary
    packed = random_weight(width, vocab, 8, device)
    dense = (torch.randn(vocab, width, device=device) * 0.05).to(one.dtype)
    matrix, table = (packed, expanded(packed).t()) if one.bloom else (dense, dense.float())
    given = torch.randint(0, vocab, (ROWS,), dtype=torch.int32, device=device)
    weight, shift, gamma = (torch.rand(width, device=device) + 0.5 for _ in range(3))
    stream = torch.empty(ROWS, width, dtype=one.dtype, device=device)
    following = NextNorm(gamma, None, torch.empty_like(stream),
                         torch.empty(2, -(-width // TILE), ROWS, device=device))
    logits = torch.empty(ROWS, vocab, device=device)
    lengths = torch.arange(ROWS, dtype=torch.int32, device=device)
    sampling = None
    if one.sampled:
        sampling = new_sampling_state(ROWS, vocab, ROOM, device)
        sampling.temperatures.fill_(TEMPERATURE)
        sampling.top_k.fill_(TOP_K)
        sampling.top_p.fill_(TOP_P)
        sampling.numbers.copy_(torch.rand(ROWS, ROOM, device=device))
    sums, tickets = workspace_size(ROWS)
    workspace = Workspace(torch.empty(max(sums, 1), device=device),
                          torch.zeros(tickets, dtype=torch.int32, device=device))
    tokens = given.clone()
    norm = FoldedNorm(following.moments, table @ gamma if one.bloom else None, EPS, width, TILE)
    embedding_launch(tokens, matrix, (weight, shift, EPS) if one.bloom else None, stream, following, pdl=one.pdl)()
    for launch in head_launches(following.x, matrix, None, norm, logits, tokens, lengths, workspace, sampling,
                                pdl=one.pdl):
        launch()
    return {"table": table, "given": given, "weight": weight, "shift": shift, "gamma": gamma, "stream": stream,
            "logits": logits, "tokens": tokens, "numbers": None if sampling is None else sampling.numbers}


def check(setting: Setting, one: Ends) -> dict[str, float]:
    """The largest relative error of embeddings and logits.

    Raises:
        WrongProduct: it is too large, or a token is not the one that these logits give.
    """
    t = run(setting, one, setting.device)
    embedded = t["table"][t["given"].long()].double()
    stream, gamma, size = t["stream"].double(), t["gamma"].double(), t["gamma"].shape
    if one.bloom:
        embedded = F.layer_norm(embedded, size, t["weight"].double(), t["shift"].double(), EPS)
    normed = F.layer_norm(stream, size, gamma, None, EPS) if one.bloom else F.rms_norm(stream, size, gamma, EPS)
    expected = normed @ t["table"].double().t()
    for row in range(ROWS):
        token, logits = int(t["tokens"][row]), t["logits"][row].double()
        if not one.sampled and token != int(t["logits"][row].argmax()):
            raise WrongProduct(f"row {row}: token {token} does not have the largest logit")
        if one.sampled and not _is_selected(token, logits, float(t["numbers"][row, row])):
            raise WrongProduct(f"row {row}: token {token} is not the one that the random number selects")
    return accepted(max(relative_error(stream, embedded), relative_error(t["logits"], expected)), ERRORS[one.dtype])


def _is_selected(token: int, logits: Tensor, number: float) -> bool:
    """Whether a random number selects a token by the cumulative distribution after temperature, top_k and top_p."""
    kept, ids = (logits / TEMPERATURE).sort(descending=True, stable=True)
    probabilities = kept[:TOP_K].softmax(0)
    cumulative = probabilities.cumsum(0)
    count = int((cumulative - probabilities < TOP_P).sum())
    place = (ids[:count] == token).nonzero().flatten().tolist()
    if not place:
        return False
    target, end = number * float(cumulative[count - 1]), float(cumulative[place[0]])
    return end - float(probabilities[place[0]]) - SLACK <= target <= end + SLACK
