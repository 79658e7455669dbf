"""A driver that launches nothing, so that the host's part of a launch can be counted and timed.

Triton's own binder and C launcher run, over a ``libcuda.so.1`` that is compiled on the spot and
answers every call with success. Kernels are compiled for a real architecture and never run: results
are whatever the memory holds. Products of matrices stand still too: they allocate their result.
Tensors are on the CPU. `install` changes the whole process, for good.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import triton
import triton.backends.nvidia.driver as nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import _device

__all__ = ["Launches", "install"]

_MOST_KERNELS = 1024
_SOURCE = (
    f"""
#include <stdint.h>
#define MOST {_MOST_KERNELS}
"""
    """
typedef int result;
long launches[MOST];
result cuLaunchKernelEx(void *config, void *function, void **args, void **extra) {
    launches[(uintptr_t)function % MOST]++;
    return 0;
}
result cuCtxGetCurrent(void **context) { static int some; *context = &some; return 0; }
result cuCtxSetCurrent(void *context) { return 0; }
result cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
result cuDevicePrimaryCtxRetain(void **context, int device) { return 0; }
result cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 0; return 0; }
result cuGetErrorString(result error, const char **text) { *text = "stub"; return 0; }
result cuPointerGetAttribute(void *out, int attribute, uint64_t pointer) {
    *(uint64_t *)out = pointer;
    return 0;
}
"""
)
_FUNCTION = re.compile(r"\bcu[A-Z]\w+")
_installed: tuple[int, Launches] | None = None
_alive: list[object] = []  # what has to live as long as the process


class Launches:
    """How often each kernel was launched since the process began."""

    def __init__(self, library: ctypes.CDLL):
        self._counts = (ctypes.c_long * _MOST_KERNELS).in_dll(library, "launches")
        self._names: list[str] = []

    def register(self, name: str) -> int:
        """The handle that stands for a function of the driver: its place, and never zero."""
        self._names.append(name)
        if len(self._names) >= _MOST_KERNELS:
            raise RuntimeError(f"stub driver: expected fewer than {_MOST_KERNELS} compiled kernels")
        return len(self._names)

    def counted(self) -> Counter[str]:
        """By the names of kernels."""
        found: Counter[str] = Counter()
        for place, name in enumerate(self._names, 1):
            found[name] += self._counts[place]
        return +found


def install(arch: int = 90) -> Launches:
    """Make this process launch the Triton kernels on CPU tensors, into nothing.

    Args:
        arch: compute capability that kernels are compiled for, as 80, 89, 90, ...

    Returns:
        The counts of launches.

    Raises:
        RuntimeError: there is no C compiler or no ``Python.h``, Triton interprets, or it was
            installed for another architecture; what to do is said.
    """
    global _installed
    if _installed is not None:
        if _installed[0] != arch:
            raise RuntimeError(f"the stub driver is one for sm_{_installed[0]}; start anew")
        return _installed[1]
    _check_tools()
    folder = _built(Path(nvidia.__file__).parent)
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    launches = Launches(library)
    # What is built against the stub stays apart from what a GPU of this machine will load.
    triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / "fastbert-stub")
    nvidia.libcuda_dirs = lambda: [str(folder)]
    nvidia.library_dirs = lambda: [nvidia.libdevice_dir, str(folder)]
    real = nvidia.CudaUtils()

    class Utils:
        """Triton's own functions, but for those that ask a GPU."""

        def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
            return 1, launches.register(name), 32, 0, 1024  # registers, spills, threads

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

        def unload_module(self, module: int) -> None:
            pass

        def __getattr__(self, name: str):
            return getattr(real, name)

    class StubDriver(nvidia.CudaDriver):
        def __init__(self):
            self.utils = Utils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: divmod(arch, 10)
            self.get_current_stream = lambda device=0: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    driver.set_active(StubDriver())
    _device._INTERPRETED_ARCH, _device._INTERPRETED_SMS = arch, 132
    _still_products()
    _installed = arch, launches
    return launches


def _check_tools() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("interpreted kernels have no launcher; unset TRITON_INTERPRET")
    if _compiler() is None:
        raise RuntimeError(
            "the stub driver and Triton's launcher are compiled on the spot, and there is no C "
            "compiler; install gcc or clang, or name one in CC"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise RuntimeError(
            f"Triton's launcher is compiled on the spot and needs {header}, which is not there; "
            "install Python's headers (python3-dev)"
        )


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _built(backend: Path) -> Path:
    """A folder with the stub library, for as long as this process lives.

    Args:
        backend: of Triton, whose sources say which functions of a driver they name.
    """
    folder = tempfile.TemporaryDirectory(prefix="fastbert-stub-")
    _alive.append(folder)
    source, library = Path(folder.name, "stub.c"), Path(folder.name, "libcuda.so.1")
    texts = (backend / name for name in ("driver.c", "driver.py"))
    named = {name for text in texts for name in _FUNCTION.findall(text.read_text())}
    others = sorted(named - set(_FUNCTION.findall(_SOURCE)))
    nothing = "".join(f"result {name}(void) {{ return 0; }}\n" for name in others)
    source.write_text(_SOURCE + nothing)
    options = ("-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1")
    made = subprocess.run(
        [_compiler(), *options, str(source), "-o", str(library)], capture_output=True, text=True
    )
    if made.returncode:
        raise RuntimeError(f"the stub driver did not compile: {made.stderr.strip()}")
    shutil.copy(library, library.with_name("libcuda.so"))
    return library.parent


def _still_products() -> None:
    """Products that allocate their result, as calls of a GPU's library do before they return."""
    library = torch.library.Library("aten", "IMPL")
    _alive.append(library)

    def mm(a, b):
        return a.new_empty(a.shape[0], b.shape[1])

    def addmm(c, a, b, *, beta=1, alpha=1):
        return a.new_empty(a.shape[0], b.shape[1])

    def addmm_(c, a, b, *, beta=1, alpha=1):
        return c

    def bmm(a, b):
        return a.new_empty(a.shape[0], a.shape[1], b.shape[2])

    def baddbmm(c, a, b, *, beta=1, alpha=1):
        return bmm(a, b)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden
        for function in (mm, addmm, addmm_, bmm, baddbmm):
            library.impl(function.__name__, function, "CPU")
