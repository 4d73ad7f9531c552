"""Functions compiled on this machine from LLVM's text form. LLVM comes in a wheel (llvmlite, extra `fast`).

Compiling takes a few hundredths of a second, and needs no compiler.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from sparse_ingest.errors import first_line
from sparse_ingest.models.memory import is_out_of_memory

# In older versions the intrinsics have other arguments.
OLDEST_LLVM = (22,)
USUAL_CACHE = 1 << 20  # bytes of the second-level cache, if the system does not report it
ADDRESS, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
Compiled = Callable[..., Any]
T = TypeVar("T")
logger = logging.getLogger(__name__)


def compile_function(text: str, name: str, *given: Any, returns: Any = None, feature: str | None = None) -> Compiled:
    """Compile a module, and return a function of it, which releases the interpreter lock while it runs.

    Args:
        text: The module.
        name: The function, which must be thread-safe.
        *given: Types of its arguments.
        returns: Type of its result.
        feature: A feature that this CPU must have.

    Raises:
        ImportError: llvmlite is not installed.
        RuntimeError: its LLVM is too old, cannot parse the text, or does not see the feature.
    """
    from llvmlite import binding

    if binding.llvm_version_info < OLDEST_LLVM:
        found = ".".join(map(str, binding.llvm_version_info))
        raise RuntimeError(f"llvmlite has LLVM {found}, but {OLDEST_LLVM[0]} is needed (llvmlite 0.50 or newer)")
    features = binding.get_host_cpu_features()
    if feature and not features.get(feature):  # LLVM would end this process
        raise RuntimeError(f"LLVM sees no {feature} in this CPU")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(text)
    module.verify()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    engine: Any = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(returns, *given)(engine.get_function_address(name))
    function.engine = engine  # type: ignore[attr-defined]  # lives as long as the function
    return function


def tried_or_none(attempt: Callable[[], T | None], name: str) -> T | None:
    """Return what `attempt` compiled; None, with a message, if it returns None as results differ, or fails."""
    level = logging.WARNING
    try:
        if (found := attempt()) is not None:
            return found
        reason = "its results differ from torch's"
    except ImportError as error:
        level, reason = logging.INFO, first_line(error)
    except Exception as error:  # a compiler that cannot compile for this device may raise any type
        if is_out_of_memory(error):  # it may have fit in another process of this run, and the last bits would differ
            raise
        reason = first_line(error)
    logger.log(level, "The compiled %s is not used, so encoding is slower: %s.", name, reason)
    return None


def rows_in_cache(row_bytes: int) -> int:
    """Return the number of rows that fit half of this CPU's second-level cache."""
    name = "SC_LEVEL2_CACHE_SIZE"
    size = os.sysconf(name) if name in os.sysconf_names else 0
    return (size if size > 0 else USUAL_CACHE) // 2 // row_bytes


@cache
def compiled_or_none(text: str, name: str, *given: Any) -> Compiled | None:
    """Return what `compile_function` returns; None without llvmlite, or if it cannot compile here."""
    try:
        return compile_function(text, name, *given)
    except (ImportError, RuntimeError):
        return None
