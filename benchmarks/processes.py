"""Measurements in processes of their own: a peak of memory is that of one thing only."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

M_MMAP_THRESHOLD = -3
STATUS = Path("/proc/self/status")


def alone(module: str, *arguments: str) -> Any:
    """What `python -m module arguments` prints as JSON."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
