"""An engine in a process of its own: one job in, one result out, as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_worker(script: Path, job: dict[str, Any], threads: int) -> Any:
    """What `script` prints behind RESULT for this job.

    Raises:
        RuntimeError: it ended without a result; with what it wrote to standard error.
    """
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(threads),
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise RuntimeError(f"bench_engine: the engine ended without a result:\n{done.stderr}")
    return json.loads(found[0].removeprefix("RESULT "))
