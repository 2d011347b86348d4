"""`python -m gpu_check`: see `command`. Child processes import this file, so it imports nothing before it has to."""

import sys

if __name__ == "__main__":
    from gpu_check.command import main

    sys.exit(main())
