"""Memory of outputs: huge pages for fresh large tensors, and a call that keeps freed memory in the process.

glibc gives every block above 32 MiB back to the system when it is freed. The next output then costs a page fault for
every 4 KiB, several times the arithmetic of a normalization.
"""

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

LARGE = 32 << 20
"""glibc's largest threshold for giving memory back (DEFAULT_MMAP_THRESHOLD_MAX), in bytes."""
HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@cache
def _libc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    except (OSError, AttributeError):
        return None
    return libc


def empty_like(x: Tensor) -> Tensor:
    """A tensor like `x`; where it is fresh memory of the system, in huge pages (one fault for 2 MiB, not 512)."""
    y = torch.empty_like(x)
    size = y.numel() * y.element_size()
    libc = _libc()
    if size >= LARGE and libc is not None:
        start = y.data_ptr()
        first = (start + HUGE_PAGE - 1) // HUGE_PAGE * HUGE_PAGE
        libc.madvise(first, (start + size - first) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
    return y


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory for the process's next allocation, whatever its size.

    Without it every tensor above 32 MiB is given back to the system when it is freed, and the next one is paid for in
    page faults. The memory of the process then stays at its peak until it ends. The setting is the whole process's,
    which is why it is a call and not a default.

    Returns: whether the C library took it (glibc does; elsewhere nothing is changed).
    """
    libc = _libc()
    if libc is None or not hasattr(libc, "mallopt"):
        return False
    largest = 2**31 - 1
    return bool(libc.mallopt(M_MMAP_THRESHOLD, largest)) and bool(libc.mallopt(M_TRIM_THRESHOLD, largest))
