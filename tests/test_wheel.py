"""The wheel carries the kernels, the data files and, where there is a compiler, the native library."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from gptq_belle.kernels.native_library import NativeLibrary, load_library

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = """
import torch
from gptq_belle.kernels import dispatch
from gptq_belle.kernels.cpu_layout import CpuWeight
from gptq_belle.kernels.native_library import load_library
words = dict(qweight=torch.randint(-2**31, 2**31, (16, 64), dtype=torch.int32), scales=torch.rand(1, 64).half(),
             qzeros=torch.full((1, 8), 0x77777777, dtype=torch.int32), g_idx=None)
cpu = torch.device("cpu")
weight = dispatch.prepare_tensors(**words, bits=4, zero_offset=1, device=cpu, dtype=torch.float32)
assert isinstance(weight, CpuWeight), load_library()
x = torch.randn(3, 128)
exact = dispatch.quant_matmul(x.double(), dispatch.prepare_tensors(**words, bits=4, zero_offset=1, device=cpu,
                                                          dtype=torch.float64))
y = dispatch.quant_matmul(x, weight)
assert (y - exact).norm() < 2e-4 * exact.norm()
print(dispatch.__file__)
"""


def python(code: str, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True, capture_output=True, text=True).stdout


def wheel_of_a_copy(tmp_path: Path, **environment: str) -> Path:
    """Build a wheel from a copy of the sources."""
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
    return wheel


def test_a_wheel_carries_kernels_and_data_even_without_a_compiler(tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel_of_a_copy(tmp_path, CC="false", CXX="false")) as archive:
        archive.extractall(site)
    assert not (site / "gptq_belle" / "kernels").is_symlink()
    page = Path("gptq_belle", "serving", "static")
    files = [path.relative_to(ROOT) for folder in (page, Path("gptq_belle", "evaluation", "templates"))
             for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert files
    assert all((site / path).is_file() for path in files)
    licences = {path.name for path in (ROOT / page).glob("vendor/LICENSE-*")}
    assert {path.name for path in site.glob("*.dist-info/licenses/**/LICENSE-*")} == licences
    code = (f"import sys; sys.path.insert(0, {str(site)!r});"
            "import gptq_belle.kernels.dispatch as d; print(d.__file__);"
            "from gptq_belle.quantization.calibration.data_files import read_documents;"
            "print(len(read_documents('builtin').documents));"
            "import torch; print(d.choose_kernel(torch.arange(64) // 32, device=torch.device('cpu'),"
            " dtype=torch.float32))")
    where, documents, choice = python(code, cwd=tmp_path).splitlines()
    assert where.startswith(str(site))
    assert int(documents) > 1000
    assert "groupwise" in choice
    assert "no C++17 compiler when the package was installed" in choice


@pytest.mark.slow
@pytest.mark.skipif(not isinstance(load_library(), NativeLibrary), reason="no compiler")
def test_a_wheel_with_native_kernels_is_installed_and_used_without_a_compiler(tmp_path):
    wheel = wheel_of_a_copy(tmp_path)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    there = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(there)], check=True)
    binaries = there / "bin"
    environment = {"PATH": str(binaries), "HOME": str(tmp_path)}  # no compiler, and no PYTHONPATH to these sources
    subprocess.run([binaries / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
                   check=True, env=environment, cwd=tmp_path)
    (site,) = there.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # torch and the rest, after the wheel
    where = subprocess.run([binaries / "python", "-c", PRODUCT], check=True, env=environment, cwd=tmp_path,
                           capture_output=True, text=True).stdout
    assert where.startswith(str(site))
