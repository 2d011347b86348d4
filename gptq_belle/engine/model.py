"""A loaded model: logits, generation and streaming, on decoders of our own with a cache that is written in place."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Unpack, cast, overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gptq_belle.checkpoint.hub import resolve_model_path
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.common.devices import choose_dtype, resolve_device, resolve_precision
from gptq_belle.common.memory import trim_heap
from gptq_belle.engine.batching import Engine, new_token_limit
from gptq_belle.engine.bloom import Bloom
from gptq_belle.engine.kv_cache import check_cache_dtype
from gptq_belle.engine.llama import Llama
from gptq_belle.engine.lm_head import check_head_bits
from gptq_belle.engine.logits_model import LogitsModel
from gptq_belle.engine.sampling import SamplingOptions, SamplingParams, sampling_params
from gptq_belle.engine.weight_loader import WeightLoader
from gptq_belle.errors import UsageError
from gptq_belle.models.decoder_config import read_decoder_config, token_ids
from gptq_belle.prompts.stop_strings import TextStream
from gptq_belle.prompts.styles import Turn, detect_style, get_style, render_conversation

DEFAULT_CAPACITY = 2048  # tokens that a cache for single answers has room for, where the context is not shorter
MAX_BATCH = 8  # prompts of one list that are answered at a time
Prompt = str | Sequence[int] | Tensor  # text, or token ids (T,)
DECODERS: dict[str, type[Bloom] | type[Llama]] = {"bloom": Bloom, "llama": Llama, "mistral": Llama, "qwen2": Llama}


def load(path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None, precision: str | None = None,
         cache: str = "float16", head_bits: int | None = None) -> "Model":
    """Load a model directory, quantized (standard GPTQ, of any producer) or not.

    Weights are read one by one, straight to their device and layout; no full-precision model is built.

    Args:
        path: a Hugging Face directory, a hub id, or a name that `gptq-belle models` lists; without a tokenizer,
            everything that takes token ids still works.
        device: "auto", "cpu" or "cuda:0".
        dtype, precision: as `engine.hf_model.hf_model`.
        cache: what keys and values are kept in: "float16", "float32", "bfloat16" or "int8".
        head_bits: of the head, and of the embedding where the two are tied: 16, 8 or 4, rounded while loading. Left
            out, 8 where they are tied and the model is quantized, else 16: the dtype of activations.
    Raises:
        InputError: files that are missing, damaged, or do not fit together; the tensor or the key is named.
        UsageError, HardwareError: as `engine.hf_model.hf_model`; an unknown kind of cache, or number of bits.
    """
    check_head_bits(head_bits)
    target = resolve_device(device)
    precision = resolve_precision(precision, target)
    dtype = choose_dtype(dtype, target, precision)
    check_cache_dtype(cache)
    reader = CheckpointReader(resolve_model_path(path))
    decoder_config = read_decoder_config(reader.config)
    eos = decoder_config.eos | _generation_eos(reader)
    weights = WeightLoader(reader, target, dtype, precision, head_bits)
    decoder = DECODERS[decoder_config.dimensions.model_type](weights, decoder_config)
    weights.check_all_used()
    trim_heap()  # of LLaMA-7B, 90 MB that were freed while loading would stay
    return Model(decoder, decoder_config, reader, weights, cache, eos)


class Model(LogitsModel):
    """A model that answers: `LogitsModel` with a tokenizer and the wording of its prompts."""

    _single: Engine | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The directory's tokenizer; its end of a sequence ends answers, too, whatever config.json says.

        Raises:
            InputError: it has none.
        """
        found = load_tokenizer(self.path)
        self.eos_ids |= {found.eos_token_id}
        return found

    @cached_property
    def prompt_style(self) -> str:
        """The wording of prompts that suits the model: a key of `prompts.styles.STYLES`."""
        return detect_style(self.config, getattr(self.tokenizer, "chat_template", None))

    def __repr__(self) -> str:
        kind, context = self.config.get("model_type"), self.context
        bits = (f"dtype={str(self.dtype).removeprefix('torch.')!r}" if self.quantization is None else
                f"bits={self.quantization.bits}, group_size={self.quantization.group_size}")
        return f"Model(path={str(self.path)!r}, architecture={kind!r}, {bits}, device={str(self.device)!r}, {context=})"

    @overload
    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None, *,
                 prompt_style: str | None = None, **options: Unpack[SamplingOptions]) -> str: ...

    @overload
    def generate(self, prompt: list[str] | tuple[str, ...] | Sequence[Sequence[int]] | Sequence[Tensor],
                 params: SamplingParams | None = None, *, prompt_style: str | None = None,
                 **options: Unpack[SamplingOptions]) -> list[str]: ...

    @overload
    def generate(self, prompt: Tensor, params: SamplingParams | None = None, *, prompt_style: str | None = None,
                 **options: Unpack[SamplingOptions]) -> str | list[str]: ...

    def generate(self, prompt: Prompt | Sequence[Prompt], params: SamplingParams | None = None, *,
                 prompt_style: str | None = None, **options: Unpack[SamplingOptions]) -> str | list[str]:
        """The answer to a prompt, or the answers to several, which are generated together.

        Args:
            prompt: text, or token ids (T,), used without changes; or a list of these, or token ids (B, T).
            params, prompt_style, options: as in `stream`.
        Returns:
            the answer; a list of answers, in order, for several prompts. On a CPU each is the one that its prompt gets
            alone.
        Raises:
            UsageError, InputError: as `stream`, for any of the prompts, before anything is generated.
            HardwareError: no memory for the keys and values of several prompts.
        """
        prompts = _several(prompt)
        if prompts is not None:
            return self._generate_batch(prompts, prompt_style, sampling_params(params, **options))
        return "".join(self.stream(cast(Prompt, prompt), params, prompt_style=prompt_style, **options))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, prompt_style: str | None = None,
               **options: Unpack[SamplingOptions]) -> Iterator[str]:
        """The answer to one prompt in pieces, each as soon as it can no longer change.

        Args:
            prompt: text, or token ids (T,), used without changes.
            params: how to sample; None is greedy decoding.
            prompt_style: None continues the text; "auto" or a key of `prompts.styles.STYLES` wraps it as a question
                and ends the answer where the model runs on into the next question.
            options: fields of `SamplingParams` that replace those of `params`.
        Raises:
            UsageError: before the first piece: an unknown or wrong option, an empty prompt, one that the context
                cannot hold.
            InputError: text is needed and the directory has no tokenizer.
        """
        params = sampling_params(params, **options)
        ids, stops = self._encode(prompt, prompt_style)
        room = new_token_limit(len(ids), params.max_new_tokens, self.context)
        return self._text(self.tokens(ids, room, params), (*params.stop, *stops))

    def _generate_batch(self, prompts: Sequence[Prompt], prompt_style: str | None, params: SamplingParams) -> list[str]:
        encoded = [self._encode(prompt, prompt_style) for prompt in prompts]
        rooms = [new_token_limit(len(ids), params.max_new_tokens, self.context) for ids, _ in encoded]
        capacity = max(len(ids) + room for (ids, _), room in zip(encoded, rooms, strict=True))
        engine = Engine(self, min(len(prompts), MAX_BATCH), capacity)
        streams = {engine.submit(ids, replace(params, max_new_tokens=room)): self._text_stream((*params.stop, *stops))
                   for (ids, stops), room in zip(encoded, rooms, strict=True)}
        answers = dict.fromkeys(streams, "")
        while not engine.idle:
            for request, token, *_ in engine.step():
                if token is not None:
                    answers[request] += streams[request].feed([token])
                if streams[request].stopped:
                    engine.cancel(request)
        return [answer + streams[request].finish() for request, answer in answers.items()]

    def tokens(self, ids: Sequence[int], count: int, params: SamplingParams) -> Iterator[int]:
        """Generate up to `count` tokens after `ids`; stops before eos unless `params.ignore_eos`. A prefix that an
        earlier call prefilled is reused."""
        engine = self._engine(len(ids) + count)
        request = engine.submit(ids, replace(params, max_new_tokens=count))
        try:
            while request.finished is None:
                yield from (event.token for event in engine.step() if event.token is not None)
        finally:
            engine.cancel(request)

    def _engine(self, length: int) -> Engine:
        """One slot for `length` tokens, created again if the last one is too short."""
        if self._single is None or self._single.capacity < length or not self._single.idle:
            self._single = None
            self._single = Engine(self, 1, max(length, min(self.context or DEFAULT_CAPACITY, DEFAULT_CAPACITY)))
        return self._single

    def _text_stream(self, stops: Sequence[str]) -> TextStream:
        tokenizer = self.tokenizer
        return TextStream(lambda ids: str(tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)), stops)

    def _text(self, tokens: Iterator[int], stops: Sequence[str]) -> Iterator[str]:
        text = self._text_stream(stops)
        for token in tokens:
            if piece := text.feed([token]):
                yield piece
            if text.stopped:
                return
        if piece := text.finish():
            yield piece

    def _encode(self, prompt: Prompt, prompt_style: str | None) -> tuple[list[int], Sequence[str]]:
        """Token ids of a prompt, and the stop strings that its style brings."""
        if not isinstance(prompt, str):
            try:
                return [index(token) for token in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)], ()
            except TypeError as error:
                raise UsageError("a prompt is neither text nor a sequence of token ids",
                                 "Give text, token ids (T,), or to generate a list of these.") from error
        if prompt_style is None:
            return self.tokenizer(prompt)["input_ids"], ()
        name = self.prompt_style if prompt_style == "auto" else prompt_style
        style = get_style(name)
        text = render_conversation([Turn(prompt)], name, self.tokenizer.eos_token)
        return self.tokenizer(text, add_special_tokens=style.special_tokens)["input_ids"], style.stops


def _several(prompt: Prompt | Sequence[Prompt]) -> Sequence[Prompt] | None:
    """The prompts where there are several; None for one."""
    if isinstance(prompt, Tensor):
        return list(prompt) if prompt.dim() == 2 else None
    several = not isinstance(prompt, str) and any(isinstance(item, str | Sequence | Tensor) for item in prompt)
    return cast(Sequence[Prompt], prompt) if several else None


def _generation_eos(reader: CheckpointReader) -> frozenset[int]:
    path = reader.path / "generation_config.json"
    return token_ids(read_json(path), "eos_token_id") if path.is_file() else frozenset()
