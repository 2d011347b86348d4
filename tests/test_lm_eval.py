"""lm-eval on a generated task, with the model class and with the server; slow, skipped without lm-eval."""

import json

import pytest
import torch
from server_process import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm_eval[api]'")
pytest.importorskip("tenacity", reason="pip install 'lm_eval[api]'")
ITEMS = [("春天的花", [" 开了", " 很冷", "，红红的"], 0), ("你好，", ["世界", "Human", "。"], 2),
         ("The weather is", [" fine", "天", "s"], 1), ("一二三", ["四", "五六", "abc"], 0)]


def choice_scores(path, context, choices):
    """Log-likelihood of each choice after a context, by transformers; lm-eval tokenizes both together."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).float()
    scores = []
    for choice in choices:
        ids = tokenizer(context + choice, return_tensors="pt").input_ids
        start = len(tokenizer(context).input_ids)
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        scores.append(float(logprobs[:-1].gather(1, ids[0, 1:, None])[start - 1:].sum()))
    return scores


def task_manager(folder):
    """A task of multiple choice in a folder."""
    from lm_eval.tasks import TaskManager

    (folder / "items.jsonl").write_text("".join(
        json.dumps({"context": context, "choices": choices, "label": label}, ensure_ascii=False) + "\n"
        for context, choices, label in ITEMS))
    (folder / "tiny.yaml").write_text(f"""
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "items.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    return TaskManager(include_path=str(folder), include_defaults=False)


def check_scores(path, found):
    """Compare the scores of all choices and the accuracy with transformers."""
    samples = sorted(found["samples"]["tiny"], key=lambda sample: sample["doc_id"])
    for sample, (context, choices, _) in zip(samples, ITEMS, strict=True):
        scores = [float(score[0]) for score in sample["filtered_resps"]]
        assert scores == pytest.approx(choice_scores(path, context, choices), abs=1e-2)
    right = [max(range(3), key=choice_scores(path, context, choices).__getitem__) == label
             for context, choices, label in ITEMS]
    assert found["results"]["tiny"]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_lm_eval_local_completions(tiny_llama, tmp_path):
    with serving(tiny_llama, tmp_path / "log", "--precision", "exact", "--cache", "float32") as server:
        found = lm_eval.simple_evaluate(
            model="local-completions", tasks=["tiny"], log_samples=True, bootstrap_iters=0,
            model_args={"base_url": f"{server.url}/v1/completions", "model": tiny_llama.name, "num_concurrent": 2,
                        "tokenizer": str(tiny_llama), "tokenizer_backend": "huggingface"},
            task_manager=task_manager(tmp_path))
    check_scores(tiny_llama, found)


def test_lm_eval_model_class(tiny_llama, tmp_path):
    from gptq_belle.evaluation.lm_harness import BelleLM

    model = BelleLM(tiny_llama, device="cpu", precision="exact")
    found = lm_eval.simple_evaluate(model=model, tasks=["tiny"], log_samples=True, bootstrap_iters=0,
                                    task_manager=task_manager(tmp_path))
    check_scores(tiny_llama, found)
    assert model._generate("春天", {"until": ["。"], "max_gen_toks": 5}) == model.model.generate(
        "春天", max_new_tokens=5, stop=("。",))
