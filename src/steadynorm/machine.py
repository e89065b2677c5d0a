"""The machine and the versions behind a number, recorded beside every measurement."""

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
GIT_TIMEOUT_SECONDS = 5


def core_count() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> dict[str, str]:
    """CPU, cores, threads, system, GPU if there is one, versions, and the commit if steadynorm runs from a checkout."""
    facts = {
        "cpu": _cpu(),
        "cores": str(core_count()),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "numba": _version("numba"),
        "steadynorm": vars(sys.modules[__name__.partition(".")[0]])["__version__"],
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    commit = _commit()
    return facts | ({"commit": commit} if commit else {})


@cache
def _cpu() -> str:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@cache
def _commit() -> str:
    """The commit of the checkout that this file is tracked in, with "-dirty" if it was changed; empty if there is none.

    Tracked, since a virtual environment may lie inside somebody else's repository.
    """
    here = Path(__file__)
    try:
        for command in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--exclude=*"]):
            done = subprocess.run(
                ["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=GIT_TIMEOUT_SECONDS
            )
            if done.returncode != 0:
                return ""
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
