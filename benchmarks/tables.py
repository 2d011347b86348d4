"""The tables of the READMEs, made from benchmarks/results/*.json.

    python benchmarks/tables.py           # rewrite what stands between <!-- table: NAME --> and <!-- end -->
    python benchmarks/tables.py --check   # exit 1 where a README is stale
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "belle_tiny"
RESULTS = ROOT / "benchmarks" / "results"
READMES = (ROOT / "README.md", ROOT / "README_zh.md", TINY / "README.md", RESULTS / "README.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

ARCHITECTURES = {"bloom": "BLOOM", "llama": "LLaMA"}
VARIANTS_ZH = {"full precision": "全精度", "8 bit GPTQ": "8 位 GPTQ", "4 bit GPTQ": "4 位 GPTQ",
               "4 bit nearest": "4 位就近舍入", "3 bit GPTQ": "3 位 GPTQ", "3 bit nearest": "3 位就近舍入"}
RUNGS = {"nearest": "rounding to nearest", "fast": "plain GPTQ (`fast`)", "order": "active inputs first",
         "search, positive": "+ scale search, positive", "search, signed": "+ both signs",
         "refine": "+ refit and descent", "targets": "+ full-precision targets", "best": "+ held-out veto (`best`)",
         "max": "+ end-to-end tuning (`max`)"}
RUNGS_ZH = {"nearest": "就近舍入", "fast": "普通 GPTQ（`fast`）", "order": "先求解活跃输入",
            "search, positive": "+ 缩放搜索，只取正", "search, signed": "+ 正负都搜", "refine": "+ 重拟合与坐标下降",
            "targets": "+ 以全精度输出为目标", "best": "+ 留出行裁决（`best`）", "max": "+ 端到端微调（`max`）"}
RUNS_ZH = {"4 bit exact": "4 位 exact", "4 bit exact, every call from Python": "4 位 exact，逐个从 Python 调用",
           "4 bit fast": "4 位 fast", "8 bit exact": "8 位 exact", "hf_model, torch int4": "transformers，torch int4"}
CLASSES_ZH = {"open_qa": "开放问答", "closed_qa": "阅读问答", "extract": "信息抽取", "classification": "分类",
              "summarization": "摘要", "rewrite": "改写", "translation": "翻译", "brainstorming": "头脑风暴",
              "math": "数学", "code": "代码"}


def result(name: str) -> dict[str, Any]:
    """One recorded measurement."""
    value: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return value


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, all columns but the first to the right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))


def quality(columns: list[str], names: dict[str, str]) -> str:
    """A row a variant: size, KL, same top token, perplexity, exact match, for each architecture."""
    rows = []
    for architecture, variants in result("belle_tiny_quality")["models"].items():
        rows += [[f"{ARCHITECTURES[architecture]}, {names.get(name, name)}", f"{v['bytes'] / 1e6:.1f}",
                  f"{v['kl']:.5f}", f"{100 * v['same_top']:.1f}", f"{v['perplexity']:.3f}", f"{v['exact']:.1f}"]
                 for name, v in variants.items()]
    return markdown(columns, rows)


def classes(first: str, variants: dict[str, str], names: dict[str, str]) -> str:
    """A row a class, a column a model and variant."""
    models = result("belle_tiny_quality")["models"]
    chosen = [(a, v) for a in models for v in models[a] if v in variants]
    columns = [first, *(f"{ARCHITECTURES[a]} {variants[v]}" for a, v in chosen)]
    found = models[chosen[0][0]][chosen[0][1]]["classes"]
    rows = []
    for cls in found:
        scores = (models[a][v]["classes"][cls]["score"] for a, v in chosen)
        rows.append([names.get(cls, cls), *(f"{score:.1f}" for score in scores)])
    return markdown(columns, rows)


def ladder(columns: list[str], names: dict[str, str]) -> str:
    """A row for each bits and rung: KL and its spread between seeds, share of plain GPTQ's, perplexity, exact match."""
    rows = []
    for architecture, found in result("belle_tiny_ladder")["models"].items():
        for row in found["summary"]:
            kl, share = f"{row['kl']:.6f}", f"{row['of_fast']:.2f}"
            if row["seeds"] > 1:
                kl, share = f"{kl} ± {row['kl_spread']:.6f}", f"{share} ± {row['of_fast_spread']:.2f}"
            rows.append([f"{ARCHITECTURES[architecture]}, {row['bits']}", names[row["rung"]], str(row["seeds"]), kl,
                         share, f"{row['perplexity']:.3f}", f"{row['exact']:.1f}"])
    return markdown(columns, rows)


