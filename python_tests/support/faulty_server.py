"""Run a server of `faulty_model`: ``python faulty_server.py '{"workers": 2}'``, with fields of `Options`."""

import json
import sys

from support.faulty_model import FaultySource

from earlyexit_kernels.serving import workers
from earlyexit_kernels.serving.server import Options

if __name__ == "__main__":
    options = Options(source=FaultySource(), port=0, **json.loads(sys.argv[1]))
    sys.exit(workers.run(options, lambda url: print(f"serving at {url}", flush=True)))
