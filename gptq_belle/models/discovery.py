"""Find the structure of a decoder in the module tree that transformers builds from its config.json.

The model is built on the meta device and runs once, without memory or arithmetic, while hooks note which linears share
an input, what runs before and after the blocks, and what a block keeps in the KV cache.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from gptq_belle.errors import GptqBelleError, InputError, one_line
from gptq_belle.models.architectures import LM_HEAD, Architecture, LinearShape, family

# Upper limits on values of config.json, larger than those of any model. They keep a damaged configuration from
# allocating tables of more than a few MB.
LARGEST = {"num_hidden_layers": 1024, "hidden_size": 1 << 17, "intermediate_size": 1 << 19, "vocab_size": 1 << 24,
           "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 1 << 14,
           "max_position_embeddings": 1 << 30}
DROPOUTS = ("attention_dropout", "hidden_dropout")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOKENS = 8  # of the pass that discovers
LEAST_SHARE = 0.95  # of a block's parameters that its linears hold; the rest stays in 16 bits


@lru_cache(maxsize=64)
def _discovered(text: str) -> Architecture:
    config = json.loads(text)
    kind = config["model_type"]
    try:
        return _discover(meta_model(config), kind)
    except GptqBelleError:
        raise
    except Exception as error:  # the code of a model raises anything for values of a wrong type
        raise InputError(f"no {kind} model can be built from config.json: {one_line(error)}",
                         "Correct the value, or install a newer version of transformers.") from error


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Discover the architecture of a config.json; the result of equal configurations is computed once.

    Raises:
        InputError: transformers has no such causal model, or it is one whose blocks this program cannot quantize.
    """
    model_class(config)
    return _discovered(json.dumps({key: value for key, value in config.items() if key != "quantization_config"},
                                  sort_keys=True, default=str))


def model_class(config: Mapping[str, Any]) -> type[PreTrainedModel]:
    """Transformers' causal model of a configuration.

    Raises:
        InputError: there is none, or it is known to be of another kind than a plain decoder.
    """
    kind = config.get("model_type")
    known = CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None
    found: Any = None if known is None else MODEL_FOR_CAUSAL_LM_MAPPING.get(known, None)
    if found is None:
        raise InputError(f"architecture {kind!r} is not supported",
                         "config.json's model_type must be one of which transformers has a causal language model.")
    if any(isinstance(config.get(key), int) and config[key] > 1 for key in EXPERTS):
        raise InputError(f"{kind} is a mixture of experts, which is not supported", "Choose a dense model.")
    if isinstance(config.get("text_config"), dict):
        raise InputError(f"{kind} is a model of several parts, which is not supported",
                         "Save its language model alone, whose config.json has no text_config.")
    return found


