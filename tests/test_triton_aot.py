"""Machine code of the kernels, compiled for GPUs that need not be present: nothing spills, and loops are short.

The fast tests compile a part of the jobs. benchmarks/results/triton_aot.json records more of them, for every supported
version of Triton.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import aot  # noqa: E402
import aot_jobs  # noqa: E402
import aot_sets  # noqa: E402
import machine_code  # noqa: E402
from aot_jobs import SAME, Job  # noqa: E402

from gptq_belle.kernels.triton_config import TileConfig  # noqa: E402

GEFORCE, HOPPER = 86, 90  # one with HMMA, one with HGMMA
FAST = (80, GEFORCE, HOPPER)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path_factory, monkeypatch):
    """Triton's cache is empty when the tests start, and shared by them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def check(job):
    code = aot_jobs.compiled(job)
    assert aot.problems(job, code) == [], aot.row(job, code)
    assert code.registers <= 255
    return code


def label(job):
    return "-".join(str(value).replace(" ", "") for value in job if value is not None)


USUAL = [job for arch in FAST for job in aot_sets.usual(arch)
         if job.config is None or (job.config.SPLIT_K == 2 and (arch == HOPPER or not job.epilogue))]
OTHER_FORMATS = [job for arch in (GEFORCE, HOPPER) for job in aot_sets.covering(arch)[len(aot_sets.usual(arch)) :]
                 if job.config is None or job.config.BM in (8, 64, 128)]


@pytest.mark.parametrize("job", USUAL, ids=label)
def test_usual_checkpoint(job):
    check(job)


@pytest.mark.parametrize("job", OTHER_FORMATS, ids=label)
def test_other_formats(job):
    check(job)


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot_jobs.PROCESSORS)
def test_all_jobs(arch):
    for job in aot_sets.every(arch):
        check(job)


