"""Carry Triton's cache from one machine to another as one zip file.

Two things tie a cache to its place. Triton's index files hold absolute paths, which `unpack` rewrites. The key of a
kernel holds the version of Triton and hashes of its files, so a cache serves only the same wheel: versions of Python
differ in it, too. The launcher's key up to Triton 3.7 is a hash of its C source, and its file name holds the version of
Python; later versions add the folders of CUDA's libraries, so there the launcher serves on machines that agree in them.
"""

import json
import zipfile
from pathlib import Path

INDEX = "__grp__"  # prefix of the files that list what belongs to a kernel
KEPT = (".cubin", ".json", ".so")  # what a launch reads


def pack(cache: Path, archive: Path) -> int:
    """Write a cache folder to an archive; returns its size in bytes."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(cache.glob("*/*")):
            if path.is_file() and path.suffix in KEPT:
                file.write(path, path.relative_to(cache).as_posix())
    return archive.stat().st_size


def unpack(archive: Path, cache: Path) -> int:
    """Add an archive to a cache folder, with the paths in its index files rewritten; returns the number of kernels."""
    with zipfile.ZipFile(archive) as file:
        file.extractall(cache)
        indexes = [cache / name for name in file.namelist() if Path(name).name.startswith(INDEX)]
    for index in indexes:
        names = json.loads(index.read_text(encoding="utf-8"))["child_paths"]
        here = {name: str(index.parent / name) for name in names if (index.parent / name).is_file()}
        index.write_text(json.dumps({"child_paths": here}), encoding="utf-8")
    return len(indexes)
