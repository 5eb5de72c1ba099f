"""Started by torchrun in the tests: `tnl pretrain`, on rank 1 from another checkout and with another learning rate.

usage: start_worker.py CHECKOUT_OF_RANK_1 CONFIG.yaml OUTPUT_FOLDER
"""

import os
import sys
from pathlib import Path

checkout, config, output = sys.argv[1:]
is_other = os.environ["RANK"] == "1"
if is_other:
    sys.path[:0] = [checkout, f"{checkout}/kernels"]

from tnl import cli  # noqa: E402 - from the checkout of this rank

sys.argv = ["tnl", "pretrain", config, f"output={output}", f"optimizer.lr={'4e-3' if is_other else '3e-3'}"]
try:
    cli.main()
except SystemExit as end:
    Path(f"{output}.{os.environ['RANK']}").write_text(str(end.code))
