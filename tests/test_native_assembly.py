"""The inner loop of products with many rows, as compilers translate it: sums stay in their registers."""

import platform
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
TILES = {"avx512vnni": ("Li8ELi1ELi128E", "Li4ELi2ELi128E"), "avxvnni": ("Li4ELi1ELi128E", "Li2ELi2ELi128E")}
MOVE = re.compile(r"\tvmov\w+\t%[xyz]mm\d+, %[xyz]mm\d+$")
STACK = re.compile(r"%[xyz]mm\d+.*\(%r[sb]p\)|\(%r[sb]p\).*%[xyz]mm\d+")


def between_products(assembly, function):
    """The lines of a function from its first to its last product of bytes."""
    body = assembly[re.search(rf"^\S*{function}\S*:", assembly, re.MULTILINE).end():].split("\t.cfi_endproc")[0]
    lines = body.splitlines()
    products = [index for index, line in enumerate(lines) if "vpdpbusd" in line]
    return lines[products[0]:products[-1] + 1]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64")
@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("compiler", ["g++", "g++-14", "clang++"])
def test_sums_of_a_tile_stay_in_registers(compiler, isa, monkeypatch):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    setup = runpy.run_path("setup.py")
    command = [compiler, *setup["FLAGS"], "-w", *setup["ISAS"][isa], "-S", "-o", "-", f"kernels/native/isa_{isa}.cpp"]
    assembly = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for tile in TILES[isa]:
        loop = between_products(assembly, f"multiply_tileI{tile}")
        products = sum("vpdpbusd" in line for line in loop)
        assert sum(bool(MOVE.search(line)) for line in loop) <= products / 8, tile
        assert not [line for line in loop if STACK.search(line)], tile
