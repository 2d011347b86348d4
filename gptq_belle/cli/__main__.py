"""``python -m gptq_belle.cli``."""

from gptq_belle.cli import main

main()
