"""CheckpointWriter: atomic output directories, and merged files that safetensors reads."""

import json
from itertools import pairwise

import pytest
import torch
from conftest import naming
from safetensors import safe_open

from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.errors import UsageError
from gptq_belle.quantization.config import QuantConfig

PARTS = {
    "a.safetensors": {"x.scales": torch.randn(3, 5).half(), "x.qweight": torch.randint(-9, 9, (4, 5)).int()},
    "b.safetensors": {"y.scales": torch.randn(1, 7).half(), "y.qweight": torch.randint(-9, 9, (2, 7)).int()},
}


def write(out, shard_bytes=10**9, publish=True):
    with CheckpointWriter(out, shard_bytes) as writer:
        for part, tensors in PARTS.items():
            writer.add(part, tensors)
        writer.write_json("quantize_config.json", QuantConfig().to_dict())
        writer.merge()
        if publish:
            writer.publish()


def read(file):
    with safe_open(str(file), framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def check(found):
    expected = {name: tensor for part in PARTS.values() for name, tensor in part.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_parts_are_merged_into_one_file(tmp_path):
    write(tmp_path / "out")
    check(read(tmp_path / "out" / "model.safetensors"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_parts_are_merged_into_shards_with_an_index(tmp_path):
    write(tmp_path / "out", shard_bytes=120)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    check({name: tensor for file in files for name, tensor in read(tmp_path / "out" / file).items()})
    assert all(name in read(tmp_path / "out" / file) for name, file in index["weight_map"].items())


def test_tensors_are_aligned_without_gaps(tmp_path):
    write(tmp_path / "out")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    spans = sorted(value["data_offsets"] for name, value in header.items() if name != "__metadata__")
    assert size % 8 == 0
    assert spans[0][0] == 0
    assert spans[-1][1] == len(data) - 8 - size
    assert all(end == begin for (_, end), (begin, _) in pairwise(spans))
    assert all(v["data_offsets"][0] % 4 == 0 for k, v in header.items() if k.endswith("qweight"))


def test_failed_job_leaves_no_files(tmp_path):
    write(tmp_path / "out", publish=False)
    assert list(tmp_path.iterdir()) == []


def test_own_output_is_replaced_and_foreign_directory_is_refused(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("old")
    write(tmp_path / "out")
    assert not (tmp_path / "out" / "stale.txt").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=naming(other)):
        write(other)
    assert (other / "thesis.txt").read_text() == "precious"


def test_two_jobs_cannot_write_one_directory(tmp_path):
    with CheckpointWriter(tmp_path / "out") as first:
        with pytest.raises(UsageError, match=naming(tmp_path / "out")), CheckpointWriter(tmp_path / "out"):
            pass
        assert first.parts.is_dir()
    write(tmp_path / "out")


def test_partial_directory_of_a_killed_job_is_reused_and_others_are_refused(tmp_path):
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a.safetensors", PARTS["a.safetensors"])
        writer.write_text("half", "written")
        writer.keep = True
    assert not (tmp_path / "out.partial" / "files").exists()
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("b.safetensors", PARTS["b.safetensors"])
        writer.merge()
        writer.publish()
    check(read(tmp_path / "out" / "model.safetensors"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=naming(tmp_path / "new.partial")):
        write(tmp_path / "new")
    (tmp_path / "link.partial").symlink_to(tmp_path / "new.partial")
    with pytest.raises(UsageError, match=naming(tmp_path / "link.partial")):
        write(tmp_path / "link")


def test_previous_output_is_restored_after_a_crash_between_the_renames(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out.partial" / "parts").mkdir(parents=True)
    (tmp_path / "out").rename(tmp_path / "out.partial" / "replaced")
    with CheckpointWriter(tmp_path / "out"):
        check(read(tmp_path / "out" / "model.safetensors"))
