"""Structured output: a grammar decides which tokens may come next. llguidance computes the set of them.

Chosen because it takes the tokenizer.json of byte-level BPE and of SentencePiece, reports errors of grammars and limits
of their size as values, and releases Python's lock while it works.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.errors import GptqBelleError, HardwareError, UsageError
from gptq_belle.prompts.tool_calls import CallForm, Tool

# Without it a weak model can write spaces until the length limit.
JSON_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def call_grammar(form: CallForm, tools: Sequence[Tool], required: bool) -> str:
    """The grammar, in llguidance's Lark, of answers that call one of the tools with arguments of its schema.

    Args:
        form: how calls are written.
        tools: in the form of OpenAI's API.
        required: whether an answer must be a call. Otherwise it is text, with or without a call at its end.
    """
    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False) if text else ""

    def schema(tool: Tool) -> str:
        return json.dumps({**(tool["function"].get("parameters") or NO_PARAMETERS), "x-guidance": JSON_FORM})

    calls = " | ".join(f"{quoted(tool['function']['name'] + form.between)} %json {schema(tool)}" for tool in tools)
    lines = ["%llguidance {}", f"called: {calls}", f"call: opening called {quoted(form.after)}"]
    if required:
        return "\n".join([*lines, f"opening: {quoted(form.before)}", "start: call"])
    rest = form.before.partition(form.trigger)[2]
    return "\n".join([*lines, "TEXT: /(?s:.*)/", f"trigger[lazy]: TEXT {quoted(form.trigger)}",
                      f"opening: trigger {quoted(rest)}", "start: call | TEXT"])


class TokenConstraint:
    """The state of one constrained answer.

    Args:
        matcher: llguidance's LLMatcher.
        vocabulary: number of token ids.
    """

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._bits = numpy.zeros(-(-vocabulary // 32), numpy.int32)

    def copy(self) -> "TokenConstraint":
        """A constraint for another answer, in the same state."""
        return TokenConstraint(self._matcher.deep_copy(), self._vocabulary)

    def advance(self) -> GptqBelleError | None:
        """Compute the set of tokens that may come next; returns why that is not possible."""
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if not self._matcher.is_error():
            return None
        return UsageError(f"the answer cannot follow its grammar: {_first_line(self._matcher.get_error())}",
                          "Use a simpler grammar or schema.")

    def excluded(self) -> Tensor:
        """Which tokens may not come next, as `advance` computed it: (V,) bool on the CPU."""
        bits = numpy.unpackbits(self._bits.view(numpy.uint8), count=self._vocabulary, bitorder="little")
        return torch.from_numpy(bits == 0)

    def accept(self, token: int) -> None:
        """Continue after a token. One that the grammar does not contain ends the answer, or `advance` reports it."""
        self._matcher.consume_token(token)


class ConstraintCompiler:
    """Compiles the grammars of one model.

    Args:
        tokenizer: a transformers tokenizer.
        vocabulary: number of token ids of the model.
        ends: tokens that end an answer.
    Raises:
        HardwareError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Iterable[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise HardwareError("structured output needs a package that is not installed: llguidance",
                                "Install it: pip install 'gptq-belle[structured]'") from error
        self._llguidance, self._vocabulary = llguidance, vocabulary
        self._tokenizer = llguidance.LLTokenizer(tokenizer.backend_tokenizer.to_str(), n_vocab=vocabulary,
                                                 eos_token=sorted(ends))

    def __call__(self, params: SamplingParams) -> TokenConstraint:
        """Compile the grammar of an answer.

        Raises:
            UsageError: the schema, expression or grammar is not valid or not supported.
        """
        kind, value = params.structure
        try:
            matcher = self._llguidance.LLMatcher(self._tokenizer, self._grammar(kind, value), log_level=0)
        except (ValueError, RecursionError) as error:  # before llguidance's own check
            raise _invalid(kind, str(error)) from error
        if matcher.is_error():
            raise _invalid(kind, matcher.get_error())
        return TokenConstraint(matcher, self._vocabulary)

    def _grammar(self, kind: str, value: Any) -> str:
        matcher = self._llguidance.LLMatcher
        if kind == "json_schema":
            return str(matcher.grammar_from_json_schema(json.dumps(value), overrides=JSON_FORM))
        if kind == "regex":
            return str(matcher.grammar_from_regex(value))
        if kind == "choice":
            options = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
            return str(matcher.grammar_from_lark(f"start: {options}"))
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            return str(matcher.grammar_from_lark(any_to_lark(value)))
        except Exception as error:  # the converter raises Exception itself
            raise _invalid(kind, str(error)) from error


def _invalid(kind: str, reason: str) -> UsageError:
    return UsageError(f"{kind}: {_first_line(reason)}", "Correct it, or leave out what is not supported.")


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["not valid"])[0][:300]
