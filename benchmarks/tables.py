"""Generate the tables of the READMEs from benchmarks/results/*.json.

    python benchmarks/tables.py           # rewrite the text between <!-- table: NAME --> and <!-- end -->
    python benchmarks/tables.py --check   # change nothing; exit with code 1 if a README is out of date
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptq_belle.common.text import markdown_table as markdown
from gptq_belle.formats.readers import KINDS, READERS, Reader

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "belle_tiny"
RESULTS = ROOT / "benchmarks" / "results"
READMES = (ROOT / "README.md", ROOT / "README_zh.md", TINY / "README.md", RESULTS / "README.md",
           ROOT / "docs" / "scale-out.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

ARCHITECTURES = {"bloom": "BLOOM", "llama": "LLaMA"}
EVIDENCE = {"run": "", "read": r"\*", "reported": r"\*\*"}
RUNGS = {"nearest": "round to nearest", "fast": "plain GPTQ (`fast`)", "order": "activation order",
         "search, positive": "+ scale search, positive scales", "search, signed": "+ scale search, signed scales",
         "refine": "+ refit and coordinate descent", "fold": "+ channel scales folded into norms",
         "targets": "+ full-precision targets", "best": "+ held-out check (`best`)",
         "max": "+ block refinement (`max`)"}


def result(name: str) -> dict[str, Any]:
    """Read one measurement."""
    value: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return value


def bits(first: str, nearest: str) -> str:
    """One row per number of bits: KL of rounding to nearest and of the presets `fast` and `best`, for each model."""
    models = {a: {(row["bits"], row["rung"]): row["kl"] for row in found["summary"]}
              for a, found in result("belle_tiny_ladder")["models"].items()}
    rungs = {"nearest": nearest, "fast": "`fast`", "best": "`best`"}
    columns = [first, *(f"{ARCHITECTURES[a]}, {name}" for a in models for name in rungs.values())]
    return markdown(columns, [[str(width), *(f"{models[a][width, rung]:.5f}" for a in models for rung in rungs)]
                              for width in (8, 4, 3, 2)])


def quality() -> str:
    """One row per model and variant: size, KL, top-1 agreement, perplexity, exact match."""
    rows = []
    for architecture, variants in result("belle_tiny_quality")["models"].items():
        rows += [[f"{ARCHITECTURES[architecture]}, {name}", f"{v['bytes'] / 1e6:.1f}", f"{v['kl']:.5f}",
                  f"{100 * v['same_top']:.1f}", f"{v['perplexity']:.3f}", f"{v['exact']:.1f}"]
                 for name, v in variants.items()]
    return markdown(["model", "MB", "KL to full precision", "top-1 agreement, %", "perplexity", "exact match, %"], rows)


def classes() -> str:
    """One row per class, one column per model and variant."""
    models = result("belle_tiny_quality")["models"]
    variants = {"full precision": "full", "8 bit GPTQ": "8 bit", "4 bit GPTQ": "4 bit",
                "3 bit nearest": "3 bit nearest"}
    chosen = [(a, v) for a in models for v in models[a] if v in variants]
    columns = ["class", *(f"{ARCHITECTURES[a]} {variants[v]}" for a, v in chosen)]
    found = models[chosen[0][0]][chosen[0][1]]["classes"]
    rows = [[name, *(f"{models[a][v]['classes'][name]['score']:.1f}" for a, v in chosen)] for name in found]
    return markdown(columns, rows)


def ladder() -> str:
    """One row per bits and rung: KL and its spread between seeds, ratio to `fast`, perplexity, exact match."""
    rows = []
    for architecture, found in result("belle_tiny_ladder")["models"].items():
        for row in found["summary"]:
            kl, ratio = f"{row['kl']:.6f}", f"{row['of_fast']:.2f}"
            if row["seeds"] > 1:
                kl, ratio = f"{kl} ± {row['kl_spread']:.6f}", f"{ratio} ± {row['of_fast_spread']:.2f}"
            rows.append([f"{ARCHITECTURES[architecture]}, {row['bits']}", RUNGS[row["rung"]], str(row["seeds"]), kl,
                         ratio, f"{row['perplexity']:.3f}", f"{row['exact']:.1f}"])
    return markdown(["model, bits", "techniques", "seeds", "KL to full precision", "ratio to `fast`", "perplexity",
                     "exact match, %"], rows)


def training() -> str:
    """Duration and losses of the demo models' training runs."""
    figures = (("steps", "{steps}"), ("tokens", "{tokens:,}"), ("minutes on one thread", "{minutes}"),
               ("training loss", "{final_loss:.4f}"), ("validation loss of answers", "{final_valid_loss:.4f}"))
    runs = [json.loads((TINY / a / "training.json").read_text(encoding="utf-8")) for a in ARCHITECTURES]
    return markdown(["", *ARCHITECTURES.values()], [[name, *(text.format(**run) for run in runs)]
                                                    for name, text in figures])


