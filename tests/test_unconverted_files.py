"""Git-lfs pointers, encrypted and legacy files instead of weights: the error names the command to run first."""

import shutil

import pytest
import torch

from gptq_belle.checkpoint.conversion import convert
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.errors import InputError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"


@pytest.fixture
def model(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


def refused(action, *args):
    with pytest.raises(InputError) as caught:
        action(*args)
    return caught.value.cause, caught.value.remedy


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointer_instead_of_weights_is_refused(model, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(POINTER)
    assert refused(CheckpointReader, model) == (f"{model / name} is a git-lfs pointer, not the file itself",
                                                "Fetch it: git lfs pull.")


def test_git_lfs_pointer_instead_of_a_pt_file_is_refused(model, tmp_path):
    (model / "old.pt").write_bytes(POINTER)
    assert "old.pt is a git-lfs pointer" in refused(convert, model, tmp_path / "out")[0]
    assert not (tmp_path / "out").exists()


def test_git_lfs_pointer_instead_of_a_tokenizer_is_refused(model):
    (model / "tokenizer.json").write_bytes(POINTER)
    assert "tokenizer.json is a git-lfs pointer" in refused(load_tokenizer, model)[0]


def test_missing_or_damaged_tokenizer_is_refused(model):
    (model / "tokenizer.json").write_text("{")
    assert str(model) in refused(load_tokenizer, model)[0]
    for file in model.glob("tokenizer*"):
        file.unlink()
    cause, remedy = refused(load_tokenizer, model)
    assert str(model) in cause
    assert "--base" in remedy


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(("name", "verb"), [("a.pt", "convert"), (f"a.bin.{'0' * 64}.enc", "decrypt")])
def test_command_that_has_to_run_first_is_suggested(model, name, verb, config):
    (model / "model.safetensors").rename(model / name)
    if not config:
        (model / "config.json").unlink()
    for path in (model, model / name):
        assert refused(CheckpointReader, path)[1].startswith(f"First: gptq-belle {verb} {path} OUT")


def test_encrypted_files_are_not_converted(model, tmp_path):
    (model / "model.safetensors").rename(model / "a.pt.enc")
    for path in (model, model / "a.pt.enc"):
        assert refused(convert, path, tmp_path / "out")[1].startswith(f"First: gptq-belle decrypt {path} OUT")


def test_unrelated_files_next_to_the_weights_are_ignored(model):
    torch.save({}, model / "optimizer.pt")
    assert "model.embed_tokens.weight" in CheckpointReader(model)
