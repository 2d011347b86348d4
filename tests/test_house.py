"""The house stands as designed: the kernels link, imports that stay light, a wheel that carries real files."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUIET = "import sys; sys.path.insert(0, {root!r}); import {module}; print([m for m in sys.modules if {ours}])"


def python(code: str, cwd: Path = ROOT) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_kernels_is_a_plain_folder_behind_a_link():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "gptq_belle" / "kernels").is_symlink()
    assert (ROOT / "gptq_belle" / "kernels").resolve() == ROOT / "kernels"


def test_nothing_in_the_package_hides_another_package():
    # by path, `python gptq_belle/quantize.py` starts with that folder first on sys.path
    names = {path.stem for path in (ROOT / "gptq_belle").iterdir()}
    assert not names & {"datasets", "evaluate", "tokenizers", "triton", "safetensors", "types", "queue", "torch"}


def test_transformers_imported_at_the_root_runs_no_code_of_ours():
    code = QUIET.format(root=str(ROOT), module="transformers; from transformers import LlamaForCausalLM",
                        ours="m.startswith(('gptq_belle', 'kernels.'))")
    assert python(code).strip() == "[]"


def test_importing_the_package_imports_nothing_heavy():
    code = QUIET.format(root=str(ROOT), module="gptq_belle, gptq_belle.cli",
                        ours="m in ('torch', 'triton', 'transformers', 'safetensors')")
    assert python(code).strip() == "[]"


def test_kernels_import_nothing_of_the_package():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "gptq_belle" not in [word.split(".")[0] for line in path.read_text(encoding="utf-8").splitlines()
                                    if line.lstrip().startswith(("import ", "from ")) for word in line.split()[1:2]]


def wheel_of_a_copy(tmp_path: Path, **environment: str) -> Path:
    """Build a wheel from a copy of the sources, unpack it, and return the folder."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("gptq_belle", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True,
                        ignore=shutil.ignore_patterns("__pycache__", "_native*.so"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                    "--no-index", "-w", str(tmp_path), str(source)], check=True, cwd=tmp_path,
                   env=os.environ | environment)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    return tmp_path / "site"


def test_a_wheel_carries_kernels_and_data_even_without_a_compiler(tmp_path):
    site = wheel_of_a_copy(tmp_path, CC="false", CXX="false")
    assert not (site / "gptq_belle" / "kernels").is_symlink()
    assert (site / "gptq_belle" / "reporting" / "templates" / "report.html.j2").is_file()
    code = (f"import sys; sys.path.insert(0, {str(site)!r});"
            "import gptq_belle.kernels.dispatch as d; print(d.__file__);"
            "from gptq_belle.quantization.calibration import read_documents; print(len(read_documents('builtin')));"
            "import torch; print(d.choose(4, torch.arange(64) // 32, 64, device=torch.device('cpu'),"
            " dtype=torch.float32))")
    where, documents, choice = python(code, cwd=tmp_path).splitlines()
    assert where.startswith(str(site))
    assert int(documents) > 1000
    assert "groupwise" in choice
    assert "no C++17 compiler when the package was installed" in choice


@pytest.mark.slow
def test_a_wheel_carries_the_native_kernels(tmp_path):
    site = wheel_of_a_copy(tmp_path)
    code = (f"import sys; sys.path.insert(0, {str(site)!r});"
            "from gptq_belle.kernels.library import library; print(library().isa)")
    assert python(code, cwd=tmp_path).strip()
