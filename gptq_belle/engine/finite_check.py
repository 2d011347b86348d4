"""Notice logits and cached keys that are not finite, and find the layer that they come from.

NaN and infinity are not visible in a token: the argmax of a row of NaN is a valid token id. The logits of every step
are therefore checked by their sum, one pass over them, and only if it is not finite, a second forward pass
without KV cache finds the layer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.engine.attention import Attention, UncachedAttention
from gptq_belle.engine.transformers_decoder import TransformersDecoder
from gptq_belle.errors import GptqBelleError, InputError
from gptq_belle.models.architectures import LM_HEAD

if TYPE_CHECKING:
    from gptq_belle.engine.kv_cache import KVCache
    from gptq_belle.engine.logits_model import LogitsModel

WIDE_CACHES = ("bfloat16", "float32")  # kinds of KV cache with the exponent range of float32


def nonfinite_rows(logits: Tensor) -> list[int]:
    """Indices of the rows of logits (n, V) that contain NaN or infinity."""
    if math.isfinite(logits.sum().item()):  # 12 us for BLOOM's 250,880 logits, of which argmax takes 470
        return []
    return (~logits.isfinite().all(-1)).nonzero()[:, 0].tolist()  # may be none: a sum of finite logits can overflow


def nonfinite_cache_block(cache: "KVCache", slot: int, start: int, stop: int) -> int | None:
    """First block whose cached keys or values of positions start .. stop exceed the range of the cache.

    An infinite key can remove its token from attention while the logits stay finite, so logits alone do not show it.
    """
    if cache.kind in WIDE_CACHES or start >= stop:
        return None
    tables = zip(cache.key_scales or cache.keys, cache.value_scales or cache.values, strict=True)
    # aminmax propagates NaN and takes 1 ms for 2 million float16 on a CPU core, where isfinite takes 22.
    extremes = torch.stack([torch.stack([*torch.aminmax(keys[slot, :, start:stop]),
                                         *torch.aminmax(values[slot, :, start:stop])]) for keys, values in tables])
    finite = extremes.isfinite().all(1)
    return None if bool(finite.all()) else int(finite.int().argmin())


def cache_overflow(model: "LogitsModel", block: int) -> InputError:
    """Error for keys or values that exceed the range of the KV cache."""
    return InputError(f"keys or values of {_block_name(model, block)} exceed the range of the {model.cache_kind} KV "
                      f"cache (a {WIDE_CACHES[0]} or {WIDE_CACHES[1]} cache holds them)",
                      f"Choose --cache {WIDE_CACHES[0]} or --cache {WIDE_CACHES[1]}.")


def explain_nonfinite(model: "LogitsModel", ids: Sequence[int], cache: "KVCache | None" = None,
                      slot: int = 0) -> InputError:
    """Error for logits with NaN or infinity; it names the first layer whose outputs are not finite.

    Args:
        model: the model.
        ids: token ids up to the position of the logits.
        cache: KV cache that was used, if any, whose `slot` holds `ids`.
        slot: slot of the sequence.
    """
    layer = first_nonfinite_layer(model, ids)
    if layer is not None:
        return _layer_error(model, layer)
    block = None if cache is None else nonfinite_cache_block(cache, slot, 0, len(ids))
    if block is not None:
        return cache_overflow(model, block)
    return InputError("the model's logits hold NaN or infinity, but no layer does in a pass without KV cache",
                      "Try --cache float32 and --precision exact.")


@torch.inference_mode()
def first_nonfinite_layer(model: "LogitsModel", ids: Sequence[int]) -> str | None:
    """Name of the first layer whose outputs for token ids (T,) contain NaN or infinity; None if all are finite."""
    row = torch.tensor(list(ids), device=model.device)
    return next((name for name, output in _outputs(model, row) if not output.isfinite().all()), None)


def _outputs(model: "LogitsModel", ids: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The names of embedding, blocks, last norm and lm_head with their outputs for ids (T,), in execution order."""
    decoder, arch = model.decoder, model.decoder_config.dimensions.arch
    if isinstance(decoder, TransformersDecoder):
        yield from decoder.layer_outputs(ids)
        return
    yield arch.modules_before[0], decoder.embedding(ids)
    x = decoder.embed(ids)
    yield arch.modules_before[-1], x
    attention = UncachedAttention(decoder.attention_config, 1, len(ids), model.device, model.dtype)
    blocks: Sequence[Callable[[Tensor, Attention, int], Tensor]] = decoder.blocks
    for index, block in enumerate(blocks):
        x = block(x, attention, index)
        yield _block_name(model, index), x
    x = decoder.norm(x)
    yield arch.modules_after[-1], x
    yield LM_HEAD, decoder.head(x[-1:])


def _block_name(model: "LogitsModel", index: int) -> str:
    return f"{model.decoder_config.dimensions.arch.blocks}.{index}"


def _layer_error(model: "LogitsModel", layer: str) -> InputError:
    cause = f"the outputs of {layer} hold NaN or infinity"
    tensor = _nonfinite_tensor(model, layer)
    if tensor is not None:
        return InputError(f"{cause}, because tensor {tensor} of {model.path} does",
                          "The checkpoint is damaged: download it or quantize the model again.")
    if model.dtype is torch.float16:
        return InputError(f"{cause}, because activations exceed the range of float16", "Choose --precision exact.")
    return InputError(cause, "The weights are finite but far too large: download or quantize the model again.")


def _nonfinite_tensor(model: "LogitsModel", layer: str) -> str | None:
    """Name of a tensor in the file that belongs to a layer and contains NaN or infinity, if any."""
    try:
        reader = CheckpointReader(model.path)
        names = [name for name in reader if name.startswith(f"{layer}.")]
        if layer == LM_HEAD and not names:  # tied
            names = [f"{reader.arch.modules_before[0]}.weight"]
        return next((name for name in names if reader.dtype(name).is_floating_point
                     and not all(chunk.isfinite().all() for chunk in reader.chunks(name))), None)
    except (GptqBelleError, OSError):  # the files have been moved since the model was loaded
        return None