@pytest.mark.slow
@pytest.mark.parametrize("version", aot.VERSIONS)
def test_every_supported_version_of_triton(version, tmp_path):
    """Each in a separate environment, which is installed unless GPTQ_BELLE_TRITON_ENVIRONMENTS holds it."""
    folder = Path(os.environ.get("GPTQ_BELLE_TRITON_ENVIRONMENTS", tmp_path))
    try:
        aot.environment(version, folder)
    except subprocess.CalledProcessError:
        pytest.skip(f"triton {version} cannot be installed here")
    command = [sys.executable, aot.__file__, "--jobs", "usual", "--triton", version]
    run = subprocess.run([*command, "--environments", folder, "--out", tmp_path / "record.json"], capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    tables = json.loads((tmp_path / "record.json").read_text())["tables"]
    assert list(tables) == [version]
    assert set(tables[version]) == {f"sm_{arch}" for arch in aot_jobs.PROCESSORS}


def test_matrix_instructions_are_those_of_the_part():
    """Two warps multiply with HMMA on every part, four with WGMMA on 9.0."""
    few = Job(HOPPER, "skinny", 4, "float16", 128, SAME, TileConfig(8, 64, 128, 2, 2, 4))
    assert check(few).loop["HMMA"]
    many = few._replace(config=TileConfig(64, 64, 128, 2, 4, 3))
    assert check(many).loop["HGMMA"]
    assert check(many._replace(arch=GEFORCE)).loop["HMMA"]


# The checks themselves: each limit is exceeded by something.


@triton.jit
def careless(x, words, out, K, BM: tl.constexpr, BN: tl.constexpr):
    """Converts codes, copies nothing ahead (the load depends on another), and multiplies."""
    n, i, m = tl.arange(0, BN), tl.arange(0, 64), tl.arange(0, BM)
    total = tl.zeros((BN, BM), tl.float32)
    for k in range(K):
        w = tl.load(words + tl.load(words + k) + n[:, None] * 64 + i[None, :])
        total = tl.dot(w.to(tl.float16), tl.load(x + k * 64 + i[:, None] + m[None, :]), total)
    tl.store(out + n[:, None] * BM + m[None, :], total)


def broken(warps, BN, BM=16):
    code = machine_code.compile_kernel(careless, {"x": "*fp16", "words": "*i32", "out": "*fp32", "K": "i32"},
                                       {"BM": BM, "BN": BN}, GEFORCE, {"num_warps": warps, "num_stages": 3})
    config = TileConfig(BM, BN, 64, 1, warps, 3)
    return aot.problems(Job(GEFORCE, "skinny", 4, "float16", 128, SAME, config), code)


def test_exceeded_limits_are_found():
    found = " ".join(broken(4, 64))
    assert "integer-to-float conversions" in found
    assert "no asynchronous 16-byte copies" in found
    assert "instructions per weight" in found
    assert "registers spill" in " ".join(broken(1, 256, 64))


def test_shared_memory_and_missing_matrix_instructions_are_found():
    job = Job(GEFORCE, "skinny", 4, "float16", 128, SAME, TileConfig(8, 64, 128, 1, 4, 4))
    code = machine_code.MachineCode(50, 0, 0, 100 * 1024, machine_code.Counter({"LDGSTS.128": 1}), 0)
    assert aot.problems(job, code) == ["102400 bytes of shared memory, the limit is 99 KiB",
                                       "no matrix instructions in a loop"]
    assert aot.problems(job._replace(arch=80), code) == ["no matrix instructions in a loop"]


def loop_of(instructions, job, registers=96):
    """Machine code whose loop of one iteration has this number of instructions."""
    turn = aot_jobs.turn(job)
    return machine_code.MachineCode(registers, 0, 0, 0, machine_code.Counter(
        {"HMMA": 8, "LDGSTS.128": 4, "LOP3": instructions - 12}), turn.products)


def test_instructions_are_counted_per_number():
    few = Job(HOPPER, "skinny", 4, "float16", 128, SAME, TileConfig(8, 64, 128, 2, 2, 4))  # 128 weights per thread
    assert aot.per_weight(few, loop_of(256, few)) == 2
    cache = Job(HOPPER, "attention-128-int8-rotation-1")  # 256 numbers
    assert aot.per_weight(cache, loop_of(1024, cache)) == 4


@pytest.mark.parametrize("job", [
    Job(HOPPER, "head-8-8-greedy"),
    Job(HOPPER, "skinny", 4, "float16", 128, SAME, TileConfig(8, 64, 128, 2, 2, 4), "stream")], ids=label)
def test_what_is_folded_in_lengthens_the_loop_by_a_tenth_at_most(job, monkeypatch):
    monkeypatch.setattr(aot, "compiled", lambda plain: loop_of(200, plain))
    assert aot_sets.plain_product(job).kernel == "skinny"
    assert not aot.problems(job, loop_of(219, job))
    [problem] = aot.problems(job, loop_of(224, job))
    assert "1.12 times" in problem


def test_registers_of_all_warps_are_limited():
    job = Job(HOPPER, "skinny", 4, "float16", 128, SAME, TileConfig(8, 32, 128, 1, 16, 2, 16))
    assert not aot.problems(job, loop_of(200, job, registers=128))
    assert "16 warps" in " ".join(aot.problems(job, loop_of(200, job, registers=136)))


def test_parts_of_a_decode_step_are_compiled_as_it_launches_them():
    found = aot_sets.decode(HOPPER)
    assert {job.kernel for job in found} == {"skinny", *aot_jobs.aot_decode.DECODE_KERNELS}
    assert {(job.config.BM, job.epilogue) for job in found if job.config} == {
        (rows, epilogue) for rows in (8, 16, 32, 64) for epilogue in aot_jobs.EPILOGUES}
    assert set(aot_sets.decode_usual(HOPPER)) < set(found)
    assert aot_sets.decode(75) == []


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;          /* 0x00000a0000017a02 */
        /*0010*/              @!P0 BRA 0x70 ;                      /* 0x... */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.64 [R2], [R4.64] ;
        /*0040*/                   HMMA.16816.F32 R4, R4, R8, RZ ;
        /*0050*/                   HGMMA.64x16x16.F32 R24, R32, gdesc[UR20], RZ, !UPT ;
        /*0060*/          @!UP1    BRA.U UP0, 0x20 ;
        /*0070*/                   I2FP.F32.S32 R2, R3 ;
        /*0080*/               @P1 BRA 0x70 ;
        /*0090*/                   BRA 0x90;
"""


TICKET = """
        /*0000*/                   STG.E desc[UR4][R4.64], R6 ;
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/                   MEMBAR.ALL.GPU ;
        /*0030*/                   ERRBAR ;
        /*0040*/                   ATOMG.E.ADD.STRONG.GPU PT, R7, desc[UR4][R4.64], R9 ;
        /*0050*/                   CCTL.IVALL ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
"""


def test_tickets_without_barriers_are_found():
    lines = TICKET.splitlines()
    assert machine_code.unordered_tickets(machine_code.instructions(TICKET)) == 0
    for missing in (2, 3, 6, 7):
        code = machine_code.instructions("\n".join(lines[:missing] + lines[missing + 1 :]))
        assert machine_code.unordered_tickets(code) == 1
    assert machine_code.unordered_tickets(machine_code.instructions(SASS)) == 0
    code = machine_code.MachineCode(50, 0, 0, 0, machine_code.Counter(), 0, 1)
    assert len(aot.problems(Job(HOPPER, "embedding-8"), code)) == 1


def test_machine_code_is_parsed():
    code = machine_code.instructions(SASS)
    assert " ".join(one.kind for one in code) == "MOV BRA LDGSTS.128 LDGSTS.64 HMMA HGMMA BRA I2FP BRA BRA"
    loop = machine_code.main_loop(code)
    assert [one.address for one in loop] == [0x20, 0x30, 0x40, 0x50, 0x60]
    assert machine_code.products(loop, 8) == 8 * 16 * 8 * 16 + 2 * 64 * 16 * 16
    assert machine_code.main_loop(code[7:]) == []
