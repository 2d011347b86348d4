"""Malicious and damaged files: mutated checkpoints in `inspect` and `load`, and cases that mutation rarely finds."""

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import naming
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import VALUES, Worker, bases, mutant
from safetensors.torch import load_file, save_file

from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.engine.hf_model import hf_model
from gptq_belle.errors import InputError
from gptq_belle.quantization.activations import Activations

PIECE = 1000


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return bases(tmp_path_factory.mktemp("bases"))


def run(worker, small, seeds, folder):
    """Count outcomes; anything but a clean error or a valid model fails with its seed."""
    counts = {"valid": 0, "refused": 0}
    for seed in seeds:
        outcome, said = worker(mutant(seed, small[seed % len(small)], folder / "mutant"))
        assert outcome in counts, f"seed {seed}: {said}"
        counts[outcome] += 1
    return counts


def test_unmutated_checkpoints_load(worker, small):
    assert [worker(base) for base in small] == [("valid", "")] * 3


def test_mutated_checkpoints_are_refused_or_load(worker, small, tmp_path):
    counts = run(worker, small, range(200), tmp_path)
    assert counts["refused"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(20))
def test_twenty_thousand_mutated_checkpoints(worker, small, tmp_path, piece):
    counts = run(worker, small, range(PIECE * (piece + 1), PIECE * (piece + 2)), tmp_path)
    print(f"piece {piece}: {counts}")


JSON = st.recursive(st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=6)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_in_any_key_is_refused_or_loads(worker, small, tmp_path, data):
    base = data.draw(st.sampled_from(small))
    name = data.draw(st.sampled_from([name for name in ("config.json", "quantize_config.json", "generation_config.json",
                                                        "tokenizer_config.json") if (base / name).is_file()]))
    content = json.loads((base / name).read_text(encoding="utf-8"))
    place = content.get("quantization_config", content) if data.draw(st.booleans()) else content
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    folder = shutil.copytree(base, tmp_path / "mutant", dirs_exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    outcome, said = worker(folder)
    shutil.rmtree(folder)
    assert outcome != "failed", said


@pytest.fixture
def model(small, tmp_path):
    """Copy of the packed BLOOM."""
    return shutil.copytree(small[0], tmp_path / "model")


def with_header(path, edit):
    """Change the header of the weights; `edit` changes it in place, or returns another one."""
    file = path / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + size])
    text = json.dumps(edit(content) or content).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def by_place(header):
    """Names of the tensors in the order of the file."""
    return sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])


def set_first(**values):
    return lambda header: header[by_place(header)[0]].update(values)


@pytest.mark.parametrize("edit", [
    set_first(data_offsets=[0, 1 << 40]), set_first(data_offsets=[1 << 40, 0]), set_first(data_offsets=[0]),
    set_first(shape=[1 << 61, 1 << 61]), set_first(shape=[-1, -1]), set_first(shape=["4"]), set_first(shape=[True]),
    set_first(dtype="F13"), set_first(dtype=16),
    lambda header: header.update(twin=dict(header[by_place(header)[-1]])),
    lambda header: header.pop(by_place(header)[1]) and None,
    lambda header: header.pop(by_place(header)[-1]) and None,
    lambda header: {"x": 3}, lambda header: [header]])
def test_inconsistent_safetensors_header_is_refused(model, edit):
    with_header(model, edit)
    with pytest.raises(InputError, match=naming(model / "model.safetensors")):
        CheckpointReader(model)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16])
def test_unsupported_dtype_is_refused(model, dtype):
    save_file({"x": torch.zeros(2, dtype=dtype)}, model / "model.safetensors")
    with pytest.raises(InputError):
        CheckpointReader(model)


@pytest.mark.parametrize("data", [
    b"", b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"\xff\xfe",
    (100_000).to_bytes(8, "little") + b"[" * 100_000,
    (25).to_bytes(8, "little") + b'{"a":{},"a":{},"__m__":{}}'[:25]])
def test_file_without_a_safetensors_header_is_refused(model, data):
    (model / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=naming(model / "model.safetensors")):
        CheckpointReader(model)


def test_huge_header_is_not_read(model):
    with (model / "model.safetensors").open("wb") as file:
        file.write((200 << 20).to_bytes(8, "little"))
        file.truncate(1 << 30)
    with pytest.raises(InputError, match=naming("model.safetensors")):
        CheckpointReader(model)


def pickled(model):
    """Replace the weights by a .bin file."""
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return model / "pytorch_model.bin"


def test_compressed_bin_file_is_refused(model):
    file = pickled(model)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(InputError):
        CheckpointReader(model)


def test_damaged_central_directory_is_refused(model):
    file = pickled(model)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"PK\x01\x02", b"PK\x01\x03"))
    with pytest.raises(InputError):
        CheckpointReader(model)


def test_storage_larger_than_its_record_is_refused(model):
    file = pickled(model)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content[:-4] if name.endswith("data/0") else content)
    with pytest.raises(InputError):
        [CheckpointReader(model).tensor(name) for name in CheckpointReader(model)]


