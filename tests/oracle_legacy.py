"""Independent NumPy implementation of the legacy checkpoints of BELLE and GPTQ-for-LLaMa: rounding, packing (with
unmasked zero points), and the arithmetic of their kernels."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptq_belle.models.discovery import architecture


def rounded(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Min-max grid that contains 0: codes (N, K), scales (N, G) exact in float16, zero points (N, G)."""
    n, k = weight.shape
    groups = weight.reshape(n, -1, group)
    low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
    scales = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    zeros = np.round(-low / scales)
    codes = np.clip(np.round(groups / scales[:, :, None]) + zeros[:, :, None], 0, 2**bits - 1)
    return codes.reshape(n, k).astype(np.int64), scales, zeros.astype(np.int64)


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """Old packing of values (C, J) along the first axis: nothing is masked, so that -1 fills the rest of its word.

    With 3 bits, the two values of each 32 that straddle words are split by hand, and their upper parts are masked.
    """
    unsigned = values.astype(np.int64) & 0xFFFFFFFF
    rows = []
    for start in range(0, len(values), 32):
        block = unsigned[start : start + 32]
        out = np.zeros((bits, values.shape[1]), np.int64)
        for i in range(32):
            word, shift = divmod(i * bits, 32)
            out[word] |= (block[i] << shift) & 0xFFFFFFFF
            if shift + bits > 32:
                spilled = shift + bits - 32
                out[word + 1] |= (block[i] >> (bits - spilled)) & ((1 << spilled) - 1)
        rows.append(out)
    return np.concatenate(rows).astype(np.uint32).view(np.int32)


def old_weight(state: dict[str, Tensor], name: str, bits: int, group: int) -> np.ndarray:
    """(N, K) float32 as the old kernels saw it: s * (q - ((z & mask) + 1)), the sum not masked again."""
    qweight, qzeros, scales = (state[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros", "scales"))

    def codes(packed: np.ndarray) -> np.ndarray:
        stream = np.unpackbits(np.ascontiguousarray(packed.T).view(np.uint8), axis=1, bitorder="little")
        return stream.reshape(packed.shape[1], -1, bits).astype(np.int64) @ (1 << np.arange(bits))

    q, z = codes(qweight), codes(np.ascontiguousarray(qzeros.T)) + 1
    groups = np.arange(q.shape[1]) // group
    return scales.T.astype(np.float32)[:, groups] * (q - z.T[:, groups]).astype(np.float32)


def write_legacy(model: Path, out: Path, config: dict, *, bits: int, group: int, all_positive: int = 0,
                 scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Write `out`, a state dictionary as torch.save wrote them, of a tiny model; returns it.

    Args:
        model: the directory of the full-precision model. config: its config.json.
        group: inputs a group; -1 for all.
        all_positive: number of outputs of every linear whose groups have only positive weights: zero points of 0.
    """
    arch = architecture(config)
    state: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        module, _, leaf = name.rpartition(".")
        if not module.endswith(arch.linears) or leaf == "bias":
            state[name] = tensor.float()
        else:
            weight = tensor.float().numpy().copy()
            places = np.arange(all_positive) * 8 + 2
            weight[places] = np.abs(weight[places])
            codes, scales, zeros = rounded(weight, bits, weight.shape[1] if group == -1 else group)
            state[f"{module}.qweight"] = torch.from_numpy(words(codes.T, bits))
            state[f"{module}.qzeros"] = torch.from_numpy(np.ascontiguousarray(words((zeros - 1), bits).T))
            state[f"{module}.scales"] = torch.from_numpy(np.ascontiguousarray(scales.T)).to(scale_dtype)
            state.setdefault(f"{module}.bias", torch.zeros(len(weight)))
    if config["model_type"] == "bloom":
        state["lm_head.weight"] = state["transformer.word_embeddings.weight"]
    else:
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    torch.save(state, out)
    return state
