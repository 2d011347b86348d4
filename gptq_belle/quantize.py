"""The main job's entry: ``python -m gptq_belle.quantize``, and by path. The command itself is in cli/quantize.py."""

import sys
from pathlib import Path

if not __package__:  # by path: this folder is first on sys.path, where its kernels/ would hide other packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from gptq_belle.cli.quantize import main  # noqa: E402

if __name__ == "__main__":
    main()
