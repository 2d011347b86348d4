"""Fields of a request that constrain the form of an answer: OpenAI's response_format, vLLM's guided_* and
structured_outputs, llama.cpp's json_schema and grammar, and tools."""

import json
from collections.abc import Mapping
from typing import Any

from gptq_belle.engine.sampling_params import STRUCTURES
from gptq_belle.engine.token_constraint import call_grammar
from gptq_belle.prompts.tool_calls import CallForm
from gptq_belle.serving.api_errors import ApiError
from gptq_belle.serving.conversation_schemas import TemplateOptions

Form = tuple[str, str, Any]  # field of the request, option of SamplingParams, value
GUIDED = {"guided_json": "json_schema", "guided_regex": "regex", "guided_choice": "choice",
          "guided_grammar": "grammar", "json_schema": "json_schema", "grammar": "grammar"}
OUTPUTS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar",
           "json_object": "json_object"}
FORMAT_KEYS = ("type", "json_schema", "schema", "value")
EMPTY: tuple[Any, ...] = (None, "", {}, [], False)


def answer_form(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The constraint of a request.

    Args:
        fields: the fields of the request by name; values that are empty are none.
    Returns:
        The name of the field, and the option of `SamplingParams`; ("", {}) without a constraint.
    Raises:
        ApiError: 400 for an unknown type, a value of the wrong type, or several constraints.
    """
    forms = [(name, option, fields[name]) for name, option in GUIDED.items() if not _is_empty(fields.get(name))]
    forms += _from_response_format(fields.get("response_format")) + _from_outputs(fields.get("structured_outputs"))
    if len(forms) > 1:
        raise ApiError(400, f"{forms[1][0]}: this field and {forms[0][0]} exclude each other", forms[1][0],
                       "invalid_value")
    if not forms:
        return "", {}
    name, option, value = forms[0]
    return name, {"json_schema" if option == "json_object" else option: _checked(name, option, value)}


def tool_form(options: TemplateOptions, form: CallForm, other: str) -> dict[str, Any]:
    """The constraint of an answer that can call tools, as an option of `SamplingParams`; {} without tools.

    Args:
        form: how the model writes calls.
        other: the field of another constraint, if any.
    Raises:
        ApiError: 400 if `tool_choice` asks for a tool that is not in `tools`, or there is another constraint.
    """
    if options.is_call_required and not options.callable_tools:
        raise ApiError(400, "tool_choice: the tool to call is not in tools", "tool_choice", "invalid_value")
    if not options.offered_tools:
        return {}
    if other:
        raise ApiError(400, f"{other}: this field and tools exclude each other. Send tool_choice 'none' for an answer "
                       "that calls no tool.", other, "invalid_value")
    return {"grammar": call_grammar(form, options.callable_tools, options.is_call_required)}


def _from_response_format(value: Any) -> list[Form]:
    """OpenAI's {"type": "json_schema", "json_schema": {"schema": ...}}; llama.cpp also takes {"schema": ...}.

    huggingface_hub converts OpenAI's form to {"type": "json_object", "value": ...}.
    """
    name = "response_format"
    if _is_empty(value) or value == {"type": "text"}:
        return []
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(value, Mapping) and (unknown := next((key for key in value if key not in FORMAT_KEYS), None)):
        raise ApiError(400, f"{name}.{unknown[:100]}: this server does not know this field. Remove it.",
                       f"{name}.{unknown[:100]}", "unknown_parameter")
    if kind == "json_schema":
        holder = value.get("json_schema", value)
        if not isinstance(holder, Mapping) or not isinstance(holder.get("schema"), Mapping):
            raise _wrong(f"{name}.json_schema", "an object with the JSON schema in its field schema")
        return [(name, "json_schema", holder["schema"])]
    if kind == "json_object":
        schema = next((value[key] for key in ("schema", "value") if not _is_empty(value.get(key))), None)
        return [(name, "json_object", True) if schema is None else (name, "json_schema", schema)]
    raise _wrong(f"{name}.type", "'text', 'json_object' or 'json_schema'")


def _from_outputs(value: Any) -> list[Form]:
    name = "structured_outputs"
    if _is_empty(value):
        return []
    if not isinstance(value, Mapping):
        raise _wrong(name, "an object")
    given = {key: each for key, each in value.items() if not _is_empty(each)}
    if unknown := next((key for key in given if key not in OUTPUTS), None):
        raise ApiError(400, f"{name}.{unknown[:100]}: this server does not support this field. Remove it.",
                       f"{name}.{unknown[:100]}", "unsupported_parameter")
    return [(f"{name}.{key}", OUTPUTS[key], each) for key, each in given.items()]


def _checked(name: str, option: str, value: Any) -> Any:
    """The value in the type of `SamplingParams`; a schema can be the text of one."""
    if option == "json_object":
        return {"type": "object"}
    if option == "json_schema":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        if not isinstance(value, Mapping):
            raise _wrong(name, "a JSON schema")
        return value
    if option == "choice":
        if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
            raise _wrong(name, "a list of texts that are not empty")
        return tuple(value)
    assert option in STRUCTURES
    if not isinstance(value, str):
        raise _wrong(name, "a text")
    return value


def _is_empty(value: Any) -> bool:
    return any(value is each or (value == each and type(value) is type(each)) for each in EMPTY)


def _wrong(name: str, needed: str) -> ApiError:
    return ApiError(400, f"{name}: this should be {needed}", name, "invalid_value")
