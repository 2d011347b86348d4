"""CheckpointReader: every layout of weight files, and damaged or malicious directories."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import naming
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gptq_belle.checkpoint import direct_io
from gptq_belle.checkpoint.reader import CheckpointReader, read_json, weight_files
from gptq_belle.errors import HardwareError, InputError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tiny_bloom, tmp_path):
    return shutil.copytree(tiny_bloom, tmp_path / "model")


@pytest.fixture
def sharded(tiny_bloom, tmp_path):
    path = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_bloom).save_pretrained(path, max_shard_size="200KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(params=["small tensors", "large tensors", "large tensors, not in the system's cache"])
def sizes(request, monkeypatch):
    """Read every tensor like tensors of that size."""
    if request.param != "small tensors":
        monkeypatch.setattr(direct_io, "LARGE", 0)
    if request.param.endswith("cache"):
        monkeypatch.setattr(direct_io, "_is_cached", lambda *part: False)


def state_of(path):
    return load_file(path / "model.safetensors")


def as_bin(path, state):
    (path / "model.safetensors").unlink()
    torch.save(state, path / "pytorch_model.bin")
    return path


def assert_same(reader, state):
    assert set(reader) == set(state)
    for name, tensor in state.items():
        assert name in reader
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.tensor(name).dtype == tensor.dtype
        assert torch.equal(reader.tensor(name), tensor)


def test_one_safetensors_file(tiny_bloom, sizes):
    reader = CheckpointReader(tiny_bloom)
    assert_same(reader, state_of(tiny_bloom))
    assert reader.arch.blocks == "transformer.h"
    assert reader.config["n_layer"] == 2
    assert reader.files == [tiny_bloom / "model.safetensors"]
    assert reader.bytes_on_disk() == (tiny_bloom / "model.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool])
def test_tensors_of_all_sizes(copy, dtype):
    """Large tensors are in huge pages: sizes of exactly one page, of more, of one element and of none.

    Values are the file's, also where direct I/O wrote them into that memory.
    """
    shapes = {"page": ((1 << 21) // dtype.itemsize,), "more": (1537, 2049), "one": (), "none": (0, 5)}
    state = {f"transformer.{name}": torch.randint(0, 2, shape).to(dtype) for name, shape in shapes.items()}
    save_file(state, copy / "model.safetensors")
    reader = CheckpointReader(copy)
    for name, expected in state.items():
        found = reader.tensor(name)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        assert found.data_ptr() % dtype.itemsize == 0


def test_sharded_checkpoint_is_read(sharded, tiny_bloom):
    assert_same(CheckpointReader(sharded), state_of(tiny_bloom))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_replaced_file_is_not_mixed_with_the_new_one(copy, kind):
    if kind == "bin":
        as_bin(copy, state_of(copy))
    reader = CheckpointReader(copy)
    [file], (*_, last) = reader.files, reader
    expected = reader.tensor(last)
    (copy / "other").write_bytes(bytes(file.stat().st_size))
    (copy / "other").replace(file)
    assert torch.equal(reader.tensor(last), expected)


def refuse(number):
    def refusing(*args, **options):
        raise OSError(number, os.strerror(number))

    return refusing


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_system_errors_are_hardware_errors(copy, monkeypatch, kind, number):
    if kind == "bin":
        as_bin(copy, state_of(copy))
    reader = CheckpointReader(copy)
    with pytest.raises(HardwareError, match=naming(reader.files[0])):
        reader.tensor(next(iter(reader)), refuse(number))
    monkeypatch.setattr(direct_io.FileBytes, "__init__", refuse(number))
    with pytest.raises(HardwareError):
        CheckpointReader(copy)
    monkeypatch.setattr(Path, "read_text", refuse(number))
    with pytest.raises(HardwareError):
        read_json(copy / "config.json")


def test_error_of_a_truncated_bin_file_is_one_line(copy):
    path = as_bin(copy, state_of(copy)) / "pytorch_model.bin"
    os.truncate(path, path.stat().st_size - 5000)
    with pytest.raises(InputError, match=naming(path)) as error:
        CheckpointReader(copy)
    assert len(error.value.cause.splitlines()) == 1


def test_bin_file_is_read(copy, tiny_bloom, sizes):
    assert_same(CheckpointReader(as_bin(copy, state_of(copy))), state_of(tiny_bloom))


def test_bin_file_before_torch_1_6_is_read(copy, tiny_bloom):
    state = state_of(copy)
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(CheckpointReader(copy), state_of(tiny_bloom))


def test_single_file_with_another_name_is_read(copy, tiny_bloom):
    (copy / "model.safetensors").rename(copy / "gptq_model-4bit-128g.safetensors")
    assert_same(CheckpointReader(copy), state_of(tiny_bloom))


def test_names_without_prefix_get_the_prefix(copy, tiny_bloom):
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state_of(copy).items()}
    bare["lm_head.weight"] = torch.ones(2, 2)
    save_file(bare, copy / "model.safetensors")
    reader = CheckpointReader(copy)
    assert "transformer.word_embeddings.weight" in reader
    assert "word_embeddings.weight" not in reader
    assert_same(reader, state_of(tiny_bloom) | {"lm_head.weight": torch.ones(2, 2)})


def refused(path, *named):
    with pytest.raises(InputError, match=naming(*named)) as caught:
        CheckpointReader(path)
    assert caught.value.remedy
    assert caught.value.exit_code == 4


def test_missing_tensor_is_refused(tiny_bloom):
    for read in (CheckpointReader(tiny_bloom).tensor, CheckpointReader(tiny_bloom).shape):
        with pytest.raises(InputError, match=naming("nothing.weight")):
            read("nothing.weight")


def test_missing_directory_is_refused(tmp_path):
    refused(tmp_path / "nothing", tmp_path / "nothing")


def test_missing_configuration_is_refused(copy):
    (copy / "config.json").unlink()
    refused(copy, copy / "config.json")


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[]", b""])
def test_damaged_configuration_is_refused(copy, text):
    (copy / "config.json").write_bytes(text)
    refused(copy, copy / "config.json", "JSON")


@pytest.mark.parametrize("model_type", ["t5", None, 7])
def test_unknown_architecture_is_refused(copy, model_type):
    (copy / "config.json").write_text(json.dumps({"model_type": model_type}))
    refused(copy, model_type)


def test_missing_weights_are_refused(copy):
    (copy / "model.safetensors").unlink()
    refused(copy, copy, 0)


def test_several_files_without_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    refused(sharded, sharded, "index")


def test_missing_shard_is_refused(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, shard.name)


@pytest.mark.parametrize("length", [0, 4, 40, -100])
def test_truncated_shard_is_rejected(sharded, length):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:length])
    refused(sharded, shard.name)


def test_git_lfs_pointer_is_refused(copy):
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(copy, copy / "model.safetensors", "git-lfs")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors"])
def test_index_with_paths_outside_the_folder_is_refused(copy, name):
    (copy / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    refused(copy, copy / INDEX)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_index_without_weight_map_is_refused(copy, content):
    (copy / INDEX).write_text(json.dumps(content))
    refused(copy, copy / INDEX, "weight_map")


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


def test_pickle_that_runs_code_is_refused(copy, tmp_path):
    marker = tmp_path / "ran"
    as_bin(copy, {"transformer.ln_f.weight": torch.ones(1), "extra": RunsCode(str(marker))})
    refused(copy, copy / "pytorch_model.bin")
    assert not marker.exists()


@pytest.mark.parametrize("state", [[torch.ones(1)], {"a": {"b": torch.ones(1)}}, {"a": 1}])
def test_bin_file_without_a_state_dictionary_is_refused(copy, state):
    refused(as_bin(copy, state), copy / "pytorch_model.bin")


@pytest.mark.parametrize("length", [0, 10, -200])
def test_truncated_bin_file_is_rejected(copy, length):
    file = as_bin(copy, state_of(copy)) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:length])
    refused(copy, file)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=naming(tmp_path / "x.json")):
        read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match=naming(tmp_path, 0)):
        weight_files(tmp_path)
