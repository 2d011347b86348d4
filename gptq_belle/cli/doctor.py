"""The command `doctor`."""

from collections.abc import Sequence
from typing import Any

import typer

from gptq_belle.cli import console, options


def doctor(device: options.Device = "auto", as_json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Show what this machine can run and which kernel each case uses, and test every kernel.

    Exit code 3 if a kernel computes a wrong result.
    """
    options.import_engine("bench.doctor")
    from gptq_belle.bench.doctor import examine, failures

    found = examine(device)
    if as_json:
        console.print_json(found)
    else:
        show(found)
    if failures(found):
        raise typer.Exit(3)


def show(found: dict[str, Any]) -> None:
    """Print the result of `examine`."""
    from gptq_belle.bench.doctor import gib

    size = found["memory"]
    console.print_table("", ["", ""], [
        *((name, value or "not installed") for name, value in found["versions"].items()),
        ("processor", f"{found['cpu']['model']}, cores: {found['cpu']['cores']}, threads: {found['cpu']['threads']}"),
        ("instructions", " ".join(found["cpu"]["features"]) or "unknown"),
        ("memory", f"{gib(size['total'])} in total, {gib(size['available'])} available"),
        *((entry["device"], f"{entry['name']}, {gib(entry['memory'])}, compute capability {entry['capability']}")
          for entry in found["devices"]),
        *([] if found["devices"] else [("GPU", "no CUDA device, or a torch without CUDA")]),
        ("decoders", f"native: {', '.join(found['native_decoders'])}; other dense models: transformers' forward pass"),
        ("CPU kernels", cpu_kernels_line(found["native"])),
        ("GPU kernels", gpu_kernels_line(found["gpu"])),
        ("Triton needed", found["gpu"]["supported_triton"]),
        ("C compiler", found["compiler"] or "none: Triton cannot build its launcher"),
    ], text=2)
    console.print_line()
    columns = ["device", "checkpoint", "--precision", "kernel", "reason"]
    missing = found["native"]["why_not"]  # shown once, above
    rows = [(row["device"], row["case"], row["precision"], row["kernel"],
             row["why"].replace(missing, "no CPU kernels") if missing else row["why"]) for row in found["kernels"]]
    console.print_table("Kernel of a quantized linear", columns, rows, text=5)
    console.print_line()
    for line in self_test_lines(found["self_test"]):
        console.print_line(line)


def self_test_lines(checks: Sequence[dict[str, Any]]) -> list[str]:
    """One line for the self-test, and one for each failed check."""
    failed = [check for check in checks if not check["passed"]]
    kernels = ", ".join(dict.fromkeys(check["kernel"] for check in checks))
    taken = sum(check["seconds"] for check in checks)
    return [f"Self-test: {len(checks) - len(failed)} of {len(checks)} checks against float64 passed in {taken:.1f} s: "
            f"{kernels}",
            *(f"WRONG: {check['kernel']}, {check['case']}: "
              + (check["why_not"] or f"relative error {check['error']:.1e}, allowed are {check['allowed']:.0e}")
              for check in failed)]


def cpu_kernels_line(found: dict[str, Any]) -> str:
    """The entry `native` of `examine` in one line."""
    others = ", ".join(name for name in found["usable"] if name != found["isa"])
    return found["why_not"] or f"{found['isa']} (GPTQ_BELLE_CPU_ISA selects another: {others})"


def gpu_kernels_line(found: dict[str, Any]) -> str:
    """The entry `gpu` of `examine` in one line."""
    if found["why_not"] is None:
        tables = found["tables"]
        return f"triton; tiles {f'as measured in {tables[-1]}' if tables else 'by rule (see gptq-belle tune)'}"
    instead = "" if found["kernel"] is None else "; weights are dequantized for cuBLAS instead"
    return f"not Triton: {found['why_not']}{instead}"