def training() -> str:
    """What the training runs of the demo models took and reached."""
    figures = (("steps", "{steps}"), ("tokens", "{tokens:,}"), ("minutes on one thread", "{minutes}"),
               ("training loss", "{final_loss:.4f}"), ("validation loss of answers", "{final_valid_loss:.4f}"))
    runs = [json.loads((TINY / a / "training.json").read_text(encoding="utf-8")) for a in ARCHITECTURES]
    return markdown(["", *ARCHITECTURES.values()], [[name, *(text.format(**run) for run in runs)]
                                                    for name, text in figures])


def generate(columns: list[str], names: dict[str, str]) -> str:
    """A row a variant: whole tokens per second, alone, in a batch, of a prompt; share of a plain read of weights."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result("cpu_generate")["results"]:
        found.setdefault(row["variant"], {})[row["what"]] = row
    return markdown(columns, [
        [names.get(name, name), *(f"{row[what]['tokens_per_s']:.1f}" if what in row else ""
                                  for what in ("decode", "batch", "prefill")),
         f"{row['decode']['share_of_read']:.2f}" if "share_of_read" in row["decode"] else ""]
        for name, row in found.items()])


def interop() -> str:
    """A row a tool, model and direction: errors against ours beside those of our own float16, over all kinds."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result("interop")["rows"]:
        found.setdefault((row["peer"], ARCHITECTURES[row["architecture"]], row["direction"]), []).append(row)

    def span(rows: list[dict[str, Any]], name: str) -> str:
        values = [1000 * row[name] for row in rows]
        return f"{min(values):.2f} to {max(values):.2f}"

    return markdown(
        ["tool", "model", "", "kinds", "relative error, 1e-3", "float16 alone, 1e-3", "at most", "same top token, %"],
        [[*key, str(len(rows)), span(rows, "relative_error"), span(rows, "float16_rounding"),
          f"{max(row['relative_error'] / row['float16_rounding'] for row in rows):.2f} times",
          f"{100 * min(row['same_top_token'] for row in rows):.1f}"] for key, rows in found.items()])


def belle_7b() -> str:
    """A row a checkpoint and cache: file, load time against reading in two ways, memory; limits in brackets."""
    rows = []
    for row in result("belle_7b")["results"]:
        first = [f"{row['bits']}, {row['stored_head']}", f"{row['file_bytes'] / 1e9:.2f} ({row['file']})",
                 f"{row['load_seconds']:.1f}", f"{row['load_of_read']:.2f} ({row['load_limit']})",
                 f"{row['load_of_direct_read']:.2f}", f"{row['tokens_per_second']:.1f}"]
        for cache, found in row["memory"].items() or [("", None)]:
            memory = [f"{found['peak_bytes'] / 1e9:.2f} ({found['limit_bytes'] / 1e9:.1f})",
                      f"{found['process_bytes'] / 1e9:.2f}"] if found else ["", ""]
            rows.append([*first, cache, *memory])
            first = [""] * len(first)
    return markdown(["bits, those of the stored head", "file, GB", "load, s", "of reading", "past the cache",
                     "tokens/s", "cache", "memory, GB", "process, GB"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "quality": lambda: quality(["model", "MB", "KL to full precision", "same top token, %", "perplexity",
                                "exact match, %"], {}),
    "quality_zh": lambda: quality(["模型", "MB", "与全精度的 KL", "首选词相同 %", "困惑度", "完全匹配 %"], VARIANTS_ZH),
    "classes": lambda: classes("class", {"full precision": "full", "8 bit GPTQ": "8 bit", "4 bit GPTQ": "4 bit",
                                         "3 bit nearest": "3 bit nearest"}, {}),
    "classes_zh": lambda: classes("类别", {"full precision": "全精度", "8 bit GPTQ": "8 位", "4 bit GPTQ": "4 位",
                                         "3 bit nearest": "3 位就近舍入"}, CLASSES_ZH),
    "ladder": lambda: ladder(["model, bits", "", "seeds", "KL to full precision", "of `fast`'s", "perplexity",
                              "exact match, %"], RUNGS),
    "ladder_zh": lambda: ladder(["模型，位数", "", "种子数", "与全精度的 KL", "与 `fast` 之比", "困惑度",
                                 "完全匹配 %"], RUNGS_ZH),
    "generate": lambda: generate(["8 blocks of LLaMA-7B and its head, tokens/s", "one token", "8 sequences",
                                  "prompt of 512", "of a plain read"], {}),
    "generate_zh": lambda: generate(["LLaMA-7B 的 8 层和输出层，词/秒", "逐词", "8 个序列", "512 词的提示",
                                     "与单纯读取之比"], RUNS_ZH),
    "training": training,
    "interop": interop,
    "belle_7b": belle_7b,
}


def filled(text: str) -> str:
    """A README's text with every table made anew.

    Raises:
        KeyError: it names a table that TABLES does not know.
    """
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + "\n" + block[3], text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a README is stale")
    check = parser.parse_args().check
    stale = [path for path in READMES if filled(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'stale' if check else 'rewritten'}")
        if not check:
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