def meta_model(config: Mapping[str, Any]) -> PreTrainedModel:
    """Build the causal model of a config.json on the meta device, buffers included.

    Nothing is downloaded, and no code of the model directory is run.

    Raises:
        ValueError: a size is not an integer within bounds; transformers raises anything for other wrong values.
    """
    found = CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(dict(config)))
    if hasattr(found, "quantization_config"):
        del found.quantization_config  # otherwise transformers looks for a quantizer
    found.use_cache = False
    found._attn_implementation = None  # a file can name code on the hub here; use the default
    for name in DROPOUTS:
        setattr(found, name, 0.0)  # only for training; a value outside 0..1 would fail in a forward pass
    for name, most in LARGEST.items():
        value = getattr(found, name, None)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"{name} {str(value)[:40]} is not a whole number from 1 to {most}")
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(found, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def block_list(model: PreTrainedModel) -> str:
    """Path of the list of decoder blocks: the longest list of modules, of several the one with most parameters."""
    sizes = {name: (len(module), sum(p.numel() for p in module.parameters()))
             for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return max(sizes, key=sizes.__getitem__, default="")


class RecordingCache(Cache):
    """An empty KV cache that notes the shapes of keys and values by block."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, list[tuple[int, ...]]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any,
               ) -> tuple[Tensor, Tensor]:
        """Note the shapes of keys and values (B, heads, T, head_dim), and return them."""
        self.shapes.setdefault(layer_idx, []).extend((tuple(key_states.shape), tuple(value_states.shape)))
        return key_states, value_states

    def get_query_offset(self, *_: Any) -> int:
        """Position of the first query."""
        return 0


class _WithoutValues(TorchFunctionMode):
    """Decisions on the values of meta tensors are made as for short prompts, such as in LongRoPE."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))


class _Pass:
    """What hooks note during one forward pass of the model."""

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList) -> None:
        self.calls: dict[int, list[tuple[str, Tensor, Tensor]]] = {}  # by block: linear, input, output
        self.order: list[str] = []  # modules outside of the blocks that hold no others, and "" for a block
        self.attention: dict[str, tuple[str, int]] = {}  # of block 0, after its use of the KV cache: linear -> module
        # that returns its output, and the length of the tuple that it returns
        self.returns_tuple = False
        self.cache = RecordingCache()
        inside = {module for block in blocks for module in block.modules()}
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if module not in inside and (module._parameters or not module._modules):
                    stack.callback(module.register_forward_hook(self._outer(name)).remove)
            for index, block in enumerate(blocks):
                stack.callback(block.register_forward_hook(self._block).remove)
                for name, module in block.named_modules():
                    if isinstance(module, nn.Linear):
                        stack.callback(module.register_forward_hook(self._linear(index, name)).remove)
                    elif index == 0 and name:
                        stack.callback(module.register_forward_hook(self._inner(name)).remove)
            with torch.no_grad(), _WithoutValues(), torch.device("meta"):
                model(torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=True,
                      **{cache_argument(model): self.cache})

    def _outer(self, name: str) -> Any:
        return lambda *_: self.order.append(name)

    def _block(self, _: nn.Module, __: Any, output: Any) -> None:
        self.order.append("")
        self.returns_tuple = isinstance(output, tuple)

    def _linear(self, index: int, name: str) -> Any:
        return lambda _, inputs, output: self.calls.setdefault(index, []).append((name, inputs[0], output))

    def _inner(self, name: str) -> Any:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            last, _input, produced = self.calls[0][-1] if 0 in self.calls else ("", None, None)
            if self.cache.shapes and produced is first and last.startswith(f"{name}."):
                self.attention.setdefault(last, (name, len(output) if isinstance(output, tuple) else 0))

        return note

    def stages(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Linears of a block in execution order, grouped by the tensor that is their input."""
        groups: list[tuple[Tensor, list[str]]] = []
        for name, tensor, _ in self.calls.get(index, []):
            group = next((names for same, names in groups if same is tensor), None)
            if group is None:
                groups.append((tensor, [name]))
            else:
                group.append(name)
        return tuple(tuple(names) for _, names in groups)


def cache_argument(model: PreTrainedModel) -> str:
    """Name of the argument for the KV cache: "cache" in new versions of transformers, "past_key_values" before."""
    code = model.forward
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    return "cache" if "cache" in code.__code__.co_varnames[: code.__code__.co_argcount] else "past_key_values"


def _discover(model: PreTrainedModel, kind: str) -> Architecture:
    path = block_list(model)
    blocks: Any = model.get_submodule(path) if path else nn.ModuleList()
    for name, module in blocks.named_modules():
        if any(word in type(module).__name__.lower() for word in ("moe", "expert", "router")):
            raise InputError(f"{kind} is a mixture of experts ({path}.{name}), which is not supported",
                             "Choose a dense model.")
    try:
        found = _Pass(model, blocks)
    except Exception as error:  # a forward pass that depends on values, or needs more than token ids
        raise _unknown(kind, f"its forward pass cannot be followed ({one_line(error)})") from error
    for reason in _obstacles(found, blocks):
        raise _unknown(kind, reason)
    first, count, known = blocks[0], len(blocks), family(kind)
    shapes = {name: LinearShape(first.get_submodule(name).in_features, first.get_submodule(name).out_features)
              for stage in found.stages(0) for name in stage}
    output, (attention, results) = next(iter(found.attention.items()), ("", ("", 0)))
    if known.residual_attention:
        attention, results = known.residual_attention, 2
        output = [name for name in shapes if name.startswith(f"{attention}.")][-1]
    begin = found.order.index("")
    before = tuple(name for name in dict.fromkeys(found.order[:begin]) if model.get_submodule(name)._parameters)
    after = tuple(name for name in dict.fromkeys(found.order[begin:]) if name not in ("", LM_HEAD))
    tied = bool(model.config.tie_word_embeddings)
    heads = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)
             if name.rpartition(".")[0] in (*before, *after, LM_HEAD)}
    _, kv_heads, _, head_dim = found.cache.shapes[0][0]
    return Architecture(
        model.base_model_prefix, path, before, after, found.stages(0), attention, output, results,
        found.returns_tuple, shapes, _vectors(first, shapes),
        {name: shape for name, shape in heads.items() if not (tied and name == f"{LM_HEAD}.weight")}, count, kv_heads,
        head_dim, tied, known)


def _vectors(block: nn.Module, shapes: Mapping[str, LinearShape]) -> dict[str, tuple[int, ...]]:
    weights = {f"{name}.weight" for name in shapes}
    return {name: tuple(p.shape) for name, p in block.named_parameters() if name not in weights}


def _obstacles(found: _Pass, blocks: nn.ModuleList) -> Iterator[str]:
    """What keeps a decoder from being run and quantized block by block, with linears whose inputs are known."""
    first = found.stages(0)
    names = [name for stage in first for name in stage]
    linears = {name: module for name, module in blocks[0].named_modules() if isinstance(module, nn.Linear)}
    held = sum(module.weight.numel() for module in linears.values())
    if held < LEAST_SHARE * sum(p.numel() for p in blocks[0].parameters()):
        yield "most weights of a block are in other modules than torch.nn.Linear"
    if sorted(names) != sorted(linears):
        yield "a linear of its first block runs never or twice"
    if [name for name in found.order if name == ""] != [""] * len(blocks):
        yield "its blocks do not run once each"
    if any(getattr(module, "is_causal", True) is False for module in blocks.modules()):
        yield "its attention sees later tokens"
    shapes = [{name: p.shape for name, p in block.named_parameters()} for block in blocks]
    if any(found.stages(index) != first or shapes[index] != shapes[0] for index in range(len(blocks))):
        yield "its blocks differ from each other"
    kept = [found.cache.shapes.get(index, []) for index in range(len(blocks))]
    if any(len(both) != 2 or both != kept[0][:1] * 2 for both in kept):
        yield "its blocks keep other state than equal keys and values"


def _unknown(kind: str, reason: str) -> InputError:
    return InputError(f"{kind} is not supported: {reason}", "Only plain decoders can be quantized.")
