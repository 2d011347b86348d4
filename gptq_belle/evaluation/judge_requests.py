"""Requests for a judging model in the form in which BELLE's project asks ChatGPT for scores.

BELLE's eval_prompt.json holds one instruction a class; its page ChatGPT_Score.html puts question, reference and answer
behind it and posts the text as one user message, temperature 0. The files are at github.com/LianjiaTech/BELLE, eval/.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptq_belle.errors import InputError
from gptq_belle.evaluation.belle_set import Row, class_name, json_lines

OPEN = ("generation", "brainstorming", "rewrite")  # judged without a reference, whether there is one or not
JUDGE = "gpt-3.5-turbo"
MAX_TOKENS = 3000


class Instruction(NamedTuple):
    """What a judge is told about one class, and how BELLE writes the class."""

    cls: str
    prompt: str


def read_instructions(path: str | Path) -> dict[str, Instruction]:
    """BELLE's eval_prompt.json (JSON Lines with class and prompt) by `class_name`.

    Raises:
        InputError: it is not there, or a line is of another form.
    """
    found: dict[str, Instruction] = {}
    for number, value in json_lines(Path(path)):
        cls, prompt = (value.get("class"), value.get("prompt")) if isinstance(value, dict) else (None, None)
        if not isinstance(cls, str) or not isinstance(prompt, str):
            raise InputError(f"{path}, line {number} is not a JSON object with class and prompt as texts",
                             "Give eval/eval_prompt.json of the BELLE project.")
        found[class_name(cls)] = Instruction(cls, prompt)
    return found


def requests(rows: Sequence[Row], answers: Sequence[str],
             instructions: dict[str, Instruction]) -> Iterator[dict[str, Any]]:
    """A request a row: BELLE's fields, the model's answer, and the body that BELLE's page posts.

    Raises:
        InputError: a class without an instruction.
    """
    for row, answer in zip(rows, answers, strict=True):
        if row.cls not in instructions:
            raise InputError(f"class {row.cls} has no prompt for the judge",
                             f"The prompts are for {', '.join(instructions)}.")
        cls, prompt = instructions[row.cls]
        message = {"role": "user", "content": content(prompt, row, answer)}
        body = {"model": JUDGE, "messages": [message], "temperature": 0.0, "max_tokens": MAX_TOKENS}
        yield {"class": cls, "question": row.question, "std_answer": row.std_answer, "answer": answer, "body": body}


def content(prompt: str, row: Row, answer: str) -> str:
    """The text that a judge reads, letter by letter as BELLE's page puts it together."""
    if row.cls in OPEN:
        return f"{prompt} {row.question}  模型回答： '{answer}'。请针对模型回答给出得分，顺便给出理由："
    return (f"{prompt} {row.question} 标准回答:{row.std_answer}  模型回答：' {answer}'。"
            "请针对模型回答给出得分，顺便给出理由：")


def write_requests(path: Path, found: Iterator[dict[str, Any]]) -> None:
    """One request a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in found)
