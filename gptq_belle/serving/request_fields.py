"""Parameters of OpenAI's API, vLLM and llama.cpp that this server does not implement.

Every parameter is in one place only. Implemented ones are fields of the schemas. The others are in these tables: a
parameter that cannot change an answer is accepted with every value, all others only with the values that mean "off".
Everything else is rejected with the name of the parameter, so that no client takes an ignored option for an effective
one. Null is accepted for every name.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from gptq_belle.serving.api_errors import ApiError


class Unsupported(NamedTuple):
    """A parameter that is accepted only with values that have no effect."""

    neutral: tuple[Any, ...] = ()  # these values
    remedy: str = "Remove it from the request"  # what the client can do instead

    def accepts(self, value: Any) -> bool:
        """Whether a value has no effect; true and 1 are different in JSON, 1 and 1.0 are not."""
        return value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool)
                                    for each in self.neutral)


Table = Mapping[str, Unsupported | None]  # None: accepted with every value


def _without_effect(*names: str) -> Table:
    return dict.fromkeys(names)


def _off(neutral: Iterable[Any], *names: str, remedy: str = "Remove it from the request") -> Table:
    return dict.fromkeys(names, Unsupported(tuple(neutral), remedy))


_COMMON: Table = {
    # Bookkeeping, and caching or speed only
    **_without_effect("user", "metadata", "store", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
                      "safety_identifier", "cache_prompt", "n_cache_reuse", "prediction", "backend_sampling"),
    # True permits several calls in one answer, and does not ask for them: an answer has one at most
    **_without_effect("parallel_tool_calls"),
    # These have an effect only with another parameter, which is rejected
    **_without_effect("dynatemp_exponent", "mirostat_tau", "mirostat_eta", "xtc_threshold",
                      "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers",
                      "adaptive_decay", "repeat_last_n", "guided_decoding_backend", "guided_whitespace_pattern",
                      "grammar_lazy", "grammar_triggers", "preserved_tokens"),
    # No model of this server has reasoning, and special tokens are never shown
    **_without_effect("include_reasoning", "reasoning_format", "reasoning_in_content", "spaces_between_special_tokens"),
    # Sampling
    **_off([0], "dry_multiplier", remedy="Use frequency_penalty"),
    **_off([1], "typical_p", "typ_p", "length_penalty"),
    **_off([0], "mirostat", "dynatemp_range", "xtc_probability", "min_keep", "n_keep", "n_discard",
           "n_indent", "thinking_token_budget"),
    **_off([-1], "top_n_sigma", "adaptive_target"),
    **_off([-1, 0], "t_max_predict_ms"),
    **_off([[]], "samplers", "bad_words", "allowed_token_ids", "logits_processors", "logprob_token_ids"),
    **_off([""], "sampler_seq"),
    **_off([False], "use_beam_search", "watermarking"),
    **_off([0, 1], "best_of", remedy="Use n, and choose among the answers"),
    **_off([1], "n_cmpl", remedy="Use n"),
    **_off([""], "stop_sequence", remedy="Use stop"),
    **_off([False], "include_stop_str_in_output"),
    **_off([True], "skip_special_tokens"),
    **_off([], "n_predict", "max_new_tokens", "max_length", remedy="Use max_tokens"),
    # Constrained answers
    **_off([{}, "", []], "structural_tag", remedy="Use response_format with a JSON schema"),
    # Form of the response
    **_off([0], "n_probs", remedy="Use logprobs"),
    **_off([False], "return_tokens_as_token_ids", "return_token_ids", "return_tokens", "timings_per_token",
           "return_progress", "post_sampling_probs", "verbose", "__verbose", "return_prompt_text"),
    **_off([[]], "response_fields"),
    **_off([], "prompt_logprobs", remedy="Use echo and logprobs with /v1/completions"),
    **_off([""], "request_id"),
    # The prompt and the model
    **_off([], "truncate_prompt_tokens", remedy="Shorten the prompt"),
    **_without_effect("truncation_side", "session_id"),
    **_off([{}, []], "mm_processor_kwargs", "media_io_kwargs", "image_data", "multimodal_data",
           remedy="Only text is supported"),
    **_off([[]], "lora", remedy="Merge the adapter into the model before quantization"),
    **_off([-1], "id_slot"),
    **_off([0], "priority", "sse_ping_interval"),
    **_off(["auto", "default"], "service_tier"),
    **_off([1], "stream_interval"),
    **_off(["", {}], "cache_salt", "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "repetition_detection",
           "moderation"),
}
_TEMPLATE: Table = {
    **_off([False], "prefill_assistant", remedy="Use continue_final_message"),
    **_off([""], "chat_template", remedy="Put the template into chat_template.jinja of the model directory"),
    **_off([{}], "chat_template_kwargs"),
    **_off([[]], "documents", remedy="Put the documents into a message"),
    **_off([[]], "functions", remedy="Use tools"),
    **_off(["none", "auto"], "function_call", remedy="Use tool_choice"),
}
CHAT: Table = {
    **_COMMON, **_TEMPLATE,
    **_off([""], "prompt", "suffix", remedy="Use /v1/completions"),
    **_off([False], "echo", remedy="Use /v1/completions"),
    **_off([-1], "n_predict", remedy="Use max_tokens"),
    **_off([False], "add_special_tokens", remedy="The prompt style of the model adds them"),
    **_off([["text"], []], "modalities", remedy="Only text is supported"),
    **_off([{}], "audio", remedy="Only text is supported"),
    **_off(["none"], "reasoning_effort", remedy="The models of this server do not reason before the answer"),
    **_off([0, -1], "reasoning_budget_tokens", "thinking_budget_tokens"),
    **_off([False], "thinking_forced_open", "enable_thinking"),
    **_off([True], "parse_tool_calls"),
    **_off(["medium"], "verbosity", remedy="Describe the length in the prompt"),
    **_off([], "web_search_options", remedy="This server does not search the web"),
}
COMPLETION: Table = {
    **_COMMON,
    **_off(["", []], "suffix", "input_prefix", "input_suffix", "input_extra",
           remedy="Text cannot be inserted: put everything before the answer into prompt"),
    **_off([[]], "messages", "tools", remedy="Use /v1/chat/completions"),
    **_off([True], "add_generation_prompt", remedy="Use /v1/chat/completions"),
    **_off([False], "continue_final_message", remedy="Use /v1/chat/completions"),
    **_off([0], "top_logprobs", remedy="Use logprobs with the number of tokens"),
    **_off([], "max_completion_tokens", remedy="Use max_tokens"),
    **_off([""], "prompt_embeds", remedy="Use prompt"),
    **_off([True], "add_special_tokens", remedy="Use /tokenize, and token ids as the prompt"),
}
MESSAGE: Table = {
    # Not part of a prompt of these models
    **_without_effect("name", "refusal", "annotations", "reasoning", "reasoning_content", "reasoning_details",
                      "cache_control", "id"),
    **_off([[], {}], "function_call", remedy="Use tool_calls"),
    **_off([{}], "audio", remedy="Only text is supported"),
    **_off([False], "prefix", "partial", remedy="Use continue_final_message"),
}
TEXT_PART: Table = {**_without_effect("cache_control", "annotations"), **_off([False], "prompt_cache_breakpoint")}
TOOL: Table = {**_without_effect("cache_control"), **_off([False], "defer_loading")}
CALL: Table = _without_effect("index", "provider_specific_fields", "extra_content")  # what other servers add
DETOKENIZE: Table = {**_off([False], "skip_special_tokens"), **_off([True], "spaces_between_special_tokens")}
STREAM_OPTIONS: Table = {
    **_without_effect("include_obfuscation"),
    **_off([False], "continuous_usage_stats", remedy="Use include_usage: the last event has the usage"),
}
TOKENIZE: Table = {
    **_TEMPLATE,
    **_off([""], "content", remedy="Use prompt"),
    **_off([True], "parse_special"),
    **_off([False], "with_pieces", "return_token_strs"),
    **_off([{}], "mm_processor_kwargs"),
}


def check_fields(extra: Mapping[str, Any] | None, table: Table, path: str = "") -> None:
    """Reject parameters that would have an effect elsewhere, and unknown ones.

    Args:
        extra: the parameters of a request that are not in its schema.
        table: those that are known.
        path: name of the object that contains them, with a dot.
    Raises:
        ApiError: 400 with the name of the first such parameter.
    """
    for name, value in (extra or {}).items():
        field = path + _printable(name)
        if value is not None and name not in table:
            raise ApiError(400, f"{field}: this server does not know this field. Remove it from the request.", field,
                           "unknown_parameter")
        entry = table.get(name)
        if entry is not None and not entry.accepts(value):
            raise ApiError(400, f"{field}: this server does not support this field, and it is not ignored. "
                           f"{entry.remedy}.", field, "unsupported_parameter")


def check_nested_fields(body: BaseModel) -> None:
    """The same for the objects in a request: stream options, messages, their parts and calls, and tools.

    Raises:
        ApiError: 400 with the path of the first such parameter.
    """
    if (options := getattr(body, "stream_options", None)) is not None:
        check_fields(options.model_extra, STREAM_OPTIONS, "stream_options.")
    for place, message in enumerate(getattr(body, "messages", None) or ()):
        check_fields(message.model_extra, MESSAGE, f"messages.{place}.")
        for part, each in enumerate(message.content if isinstance(message.content, list) else ()):
            check_fields(each.model_extra, TEXT_PART, f"messages.{place}.content.{part}.")
        for number, call in enumerate(message.tool_calls or ()):
            check_fields(call.model_extra, CALL, f"messages.{place}.tool_calls.{number}.")
    for place, tool in enumerate(getattr(body, "tools", None) or ()):
        check_fields(tool.model_extra, TOOL, f"tools.{place}.")
        check_fields(tool.function.model_extra, {}, f"tools.{place}.function.")


def _printable(name: str) -> str:
    """A field name for a message: of limited length, and encodable."""
    return name[:100].encode("utf-8", "backslashreplace").decode()
