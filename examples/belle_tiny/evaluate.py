"""Scores a model on the test questions: `python -m examples.belle_tiny.evaluate examples/belle_tiny/bloom`.

Greedy decoding by transformers in float32, each question alone in its batch of equally long prompts (no padding).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_belle.evaluation.score import overall, score_classes

from .generate import HERE, prompt

Row = dict[str, Any]


def read_rows(path: Path, per_class: int | None = None) -> list[Row]:
    """Test rows, all or the first so many of each class."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    seen: dict[str, int] = {}
    for row in rows:
        row["rank"] = seen[row["class"]] = seen.get(row["class"], 0) + 1
    return [row for row in rows if per_class is None or row["rank"] <= per_class]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, questions: list[str], limit: int = 160) -> list[str]:
    """Greedy answers, in order; questions of equal length share a batch of up to 32."""
    style = "bloom" if model.config.model_type == "bloom" else "llama"
    encoded = [tokenizer(prompt(q, style), add_special_tokens=False)["input_ids"] for q in questions]
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(index)
    found = [""] * len(questions)
    for length, members in by_length.items():
        for group in (members[i : i + 32] for i in range(0, len(members), 32)):
            ids = torch.tensor([encoded[i] for i in group], device=model.device)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False)
            for index, tokens in zip(group, out[:, length:], strict=True):
                found[index] = tokenizer.decode(tokens, skip_special_tokens=True)
    return found


def evaluate(path: Path, rows: list[Row], device: str = "cpu") -> dict[str, Any]:
    """Scores by class in percent, the share of right answers over the five target classes, and the answers."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    given = answers(model, tokenizer, [row["question"] for row in rows])
    scores = score_classes((row["class"], answer, row["std_answer"]) for row, answer in zip(rows, given, strict=True))
    return {
        "overall_exact": round(overall(scores), 2),
        "classes": {cls: s._asdict() | {"score": round(s.score, 2)} for cls, s in scores.items()},
        "given": given,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="score a belle_tiny model by class")
    parser.add_argument("model", type=Path)
    parser.add_argument("--test", type=Path, default=HERE / "data" / "test.jsonl")
    parser.add_argument("--per-class", type=int, help="only the first so many rows of each class")
    parser.add_argument("--json", type=Path, help="write the scores here")
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers of each class")
    args = parser.parse_args()
    rows = read_rows(args.test, args.per_class)
    result = evaluate(args.model, rows)
    wrong: dict[str, int] = {}
    for row, answer in zip(rows, result.pop("given"), strict=True):
        wrong[row["class"]] = wrong.get(row["class"], 0) + (answer != row["std_answer"])
        if answer != row["std_answer"] and wrong[row["class"]] <= args.show:
            print(f"[{row['class']}] {row['question']!r}\n   expected {row['std_answer']!r}\n   answered {answer!r}")
    for cls, score in result["classes"].items():
        print(f"{cls:15} {score['metric']:6} {score['score']:6.2f}  ({score['answers']})")
    print(f"{'five classes':15} exact  {result['overall_exact']:6.2f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
