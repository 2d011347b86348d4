"""A loaded model: logits, generation and streaming, on decoders of our own with a cache that is written in place."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gptq_belle.checkpoint.directory import load_tokenizer
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.errors import UsageError
from gptq_belle.models.bloom import Bloom
from gptq_belle.models.llama import Llama
from gptq_belle.models.settings import Settings, read_settings, token_ids
from gptq_belle.runtime.attention import Decode, Prefill, Whole
from gptq_belle.runtime.cache import Cache, check_kind
from gptq_belle.runtime.chat import TextStream, Turn, detect_style, render, style_named
from gptq_belle.runtime.head import check_head_bits
from gptq_belle.runtime.loader import choose_dtype, resolve_device, resolve_precision
from gptq_belle.runtime.sampling import SamplingParams
from gptq_belle.runtime.weights import Weights

if TYPE_CHECKING:
    from gptq_belle.runtime.slots import Engine

USUAL_CAPACITY = 2048  # tokens that a cache for single answers has room for, where the context is not shorter
MOST_NEW_TOKENS = 512  # where the caller sets no limit
CHUNK = 512  # tokens of a prompt that are read at a time: activations of so many rows are what a prompt takes
DECODERS: dict[str, type[Bloom] | type[Llama]] = {"bloom": Bloom, "llama": Llama, "mistral": Llama, "qwen2": Llama}


def load(path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None, precision: str | None = None,
         cache: str = "float16", head_bits: int | None = None) -> "Model":
    """Load a model directory, quantized (standard GPTQ, of any producer) or not.

    Weights are read one by one, straight to their device and layout; no full-precision model is built.

    Args:
        path: a Hugging Face directory; without a tokenizer, everything that takes token ids still works.
        device: "auto", "cpu" or "cuda:0".
        dtype, precision: as `runtime.loader.hf_model`.
        cache: what keys and values are kept in: "float16", "float32", "bfloat16" or "int8".
        head_bits: of the head, and of the embedding where the two are tied: 16, 8 or 4, rounded while loading. Left
            out, 8 where they are tied and the model is quantized, else 16: the dtype of activations.
    Raises:
        InputError: files that are missing, damaged, or do not fit together; the tensor or the key is named.
        UsageError, HardwareError: as `runtime.loader.hf_model`; an unknown kind of cache, or number of bits.
    """
    check_head_bits(head_bits)
    target = resolve_device(device)
    precision = resolve_precision(precision, target)
    dtype = choose_dtype(dtype, target, precision)
    check_kind(cache)
    reader = CheckpointReader(path)
    settings = read_settings(reader.config)
    eos = settings.eos | _generation_eos(reader)
    weights = Weights(reader, target, dtype, precision, head_bits)
    decoder = DECODERS[settings.sizes.model_type](weights, settings)
    weights.check_all_used()
    return Model(decoder, settings, reader, weights, cache, eos)


class Session:
    """Rows of equal length that were read together, with their keys and values."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.length = 0