def test_huge_json_file_is_not_read(model):
    with (model / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match=naming("config.json")):
        CheckpointReader(model)


def test_devices_and_pipes_are_not_opened(model):
    for name in ("config.json", "model.safetensors"):
        (model / name).rename(model / "kept")
        os.mkfifo(model / name)
        with pytest.raises(InputError, match=naming(model)):
            CheckpointReader(model)
        (model / name).unlink()
        (model / "kept").rename(model / name)
    CheckpointReader(model)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_file_truncated_while_it_is_read_is_refused(model, kind):
    file = model / "model.safetensors"
    if kind == "bin":
        torch.save(load_file(file), model / "pytorch_model.bin")
        file.unlink()
        file = model / "pytorch_model.bin"
    reader = CheckpointReader(model)
    os.truncate(file, 3000)
    with pytest.raises(InputError, match=naming(file)):
        [reader.tensor(name) for name in reader]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_run_no_code(model, tmp_path, zipped):
    (model / "model.safetensors").unlink()
    payload = {"transformer.ln_f.weight": torch.zeros(2), "x": Payload(tmp_path / "executed")}
    if zipped:
        torch.save(payload, model / "pytorch_model.bin")
    else:
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(payload))
    with pytest.raises(InputError, match=naming(model / "pytorch_model.bin")):
        CheckpointReader(model)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("place", ["../climbed", "../../climbed/data", "/climbed"])
def test_paths_in_an_archive_are_ignored(model, tmp_path, place):
    """Archives are not extracted, so names of members are never used as paths."""
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with zipfile.ZipFile(model / "pytorch_model.bin") as archive:
        members = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(model / "pytorch_model.bin", "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{place}/{name}", content)
    before = sorted(tmp_path.rglob("*"))
    with contextlib.suppress(InputError):
        reader = CheckpointReader(model)
        assert all(len(reader.tensor(name)) for name in reader)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/climbed").exists()


def test_truncated_activation_file_is_named(tmp_path):
    (tmp_path / "journal").mkdir()
    states = Activations(tmp_path, [(2, 8)] * 2, spill=True)
    states.write(1, [torch.ones(2, 8)] * 2)
    os.truncate(tmp_path / states.name(1), 100)
    with pytest.raises(InputError, match=naming(tmp_path / states.name(1))):
        list(states)


def edited(model, name, change):
    tensors = load_file(model / "model.safetensors")
    (name,) = [n for n in tensors if n.endswith(name)][:1]
    tensors[name] = change(tensors[name])
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize(("tensor", "change", "named"), [
    ("g_idx", lambda t: t.fill_(4), "g_idx"), ("g_idx", lambda t: t.fill_(-1), "g_idx"),
    ("g_idx", lambda t: t[:-1].clone(), "g_idx"), ("g_idx", lambda t: t.float(), "g_idx"),
    ("scales", lambda t: t.fill_(float("nan")), "NaN"), ("scales", lambda t: t.fill_(float("inf")), "infinity"),
    ("scales", lambda t: t.to(torch.int32), "scales"), ("qweight", lambda t: t.to(torch.int64), "qweight"),
    ("qweight", lambda t: t[:-1].clone(), "bits"), ("qzeros", lambda t: t[:, :-1].clone(), "qzeros"),
    ("bias", lambda t: t[:-1].clone(), "bias")])
def test_damaged_packed_tensor_is_refused(model, tensor, change, named):
    edited(model, f"h.0.mlp.dense_4h_to_h.{tensor}", change)
    with pytest.raises(InputError, match=naming("h.0.mlp.dense_4h_to_h", named)):
        hf_model(model)
    assert inspect(model).problems


def configured(model, **values):
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | values))


@pytest.mark.parametrize("values", [
    {"n_layer": 10**9}, {"hidden_size": 1 << 40}, {"n_head": 0}, {"vocab_size": -5}, {"n_layer": "2"},
    {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 10**30}},
    {"quantization_config": {"quant_method": "gptq", "bits": True, "group_size": 32}},
    {"quantization_config": [4]}], ids=str)
def test_inconsistent_configuration_is_refused(model, values):
    configured(model, **values)
    with pytest.raises(InputError):
        hf_model(model)
    with contextlib.suppress(InputError):
        assert inspect(model).problems


def test_configuration_cannot_select_code(model):
    configured(model, _attn_implementation="attacker/kernel", attn_implementation="attacker/kernel",
               auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    (model / "evil.py").write_text("raise SystemExit('executed')")
    assert hf_model(model).config._attn_implementation in ("eager", "sdpa")


def test_small_files_are_not_copied_from_elsewhere(tiny_bloom, tmp_path):
    from gptq_belle.quantization.config import QuantConfig
    from gptq_belle.quantization.pipeline import quantize_checkpoint

    (tmp_path / "secret").write_text("secret")
    source = shutil.copytree(tiny_bloom, tmp_path / "source")
    (source / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=naming("merges.txt")):
        quantize_checkpoint(source, tmp_path / "out", QuantConfig(group_size=32, method="rtn"))
