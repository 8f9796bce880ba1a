"""A stand-in for CuPy: NumPy's arrays as if they lay on a device, kernels compiled by g++.

`installed()` puts it where `import cupy` finds it. Its arrays are a type of their own, and what
mixes them with NumPy's is refused, as CuPy does; what copies a value to the host is counted.
A kernel is the very source that a GPU would get, behind HEADER, which stands for CUDA's indexes
and runs every thread in turn. So the whole path that cqsnn takes on a GPU runs on a CPU, but for
CuPy's own functions, which NumPy's stand for, and for what only threads at once can do wrong.
"""

import contextlib
import ctypes
import functools
import hashlib
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

HEADER = """
#include <cmath>
#include <cstddef>
#include <utility>
struct Index { unsigned x, y, z; };
static Index blockIdx, threadIdx, blockDim, gridDim;
struct uint4 { unsigned x, y, z, w; };
#define __global__
using std::floor;
"""
# the arguments come as cuLaunchKernel gets them: an address for each
LOOP = """
template <class... A, size_t... I>
static void every_thread(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
      kernel(*(A *)arguments[I]...);
}
template <class... A>
static void all(void (*kernel)(A...), void **arguments, size_t given) {
  if (given == sizeof...(A)) every_thread(kernel, arguments, std::index_sequence_for<A...>());
}
template <class... A> constexpr size_t taken(void (*)(A...)) { return sizeof...(A); }
extern "C" size_t run(unsigned grid, unsigned block, void **arguments, size_t given) {
  gridDim.x = grid; blockDim.x = block;
  all(KERNEL, arguments, given);
  return taken(KERNEL);
}
"""
FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def library(source, name, options):
    """Compile a kernel with g++; products and sums are rounded one by one, as in cqsnn."""
    assert "--fmad=false" in options
    defines = [o for o in options if o.startswith("-D")]
    path = Path(FOLDER.name) / hashlib.sha256(repr((source, defines)).encode()).hexdigest()
    path.with_suffix(".cc").write_text(HEADER + source + LOOP.replace("KERNEL", name))
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-sign-compare", "-Wno-unused-variable", *defines, "-shared", "-fPIC"]
    files = ["-o", path.with_suffix(".so"), path.with_suffix(".cc")]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)  # no assertion: a kernel that a test broke must compile
    found = ctypes.CDLL(str(path.with_suffix(".so")))
    found.run.restype = ctypes.c_size_t
    return found


class RawKernel:
    """cupy.RawKernel by g++."""

    launched = 0

    def __init__(self, code, name, options=()):
        self.library = library(code, name, tuple(options))
        self.alignment = 16 if any("uint4" in option for option in options) else 1

    def __call__(self, grid, block, arguments):
        RawKernel.launched += 1
        held = []
        for a in arguments:
            if isinstance(a, Device):
                assert a.flags.c_contiguous, "a kernel was given a view with gaps"
                assert a.data.ptr % self.alignment == 0, "a kernel was given 16 bytes astride two"
                held.append(ctypes.c_void_p(a.data.ptr))
            else:
                held.append(np.ctypeslib.as_ctypes_type(np.asarray(a).dtype)(a))
        addresses = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        count = ctypes.c_size_t(len(held))
        taken = self.library.run(*(ctypes.c_uint(n[0]) for n in (grid, block)), addresses, count)
        assert taken == len(held), f"the kernel takes {taken} arguments, {len(held)} were given"


class Device(np.ndarray):
    """An array that lies on the device: nothing of NumPy's may meet it but numbers."""

    reads = 0  # how often a value was copied to the host

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def get(self):
        Device.reads += 1
        return np.array(self.view(np.ndarray))

    def _number(self):
        Device.reads += 1
        return self.view(np.ndarray)

    def __int__(self):
        return int(self._number())

    def __float__(self):
        return float(self._number())

    def __bool__(self):
        return bool(self._number())

    def item(self, *index):
        return self._number().item(*index)

    def tolist(self):
        return self._number().tolist()

    __index__ = __int__

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **how):
        out = None if out is None else tuple(map(bare, out))
        how = {name: bare(a) for name, a in how.items()}
        return wrapped(getattr(ufunc, method)(*map(bare, inputs), out=out, **how), out)

    def __array_function__(self, function, kinds, arguments, how):
        raise TypeError(f"numpy.{function.__name__} was given a device array")

    def argmax(self, *axis):
        return wrapped(self.view(np.ndarray).argmax(*axis))

    def argmin(self, *axis):
        return wrapped(self.view(np.ndarray).argmin(*axis))

    def __getitem__(self, index):
        return wrapped(self.view(np.ndarray)[bare(index)])

    def __setitem__(self, index, value):
        self.view(np.ndarray)[bare(index)] = bare(value)

    def clip(self, *ends):
        return wrapped(self.view(np.ndarray).clip(*ends))

    def dot(self, other):
        return wrapped(self.view(np.ndarray).dot(bare(other)))


