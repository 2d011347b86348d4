"""Package layout: the link to kernels/, names that hide no other package, and light imports."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUIET = "import sys; sys.path.insert(0, {root!r}); import {module}; print([m for m in sys.modules if {ours}])"


def python(code: str, cwd: Path = ROOT) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_kernels_is_a_folder_and_a_symlink():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "gptq_belle" / "kernels").is_symlink()
    assert (ROOT / "gptq_belle" / "kernels").resolve() == ROOT / "kernels"


def test_no_module_hides_another_package():
    # by path, `python gptq_belle/quantize.py` starts with that folder first on sys.path
    names = {path.stem for path in (ROOT / "gptq_belle").iterdir()}
    assert not names & {"datasets", "evaluate", "tokenizers", "triton", "safetensors", "types", "queue", "torch"}


def test_importing_transformers_imports_no_code_of_this_package():
    code = QUIET.format(root=str(ROOT), module="transformers; from transformers import LlamaForCausalLM",
                        ours="m.startswith(('gptq_belle', 'kernels.'))")
    assert python(code).strip() == "[]"


def test_importing_the_package_imports_no_large_package():
    code = QUIET.format(root=str(ROOT), module="gptq_belle, gptq_belle.cli",
                        ours="m in ('torch', 'triton', 'transformers', 'safetensors')")
    assert python(code).strip() == "[]"


def test_kernels_import_nothing_of_the_package():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "gptq_belle" not in [word.split(".")[0] for line in path.read_text(encoding="utf-8").splitlines()
                                    if line.lstrip().startswith(("import ", "from ")) for word in line.split()[1:2]]


def test_system_without_file_locks_is_named_in_one_line():
    code = "import sys; sys.modules['fcntl'] = None; from gptq_belle.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "inspect", "examples/belle_tiny/llama"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 3
    assert "WSL2" in done.stderr
    assert "Traceback" not in done.stderr
