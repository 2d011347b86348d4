"""Install the committed sources in clean environments, and check what is installed; needs pip's package index.

    python benchmarks/install_matrix.py python3.11 python3.12 python3.13

Every Python installs a wheel, an sdist and git+file:// where there is only gcc, only clang, or no compiler. The first
installation of a Python resolves and downloads all dependencies; the others are environments of their own with
`--no-deps` that see those. The product runs without a compiler. Results: benchmarks/results/install_matrix.json. The
exit code is 1 if a case fails.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import records

SOURCES = ("wheel", "sdist", "git")
COMPILERS = {"gcc": ("gcc", "g++"), "clang": ("clang", "clang++"), "none": ()}
TOOLS = ("as", "ld", "ar", "git", "sh", "env", "uname")  # what pip and a compiler start
NOT_BUILT = "CPU kernels are not built"
SDIST = "import setuptools.build_meta as backend; backend.build_sdist({!r})"


def run(*words: str | Path, path: Path | None = None, cwd: Path | None = None, errors: bool = False) -> str:
    """Run a command and return its stdout; raises CalledProcessError.

    Args:
        path: folder of the only programs it finds.
        errors: return stderr too.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC", "CXX")}
    done = subprocess.run(words, env=kept | ({"PATH": str(path)} if path else {}), cwd=cwd, check=True, text=True,
                          capture_output=True)
    return done.stdout + (done.stderr if errors else "")


def environment(python: str | Path, folder: Path, dependencies: Path | None = None) -> Path:
    """Make a virtual environment, which sees the packages of the environment `dependencies`; return its Python."""
    run(python, "-m", "venv", folder)
    if dependencies:
        (site,) = folder.glob("lib/python*/site-packages")
        (others,) = dependencies.parent.parent.glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text(f"{others}\n")
    return folder / "bin" / "python"


def tools(folder: Path, compilers: tuple[str, ...]) -> Path:
    """A folder with links to TOOLS and to the given compilers."""
    folder.mkdir()
    for name in (*TOOLS, *compilers):
        (folder / name).symlink_to(shutil.which(name) or sys.exit(f"{name} is not installed"))
    return folder


def wheel(python: Path, source: Path, folder: Path, path: Path) -> Path:
    """Build a wheel of a source tree; it is for every Python."""
    shutil.rmtree(source / "build", ignore_errors=True)  # another compiler's library would be used again
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source, path=path)
    (found,) = folder.glob("*.whl")
    return found


def check(python: Path, compiler: str, log: str, source: str, empty: Path) -> dict[str, Any]:
    """What an installed package does; `log` is the output of pip."""
    program = python.with_name("gptq-belle")
    doctor = json.loads(run(program, "doctor", "--json", path=empty, cwd=empty))
    model = records.ROOT / "examples" / "belle_tiny" / "bloom"
    run(program, "generate", model, "--prompt", "你好", "--max-tokens", "8", path=empty, cwd=empty)
    said = [text.count(NOT_BUILT) for text in (log, run(program, "doctor", path=empty, cwd=empty))]
    built = compiler != "none"
    expected = [0 if built or source == "wheel" else 1, 0 if built else 1]  # pip builds nothing for a wheel
    return {"isa": doctor["native"]["isa"], "said": said,
            "ok": (doctor["native"]["isa"] is not None) == built and said == expected}


def main() -> None:
    """Install every case, and write the record."""
    pythons, rows = sys.argv[1:] or ["python3"], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, empty = folder / "source", folder / "empty"
        run("git", "clone", "--quiet", records.ROOT, source)
        empty.mkdir()
        paths = {compiler: tools(folder / f"with-{compiler}", names) for compiler, names in COMPILERS.items()}
        builder = environment(pythons[0], folder / "builder")
        run(builder, "-m", "pip", "install", "--quiet", "setuptools>=77")
        run(builder, "-c", SDIST.format(str(folder)), cwd=source)
        (sdist,) = folder.glob("*.tar.gz")
        wheels = {compiler: wheel(builder, source, folder / f"wheel-{compiler}", path)
                  for compiler, path in paths.items()}
        for number, python in enumerate(pythons):
            start = time.monotonic()
            complete = environment(python, folder / f"complete-{number}")
            run(complete, "-m", "pip", "install", "--quiet", wheels["gcc"])
            version = run(complete, "-c", "import platform; print(platform.python_version())").strip()
            seconds = round(time.monotonic() - start)
            rows.append({"python": version, "source": "wheel, all dependencies", "compiler": "gcc", "seconds": seconds}
                        | check(complete, "gcc", "", "wheel", empty))
            print(rows[-1], flush=True)
            run(complete, "-m", "pip", "uninstall", "--quiet", "--yes", "gptq-belle")
            for kind, compiler in product(SOURCES, COMPILERS):
                what = {"wheel": str(wheels[compiler]), "sdist": str(sdist), "git": f"git+file://{source}"}[kind]
                start = time.monotonic()
                own = environment(python, folder / "own", complete)
                log = run(own, "-m", "pip", "install", "--no-deps", "-v", "--no-cache-dir", what, path=paths[compiler],
                          errors=True)
                seconds = round(time.monotonic() - start)
                rows.append({"python": version, "source": kind, "compiler": compiler, "seconds": seconds}
                            | check(own, compiler, log, kind, empty))
                print(rows[-1], flush=True)
                shutil.rmtree(folder / "own")
            shutil.rmtree(folder / f"complete-{number}")
            records.write("install_matrix", {"ok": sum(row["ok"] for row in rows), "cases": rows})
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd}\n{error.stdout}{error.stderr}")
