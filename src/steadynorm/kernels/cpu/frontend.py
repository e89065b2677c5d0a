"""Numba's front end alone: from Python to the text of LLVM, with no machine code on the way.

Numba makes every function that a kernel is built of ready to be called, which is half of the time a kernel takes to
compile. The parts of a kernel are called by the kernel only, and its machine code is made in `build`.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numba
from numba.core import codegen, cpu, registry
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher


class _Library(codegen.JITCodeLibrary):
    """A function and those that it calls, as they come: `build` optimizes the whole, once."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_specific(self) -> None:
        pass


class _Codegen(codegen.JITCPUCodegen):
    _library_class = _Library

    def _add_module(self, module: Any) -> None:
        """Nothing is ever called: the engine need not know."""

    def _check_llvm_bugs(self) -> None:
        pass


class _Context(cpu.CPUContext):
    def init(self) -> None:
        super().init()
        self._internal_codegen = _Codegen("steadynorm")

    def get_executable(self, library: Any, fndesc: Any, env: Any) -> object:
        """Python never calls a part of a kernel: what stands for it where Numba looks it up."""
        return object()


class _Target(registry.CPUTarget):
    """The processor, and its functions, with libraries of our kind."""

    @cached_property
    def _toplevel_target_context(self) -> Any:
        return _Context(self.typing_context, self._target_name)

    @property
    def typing_context(self) -> Any:
        return registry.cpu_target.typing_context


class _Dispatcher(Dispatcher):
    targetdescr = _Target("cpu")

    def add_overload(self, cres: Any) -> None:
        self.overloads[tuple(cres.signature.args)] = cres


class _CFunc(CFunc):
    _targetdescr = _Dispatcher.targetdescr


def inlined(function: Callable[..., Any]) -> Any:
    """A part of kernels, which becomes part of the code of whoever calls it."""
    options = {"nopython": True, "forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return _Dispatcher(py_func=function, targetoptions={**options, "no_rewrites": True, "boundscheck": None})


def llvm_of(kernel: Callable[..., Any], arguments: int = 1, has_result: bool = False) -> tuple[str, str]:
    """The text of a kernel of int64 arguments (and result) with all its parts, and its name in there."""
    with global_compiler_lock:
        result = numba.int64 if has_result else numba.void
        signature = numba.core.sigutils.normalize_signature(result(*[numba.int64] * arguments))
        compiled = _CFunc(kernel, signature, locals={}, options={"error_model": "numpy"})
        compiled.compile()
    return compiled.inspect_llvm(), compiled.native_name
