"""instructor in the modes JSON_SCHEMA and TOOLS."""

import instructor
import openai
from questions import LIMIT, MODEL, QUESTION, Weather, check_answer


def _ask(url: str, mode: instructor.Mode) -> Weather:
    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0), mode=mode)
    return client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=LIMIT, max_retries=0,
                                          response_model=Weather)


def case_json_schema(url: str) -> None:
    check_answer(_ask(url, instructor.Mode.JSON_SCHEMA))


def case_tools(url: str) -> None:
    check_answer(_ask(url, instructor.Mode.TOOLS))