def generate() -> str:
    """One row per variant: tokens/s of decoding, of a batch and of prefill; decoding as a share of a plain read."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result("cpu_generate")["results"]:
        found.setdefault(row["variant"], {})[row["what"]] = row
    return markdown(["tokens/s", "decode, 1 sequence", "decode, 8 sequences", "prefill, 512 tokens",
                     "share of a plain read"], [
        [name, *(f"{row[what]['tokens_per_s']:.1f}" if what in row else "" for what in ("decode", "batch", "prefill")),
         f"{row['decode']['share_of_read']:.2f}" if "share_of_read" in row["decode"] else ""]
        for name, row in found.items()])


def interop() -> str:
    """One row per tool, model and direction: error against our logits next to the error of our own float16."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result("interop")["rows"]:
        found.setdefault((row["peer"], ARCHITECTURES[row["architecture"]], row["direction"]), []).append(row)

    def span(rows: list[dict[str, Any]], name: str) -> str:
        values = [1000 * row[name] for row in rows]
        return f"{min(values):.2f} to {max(values):.2f}"

    return markdown(
        ["tool", "model", "direction", "variants", "relative error, 1e-3", "our float16, 1e-3", "largest ratio",
         "top-1 agreement, %"],
        [[*key, str(len(rows)), span(rows, "relative_error"), span(rows, "float16_rounding"),
          f"{max(row['relative_error'] / row['float16_rounding'] for row in rows):.2f}",
          f"{100 * min(row['same_top_token'] for row in rows):.1f}"] for key, rows in found.items()])


def belle_7b() -> str:
    """One row per checkpoint and KV cache: file, load time relative to reading, memory; limits in brackets."""
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
    return markdown(["bits, head bits on disk", "file, GB", "load, s", "load / read", "load / direct read",
                     "tokens/s", "KV cache", "model, GB", "process, GB"], rows)


def _reader_cell(kind: str, takes: bool, language: int) -> str:
    """The readers that take a kind, or those that do not and why."""
    found = [(reader, verdict) for reader in READERS.values()
             if (verdict := reader.verdicts.get(kind)) is not None and verdict.takes == takes]
    return ", ".join(reader.name + EVIDENCE[verdict.evidence]
                     + (f" ({verdict.why})" if verdict.why and language == 0 else "") for reader, verdict in found)


def readers(language: int) -> str:
    """One row per kind of directory: who reads it, who refuses or misreads it; then the versions."""
    head = (["written with", "read by gptq_belle and", "refused or misread by"],
            ["写出方式", "gptq_belle 之外可读取的程序", "拒绝或误读的程序"])[language]
    table = markdown(head, [[names[language], _reader_cell(kind, True, language), _reader_cell(kind, False, language)]
                            for kind, names in KINDS.items()])
    versions = ", ".join(f"{reader.name} {reader.version}" for reader in READERS.values() if reader.version)
    marks = ("its source was read, \\*\\* reported by others; all else was run. Versions:",
             "只读过源码，\\*\\* 他人报告，其余均已运行。版本：")[language]
    return f"{table}\n\n\\* {marks} {versions}."


def readers_vllm() -> str:
    """One row per kind of directory: what vLLM does with it, on GPUs and on a CPU."""
    def cell(reader: Reader, kind: str) -> str:
        found = reader.verdicts[kind]
        return ", ".join(filter(None, ["yes" if found.takes else "no", found.why]))

    both = [READERS["vllm"], READERS["vLLM on a CPU"]]
    return markdown(["written with", *(f"{reader.name} ({reader.version})" for reader in both)],
                    [[names[0], *(cell(reader, kind) for reader in both)] for kind, names in KINDS.items()])


TABLES: dict[str, Callable[[], str]] = {
    "bits": lambda: bits("bits", "nearest"),
    "bits_zh": lambda: bits("位数", "就近舍入"),
    "quality": quality,
    "classes": classes,
    "ladder": ladder,
    "generate": generate,
    "training": training,
    "interop": interop,
    "readers": lambda: readers(0),
    "readers_zh": lambda: readers(1),
    "readers_vllm": readers_vllm,
    "belle_7b": belle_7b,
}


def filled(text: str) -> str:
    """Return a README's text with every table generated again.

    Raises:
        KeyError: the text names a table that is not in TABLES.
    """
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + "\n" + block[3], text)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with code 1 if a README is stale")
    check = parser.parse_args().check
    stale = [path for path in READMES if filled(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'stale' if check else 'rewritten'}")
        if not check:
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
