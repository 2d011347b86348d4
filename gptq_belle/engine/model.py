"""Load a model, and generate text from prompts, whole or as a stream."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Unpack, cast, overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gptq_belle.checkpoint.config_files import GENERATION, repaired_generation_config
from gptq_belle.checkpoint.hub import resolve_model_path
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.checkpoint.validation import check_model
from gptq_belle.common.devices import choose_dtype, resolve_device, resolve_precision
from gptq_belle.common.memory import parse_memory, trim_heap
from gptq_belle.engine.batching import Engine
from gptq_belle.engine.bloom import Bloom
from gptq_belle.engine.kv_cache import check_cache_dtype
from gptq_belle.engine.llama import Llama
from gptq_belle.engine.lm_head import check_head_bits
from gptq_belle.engine.logits_model import LogitsModel
from gptq_belle.engine.prefix_cache import PrefixCache
from gptq_belle.engine.prompt_arguments import check_prompt, new_token_limit, split_prompts
from gptq_belle.engine.sampling_params import SamplingOptions, SamplingParams, sampling_params
from gptq_belle.engine.slots import Event
from gptq_belle.engine.token_constraint import ConstraintCompiler, TokenConstraint
from gptq_belle.engine.transformers_decoder import TransformersDecoder
from gptq_belle.engine.weight_loader import WeightLoader
from gptq_belle.errors import UsageError
from gptq_belle.models.decoder_config import read_decoder_config, token_ids
from gptq_belle.models.sizes import QUERY_BLOCK
from gptq_belle.prompts.conversation import ChatFormat
from gptq_belle.prompts.stop_strings import TextStream
from gptq_belle.prompts.styles import detect_style

DEFAULT_CAPACITY = 2048  # tokens of the cache for a single prompt, unless the context is shorter
MAX_BATCH = 8  # prompts of a list that are generated at a time
Prompt = str | Sequence[int] | Tensor  # text, or token ids (T,)
NATIVE: dict[str, type[Bloom] | type[Llama]] = {"bloom": Bloom, "llama": Llama}  # by `Family.native`


def load(path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None, precision: str | None = None,
         cache: str = "float16", head_bits: int | None = None, context: int | None = None,
         prefix_cache: int | str | None = None,
         progress: Callable[[int, int], None] = lambda done, total: None) -> "Model":
    """Load a model directory: quantized (GPTQ of any tool) or full precision.

    Weights are read one by one, directly to their device and layout; no full-precision model is built.

    Args:
        path: a Hugging Face directory, a hub id, or a name that `gptq-belle models` lists. A tokenizer is needed only
            for text.
        device: "auto", "cpu" or "cuda:0".
        dtype, precision: see `engine.hf_model.hf_model`.
        cache: dtype of the KV cache: "float16", "float32", "bfloat16" or "int8".
        head_bits: bits of the lm_head, and of the embedding if they are tied: 16 (the dtype of activations), 8 or 4;
            it is quantized while it is loaded. Default: 8 for a tied lm_head of a quantized model, else 16.
        context: limit of prompt and answer tokens together; default: the model's context, which it cannot exceed.
        prefix_cache: host memory for keys and values of earlier prompts, in bytes or as a size such as "2GiB". A prompt
            that begins with 64 or more tokens of one of them is not read again. Default: only the last prompt of each
            sequence of the KV cache is reused.
        progress: called with the numbers of loaded blocks and of all.
    Raises:
        InputError: files are missing, damaged or inconsistent; the tensor or key is named.
        UsageError: unknown device, precision, cache or head_bits, an unsupported dtype, too large a context, or too
            small a prefix cache.
        HardwareError: this machine has no such device, or not the memory for the prefix cache.
    """
    check_head_bits(head_bits)
    target = resolve_device(device)
    precision = resolve_precision(precision, target)
    dtype = choose_dtype(dtype, target, precision)
    check_cache_dtype(cache)
    reader = CheckpointReader(resolve_model_path(path))
    decoder_config = read_decoder_config(reader.config)
    if context is not None and not 0 < context <= (decoder_config.context or context):
        raise UsageError(f"a context of {context} tokens is not possible", f"{path} has {decoder_config.context}.")
    eos = decoder_config.eos | _generation_eos(reader)
    weights = WeightLoader(reader, target, dtype, precision, head_bits, progress)
    check_model(reader, weights.quantization)
    native = NATIVE.get(reader.arch.family.native)
    decoder = native(weights, decoder_config) if native else TransformersDecoder(weights)
    trim_heap()  # for LLaMA-7B, returns 90 MB that were freed during loading
    model = Model(decoder, decoder_config, reader, weights, cache, eos)
    model.context = context or model.context
    if prefix_cache is not None:
        size = parse_memory(prefix_cache) if isinstance(prefix_cache, str) else prefix_cache
        model.prefix_cache = PrefixCache(model.new_cache(1, QUERY_BLOCK), size)
    return model


class Model(LogitsModel):
    """A `LogitsModel` with tokenizer and prompt style that generates text."""

    _single: Engine | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the directory. Its eos token ends answers as well as those of config.json.

        Raises:
            InputError: the directory has no tokenizer.
        """
        found = load_tokenizer(self.path)
        self.eos_ids |= {found.eos_token_id}
        return found

    @cached_property
    def _chat_formats(self) -> dict[str, ChatFormat]:
        return {}

    @cached_property
    def prompt_style(self) -> str:
        """Prompt style of the model: a key of `prompts.styles.STYLES`, or "template" for its own chat template."""
        return detect_style(self.config, self.tokenizer.chat_template)

    def chat_format(self, prompt_style: str = "auto") -> ChatFormat:
        """How conversations become prompts. Tokens that end answers in this format end them from now on.

        Args:
            prompt_style: "auto" for the model's own, or a key of `prompts.styles.STYLES`.
        Raises:
            UsageError, InputError: see `prompts.conversation.ChatFormat`.
        """
        name = self.prompt_style if prompt_style == "auto" else prompt_style
        if name not in self._chat_formats:
            self._chat_formats[name] = ChatFormat(self.tokenizer, name)
            self.eos_ids |= self._chat_formats[name].stop_ids
        return self._chat_formats[name]

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
        """Generate the answer to one prompt, or to several prompts as a batch.

        Args:
            prompt: text, or token ids (T,), used without changes; or a list of these, or token ids (B, T).
            params, prompt_style, options: see `stream`.
        Returns:
            The answer, or a list of answers for several prompts. On a CPU, each answer is the same as for the prompt
            alone.
        Raises:
            UsageError, InputError: see `stream`; raised for any of the prompts before generation starts.
            HardwareError: not enough memory for the KV cache of several prompts.
        """
        prompts = split_prompts(prompt)
        if prompts is not None:
            return self._generate_batch(prompts, prompt_style, sampling_params(params, **options))
        return "".join(self.stream(cast(Prompt, prompt), params, prompt_style=prompt_style, **options))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, prompt_style: str | None = None,
               **options: Unpack[SamplingOptions]) -> Iterator[str]:
        """Generate the answer to one prompt, and yield text as soon as it is final.

        Args:
            prompt: text, or token ids (T,), used without changes.
            params: sampling parameters; None for greedy decoding.
            prompt_style: None continues the text; "auto" (the model's chat template or style) or a key of
                `prompts.styles.STYLES` wraps it as a question and ends the answer before the next question.
            options: fields of `SamplingParams` that replace those of `params`.
        Raises:
            UsageError: an unknown or invalid option, an empty prompt, or one that exceeds the context; raised before
                generation starts.
            InputError: text is needed and the directory has no tokenizer; or, during generation, logits contain NaN or
                infinity: the first layer that does is named.
        """
        params = sampling_params(params, **options)
        ids, stops = self._encode(prompt, prompt_style)
        params.check_vocabulary(self.vocabulary_size)
        room = new_token_limit(len(ids), params.max_new_tokens, self.context)
        return self._text(self.tokens(ids, room, params), self._text_stream(_stops(params, stops), params.min_tokens))

    def _generate_batch(self, prompts: Sequence[Prompt], prompt_style: str | None, params: SamplingParams) -> list[str]:
        encoded = [self._encode(prompt, prompt_style) for prompt in prompts]
        rooms = [new_token_limit(len(ids), params.max_new_tokens, self.context) for ids, _ in encoded]
        capacity = max(len(ids) + room for (ids, _), room in zip(encoded, rooms, strict=True))
        engine = Engine(self, min(len(prompts), MAX_BATCH), capacity)
        streams = {}
        for (ids, stops), room in zip(encoded, rooms, strict=True):
            request = engine.submit(ids, _limited(params, room), self.constraint(params))
            streams[request] = self._text_stream(_stops(params, stops), params.min_tokens)
        answers = dict.fromkeys(streams, "")
        while not engine.idle:
            for request, token, *_ in _checked(engine.step()):
                if token is not None:
                    answers[request] += streams[request].feed([token])
                if streams[request].stopped:
                    engine.cancel(request)
        engine.release()
        return [answer + streams[request].finish() for request, answer in answers.items()]

    def tokens(self, ids: Sequence[int], count: int, params: SamplingParams) -> Iterator[int]:
        """Generate up to `count` tokens after `ids`; stops before `params.stop_token_ids`, and before eos unless
        `params.ignore_eos`. A prefix that an earlier call prefilled is reused.

        Raises:
            InputError: logits are not finite.
        """
        engine = self._engine(len(ids) + count)
        request = engine.submit(ids, _limited(params, count), self.constraint(params))
        try:
            while request.finished is None:
                yield from (event.token for event in _checked(engine.step()) if event.token is not None)
        finally:
            engine.cancel(request)

    def constraint(self, params: SamplingParams) -> TokenConstraint | None:
        """The grammar of an answer with these parameters; None without one.

        Raises:
            UsageError: a schema, expression or grammar that is not valid or not supported.
            HardwareError: llguidance is not installed.
        """
        return None if params.structure[1] is None else self._compile_constraint(params)

    @cached_property
    def _compile_constraint(self) -> ConstraintCompiler:
        return ConstraintCompiler(self.tokenizer, self.vocabulary_size, self.eos_ids)

    def _engine(self, length: int) -> Engine:
        """Engine with one slot for `length` tokens; replaced if the capacity of the previous one is too small."""
        if self._single is None or self._single.capacity < length or not self._single.idle:
            if self._single is not None:
                self._single.release()
            self._single = None  # its memory is freed before the next one is allocated
            self._single = Engine(self, 1, max(length, min(self.context or DEFAULT_CAPACITY, DEFAULT_CAPACITY)))
        return self._single

    def _text_stream(self, stops: Sequence[str], min_tokens: int) -> TextStream:
        tokenizer = self.tokenizer
        return TextStream(lambda ids: str(tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)), stops, min_tokens)

    def _text(self, tokens: Iterator[int], text: TextStream) -> Iterator[str]:
        for token in tokens:
            if piece := text.feed([token]):
                yield piece
            if text.stopped:
                return
        if piece := text.finish():
            yield piece

    def _encode(self, prompt: Prompt, prompt_style: str | None) -> tuple[list[int], Sequence[str]]:
        """Token ids of a prompt, and the stop strings of its style."""
        prompt = check_prompt(prompt, self.vocabulary_size)
        if not isinstance(prompt, str):
            return prompt, ()
        if prompt_style is None:
            return self.tokenizer(prompt)["input_ids"], ()
        prepared = self.chat_format(prompt_style).question(prompt)
        return prepared.ids, prepared.stops


def _stops(params: SamplingParams, stops: Sequence[str]) -> tuple[str, ...]:
    """Stop strings of an answer: those of the prompt style do not end one that follows a grammar."""
    return params.stop if params.structure[1] is not None else (*params.stop, *stops)


def _limited(params: SamplingParams, room: int) -> SamplingParams:
    """The parameters of an answer for which there is room for `room` tokens."""
    return replace(params, max_new_tokens=room, min_tokens=min(params.min_tokens, room))


def _checked(events: list[Event]) -> list[Event]:
    """The events of a step; raises the error of a request that cannot be continued."""
    for event in events:
        if event.error is not None:
            raise event.error
    return events


def _generation_eos(reader: CheckpointReader) -> frozenset[int]:
    path = reader.path / GENERATION
    if not path.is_file():
        return frozenset()
    return token_ids(repaired_generation_config(read_json(path), path), "eos_token_id")
