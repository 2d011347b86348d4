"""GPTQModel, transformers with optimum, and AutoGPTQ read what we write with our logits, and we read what they write.

Each runs in a separate environment, on the demo models. The yardstick is rounding to float16, in which they compute:
their logits may be twice as far from ours in float32 as ours in float16 are. `make interop` runs this and leaves
benchmarks/results/interop.json.
"""

import datetime
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_belle import QuantConfig, __version__, hf_model, quantize_checkpoint
from gptq_belle.bench.doctor import machine_summary
from gptq_belle.checkpoint.conversion import convert
from gptq_belle.quantization.calibration.rows import Calibration

sys.path.insert(0, str(Path(__file__).parent / "interop"))
from environments import carry_out, python_of  # noqa: E402

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "belle_tiny"
RECORD = "GPTQ_BELLE_RECORD"  # an environment variable: the file to leave the figures in
IDS = torch.randint(4, 3000, (2, 96), generator=torch.Generator().manual_seed(5))
ROWS = torch.randint(4, 3000, (8, 128), generator=torch.Generator().manual_seed(6))
OURS = {"4 bit": QuantConfig(), "8 bit": QuantConfig(bits=8), "act-order": QuantConfig(act_order=True),
        "8 bit act-order": QuantConfig(bits=8, act_order=True), "asymmetric": QuantConfig(sym=False),
        "8 bit asymmetric": QuantConfig(bits=8, sym=False)}
THEIRS = {name: {"bits": config.bits, "group_size": 128, "sym": config.sym, "desc_act": config.act_order}
          for name, config in OURS.items()}
ARCHITECTURES = ("bloom", "llama")
MOST = 2.0
TODAY = datetime.date.today().isoformat()


class Peer(NamedTuple):
    """Where a peer runs, by which script, the kinds that it quantizes, and what it needs to read ours."""

    environment: str
    script: str
    writes: tuple[str, ...] = tuple(OURS)
    needs_v1: bool = False  # zeros of gptq_v2 are read one too high, without a word
    needs_head: bool = False  # beside the tied embedding: one that is left out is not tied


PEERS = {
    "GPTQModel": Peer("gptqmodel", "gptqmodel_peer"),
    # Optimum's own loop around GPTQModel's solver takes minutes on two cores: one kind shows the format.
    "transformers and optimum": Peer("gptqmodel", "transformers_peer", ("4 bit",)),
    "AutoGPTQ": Peer("autogptq", "autogptq_peer", needs_v1=True, needs_head=True),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Our directories by architecture and kind."""
    root, found = tmp_path_factory.mktemp("ours"), {}
    for arch in ARCHITECTURES:
        for name, config in OURS.items():
            found[arch, name] = root / f"{arch}-{name.replace(' ', '-')}"
            quantize_checkpoint(EXAMPLE / arch, found[arch, name], config,
                                calibration=Calibration(ROWS, allow_short=True))
    return found


def readable(peer, arch, name, path, scratch):
    """Our directory as a peer can read it: in v1 by `convert --format gptq`, with a separate head."""
    if peer.needs_v1 and not OURS[name].sym:
        convert(path, scratch / f"v1-{path.name}", checkpoint_format="gptq")
        path = scratch / f"v1-{path.name}"
    return with_head(path, scratch / f"head-{path.name}") if peer.needs_head and arch == "bloom" else path


def with_head(source, out):
    """A copy that holds the tied head a second time, under its own name."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if name.endswith("word_embeddings.weight")]:
        tensors["lm_head.weight"] = tensors[name].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def records():
    found = {"versions": {"gptq_belle": __version__, "torch": torch.__version__}, "rows": []}
    yield found
    if path := os.environ.get(RECORD):
        head = {"date": TODAY, "command": "make interop", "machine": machine_summary()}
        _add_earlier(found, Path(path))
        Path(path).write_text(json.dumps(head | found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_earlier(found, path):
    """Keep the recorded rows of the tests that this run did not select (-k)."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"versions": {}, "rows": []}
    measured = {_case(row) for row in found["rows"]}
    found["versions"] = earlier["versions"] | found["versions"]
    found["rows"] = [row for row in earlier["rows"] if _case(row) not in measured] + found["rows"]


def _case(row):
    return tuple(row[key] for key in ("peer", "direction", "architecture", "kind"))


@pytest.fixture(scope="module", params=PEERS)
def answers(request, written, records, tmp_path_factory):
    """Everything that one peer is asked, in one process: results by (direction, architecture, kind)."""
    peer, scratch = PEERS[request.param], tmp_path_factory.mktemp("peer")
    python = python_of(peer.environment)
    jobs, keys = [], []
    for (arch, name), path in written.items():
        _ask(jobs, keys, ("reads ours", arch, name), readable(peer, arch, name, path, scratch), scratch)
        if name in peer.writes:
            out = scratch / f"theirs-{path.name}"
            jobs.append({"do": "quantize", "source": str(EXAMPLE / arch), "path": str(out), "rows": ROWS.tolist()}
                        | THEIRS[name])
            keys.append(None)
            _ask(jobs, keys, ("is read by us", arch, name), out, scratch)
    answer = carry_out(python, peer.script, jobs, scratch)
    records["versions"] |= {f"{request.param}: {name}": version for name, version in answer["versions"].items()}
    return request.param, {key: (job, result) for key, job, result in
                                 zip(keys, jobs, answer["results"], strict=True) if key}


def _ask(jobs, keys, key, path, scratch):
    jobs.append({"do": "logits", "path": str(path), "ids": IDS.tolist(), "out": str(scratch / f"{len(jobs)}.npy")})
    keys.append(key)


def logits(path, dtype):
    with torch.inference_mode():
        return hf_model(path, device="cpu", dtype=dtype)(IDS).logits.double()


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("direction", ["reads ours", "is read by us"])
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_agree(answers, records, arch, name, direction):
    who, found = answers
    if (direction, arch, name) not in found:
        pytest.skip(f"{who} is not asked to quantize this kind")
    job, result = found[direction, arch, name]
    assert not result, result["error"]
    theirs = torch.from_numpy(numpy.load(job["out"])).double()
    exact = logits(job["path"], torch.float32)
    error, rounding = distance(theirs, exact), distance(logits(job["path"], torch.float16), exact)
    same = float((theirs.argmax(-1) == exact.argmax(-1)).double().mean())
    records["rows"].append({"date": TODAY, "peer": who, "direction": direction, "architecture": arch, "kind": name,
                            "relative_error": error, "float16_rounding": rounding, "same_top_token": same})
    assert error < MOST * rounding
    assert same > 0.97
