"""Models by name: resolution of names, and interrupted downloads from a stub of the hub on this machine."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import naming
from hub_stub import Hub
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE
from oracle_legacy import write_legacy

from gptq_belle.checkpoint import hub
from gptq_belle.checkpoint.decryption import encrypt
from gptq_belle.errors import InputError, UsageError


@pytest.fixture
def command(tmp_path):
    """Runs the command line with the stub as its hub: (exit code, stdout, stderr)."""

    def call(stub, *args):
        environment = os.environ | {"HF_ENDPOINT": stub.endpoint, "HF_HOME": str(tmp_path / "home"),
                                    "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("HF_HUB_CACHE", None)
        done = subprocess.run([sys.executable, "-m", "gptq_belle.cli", *map(str, args)], capture_output=True, text=True,
                              env=environment, timeout=300)
        return done.returncode, done.stdout, done.stderr

    return call


def test_model_is_found_by_its_hub_id(tiny_llama, command):
    with Hub("BelleGroup/tiny", tiny_llama) as stub:
        code, out, _ = command(stub, "inspect", "BelleGroup/tiny", "--json")
        assert code == 0
        assert json.loads(out)["architecture"] == "llama"
        stub.ranges.clear()
        assert command(stub, "inspect", "BelleGroup/tiny")[0] == 0
        assert stub.ranges == []  # found in the cache
        code, _, err = command(stub, "inspect", "BelleGroup/other")
        assert code == 4
        assert "BelleGroup/other" in err


def test_known_model_is_found_by_its_short_name(tiny_bloom, command):
    with Hub("BelleGroup/BELLE-7B-2M", tiny_bloom) as stub:
        code, out, err = command(stub, "generate", "BELLE-7B-2M", "--prompt", "你好", "--max-tokens", "3", "--json")
        assert code == 0, err
        assert "answer" in json.loads(out)


def downloaded(tmp_path, name="model.safetensors"):
    (got,) = (tmp_path / "home").rglob(f"snapshots/*/{name}")
    return got.read_bytes()


def test_broken_connection_resumes_the_download(tiny_llama, command, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    large = np.random.default_rng(0).bytes(2 * DOWNLOAD_CHUNK_SIZE + 5)
    (tmp_path / "model" / "another.bin").write_bytes(large)
    with Hub("BelleGroup/tiny", tmp_path / "model") as stub:
        stub.breaks, stub.heals = {"another.bin": DOWNLOAD_CHUNK_SIZE + 1000}, True
        assert command(stub, "inspect", "BelleGroup/tiny")[0] == 0
        asked = [first for name, first in stub.ranges if name == "another.bin"]
    assert asked == [0, DOWNLOAD_CHUNK_SIZE]  # huggingface_hub keeps whole chunks
    assert downloaded(tmp_path, "another.bin") == large


def test_interrupted_download_keeps_complete_files(tiny_llama, command, tmp_path):
    whole = (tiny_llama / "model.safetensors").read_bytes()
    with Hub("BelleGroup/tiny", tiny_llama) as stub:
        stub.breaks = {"model.safetensors": len(whole) // 2}
        code, out, err = command(stub, "inspect", "BelleGroup/tiny")
        assert (code, out) == (3, "")
        assert "BelleGroup/tiny" in err
        assert {"config.json", "tokenizer.json"} <= {name for name, _ in stub.ranges}
        stub.breaks, stub.ranges = {}, []
        assert command(stub, "inspect", "BelleGroup/tiny")[0] == 0
        assert {name for name, _ in stub.ranges} == {"model.safetensors"}
    assert downloaded(tmp_path) == whole


def test_only_the_requested_pt_file_is_downloaded(tiny_bloom, command, tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_bloom / name, folder)
    config = json.loads((tiny_bloom / "config.json").read_text())
    for bits in (4, 8):
        write_legacy(tiny_bloom, folder / f"bloom7b-2m-{bits}bit-128g.pt", config, bits=bits, group=32)
    with Hub("BelleGroup/BELLE-7B-gptq", folder) as stub:
        code, out, err = command(stub, "convert", "BELLE-7B-gptq/bloom7b-2m-8bit-128g.pt", tmp_path / "out", "--json")
        assert code == 0, err
        assert json.loads(out)["bits"] == 8
        assert "bloom7b-2m-4bit-128g.pt" not in dict(stub.ranges)


def test_only_the_requested_encrypted_file_is_downloaded(tiny_llama, command, tmp_path):
    (tmp_path / "plain").mkdir()
    shutil.copy(tiny_llama / "config.json", tmp_path / "plain")
    for bits in (4, 8):
        (tmp_path / "plain" / f"llama7b-2m-{bits}bit-128g.pt").write_bytes(np.random.default_rng(bits).bytes(999))
    key = tmp_path / "consolidated.00.pth"
    key.write_bytes(np.random.default_rng(0).bytes(50_000))
    encrypt(tmp_path / "plain", tmp_path / "enc", key)
    with Hub("BelleGroup/BELLE-LLaMA-7B-2M-gptq-enc", tmp_path / "enc") as stub:
        code, _, err = command(stub, "decrypt", "BELLE-LLaMA-7B-2M-gptq-enc/llama7b-2m-4bit-128g.pt", tmp_path / "out",
                               "--key", key)
        assert code == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "llama7b-2m-4bit-128g.pt"}


@pytest.mark.parametrize(("model", "kinds", "advice"), [
    ("BELLE-LLaMA-7B-2M-enc", hub.READABLE, "gptq-belle decrypt BELLE-LLaMA-7B-2M-enc OUT"),
    ("BelleGroup/BELLE-LLaMA-13B-2M-enc", hub.CONVERTIBLE, "gptq-belle decrypt"),
    ("belle-7b-gptq", hub.READABLE, "gptq-belle convert BELLE-7B-gptq/bloom7b-2m-4bit-128g.pt OUT"),
    ("BELLE-7B-gptq", hub.CONVERTIBLE, "BELLE-7B-gptq/bloom7b-2m-4bit-128g.pt"),
    ("BELLE-7B-2M", hub.DECRYPTABLE, "gptq-belle quantize BELLE-7B-2M OUT"),
])
def test_command_that_has_to_run_first_is_suggested(model, kinds, advice):
    with pytest.raises(UsageError) as refused:
        hub.resolve_model_path(model, kinds)
    assert advice in refused.value.remedy


def test_unknown_model_name_is_refused(tmp_path):
    with pytest.raises(InputError, match=naming("nonsense")):
        hub.resolve_model_path("nonsense")
    with pytest.raises(InputError, match=naming(tmp_path / "not" / "there")):
        hub.resolve_model_path(tmp_path / "not" / "there")
    assert hub.resolve_model_path(tmp_path) == tmp_path
