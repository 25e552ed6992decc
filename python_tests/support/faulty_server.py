"""Run `earlyexit serve` with `faulty_worker`."""

import sys
from pathlib import Path

from earlyexit_cli import main
from earlyexit_kernels.serving.http import worker_process

if __name__ == "__main__":
    worker_process.WORKER = (str(Path(__file__).with_name("faulty_worker.py")),)
    sys.exit(main(["serve", *sys.argv[1:]]))
