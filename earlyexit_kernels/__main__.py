"""Run the command line: ``python -m earlyexit_kernels``."""

import sys

from earlyexit_cli import main

if __name__ == "__main__":
    sys.exit(main())