class Model:
    """A model that answers.

    Attributes:
        decoder: of `gptq_belle.models`.
        settings: what config.json says about it.
        path: the directory it came from.
        config: config.json as a dictionary.
        device: where it lives.
        dtype: of its activations.
        context: the most tokens that prompt and answer may have together; None where the configuration does not say.
        eos_ids: tokens that end an answer.
        weight_bytes: of all weights as they lie in memory.
        step_bytes: of those that a step of decoding reads whole: all but an embedding that is not also the head.
    """

    def __init__(self, decoder: Bloom | Llama, settings: Settings, reader: CheckpointReader, weights: Weights,
                 cache: str, eos: frozenset[int]) -> None:
        self.decoder, self.settings, self.path, self.config = decoder, settings, reader.path, reader.config
        self.device, self.dtype, self.cache_kind, self.eos_ids = weights.device, weights.dtype, cache, eos
        self.context = settings.context
        self._single: Engine | None = None
        self.weight_bytes = weights.nbytes
        self.step_bytes = weights.nbytes - decoder.embedding.extra_bytes

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The directory's tokenizer.

        Raises:
            InputError: it has none.
        """
        return load_tokenizer(self.path)

    @cached_property
    def prompt_style(self) -> str:
        """The wording of prompts that suits the model: a key of `runtime.chat.STYLES`."""
        return detect_style(self.config, getattr(self.tokenizer, "chat_template", None))

    @torch.inference_mode()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) float32 of token ids (B, T) int64. Rows that are shorter may be padded behind their end
        with any token: what stands there changes nothing in front of it.

        Raises:
            UsageError: not a matrix, empty, or longer than the context.
        """
        self.check_ids(input_ids)
        rows, length = input_ids.shape
        attend = Whole(self.decoder.heads, rows, length, self.device, self.dtype)
        hidden = self.decoder.hidden(input_ids.to(self.device).flatten(), attend)
        return self.decoder.logits(hidden).float().view(rows, length, -1)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, room: int = MOST_NEW_TOKENS) -> tuple[Tensor, Session]:
        """Read prompts of equal length.

        Args:
            input_ids: (B, T) int64.
            room: for how many tokens behind them; the context may leave less.
        Returns:
            logits (B, V) float32 behind the last token, and what `decode` continues.
        Raises:
            UsageError: as `logits`.
            HardwareError: no memory for the cache.
        """
        self.check_ids(input_ids)
        rows, length = input_ids.shape
        capacity = length + room if self.context is None else min(length + room, self.context)
        session = Session(self.new_cache(rows, capacity))
        session.length = length
        ids = input_ids.to(self.device)
        return torch.cat([self.read(ids[row], session.cache, row) for row in range(rows)]), session

    @torch.inference_mode()
    def decode(self, tokens: Tensor, session: Session) -> Tensor:
        """Logits (B, V) float32 behind one more token a row, tokens (B,) int64.

        Raises:
            UsageError: there is no room for it.
        """
        if session.length >= session.cache.capacity:
            raise UsageError(f"{session.length + 1} tokens do not fit into a cache of {session.cache.capacity}",
                             "Ask for fewer new tokens.")
        slots = list(range(len(tokens)))
        logits = self.step(tokens.to(self.device), session.cache, slots, [session.length] * len(slots))
        session.length += 1
        return logits

    def new_cache(self, slots: int, capacity: int) -> Cache:
        """An empty cache for so many sequences of at most `capacity` tokens; raises HardwareError without memory."""
        sizes = self.settings.sizes
        return Cache(sizes.blocks, slots, sizes.kv_heads, capacity, sizes.head_dim, self.cache_kind, self.device)

    def read(self, ids: Tensor, cache: Cache, slot: int, start: int = 0) -> Tensor:
        """Read ids (T,) behind the first `start` tokens of a slot, CHUNK at a time: logits (1, V) float32."""
        for at in range(0, len(ids), CHUNK):
            chunk = ids[at : at + CHUNK]
            attend = Prefill(self.decoder.heads, cache, slot, start + at, len(chunk), self.dtype)
            hidden = self.decoder.hidden(chunk, attend)
        return self.decoder.logits(hidden[-1:]).float()

    def step(self, tokens: Tensor, cache: Cache, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Logits (n, V) float32 behind one more token (n,) in each of some slots that hold `lengths` tokens so far."""
        attend = Decode(self.decoder.heads, cache, slots, lengths, self.dtype)
        return self.decoder.logits(self.decoder.hidden(tokens, attend)).float()

    def generate(self, prompt: str | Sequence[int] | Tensor, *, prompt_style: str | None = None,
                 **sampling: Any) -> str:
        """The answer to a prompt, or its continuation; see `stream`."""
        return "".join(self.stream(prompt, prompt_style=prompt_style, **sampling))

    def stream(self, prompt: str | Sequence[int] | Tensor, *, prompt_style: str | None = None,
               **sampling: Any) -> Iterator[str]:
        """The same in pieces, each as soon as it is certain.

        Args:
            prompt: text, or token ids that are taken as they are.
            prompt_style: None continues the text; "auto" or a key of `runtime.chat.STYLES` takes it as a question,
                wraps it, and ends the answer where the model runs on into the next question.
            sampling: fields of `runtime.sampling.SamplingParams`.
        Raises:
            UsageError: before the first piece: a wrong option, an empty prompt, one that the context cannot hold.
            InputError: text is needed and the directory has no tokenizer.
        """
        params = SamplingParams(**sampling)
        ids, stops = self._encode(prompt, prompt_style)
        room = self._room(len(ids), params.max_new_tokens)
        return self._text(self.tokens(ids, room, params), (*params.stop, *stops))

    def tokens(self, ids: Sequence[int], count: int, params: SamplingParams) -> Iterator[int]:
        """Draw up to `count` tokens behind `ids`; ends in front of eos unless `params.ignore_eos`. What an earlier call
        read of the same beginning is not read again."""
        engine = self._engine(len(ids) + count)
        request = engine.submit(ids, replace(params, max_new_tokens=count))
        try:
            while request.finished is None:
                yield from (event.token for event in engine.step() if event.token is not None)
        finally:
            engine.cancel(request)

    def _engine(self, length: int) -> "Engine":
        """One slot for `length` tokens, made anew where the last one is too short."""
        from gptq_belle.runtime.slots import Engine

        if self._single is None or self._single.capacity < length or not self._single.idle:
            self._single = None
            self._single = Engine(self, 1, max(length, min(self.context or USUAL_CAPACITY, USUAL_CAPACITY)))
        return self._single

    def _text(self, tokens: Iterator[int], stops: Sequence[str]) -> Iterator[str]:
        tokenizer = self.tokenizer
        text = TextStream(lambda ids: str(tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)), stops)
        for token in tokens:
            if piece := text.feed([token]):
                yield piece
            if text.stopped:
                return
        if piece := text.finish():
            yield piece

    def _encode(self, prompt: str | Sequence[int] | Tensor,
                prompt_style: str | None) -> tuple[list[int], Sequence[str]]:
        """Token ids of a prompt, and the stop strings that its style brings."""
        if not isinstance(prompt, str):
            ids = prompt.flatten().tolist() if isinstance(prompt, Tensor) else list(prompt)
            return ids, ()
        if prompt_style is None:
            return self.tokenizer(prompt)["input_ids"], ()
        name = self.prompt_style if prompt_style == "auto" else prompt_style
        style = style_named(name)
        text = render([Turn(prompt)], name, self.tokenizer.eos_token)
        return self.tokenizer(text, add_special_tokens=style.special_tokens)["input_ids"], style.stops

    def _room(self, length: int, asked: int | None) -> int:
        """How many tokens to generate behind a prompt of `length`."""
        room = MOST_NEW_TOKENS if self.context is None else self.context - length
        if room < max(1, asked or 1) and self.context is not None:
            wanted = f" and {asked} new ones" if asked else " and an answer"
            raise UsageError(f"a prompt of {length} tokens{wanted} do not fit into this model's {self.context}",
                             "Shorten the prompt, or ask for fewer new tokens.")
        return asked or min(room, MOST_NEW_TOKENS)

    def check_ids(self, input_ids: Tensor) -> None:
        """Raises UsageError where token ids (B, T) are no filled matrix, too many for the context, or unknown."""
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise UsageError(f"token ids of shape {tuple(input_ids.shape)} cannot be run", "Give (rows, tokens).")
        if self.context is not None and input_ids.shape[1] > self.context:
            raise UsageError(f"{input_ids.shape[1]} tokens are more than this model's context of {self.context}",
                             "Give fewer tokens.")
        low, high, vocabulary = int(input_ids.min()), int(input_ids.max()), self.settings.sizes.vocabulary
        if low < 0 or high >= vocabulary:
            raise UsageError(f"token ids {low}..{high} are not all in the vocabulary of {vocabulary}",
                             "The tokenizer belongs to another model.")


def _generation_eos(reader: CheckpointReader) -> frozenset[int]:
    path = reader.path / "generation_config.json"
    return token_ids(read_json(path), "eos_token_id") if path.is_file() else frozenset()
