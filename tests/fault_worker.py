"""A process that forks a job for every line of JSON on stdin, so that jobs start without imports and can be killed.

Request: {"source", "out", "config", "calibration", "kill_after": seconds or null, "log": file or null}.
Answer: {"status", "seconds"}, and {"resumed"} or {"error", "code"}. `log` gets a line for every fsync: the inode with
its size or, for a folder, with the names in it.
"""

import json
import os
import signal
import stat
import sys
import time
from pathlib import Path

import torch

from gptq_belle.errors import as_user_error
from gptq_belle.quantization.calibration.rows import Calibration
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.pipeline import quantize_checkpoint


def logged(log):
    """An os.fsync that logs what it has synced."""
    plain = os.fsync

    def fsync(handle):
        plain(handle)
        found = os.fstat(handle)
        entry = {"inode": found.st_ino, "size": found.st_size}
        if stat.S_ISDIR(found.st_mode):
            entry["names"] = os.listdir(handle)
        with open(log, "a") as file:
            file.write(json.dumps(entry) + "\n")

    return fsync


def job(request, outcome):
    torch.set_num_threads(1)
    if request.get("log"):
        os.fsync = logged(request["log"])
    try:
        report = quantize_checkpoint(request["source"], request["out"], QuantConfig(**request.get("config", {})),
                                     calibration=Calibration(**request["calibration"]))
        outcome.write_text(json.dumps({"resumed": report.resumed}))
    except BaseException as error:
        outcome.write_text(json.dumps({"error": str(as_user_error(error)), "code": as_user_error(error).exit_code}))
        os._exit(1)
    os._exit(0)


def main():
    torch.set_num_threads(1)
    outcome = Path(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        outcome.unlink(missing_ok=True)
        started = time.monotonic()
        child = os.fork()
        if not child:
            job(request, outcome)
        if request.get("kill_after") is not None:
            time.sleep(request["kill_after"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        result = json.loads(outcome.read_text()) if outcome.exists() else {}
        print(json.dumps(result | {"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - started}),
              flush=True)


if __name__ == "__main__":
    main()