def bare(a):
    """Return what NumPy takes for a: device arrays as its own; its own arrays are refused."""
    if isinstance(a, Device):
        return a.view(np.ndarray)
    if isinstance(a, (list, tuple)):
        return type(a)(map(bare, a))
    if isinstance(a, np.ndarray) and a.ndim:
        raise TypeError(f"a NumPy array of shape {a.shape} meets a device array")
    return a


def wrapped(a, out=None):
    """Return arrays and numbers of NumPy's as arrays on the device."""
    if isinstance(a, (list, tuple)):
        return type(a)(map(wrapped, a))
    return np.asarray(a).view(Device) if isinstance(a, (np.ndarray, np.generic)) else a


def on_device(function):
    """Return a function of NumPy's that takes device arrays and gives them."""

    @functools.wraps(function)
    def call(*arguments, **how):
        how = {name: bare(a) for name, a in how.items()}
        return wrapped(function(*map(bare, arguments), **how))

    return call


class Generator:
    """A random Generator whose draws lie on the device."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def random(self, *size, **how):
        return wrapped(self.rng.random(*size, **how))

    def standard_normal(self, *size, **how):
        return wrapped(self.rng.standard_normal(*size, **how))


def gemm_ex(_, turn_a, turn_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, *rest):
    """cublasGemmEx by its documentation: C = alpha A B + beta C, columns first, at addresses."""
    c_type, ldc, compute, algorithm = rest
    assert (turn_a, turn_b, a_type, b_type, c_type, compute, algorithm) == (0, 0, 2, 2, 0, 68, -1)

    def matrix(address, lead, columns, kind):
        size = lead * columns * np.dtype(kind).itemsize
        held = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(held, kind).reshape(columns, lead).T

    (one,), (zero,) = (matrix(p, 1, 1, np.float32)[0] for p in (alpha, beta))
    product = matrix(a, lda, k, np.float16)[:m].astype(np.float32)
    product = product @ matrix(b, ldb, n, np.float16)[:k].astype(np.float32)
    out = matrix(c, ldc, n, np.float32)[:m]
    out[...] = one * product + (zero * out if zero else 0)
    Counted.products += 1


class Counted:
    """What was asked of the device's libraries."""

    products, tf32 = 0, []


class Module(types.ModuleType):
    """cupy: what is not written here is NumPy's function of that name."""

    ndarray, RawKernel = Device, RawKernel

    def __getattr__(self, name):
        found = getattr(np, name)
        return on_device(found) if callable(found) and not isinstance(found, type) else found

    @staticmethod
    def asarray(a, dtype=None):
        return wrapped(np.array(a if isinstance(a, Device) else np.asarray(a), dtype, order="K"))

    array = asarray

    @staticmethod
    def get_default_memory_pool():
        return types.SimpleNamespace(free_bytes=lambda: 0)


def module(free):
    """Return a `cupy` whose device has so many free bytes."""
    cupy, names = Module("cupy"), types.SimpleNamespace
    runtime = names(memGetInfo=lambda: (free, free), CUDA_R_16F=2, CUDA_R_32F=0)
    runtime.getDeviceProperties = lambda i: {"name": b"a stand-in"}
    cupy.cuda = names(runtime=runtime, cublas=names(gemmEx=gemm_ex))
    cupy.cuda.Device = lambda: names(cublas_handle=0)
    cupy.random = names(default_rng=Generator)
    cupy.linalg = names(norm=on_device(np.linalg.norm))
    strided = on_device(np.lib.stride_tricks.as_strided)
    cupy.lib = names(stride_tricks=names(as_strided=strided))
    products = names(COMPUTE_TYPE_TF32="tf32", COMPUTE_TYPE_DEFAULT="float32")
    products.set_compute_type = lambda kind, name: Counted.tf32.append((kind.name, name))
    core = types.ModuleType("cupy._core")
    core._routines_linalg = products
    return {"cupy": cupy, "cupy._core": core, "cupy._core._routines_linalg": products}


@contextlib.contextmanager
def installed(cuda_kernel, free=2**30):
    """Let `import cupy` find the stand-in; cuda_kernel is cqsnn's, whose cache is emptied."""
    before = {name: sys.modules.get(name) for name in module(free)}
    sys.modules.update(module(free))
    cuda_kernel.cache_clear()
    RawKernel.launched = Device.reads = Counted.products = 0
    Counted.tf32.clear()
    try:
        yield sys.modules["cupy"]
    finally:
        cuda_kernel.cache_clear()
        for name, found in before.items():
            if found is None:
                del sys.modules[name]
            else:
                sys.modules[name] = found
