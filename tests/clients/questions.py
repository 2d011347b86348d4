"""What all clients ask: a form of answers, a tool, and the checks of what comes back from models that know no facts."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

MODEL = "demo"
LIMIT = 200
QUESTION = [{"role": "user", "content": "北京的天气怎么样？"}]


class Weather(BaseModel):
    """The weather of a city."""  # clients send it as the description of a tool

    model_config = ConfigDict(extra="forbid")  # as strict schemas of OpenAI need it
    city: Literal["北京", "上海"]
    degrees: Literal[10, 20, 30]
    rain: bool


TOOL = {"type": "function", "function": {"name": "Weather", "description": "天气", "strict": True,
                                         "parameters": Weather.model_json_schema()}}


def check_answer(found: object) -> None:
    """Check that an answer is a parsed form; what it says is chance."""
    assert isinstance(found, Weather), repr(found)


def check_arguments(text: str | dict) -> None:
    """Check the arguments of a call."""
    Weather.model_validate_json(text) if isinstance(text, str) else Weather.model_validate(text)
