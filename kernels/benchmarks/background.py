"""Work that needs no quiet GPU, in processes of its own: correctness, compiling the peers, the cold compile time."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
GATES = 8
PEER_PARTS = {"fla_chunk": 5, "fla_fused_chunk": 1, "lightning_attn2": 2}


class Job:
    """``python SCRIPT ARGUMENTS --json FILE`` beside this process; its output goes to a file."""

    def __init__(
        self, folder: Path, name: str, script: str, *arguments: str, cache: Path | None = None, saves: bool = True
    ):
        self.name = name
        self.result_path = folder / f"{name}.json"
        self.log_path = folder / f"{name}.log"
        command = [
            sys.executable,
            str(HERE / script),
            *arguments,
            *(["--json", str(self.result_path)] if saves else []),
        ]
        environment = dict(os.environ) | ({"TRITON_CACHE_DIR": str(cache)} if cache else {})
        with open(self.log_path, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def wait(self, deadline: float) -> str | None:
        """Wait until ``deadline`` (of `time.monotonic`), then end it. Returns why there may be no result, or None."""
        try:
            code = self.process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"{self.name}: not done in time; {self.tail()}"
        return f"{self.name}: exit code {code}; {self.tail()}" if code else None

    def result(self) -> list | dict | None:
        """What it saved, None for nothing."""
        return json.loads(self.result_path.read_text(encoding="utf-8")) if self.result_path.exists() else None

    def tail(self) -> str:
        """The end of its output."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")[-800:].strip()


class Background:
    """The jobs of one run of the benchmark; a context that ends what still runs and removes their files."""

    def __init__(self, *, peers: bool, cold: bool):
        self.folder = tempfile.TemporaryDirectory(prefix="tnl_benchmark_")
        folder = Path(self.folder.name)
        self.start = time.monotonic()
        self.cold = Job(folder, "cold", "compile_time.py", cache=folder / "cache") if cold else None
        self.gates = [
            Job(folder, f"gate{part}", "correctness.py", "--part", f"{part}/{GATES}") for part in range(GATES)
        ]
        self.compilers = [
            Job(folder, f"{name}{part}", "peers.py", name, f"{part}/{parts}", saves=False)
            for name, parts in (PEER_PARTS if peers else {}).items()
            for part in range(parts)
        ]

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *exception) -> None:
        for job in [*self.gates, *self.compilers, *([self.cold] if self.cold else [])]:
            if job.process.poll() is None:
                job.process.kill()
                job.process.wait()
        self.folder.cleanup()

    def correctness(self, timeout_s: float) -> list[dict]:
        """The rows of all gates; a gate without a result is a failing row."""
        rows = []
        for job in self.gates:
            reason = job.wait(self.start + timeout_s)
            result = job.result()
            rows += [{"case": job.name, "ok": False, "reason": reason or "no result"}] if result is None else result
        return rows

    def wait_for_compilers(self, timeout_s: float) -> list[str]:
        """Wait for the peers' kernels. Returns what went wrong; such a peer is then compiled as it is timed."""
        reasons = [job.wait(self.start + timeout_s) for job in self.compilers]
        return [reason for reason in reasons if reason]

    def cold_compile(self, timeout_s: float) -> dict | None:
        """What `compile_time.py` measured, or why it did not."""
        if self.cold is None:
            return None
        reason = self.cold.wait(self.start + timeout_s)
        return {"reason": reason} if reason else self.cold.result()
