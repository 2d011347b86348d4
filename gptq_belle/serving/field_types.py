"""Types of fields in request bodies. An invalid value is rejected with the name of the field."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

FAIL_FAST = Field(fail_fast=True)


class Body(BaseModel):
    """A JSON object; fields that are not in its schema are checked by the tables of `request_fields`."""

    model_config = ConfigDict(extra="allow", strict=True)


def _check_encodable(text: str) -> str:
    """Reject half of a surrogate pair, which JSON allows, but no encoding and no tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start}") from None
    return text


def _integral(value: Any) -> Any:
    """Accept 100.0 as 100, as vLLM does: JSON does not distinguish them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_count(count: int, most: int) -> None:
    """Reject a list of more than `most` elements."""
    if count > most:
        raise PydanticCustomError("too_many", "there should be at most {most} elements, not {count}",
                                  {"most": most, "count": count})


def _check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Reject a schema that cannot become the text of a prompt."""
    try:
        json.dumps(schema, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("this is nested too deeply, or contains half of a surrogate pair") from None
    return schema


Integer = Annotated[int, BeforeValidator(_integral)]
Text = Annotated[str, AfterValidator(_check_encodable)]
Schema = Annotated[dict[str, Any], AfterValidator(_check_schema)]
