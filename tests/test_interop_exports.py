"""Exports of auto-round, llm-compressor and GPTQModel (AWQ, a quantized lm_head): our logits are the tools' own.

Each tool runs in a separate environment (see test_interop.py) on the demo LLaMA:
`pytest -m slow tests/test_interop_exports.py`.
"""

import sys
from pathlib import Path

import numpy
import pytest
import torch

from gptq_belle import load
from gptq_belle.checkpoint.conversion import convert
from gptq_belle.checkpoint.inspection import inspect

sys.path.insert(0, str(Path(__file__).parent / "interop"))
import record  # noqa: E402
from environments import carry_out, python_of  # noqa: E402
from record import EXAMPLE, IDS, ROWS  # noqa: E402

pytestmark = pytest.mark.slow
MOST = 2.0  # of our own float16's error, see test_interop.py
MIXED = {"model.layers.1.mlp.down_proj": {"bits": 8}, "model.layers.0.self_attn.o_proj": {"bits": 16},
         "lm_head": {"bits": 8, "group_size": 128, "sym": True}}
TOOLS = {  # peer: environment and script, and the kinds that it exports
    "auto-round": ("autoround", "autoround_peer", {
        "auto_round:auto_gptq": {"format": "auto_round:auto_gptq"},
        "auto_round": {"format": "auto_round"},
        "mixed, quantized lm_head": {"format": "auto_round", "layers": MIXED},
        "asymmetric": {"format": "auto_round", "group_size": 64, "sym": False}}),
    "llm-compressor": ("llmcompressor", "llmcompressor_peer", {
        "W4A16": {}, "W4A16 asymmetric": {"group_size": 32, "sym": False},
        "W8A16 channel": {"bits": 8, "group_size": -1},
        "W8A16 channel asymmetric": {"bits": 8, "group_size": -1, "sym": False}}),
    "GPTQModel": ("gptqmodel", "gptqmodel_peer", {
        "quantized lm_head": {"lm_head": True}, "AWQ gemm": {"awq": True, "sym": False}}),
}
records = pytest.fixture(scope="module")(record.records)


@pytest.fixture(scope="module", params=TOOLS)
def exported(request, records, tmp_path_factory):
    """The directories of a tool and the files of its logits, by kind."""
    environment, script, kinds = TOOLS[request.param]
    scratch, jobs = tmp_path_factory.mktemp(environment), []
    for number, settings in enumerate(kinds.values()):
        path = str(scratch / f"export-{number}")
        jobs += [{"do": "quantize", "source": str(EXAMPLE / "llama"), "path": path, "rows": ROWS.tolist(), "bits": 4,
                  "group_size": 128, "sym": True, "desc_act": False} | settings,
                 {"do": "logits", "path": path, "ids": IDS.tolist(), "out": f"{path}.npy"} | settings]
    answer = carry_out(python_of(environment), script, jobs, scratch)
    records["versions"] |= {f"{request.param}: {name}": version for name, version in answer["versions"].items()}
    errors = [result.get("error") for result in answer["results"]]
    return request.param, {kind: (Path(jobs[2 * at]["path"]), errors[2 * at] or errors[2 * at + 1])
                           for at, kind in enumerate(kinds)}


@pytest.mark.parametrize(("tool", "kind"), [(tool, kind) for tool, (_, _, kinds) in TOOLS.items() for kind in kinds])
def test_exports_are_read_and_converted(exported, records, tool, kind, tmp_path):
    who, found = exported
    if tool != who:
        pytest.skip("another tool's kind")
    path, error = found[kind]
    assert not error, error
    assert inspect(path).problems == []
    theirs = torch.from_numpy(numpy.load(f"{path}.npy")).double()
    row = record.row((who, "is read by us", "llama", kind), theirs, path)
    records["rows"].append(row)
    assert row["relative_error"] < MOST * row["float16_rounding"]
    assert row["same_top_token"] > 0.97
    exact = record.logits(path, torch.float32)
    assert record.distance(load(path, device="cpu", dtype=torch.float32).logits(IDS).double(), exact) < 1e-4
    convert(path, tmp_path / "converted")
    assert record.distance(record.logits(tmp_path / "converted", torch.float32), exact) < row["float16_rounding"]
