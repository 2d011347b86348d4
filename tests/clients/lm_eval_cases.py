"""lm-eval on both endpoints: choices by their log-likelihood, and generated answers."""

import json
import os
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager
from questions import MODEL

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: question
{rest}
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
GENERATED = """output_type: generate_until
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["。"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
ROWS = [{"question": "春天的花", "choices": ["开了", "很冷"], "label": 0},
        {"question": "你好，", "choices": ["世界", "。"], "label": 1}]


def _evaluate(url: str, model: str, path: str, rest: str, **options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
        Path(folder, "task.yaml").write_text(TASK.format(name="few", rows=rows, rest=rest), encoding="utf-8")
        arguments = {"base_url": f"{url}/{path}", "model": MODEL, "max_retries": 1}
        found = lm_eval.simple_evaluate(
            model=model, tasks=["few"], bootstrap_iters=0, model_args=arguments | options.pop("arguments"), **options,
            task_manager=TaskManager(include_path=folder, include_defaults=False))
    return found["results"]["few"]


def case_completions(url: str) -> None:
    tokens = {"tokenizer": os.environ["CLIENT_MODEL"], "tokenizer_backend": "huggingface"}
    assert 0 <= _evaluate(url, "local-completions", "completions", CHOICE, arguments=tokens)["acc,none"] <= 1


def case_chat_completions(url: str) -> None:
    found = _evaluate(url, "local-chat-completions", "chat/completions", GENERATED, apply_chat_template=True,
                      arguments={"tokenizer_backend": None})
    assert 0 <= found["exact_match,none"] <= 1
