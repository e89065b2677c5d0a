"""Build a kernel once, keep its machine code on disk, and run it on torch's own threads.

A kernel is a Numba-compiled `void f(int64 arguments)`, where `arguments` is the address of an int64 array, unless its
entry says something else. Machine code is kept in the user's cache folder under a name that says everything it depends
on: the sources, the processor, the versions. A folder that cannot be read or written costs time, never a result.

Threads come from the OpenMP runtime that torch has loaded: `GOMP_parallel` runs one function on torch's own pool
(1.2 µs measured), so there is no second pool to fight with. Without it a thread pool of ours runs the same function.
"""

import ctypes
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

HERE = Path(__file__).parent
ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
"""How Python calls a kernel: it releases the GIL while it runs."""
DIGEST_BYTES = hashlib.sha256().digest_size

_engines: list[Any] = []  # the engine owns the machine code it has loaded


def quick_entry(arguments: int, result: Any = None) -> Any:
    """`ENTRY` for a few int64 arguments: it keeps the GIL, which to release and take costs more than a small kernel."""
    return ctypes.PYFUNCTYPE(result, *(arguments * [ctypes.c_int64]))


def cache_folder() -> Path:
    """Where machine code is kept: `STEADYNORM_CACHE`, else `steadynorm` in the user's cache folder."""
    named = os.environ.get("STEADYNORM_CACHE")
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "steadynorm"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "steadynorm" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steadynorm"


@cache
def _fingerprint() -> str:
    """What machine code depends on besides the kernel's name."""
    import llvmlite.binding as llvm

    parts = [version("numba"), version("llvmlite"), platform.machine(), llvm.get_host_cpu_name()]
    parts.append(llvm.get_host_cpu_features().flatten())
    parts += [path.read_text() for path in sorted(HERE.glob("*.py"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def load(name: str, make: Callable[[], Callable[..., Any]], entry: Any = ENTRY) -> Any:
    """The compiled kernel `name`: from the cache, or made by `make`, compiled and cached.

    Args:
        entry: a ctypes prototype, of int64 arguments and an int64 or no result.

    Returns: the kernel, as a ctypes function of that prototype.
    """
    path = cache_folder() / f"{name}-{_fingerprint()}.o"
    code = _kept(path)
    if code is None:
        with _alone(path):
            code = _kept(path)
            if code is None:
                code = _compile(make(), name, entry)
                _keep(path, code)
    return entry(_link(code, name))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for another process that is compiling the same kernel: the ranks of one machine all begin with it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "ab")  # noqa: SIM115
    except OSError:
        yield
        return
    with lock:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Who still waits has it open, and finds the code when its turn comes.
            with suppress(OSError):
                os.unlink(lock.name)


def _compile(kernel: Callable[..., Any], name: str, prototype: Any) -> bytes:
    """Machine code of a kernel, under its name."""
    import llvmlite.binding as llvm

    from steadynorm.kernels.cpu.frontend import llvm_of

    text, entry = llvm_of(kernel, len(prototype._argtypes_), prototype._restype_ is not None)
    module = llvm.parse_assembly(text)
    module.get_function(entry).name = f"steadynorm_{name}"
    machine = _target_machine()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    # The loops are vectors already, and wait for memory: copies of them only take longer to compile.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return bytes(machine.emit_object(module))


@cache
def _target_machine() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="small",
        jit=True,
    )


def _link(code: bytes, name: str) -> int:
    """Load machine code into the process; the address of its entry."""
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(f"steadynorm_{name}"))


def _kept(path: Path) -> bytes | None:
    """Machine code from the cache, or None; a damaged file counts as none, since LLVM would end the process on it."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(path: Path, code: bytes) -> None:
    """Write whole or not at all; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)


# Running.

_is_forked = False


def _after_fork() -> None:
    """The pool's threads are not in a forked child, and waiting for them would be for ever."""
    global _is_forked
    _is_forked = True


os.register_at_fork(after_in_child=_after_fork)


@cache
def _gomp_parallel() -> Any:
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP runtime that torch uses, or None."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    libraries = {line.split(maxsplit=5)[5] for line in lines if "omp" in line and ".so" in line}
    # torch's own copy first: another package may have brought a second runtime with a pool of its own.
    home = str(Path(torch.__file__).parent)
    for library in sorted(libraries, key=lambda name: (not name.startswith(home), name)):
        try:
            function = ctypes.CDLL(library).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="steadynorm")


def run(kernel: Any, arguments: int, threads: int) -> None:
    """Run a kernel on `threads` threads; each takes tasks until there are none, so fewer threads do the same work."""
    if threads <= 1 or _is_forked:
        kernel(arguments)
        return
    parallel = _gomp_parallel()
    if parallel is not None:
        parallel(kernel, arguments, threads, 0)
        return
    for done in [_pool(threads).submit(kernel, arguments) for _ in range(threads)]:
        done.result()
