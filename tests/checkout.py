"""This checkout, for programs that tests start in processes of their own."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python_path() -> str:
    """PYTHONPATH under which another process finds the packages of this checkout first."""
    return os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
