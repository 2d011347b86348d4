"""Requests that let a judging model score answers, in the form that BELLE's project sends to ChatGPT.

BELLE's eval_prompt.json contains one instruction per class. Its page ChatGPT_Score.html appends question, reference and
answer and sends the text as one user message with temperature 0. See github.com/LianjiaTech/BELLE, eval/.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptq_belle.errors import InputError
from gptq_belle.evaluation.belle_set import BelleQuestion, normalize_class
from gptq_belle.quantization.calibration.data_files import read_data_file

OPEN_CLASSES = ("generation", "brainstorming", "rewrite")  # judged without the reference answer
JUDGE = "gpt-3.5-turbo"
MAX_TOKENS = 3000


class JudgeInstruction(NamedTuple):
    """Instruction for the judge about one class, with the class as BELLE spells it."""

    cls: str
    prompt: str


def read_instructions(path: str | Path) -> dict[str, JudgeInstruction]:
    """Read BELLE's eval_prompt.json (JSON Lines with class and prompt); the keys are normalized classes.

    Raises:
        InputError: the file does not exist, or a line is not valid.
    """
    found: dict[str, JudgeInstruction] = {}
    for where, value in read_data_file(Path(path)).rows:
        cls, prompt = (value.get("class"), value.get("prompt")) if isinstance(value, dict) else (None, None)
        if not isinstance(cls, str) or not isinstance(prompt, str):
            raise InputError(f"{path}, {where} is not a JSON object with class and prompt as texts",
                             "Give eval/eval_prompt.json of the BELLE project.")
        found[normalize_class(cls)] = JudgeInstruction(cls, prompt)
    return found


def judge_requests(rows: Sequence[BelleQuestion], answers: Sequence[str],
                   instructions: dict[str, JudgeInstruction]) -> Iterator[dict[str, Any]]:
    """One request per question: BELLE's fields, the model's answer, and the body that BELLE's page sends.

    Raises:
        InputError: a class without an instruction.
    """
    for row, answer in zip(rows, answers, strict=True):
        if row.cls not in instructions:
            raise InputError(f"class {row.cls} has no prompt for the judge",
                             f"The prompts are for {', '.join(instructions)}.")
        cls, prompt = instructions[row.cls]
        message = {"role": "user", "content": judge_message(prompt, row, answer)}
        body = {"model": JUDGE, "messages": [message], "temperature": 0.0, "max_tokens": MAX_TOKENS}
        yield {"class": cls, "question": row.question, "std_answer": row.std_answer, "answer": answer, "body": body}


def judge_message(prompt: str, row: BelleQuestion, answer: str) -> str:
    """The text for the judge, exactly as BELLE's page composes it."""
    if row.cls in OPEN_CLASSES:
        return f"{prompt} {row.question}  模型回答： '{answer}'。请针对模型回答给出得分，顺便给出理由："
    return (f"{prompt} {row.question} 标准回答:{row.std_answer}  模型回答：' {answer}'。"
            "请针对模型回答给出得分，顺便给出理由：")


def write_requests(path: Path, requests: Iterator[dict[str, Any]]) -> None:
    """Write a JSON Lines file with one request per line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in requests)
