"""cqsnn: clamp-and-quantise training of CNNs and their exact transfer to spiking networks.

A CNN whose activations are clamped to [0, 1] and quantised (CQ training) is turned into a
network of integrate-and-fire (IF) neurons whose weights, thresholds and potentials are whole
numbers. After Yan, Zhou and Wong, "Near Lossless Transfer Learning for Spiking Neural
Networks", AAAI 2021 ("the paper"). No framework: every backward pass is written out here.

Reading order
    1 arrays       which library an array belongs to; running over the shards of a batch
    2 layers       each f and, right under it, f_backward
    3 networks     descriptions, the table of networks, init, forward, backward
    4 training     optimisers, rate, augmentation, one epoch, accuracy
    5 conversion   folding batch normalisation, integer weights, exactness bounds
    6 simulation   encoder, IF neurons, integer CNN, schedules, operations, certificates
    7 files        checkpoints, SNN files, PyTorch's weights, NIR, golden vectors, data sets

Axes
    N images, H W rows and columns, C input channels, O output channels, K kernel size,
    T time steps, L quantisation levels, t a time step counted from 1. Arrays are channels-last:
    images (N, H, W, C), convolution weights (K, K, C, O), depthwise (K, K, C), dense (in, O)
    with `in` flattened in H, W, C order, spikes over time (T, N, H, W, C).

Numbers
    Pixels are uint8, 0 to 255. Activations are dimensionless in [0, 1]; while quantised, layers
    pass on the whole level k = L * activation instead, and the next weights take the 1/L.
    `da` is the derivative of the loss by the *activation* a, with the shape of a.
    A converted network is whole numbers only: counts 0 to T; potentials, weights, biases and
    thresholds in units of 1/(S F) of the float threshold 1 (section 5). Floats carry them only
    under a bound that `exact_dtype` has checked, so spikes are the same bits on every backend,
    for every batch size, time chunk and number of threads.
    A neuron fires at v >= theta and then loses theta (soft reset); at most one spike a step.
    Parameters, gradients and optimiser state are flat dicts, keys "i.name" for layer i.
"""

import contextlib
import ctypes
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import operator
import os
import pickle
import pickletools
import re
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import threadpoolctl

__version__ = "0.1.0"

# 1  Arrays ----------------------------------------------------------------------------------------

SHARDS = 8  # parts of a batch: fixed, so that the number of threads changes no bit
SMALLEST_SHARD = 8  # images; a small batch has fewer shards
STRETCH = 2**16  # values that arrays are added up by
_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
CORES = len(_CORES)


def array_module(x):
    """Return numpy, or cupy when x is a CuPy array; nothing is imported here."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(x, cupy.ndarray) else np


def to_host(x):
    """Return x as a NumPy array."""
    return x if array_module(x) is np else x.get()


C_NAMES = {"float32": "float", "float64": "double", "int32": "int", "int64": "long long"}
C_NAMES |= {"float16": "unsigned short", "uint8": "unsigned char"}  # halves are only moved
C_NAMES |= {"complex128": "uint4"}  # 16 bytes of anything, moved at once


@functools.cache
def cuda_kernel(source, **types):
    """Return the CUDA kernel that a source defines, its types by name: NumPy's for CUDA's.
    Products and sums are rounded one by one, as NumPy does: fused they would be other bits."""
    import cupy

    options = [f"-D{name}={C_NAMES[kind]}" for name, kind in types.items()]
    return cupy.RawKernel(source, re.search(r"void (\w+)\(", source)[1], ("--fmad=false", *options))


def launch(source, size, *arguments, **types):
    """Run the CUDA kernel of a source for every index i below `size`, each a thread of its own.
    The kernel takes the arguments and then size; whole numbers as `unsigned`."""
    assert size < 2**32, "an index has 32 bits"
    whole = [np.uint32(a) if isinstance(a, int) else a for a in (*arguments, size)]
    kernel = cuda_kernel(source, **{name: np.dtype(kind).name for name, kind in types.items()})
    kernel((-(-size // 256),), (256,), tuple(whole))


def use_tf32(allowed):
    """Let CuPy round the operands of float32 products to 11 bits (TF32 tensor cores), or not.
    Sums of whole numbers need it off; the one public switch, CUPY_TF32, is read only once."""
    from cupy._core import _routines_linalg as cupy_products

    kind = cupy_products.COMPUTE_TYPE_TF32 if allowed else cupy_products.COMPUTE_TYPE_DEFAULT
    cupy_products.set_compute_type(np.dtype(np.float32), kind)


def shards(x):
    """Split images x (N, ...) into at most SHARDS slices whose bounds depend on N alone; on a GPU
    into one, which is an eighth of the kernels to start."""
    parts = max(1, min(SHARDS, len(x) // SMALLEST_SHARD)) if array_module(x) is np else 1
    edges = [len(x) * i // parts for i in range(parts + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]


_worker = functools.cache(lambda number: ThreadPoolExecutor(1))  # both made when first needed
_blas = functools.cache(threadpoolctl.ThreadpoolController)


def keep_freed_memory():
    """Let glibc's malloc keep what is freed for the next arrays of the same core, rather than hand
    its pages back and fault them in anew: 10 % of a step of `lenet*`. Of no effect elsewhere."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        # trim never; grow by so much that no heap is dropped; no mmap; a heap for each core
        for parameter, value in ((-1, -1), (-2, 2**26), (-4, 0), (-8, CORES)):
            ctypes.CDLL(None).mallopt(parameter, value)


class OneBlasThread(contextlib.ContextDecorator):
    """Let BLAS keep to one thread while a function runs. Its own splitting would change the bits,
    and its threads, which go on spinning when their work is over, would take the cores from ours.
    A process has one limit: its first thread to come sets it, the last one to leave restores it."""

    lock, users = threading.Lock(), 0
    # newer versions of threadpoolctl obey one thread alone until they are told to forget it
    forget = getattr(
        threadpoolctl.OpenBLASController, "clear_controlling_thread", lambda *_, **how: 0
    )

    def __enter__(self):
        with self.lock:
            if self.users == 0:
                self.forget(force=True)
                self.limit = _blas().limit(limits=1, user_api="blas")
            self.users += 1

    def __exit__(self, *error):
        with self.lock:
            self.users -= 1
            if self.users == 0:
                self.forget(force=True)
                self.limit.restore_original_limits()


one_blas_thread = OneBlasThread()


def _begin_child():
    """A forked process: threads do not come along, and a lock may have been one's."""
    _worker.cache_clear()
    one_blas_thread.lock, one_blas_thread.users = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)


@one_blas_thread
def over_shards(f, *lists, threads=None):
    """Return [f(*items) for items in zip(*lists)], several at once on a CPU: NumPy and BLAS let go
    of the interpreter lock. A thread, the calling one too, begins with the same items each time,
    which its core's cache may still hold, and ends with what others have not begun."""
    items, n = list(zip(*lists)), len(lists[0])
    threads = min(threads or CORES, n)
    if threads == 1 or array_module(lists[0][0]) is not np:
        return [f(*item) for item in items]
    results, taken = [None] * n, [itertools.count() for _ in items]

    def work(first):
        for k in (*range(first, n), *range(first)):
            if next(taken[k]) == 0:
                results[k] = f(*items[k])

    others = []
    try:
        with contextlib.suppress(RuntimeError):  # no thread can be had: then we do it all
            for t in range(1, threads):
                others.append(_worker(t).submit(work, n * t // threads))
        work(0)
    finally:
        taken = [itertools.count(1)] * n  # after an error nothing more begins
        begun = [other for other in others if not other.cancel()]
        wait(begun)
    for other in begun:
        other.result()
    return results


class Ranks:
    """The processes that work together: one, ALONE, or those that mpiexec has started. Each takes
    some consecutive shards of a batch; all call the same in the same order and get the same bits.
    comm is mpi4py's communicator of all of them, local that of those on one machine."""

    def __init__(self, comm=None, local=None):
        self.comm, self.local, self.ending = comm, local, comm and comm.Dup()
        self.rank, self.size = (comm.rank, comm.size) if comm else (0, 1)
        cores = set().union(*local.allgather(_CORES)) if local else ()  # bound to some each, or not
        self.threads = max(1, len(cores) // local.size) if local else None

    def ours(self, items):
        """Return this rank's share of a sequence that every rank has."""
        first, end = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return items[first:end]

    def of(self, x):
        """Return who works images x: all ranks; or, with fewer shards than ranks, each rank all."""
        return self if len(shards(x)) >= self.size else ALONE

    def wait(self, request, seconds=math.inf, pause=2e-4):
        """Return whether an MPI request is over in time. Soon asleep for `pause` at a time: others
        may need the core. MPI moves data while it is asked: 0 where much is on its way."""
        began, spent = time.monotonic(), 0
        while not (over := request.Test()) and spent < seconds:
            spent = time.monotonic() - began
            time.sleep(pause if spent > 1e-3 else 0)
        return over

    def gather(self, items):
        """Return every rank's items in one list, in the order of ranks. For a few numbers each."""
        if self.size == 1:
            return items
        data, sizes = pickle.dumps(list(items), 5), np.empty(self.size, np.int64)
        self.wait(self.comm.Iallgather(np.array([len(data)]), sizes))
        found = bytearray(sizes.sum())
        self.wait(self.comm.Iallgatherv(data, [found, sizes]))
        found = io.BytesIO(found)
        return [item for _ in sizes for item in pickle.load(found)]

    def sum(self, parts):
        """Add arrays of all ranks in shard order: each rank one slice of them, for all. So an array
        crosses the network about twice, whatever the number of ranks."""
        rows, counts = [part.reshape(-1) for part in parts], np.empty(self.size, np.int64)
        self.wait(self.comm.Iallgather(np.array([len(rows)]), counts))  # shards of each rank
        edges = [rows[0].size * rank // self.size for rank in range(self.size + 1)]
        sent = np.concatenate([row[i:j] for i, j in itertools.pairwise(edges) for row in rows])
        widths, total = np.diff(edges), np.empty_like(rows[0])
        slices = np.empty((counts.sum(), widths[self.rank]), sent.dtype)
        sizes = widths * len(rows), counts * widths[self.rank]
        self.wait(self.comm.Ialltoallv([sent, sizes[0]], [slices, sizes[1]]), pause=0)
        self.wait(self.comm.Iallgatherv(sum_over_shards(slices), [total, widths]), pause=0)
        return total.reshape(parts[0].shape)


ALONE = Ranks()
# what launchers tell each process: how many they have started, and which it is
LAUNCHERS = {"PMI_SIZE": "PMI_RANK", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}
LAUNCHERS |= {"SLURM_STEP_NUM_TASKS": "SLURM_PROCID"}  # last: it may have started another launcher


def ranks_started():
    """Return the Ranks that mpiexec has started; ALONE, and nothing is imported, if it is one.
    Raises ValueError, on the first of them, where mpi4py is missing or sees one process alone."""
    size, rank = next((pair for pair in LAUNCHERS.items() if pair[0] in os.environ), ("", ""))
    if int(os.environ.get(size, 1)) == 1:
        return ALONE
    try:
        from mpi4py.MPI import COMM_TYPE_SHARED, COMM_WORLD

        if COMM_WORLD.size == int(os.environ[size]):
            return Ranks(COMM_WORLD, COMM_WORLD.Split_type(COMM_TYPE_SHARED))
        wrong = "its MPI sees none of them, expected the mpiexec that belongs to it"
    except (ImportError, RuntimeError) as error:  # the latter where it finds no MPI
        wrong = f"{error}; expected pip install mpi4py mpich"
    if int(os.environ[rank]):
        raise SystemExit(2)  # one line is enough
    raise ValueError(f"mpiexec: {os.environ[size]} ranks, but mpi4py: {wrong}")


def sum_over_shards(parts, ranks=ALONE, threads=1):
    """Add arrays in shard order, of all ranks: where sums over a batch are closed, but those of
    `batch_moments`. On a CPU a stretch at a time, which stays in a core's cache."""
    if ranks.size > 1:
        return ranks.sum(parts)
    if array_module(parts[0]) is not np or np.size(parts[0]) <= STRETCH:
        return functools.reduce(operator.add, parts)
    rows, total = [part.reshape(-1) for part in parts], np.empty(parts[0].size, parts[0].dtype)

    def add(start):
        stretch = slice(start, start + STRETCH)
        total[stretch] = functools.reduce(operator.add, [row[stretch] for row in rows])

    over_shards(add, range(0, total.size, STRETCH), threads=threads)
    return total.reshape(parts[0].shape)


def exact_dtype(bound):
    """Return the float type in which every sum of whole numbers up to `bound` is exact."""
    if bound >= 2**53:
        raise ValueError(f"sums reach {bound}, expected less than 2**53: no float holds them")
    return np.float32 if bound < 2**24 else np.float64


def integer_dtype(bound):
    """Return the integer type of values up to `bound`: int32, or int64 from 2**31."""
    if bound >= 2**63:
        raise ValueError(f"potentials of up to {bound}, expected less than 2**63")
    return np.int32 if bound < 2**31 else np.int64


def check_range(name, value, low, high):
    """Raise ValueError unless value is a whole number from low to high."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}: {value!r}, expected a whole number")
    if not low <= value <= high:
        raise ValueError(f"{name}: {value}, expected {low} to {high}")


def check_choice(name, value, choices):
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: {value!r}, expected one of {', '.join(choices)}")


# 2  Layers: pure functions, y, cache = f(x, ...) and dx, grads = f_backward(dy, cache) ------------

BATCH_NORM_EPS = 1e-5
WHITEN_EPS = 5e-4  # added to a variance of pixels, white is 1: directions of mere noise stay small
BFLOAT16 = np.uint16  # NumPy has no such type: the bits of one
GAMMA_START = 0.4  # most of a layer then lies where the clamp lets gradients pass


def pad_borders(x, pad):
    """Add `pad` rows and columns of zeros around images x (N, H, W, C)."""
    if pad:
        shape = len(x), *(n + 2 * pad for n in x.shape[1:3]), x.shape[3]
        x, inside = array_module(x).zeros(shape, x.dtype), x
        x[:, pad:-pad, pad:-pad] = inside
    return x


def output_size(shape, size, stride, pad):
    """Return [rows, columns] of what a K x K kernel makes of images of `shape` (N, H, W, C)."""
    return [(n + 2 * pad - size) // stride + 1 for n in shape[1:3]]


def shifted(x, size, stride):
    """Yield (k, l, view): for each kernel position, the pixels it meets (N, Ho, Wo, C)."""
    rows, columns = ((n - size) // stride * stride + 1 for n in x.shape[1:3])
    for k, m in itertools.product(range(size), repeat=2):
        yield k, m, x[:, k : k + rows : stride, m : m + columns : stride]


IM2COL_VALUES = 2**28  # of columns at a time on a GPU: 1 GiB in float32
IM2COL = """
extern "C" __global__ void im2col(const ELEMENT *x, unsigned height, unsigned width,
    unsigned channels, unsigned size, unsigned stride, unsigned pad, unsigned rows,
    unsigned columns, ELEMENT *cols, unsigned n) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x, rest = i;
  if (i >= n) return;
  unsigned c = rest % channels; rest /= channels;
  unsigned l = rest % size; rest /= size;
  unsigned k = rest % size; rest /= size;
  unsigned column = rest % columns; rest /= columns;
  unsigned row = rest % rows, image = rest / rows;
  unsigned y = row * stride + k - pad, z = column * stride + l - pad;  // outside: huge
  const ELEMENT zero = {};
  bool inside = y < height && z < width;
  cols[i] = inside ? x[(((size_t)image * height + y) * width + z) * channels + c] : zero;
}"""


def im2col(x, size, stride, pad, dtype):
    """Return on a GPU, at once, the rows (N*Ho*Wo, K*K*C) that NumPy copies in `column_blocks`, in
    dtype: float16, float32 or float64. x is converted before it is multiplied K*K times, and moved
    16 bytes at a time where its channels fill them and it lies on a multiple of them."""
    xp, (n, height, width, channels) = array_module(x), x.shape
    x = xp.ascontiguousarray(x.astype(dtype, copy=False))
    rows, columns = output_size(x.shape, size, stride, pad)
    cols = xp.empty((n * rows * columns, size * size * channels), dtype)
    wide = dtype if channels * x.itemsize % 16 or x.data.ptr % 16 else np.complex128
    source, target = x.view(wide), cols.view(wide)
    geometry = height, width, source.shape[3], size, stride, pad, rows, columns
    launch(IM2COL, target.size, source, *geometry, target, ELEMENT=wide)
    return cols


def column_blocks(x, size, stride, pad, dtype):
    """Yield im2col of x, a block of images at a time: (slice of images, rows (n*Ho*Wo, K*K*C)).
    About 1,024 rows stay in a core's cache. The rows are overwritten by the next block."""
    if array_module(x) is not np:
        positions = math.prod(output_size(x.shape, size, stride, pad))
        block = max(1, IM2COL_VALUES // (positions * size * size * x.shape[3]))
        for start in range(0, len(x), block):
            images = slice(start, min(len(x), start + block))
            yield images, im2col(x[images], size, stride, pad, dtype)
        return
    n, (height, width), inside = len(x), output_size(x.shape, size, stride, pad), size * x.shape[3]
    x = np.ascontiguousarray(pad_borders(x, pad))
    image, row, column, _ = x.strides  # the last may be anything if there is one channel
    # columns and channels of a window lie next to each other in memory: one axis
    how = (n, height, width, size, inside), (image, row * stride, column * stride, row, x.itemsize)
    view = np.lib.stride_tricks.as_strided(x, *how)
    block = min(n, max(1, 1024 // (height * width)))
    cols = np.empty((block, *view.shape[1:]), dtype)
    for start in range(0, n, block):
        part = view[start : start + block]
        cols[: len(part)] = part
        yield slice(start, start + len(part)), cols[: len(part)].reshape(-1, size * inside)


def bfloat16(x):
    """Round x to bfloat16, the upper half of a float32: ties away from zero."""
    found = np.empty(x.shape, BFLOAT16)
    for index in cached_blocks(x.shape):
        bits = np.ascontiguousarray(x[index], np.float32).view(np.uint32) + np.uint32(2**15)
        found[index] = np.right_shift(bits, 16, out=bits)
    return found


@functools.cache
def mkl_product():
    """Return MKL's product of bfloat16 matrices on a CPU's matrix units (AMX), or None without them
    or the package mkl in this environment. From then on MKL has one thread in this process."""
    with contextlib.suppress(StopIteration, OSError, AttributeError):  # none, or one too old
        if "amx_bf16" in Path("/proc/cpuinfo").read_text():
            mkl = ctypes.CDLL(str(next(Path(sys.prefix).glob("lib/libmkl_rt.so*"))))
            whole, real, matrix = ctypes.c_int, ctypes.c_float, (ctypes.c_void_p, ctypes.c_int)
            product = mkl.cblas_gemm_bf16bf16f32
            product.argtypes = *[whole] * 6, real, *matrix, *matrix, real, *matrix
            mkl.MKL_Set_Interface_Layer(0)  # whole numbers of 32 bits
            mkl.MKL_Set_Threading_Layer(1)
            return product
    return None


def bfloat16_matmul(x, w, out, turned=False):
    """out = x w, or out += x' w, of bfloat16 matrices in float32 sums, by MKL or else NumPy."""
    if product := mkl_product():
        (rows, columns), how = out.shape, (101, 111 + turned, 111)  # C's order, x or x', w
        left, right = (x.ctypes.data, x.shape[1]), (w.ctypes.data, columns)
        product(*how, rows, columns, len(w), 1, *left, *right, turned, out.ctypes.data, columns)
        return
    x, w = ((a.astype(np.uint32) << 16).view(np.float32) for a in (x, w))
    out[...] = out + x.T @ w if turned else x @ w


def half_matmul(x, w, out):
    """out = x w on a GPU's tensor cores: x (M, K) and w (K, O) float16, out (M, O) float32.
    Exact while x and w are whole numbers of at most 2,048, w times a power of two up to 16, sums of
    absolute products below 2**24 of it: a product has 22 bits, and float32 adds them."""
    cuda, rows, outputs = array_module(x).cuda, *out.shape
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    half, single, compute = cuda.runtime.CUDA_R_16F, cuda.runtime.CUDA_R_32F, 68  # in float32
    left = w.data.ptr, half, outputs  # cuBLAS reads columns first: what it sees is out' = w' x'
    right = x.data.ptr, half, x.shape[1]
    sizes = 0, 0, outputs, rows, x.shape[1]  # nothing is turned
    result = zero.ctypes.data, out.data.ptr, single, outputs
    handle = cuda.Device().cublas_handle
    cuda.cublas.gemmEx(handle, *sizes, one.ctypes.data, *left, *right, *result, compute, -1)


def carried(x, w):
    """Return x, rounded where weights w are in bfloat16; how matrices of their type are multiplied;
    and the type of sums, float32 at least."""
    short = {np.float16: half_matmul, BFLOAT16: bfloat16_matmul}
    x = bfloat16(x) if w.dtype == BFLOAT16 != x.dtype else x
    return x, short.get(w.dtype.type, array_module(w).matmul), np.promote_types(w.dtype, np.float32)


def conv(x, w, stride, pad):
    """Convolve: z[n,i,j,o] = sum_klc x[n, i*stride+k-pad, j*stride+l-pad, c] w[k,l,c,o].
    im2col, then one matrix product. x (N, H, W, C) of any real type is carried in the type of
    w (K, K, C, O). Returns z (N, Ho, Wo, O), cache."""
    size, outputs, (x, multiply, kind) = len(w), w.shape[-1], carried(x, w)
    z = array_module(x).empty((len(x), *output_size(x.shape, size, stride, pad), outputs), kind)
    for images, rows in column_blocks(x, size, stride, pad, w.dtype):
        multiply(rows, w.reshape(-1, outputs), out=z[images].reshape(-1, outputs))
    return z, (x, w, stride, pad)


def conv_backward(dz, cache, input_gradient=True):
    """dw = cols' dz; dx is a convolution again, see `turned_conv`.
    Returns dx (None unless input_gradient), {"w": dw}."""
    x, w, stride, pad = cache
    dz, multiply, kind = carried(dz, w)
    dw = array_module(x).zeros((w.size // w.shape[3], w.shape[3]), kind)
    for images, rows in column_blocks(x, len(w), stride, pad, w.dtype):
        part = dz[images].reshape(-1, w.shape[3])
        if multiply is bfloat16_matmul:
            multiply(rows, part, dw, turned=True)
        else:
            dw += rows.T @ part
    dx = turned_conv(dz, w, stride, pad, x.shape) if input_gradient else None
    return dx, {"w": dw.reshape(w.shape)}


def turned_conv(dz, w, stride, pad, shape):
    """dx[n,y,x,c] = sum of dz[n,i,j,o] w[k,l,c,o] where i*stride+k-pad = y, and l likewise: a
    convolution of stride 1 of dz with the kernel turned about, which gives every phase of the image
    as channels (see `phase_taps`), less the border that nobody asks for. Returns dx of `shape`."""
    xp, taps = array_module(dz), phase_taps(w, stride)
    beyond = min(len(taps) - 1, pad) if stride == 1 else 0
    turned = xp.ascontiguousarray(taps[::-1, ::-1].swapaxes(2, 3))
    phases = conv(dz, turned, 1, len(taps) - 1 - beyond)[0]
    n, rows, columns, _ = phases.shape
    phases = phases.reshape(n, rows, columns, stride, stride, -1).swapaxes(2, 3)
    wide = phases.reshape(n, rows * stride, columns * stride, -1)
    reached = wide[:, pad - beyond :, pad - beyond :][:, : shape[1], : shape[2]]
    if reached.shape == shape:
        return reached
    # the stride passes over the last rows or columns
    return xp.pad(reached, [(0, n - m) for n, m in zip(shape, reached.shape)])


def phase_taps(w, stride):
    """Return weights w (K, K, C, O) as taps (r, r, S*S*C, O) of stride 1 on the S x S phases of an
    image: w[S p + a, S q + b] is tap p, q of phase a, b. Zeros fill K up to r S."""
    size, channels, outputs = len(w), w.shape[2], w.shape[3]
    if rest := -size % stride:
        w = array_module(w).pad(w, ((0, rest), (0, rest), (0, 0), (0, 0)))
    r = len(w) // stride
    phases = w.reshape(r, stride, r, stride, channels, outputs).swapaxes(1, 2)
    return phases.reshape(r, r, stride**2 * channels, outputs)


def winograd_matrices(m, r):
    """Return A', B', G of Winograd's way to m outputs of a kernel of r taps with n = m + r - 1
    products instead of m r: y = A' ((G w) * (B' x)); in two dimensions y = A' ((G w G') * (B' x B))
    A (Lavin and Gray, 2016). They multiply polynomials by their values at n - 1 points and at
    infinity. For two outputs A' and B' only add and subtract, and 4 G w G' is whole where w is;
    four take fewer products, of sums ten times less accurate: for training alone."""
    n, points = m + r - 1, np.array((0.0, 1, -1, 2, -2)[: m + r - 2])
    a, b, g = np.zeros((m, n)), np.zeros((n, n)), np.zeros((n, r))
    for i, p in enumerate(points):
        others = points[points != p]
        apart = math.prod(p - others)
        a[:, i], g[i] = p ** np.arange(m), p ** np.arange(r) / abs(apart)
        b[i, :-1] = np.sign(apart) * np.poly(others)[::-1]
    a[-1, -1], b[-1], g[-1, -1] = 1, np.poly(points)[::-1], 1
    return a, b, g


WINOGRAD = {size: winograd_matrices(*size) for size in ((2, 2), (2, 3), (4, 3))}  # by (m, r)
# With fewer channels passes over memory cost what products save, with fewer tiles in a shard those
# over the weights do: measured. So is the number of bytes of tiles that are worked at a time.
WINOGRAD_CHANNELS, WINOGRAD_TILES, WINOGRAD_BYTES = 128, {2: 64, 4: 48}, 2**22  # by m


class WinogradKernel(NamedTuple):
    """Convolution weights (K, K, C, O) of stride S, K = r S, as Winograd's algorithm takes them:
    as r x r taps of stride 1 on the S x S phases of an image, S*S*C channels."""

    u: np.ndarray  # G w G' (m+r-1, m+r-1, S*S*C, O)
    stride: int
    m: int  # outputs of a tile, each way


def tile_size(layer, w, shape, training=False):
    """Return the outputs of a tile, each way, with which Winograd's algorithm is fastest on a CPU
    for a layer with weights w (K, K, C, O) and inputs of `shape` (N, H, W, C); 0 where none is."""
    taps, rest = divmod(layer.size, layer.stride)
    if rest or layer.kind != "conv" or array_module(w) is not np:
        return 0
    narrowest = min(layer.stride**2 * w.shape[2], w.shape[3])
    outputs = output_size(shape, layer.size, layer.stride, layer.pad)
    for m in (4, 2) if training and not any(n % 4 for n in outputs) else (2,):
        tiles = shape[0] * math.prod(n // m for n in outputs)
        if (m, taps) in WINOGRAD and tiles >= WINOGRAD_TILES[m] and narrowest >= WINOGRAD_CHANNELS:
            return m
    return 0


def winograd_kernel(w, stride, m=2):
    """u = G w G', for the taps that each phase meets."""
    taps = phase_taps(w, stride)
    return WinogradKernel(both_ways(WINOGRAD[m, len(taps)][2], taps), stride, m)


def winograd_kernel_backward(du, stride, m):
    """dw = G' du G, every tap back in its place."""
    r, outputs = len(du) - m + 1, du.shape[3]
    taps = both_ways(WINOGRAD[m, r][2].T, du)
    phases = taps.reshape(r, r, stride, stride, -1, outputs).swapaxes(1, 2)
    return phases.reshape(r * stride, r * stride, -1, outputs)


def winograd_bound(u, largest):
    """Bound every sum that `winograd` takes with u, whole numbers, of inputs from 0 to `largest`.
    A value v = B' x B adds some inputs and subtracts others: it is at most as large as the more
    numerous of the two. Then comes A' m A, with m at most the sum of |u| v over channels."""
    a, b, _ = WINOGRAD[2, len(u) - 1]
    signs = np.einsum("ik,jl->ijkl", b, b)
    reach = np.maximum((signs > 0).sum((2, 3)), (signs < 0).sum((2, 3)))  # (r+1, r+1)
    m = reach[..., None] * np.abs(u).sum(2, dtype=np.float64)  # (r+1, r+1, O)
    return largest * np.einsum("pi,qj,ijo->pqo", abs(a), abs(a), m).max()


def signed_sum(signs, parts, out):
    """out = the sum of sign * part, for signs -1, 0 and 1, of which one at least is 1."""
    total, *added = (part for sign, part in zip(signs, parts) if sign > 0)
    subtracted = [part for sign, part in zip(signs, parts) if sign < 0]
    for function, others in ((np.add, added), (np.subtract, subtracted)):
        for part in others:
            total = function(total, part, out=out)
    if total is not out:
        out[...] = total


def both_ways(matrix, x):
    """Return M x M' (p, p, ...), for a matrix M (p, q) and x (q, q, ...), in the type of x: by
    adding and subtracting where M asks for nothing else."""
    p, q, rest = len(matrix), len(x), x.shape[2:]
    if not np.isin(matrix, (-1, 0, 1)).all():
        return (np.kron(matrix, matrix).astype(x.dtype) @ x.reshape(q * q, -1)).reshape(p, p, *rest)
    half, out = np.empty((p, q, *rest), x.dtype), np.empty((p, p, *rest), x.dtype)
    for i, signs in enumerate(matrix):
        signed_sum(signs, x, half[i])
    for j, signs in enumerate(matrix):
        signed_sum(signs, half.swapaxes(0, 1), out[:, j])
    return out


class Tiles(NamedTuple):
    """How m x m outputs at a time cover an image: `down` by `across` tiles, each of m + r - 1 rows
    and columns of every phase, overlapping by r - 1."""

    m: int
    r: int
    stride: int
    pad: int
    down: int
    across: int

    def framed(self, shape, dtype):
        """For images of `shape`: zeros for them, their border and what the tiles reach beyond it;
        and, a view of those, where the images lie."""
        sizes = [(self.m * n + self.r - 1) * self.stride for n in (self.down, self.across)]
        ends = [self.pad + n for n in shape[1:3]]
        frame = np.zeros((shape[0], *map(max, sizes, ends), shape[3]), dtype)
        return frame, frame[:, self.pad : ends[0], self.pad : ends[1]]

    def view(self, frame):
        """View framed images (N, H, W, C) as the pixels k, l of every tile and phase:
        (m+r-1, m+r-1, N, down, across, S, S*C)."""
        (n, _, _, channels), (image, row, column, channel) = frame.shape, frame.strides
        side, s = self.m + self.r - 1, self.stride
        shape = (side, side, n, self.down, self.across, s, s * channels)
        strides = (row * s, column * s, image, row * s * self.m, column * s * self.m, row, channel)
        return np.lib.stride_tricks.as_strided(frame, shape, strides)


def winograd_inputs(x, tiles, dtype):
    """v = B' x B of every tile and phase: (m+r-1, m+r-1, N*down*across, S*S*C), of a type."""
    frame, images = tiles.framed(x.shape, dtype)
    images[...] = x
    v = both_ways(WINOGRAD[tiles.m, tiles.r][1], tiles.view(frame).copy())
    return v.reshape(*v.shape[:2], -1, tiles.stride**2 * x.shape[3])


def winograd_inputs_backward(dv, tiles, shape):
    """dx = B dv B' of every tile, added up where tiles overlap, as images of `shape`."""
    frame, dx = tiles.framed(shape, dv.dtype)
    pixels = tiles.view(frame)
    dpixels = both_ways(WINOGRAD[tiles.m, tiles.r][1].T, dv).reshape(pixels.shape)
    for at in np.ndindex(pixels.shape[:2]):
        pixels[at] += dpixels[at]
    return dx


def winograd_outputs(m, tiles, z):
    """z = A' m A of every tile, from m (m+r-1, m+r-1, N*down*across, O); in place on z."""
    every = z.reshape(len(z), tiles.down, tiles.m, tiles.across, tiles.m, -1)
    every = every.transpose(2, 4, 0, 1, 3, 5)
    every[...] = both_ways(WINOGRAD[tiles.m, tiles.r][0], m).reshape(every.shape)


def winograd_outputs_backward(dz, tiles):
    """dm = A dz A' of every tile, (m+r-1, m+r-1, N*down*across, O)."""
    every = dz.reshape(len(dz), tiles.down, tiles.m, tiles.across, tiles.m, -1)
    every = every.transpose(2, 4, 0, 1, 3, 5).reshape(tiles.m, tiles.m, -1, dz.shape[3])
    return both_ways(WINOGRAD[tiles.m, tiles.r][0].T, every)


def tile_blocks(x, kernel, pad):
    """Return height and width of the outputs, the Tiles, and slices of images to work at a time."""
    u, stride, m = kernel
    r = len(u) - m + 1
    height, width = output_size(x.shape, r * stride, stride, pad)
    tiles = Tiles(m, r, stride, pad, -(-height // m), -(-width // m))
    image = tiles.down * tiles.across * len(u) ** 2 * max(u.shape[2:]) * u.itemsize
    block = max(1, WINOGRAD_BYTES // image)
    return height, width, tiles, [slice(i, i + block) for i in range(0, len(x), block)]


def winograd(x, kernel, pad):
    """Convolve as `conv` does, x (N, H, W, C) of any real type carried in the kernel's. Tiles of
    int8, which stands for spikes, stay in eight bits up to the product: a value adds four at most.
    Returns z (N, Ho, Wo, O), cache."""
    dtype = np.int8 if x.dtype == np.int8 else kernel.u.dtype
    u, (height, width, tiles, blocks) = kernel.u, tile_blocks(x, kernel, pad)
    z = np.empty((len(x), tiles.m * tiles.down, tiles.m * tiles.across, u.shape[3]), u.dtype)
    for images in blocks:
        v = winograd_inputs(x[images], tiles, dtype).astype(u.dtype, copy=False)
        winograd_outputs(v @ u, tiles, z[images])
    return np.ascontiguousarray(z[:, :height, :width]), (x, kernel, pad)


def winograd_backward(dz, cache, input_gradient=True):
    """With m = v u for every tile: du = v' dm, dv = dm u'.
    Returns dx (None unless input_gradient), {"w": du}."""
    x, kernel, pad = cache
    u, (height, width, tiles, blocks) = kernel.u, tile_blocks(x, kernel, pad)
    rest = [(0, -n % tiles.m) for n in (height, width)]  # outputs that only tiles have
    dz = np.pad(dz, ((0, 0), *rest, (0, 0))) if rest != [(0, 0)] * 2 else dz
    du, dx = 0, np.empty(x.shape, u.dtype) if input_gradient else None
    for images in blocks:
        v = winograd_inputs(x[images], tiles, u.dtype)
        dm = winograd_outputs_backward(dz[images], tiles)
        product = v.swapaxes(2, 3) @ dm
        du = product if images.start == 0 else np.add(du, product, out=du)
        if input_gradient:
            dv = np.matmul(dm, u.swapaxes(2, 3), out=v)
            dx[images] = winograd_inputs_backward(dv, tiles, x[images].shape)
    return dx, {"w": du}


def depthwise(x, w, stride, pad):
    """Convolve each channel by itself: z[n,i,j,c] = sum_kl x[n, i*stride+k-pad, ..., c] w[k,l,c].
    Returns z (N, Ho, Wo, C) in the type of w (K, K, C), cache."""
    z = 0
    for k, m, pixels in shifted(pad_borders(x, pad), len(w), stride):
        z = z + pixels.astype(w.dtype, copy=False) * w[k, m]
    return z, (x, w, stride, pad)


def depthwise_backward(dz, cache):
    """dw[k,l] = sum of dz times the pixels met; dx adds dz w[k,l] to those pixels."""
    x, w, stride, pad = cache
    x, dw = pad_borders(x, pad), array_module(x).zeros_like(w)
    dx = array_module(x).zeros(x.shape, w.dtype)
    pairs = zip(shifted(x, len(w), stride), shifted(dx, len(w), stride))
    for (k, m, pixels), (_, _, dpixels) in pairs:
        dw[k, m] = (dz * pixels).sum((0, 1, 2))
        dpixels += dz * w[k, m]
    return dx[:, pad : dx.shape[1] - pad, pad : dx.shape[2] - pad], {"w": dw}


def sum_pool(x, size, dtype):
    """Add up K x K squares side by side; odd rows and columns are dropped.
    Average pooling is this over K*K: as a sum it stays a whole number. z (N, H//K, W//K, C)."""
    z = 0
    for _, _, pixels in shifted(x, size, size):
        z = z + pixels.astype(dtype, copy=False)
    return z, (x.shape, size)


def sum_pool_backward(dz, cache):
    """Every pixel of a square receives the square's dz."""
    shape, size = cache
    dx = array_module(dz).zeros(shape, dz.dtype)
    for _, _, pixels in shifted(dx, size, size):
        pixels[...] = dz
    return dx, {}


def dense(x, w):
    """z = x w, with x (N, ...) flattened to (N, in) and w (in, O)."""
    return x.reshape(len(x), -1).astype(w.dtype, copy=False) @ w, (x, w)


def dense_backward(dz, cache):
    """dw = x' dz, dx = dz w'."""
    x, w = cache
    return (dz @ w.T).reshape(x.shape), {"w": x.reshape(len(x), -1).T @ dz}


CACHED = 2**20  # values of a block that several passes go over; threads take turns at smaller ones


def cached_blocks(shape):
    """Yield indexes of blocks of an array (N, ..., C), small enough for a cache: of whole images,
    or of some rows of one. They depend on the shape alone."""
    height, size = shape[1] if len(shape) > 2 else 1, math.prod(shape[1:])
    images = max(1, CACHED // size)
    rows = height if images > 1 else max(1, CACHED * height // size)
    for start, top in itertools.product(range(0, shape[0], images), range(0, height, rows)):
        yield (slice(start, start + images), slice(top, top + rows))[: len(shape) - 1]


def column_sums(x):
    """Sum x (N, ..., C) over all but its channels, in its own type over what a cache holds, then in
    float64. A product with ones is five times faster than a sum."""
    rows = x.reshape(-1, x.shape[-1])
    return (np.ones(len(rows), x.dtype) @ rows).astype(np.float64)


STRIP = 64  # rows that a thread of a GPU adds up
MOMENTS = """
extern "C" __global__ void moments(const REAL *z, unsigned rows, unsigned channels,
    unsigned strip, REAL *found, unsigned n) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;  // of a strip of rows, one channel
  if (i >= n) return;
  unsigned c = i % channels, first = i / channels * strip;
  REAL m = z[(size_t)first * channels + c], sum = 0, squares = 0;
  for (unsigned row = first; row < first + strip && row < rows; row++) {
    REAL off = z[(size_t)row * channels + c] - m;
    sum += off;
    squares += off * off;
  }
  REAL *of_strip = found + ((size_t)(i - c) * 3 + c);
  of_strip[0] = m, of_strip[channels] = sum, of_strip[2 * channels] = squares;
}"""


def moments(z):
    """Return, for a shard z (..., C) in B blocks: how many rows it has; how many each has (B, 1);
    a row m near the mean of each (B, C), of the type of z; and the sums of z - m and of its square
    (B, 2, C), in which nothing cancels where the mean is large. A block is what a cache holds, and
    m its mean, rounded; on a GPU it is a strip of rows, and m the first."""
    xp, rows = array_module(z), z.size // z.shape[-1]
    if xp is not np:
        n = xp.minimum(rows - xp.arange(0, rows, STRIP), STRIP)[:, None]
        found = xp.empty((len(n), 3, z.shape[-1]), z.dtype)
        how = rows, z.shape[-1], STRIP, found
        launch(MOMENTS, found.size // 3, xp.ascontiguousarray(z), *how, REAL=z.dtype)
        return rows, n, found[:, 0], found[:, 1:]
    n, about, sums = [], [], []
    for index in cached_blocks(z.shape):
        part = z[index]
        n.append([part.size // z.shape[-1]])
        about.append((column_sums(part) / n[-1]).astype(z.dtype))
        off = part - about[-1]
        sums.append([column_sums(off), column_sums(np.square(off, out=off))])
    return rows, np.array(n), np.stack(about), np.array(sums)


def batch_moments(found):
    """Return count, mean and variance (population) of all shards, from the `moments` of each: with
    d = z - m, sum (z - mean)^2 = sum d^2 - (sum d)^2 / count. All in float64."""
    rows, *blocks = zip(*found)
    xp, count = array_module(blocks[0][0]), sum(rows)
    n, about, sums = map(xp.concatenate, blocks)
    off = sums[:, 0] / n
    means = about + off
    mean = (n * means).sum(0) / count
    spread = sums[:, 1] - n * off**2
    return count, mean, xp.concatenate([spread, n * (means - mean) ** 2]).sum(0) / count


ACTIVATIONS = ("relu", "clamp", "quantize")  # in the order of the stages

ACTIVATE = """
extern "C" __global__ void activate(const REAL *z, const REAL *mean, const REAL *scale,
    const REAL *beta, unsigned channels, unsigned activation, double levels, double shift,
    REAL *a, bool *inside, unsigned n) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  REAL u = z[i];
  if (channels) {
    unsigned c = i % channels;
    u = (u - mean[c]) * scale[c] + beta[c];
  }
  inside[i] = u > 0 && (activation == 0 || u < 1);
  if (u < 0) u = 0;  // NaN stays NaN
  if (activation > 0 && u > 1) u = 1;
  if (activation == 2) u = floor(u * (REAL)levels + (REAL)shift);
  a[i] = u;
}"""


def activate(z, activation, levels=None, shift=0.0, norm=None):
    """The activation a of u, and where it lets gradients pass (bool, the shape of u).
    "relu"      a = max(u, 0)
    "clamp"     a = clamp(u, 0, 1)
    "quantize"  the whole level k = L a = floor(L clamp(u, 0, 1) + shift)   (Algorithm 1)
    The paper's CQ has shift 0; 1/2 rounds without bias (QCFS). L and shift are of "quantize".
    u is z, or (z - mean) scale + beta where norm is (mean, scale, beta), each (C,)."""
    xp = array_module(z)
    a, inside = xp.empty(z.shape, z.dtype), xp.empty(z.shape, bool)
    if xp is not np:
        channels, kind = z.shape[-1] if norm else 0, ACTIVATIONS.index(activation)
        how = *(norm or (z, z, z)), channels, kind, float(levels or 0), float(shift)
        launch(ACTIVATE, z.size, xp.ascontiguousarray(z), *how, a, inside, REAL=z.dtype)
        return a, inside
    mean, scale, beta = (0, 1, 0) if norm is None else norm
    for index in cached_blocks(z.shape):  # every pass over a block finds it in the cache
        u, passes = a[index], inside[index]
        xp.subtract(z[index], mean, out=u)  # first, or a large mean would cancel
        u *= scale
        u += beta
        xp.greater(u, 0, out=passes)
        if activation != "relu":
            passes &= u < 1
        xp.clip(u, 0, None if activation == "relu" else 1, out=u)
        if activation == "quantize":
            u *= levels
            u += shift
            xp.floor(u, out=u)
    return a, inside


def activate_backward(da, inside):
    """du = da where 0 < u (and u < 1 unless relu), else 0: straight through the floor. In place."""
    da *= inside
    return da, {}


NORM_SUMS = """
extern "C" __global__ void norm_sums(const REAL *z, REAL *da, const bool *inside,
    const REAL *mean, unsigned rows, unsigned channels, unsigned strip, REAL *sums, unsigned n) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;  // of a strip of rows, one channel
  if (i >= n) return;
  unsigned c = i % channels, first = i / channels * strip;
  REAL sum = 0, sum_x = 0;
  for (unsigned row = first; row < first + strip && row < rows; row++) {
    size_t k = (size_t)row * channels + c;
    REAL du = da[k] * (REAL)inside[k];
    da[k] = du;
    sum += du;
    sum_x += (z[k] - mean[c]) * du;
  }
  sums[i] = sum;
  sums[n + i] = sum_x;
}"""


def norm_sums(z, da, inside, mean):
    """Turn da into du, in place where it is contiguous or NumPy's; return du and, in float64,
    [sum du, sum du (z - mean)] over all but channels: here blocks, on a GPU strips of rows."""
    xp = array_module(z)
    if xp is not np:
        z, da, channels = *map(xp.ascontiguousarray, (z, da)), z.shape[-1]
        rows = z.size // channels
        sums = xp.empty((2, -(-rows // STRIP), channels), z.dtype)
        how = rows, channels, STRIP, sums
        launch(NORM_SUMS, sums.size // 2, z, da, inside, mean, *how, REAL=z.dtype)
        return da, sums.sum(1, dtype=np.float64)
    sums = 0
    for index in cached_blocks(z.shape):
        du, x = da[index], z[index] - mean
        du *= inside[index]
        x *= du
        sums = sums + np.stack([column_sums(du), column_sums(x)])
    return da, sums


def batch_norm(found, gamma, beta, mean, var, momentum=0.1):
    """Return (mean, scale, beta) with which `activate` takes u = gamma (z - mean) / sqrt(var + eps)
    + beta, and a cache. Here alone images meet: in training, found is the `moments` of each shard
    of a batch, whose mean and variance are used and move the running ones in place by the momentum,
    the variance unbiased (as PyTorch does); where it is None the running ones are used."""
    count = None
    if found is not None:
        count, batch_mean, batch_var = batch_moments(found)
        for running, now in ((mean, batch_mean), (var, batch_var * count / max(count - 1, 1))):
            running *= 1 - momentum
            running += (momentum * now).astype(running.dtype)
        mean, var = batch_mean, batch_var
    mean = mean.astype(gamma.dtype)  # a copy: backward must not see the running mean move
    inverse = (1 / array_module(var).sqrt(var + BATCH_NORM_EPS)).astype(gamma.dtype)
    return (mean, gamma * inverse, beta), (mean, inverse, gamma, count)


def batch_norm_backward(sums, cache):
    """From the `norm_sums` of all shards: with x = (z - mean) / sqrt(var + eps), dbeta = sum du,
    dgamma = sum du x, and dz = gamma / sqrt(var + eps) (du - (dbeta + x dgamma) / count); without
    the last two terms where the running mean and variance were used.
    Returns (mean, scale, level, slope) for `norm_input_gradient`, {"gamma": ..., "beta": ...}."""
    mean, inverse, gamma, count = cache
    dbeta, dgamma = sums[0], sums[1] * inverse
    count = count or math.inf  # running statistics do not move with z: nothing comes back by them
    level, slope = ((g / count).astype(mean.dtype) for g in (dbeta, dgamma * inverse))
    grads = {"gamma": dgamma.astype(gamma.dtype), "beta": dbeta.astype(gamma.dtype)}
    return (mean, gamma * inverse, level, slope), grads


NORM_INPUT_GRADIENT = """
extern "C" __global__ void norm_input_gradient(const REAL *z, REAL *du, const REAL *mean,
    const REAL *scale, const REAL *level, const REAL *slope, unsigned channels, unsigned n) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x, c = i % channels;
  if (i >= n) return;
  du[i] = (du[i] - ((z[i] - mean[c]) * slope[c] + level[c])) * scale[c];
}"""


def norm_input_gradient(z, du, mean, scale, level, slope):
    """dz = scale (du - level - slope (z - mean)), in place of du."""
    xp = array_module(z)
    if xp is not np:
        how = mean, scale, level, slope, z.shape[-1]
        launch(NORM_INPUT_GRADIENT, z.size, xp.ascontiguousarray(z), du, *how, REAL=z.dtype)
        return du
    for index in cached_blocks(z.shape):
        part, x = du[index], z[index] - mean
        x *= slope
        x += level
        part -= x
        part *= scale
    return du


def dropout(a, rate, seed):
    """Set a fraction `rate` of a to zero and divide the rest by 1 - rate; in place."""
    kept = array_module(a).random.default_rng(seed).random(a.shape, dtype=np.float32) >= rate
    kept = kept.astype(a.dtype) * a.dtype.type(1 / (1 - rate))
    a *= kept
    return a, kept


def dropout_backward(da, kept):
    """What was kept passes, divided by 1 - rate; in place."""
    da *= kept
    return da, {}


def cross_entropy(logits, labels, smoothing=0.0):
    """Mean over images of -sum_c q_c log softmax(logits)_c, and its derivative by the logits.
    q is 1 - smoothing at the label plus smoothing / classes everywhere.
    Returns the loss (0-d array) and dlogits = (softmax - q) / N."""
    xp = array_module(logits)
    n, classes = logits.shape
    below_top = logits - logits.max(1, keepdims=True)
    log_softmax = below_top - xp.log(xp.exp(below_top).sum(1, keepdims=True))
    q = xp.full(logits.shape, smoothing / classes, logits.dtype)
    q[xp.arange(n), labels] += 1 - smoothing
    return -(q * log_softmax).sum() / n, (xp.exp(log_softmax) - q) / n


# 3  Networks: one description for each layer that has neurons -------------------------------------


@dataclass(frozen=True)
class Conv:
    """Convolution, batch normalisation, CQ and, while training, dropout. mean=True: the mean of
    2x2 outputs of K-1 x K-1 weights with stride 1, which is one of K x K with stride 2."""

    channels: int
    size: int = 3
    stride: int = 1
    pad: int = 1
    dropout: float = 0.0
    mean: bool = False
    kind, norm = "conv", True


@dataclass(frozen=True)
class Depthwise:
    """Trainable pooling: a depthwise convolution with a bias, then CQ; starts as the mean."""

    size: int = 2
    stride: int = 2
    pad: int = 0
    kind, norm, mean = "depthwise", False, False


@dataclass(frozen=True)
class AvgPool:
    """Average pooling with stride K, then CQ; odd rows and columns are dropped."""

    size: int = 2
    kind, norm, pad = "pool", False, 0
    stride = property(lambda self: self.size)


@dataclass(frozen=True)
class Dense:
    """Fully connected. With units: batch normalisation and CQ. Without (the last layer): one
    output a class, a bias, no CQ. mean=True reads the mean over rows and columns instead."""

    units: int | None = None
    mean: bool = False
    kind, size, stride, pad = "dense", 1, 1, 0
    norm = property(lambda self: self.units is not None)


_NAMED = {
    "digits": "32C3-A-64C3-A-FC",
    "lenet*": "32C3p0-32C3p0-32C4s2-64C3p0-64C3p0-64C4s2-128C3p0-FC",
    "vgg*": "128C3-128C3-A-256C3-256C3-A-512C3-512C3-A-1024C3p0-A-FC",
    "allconv": "32C3-64C4s2-64C3-256C4s2-256C3-256C4s2-256C3-G-FC",
    "wideconv": "64C3-128C3A-128C3-256C3A-256C3-384C3A-384C3-G-FC",
    "vgg11": "64C3-A-128C3-A-256C3-256C3-A" + "-512C3-512C3-A" * 2 + "-FC",
    "vgg13": "64C3-64C3-A-128C3-128C3-A-256C3-256C3-A" + "-512C3-512C3-A" * 2 + "-FC",
    "vgg16": "64C3-64C3-A-128C3-128C3-A" + "-256C3" * 3 + ("-A" + "-512C3" * 3) * 2 + "-A-FC",
    "vgg19": "64C3-64C3-A-128C3-128C3-A" + "-256C3" * 4 + ("-A" + "-512C3" * 4) * 2 + "-A-FC",
}
_NAMED["vgg19-tp"] = _NAMED["vgg19"].replace("A", "T")


def network(text, what="network"):
    """Return the network of a name, or of words: nCk a convolution, with sS and pP where stride or
    pad is not 1, and A behind it for the mean of 2x2 outputs before the norm; A average and T
    trainable pooling; FC last, G-FC on the mean over positions."""
    words = {"A": AvgPool(), "T": Depthwise(), "FC": Dense(), "GFC": Dense(mean=True)}
    found, layers = _NAMED.get(text, text).replace("G-FC", "GFC").split("-"), []
    for word in found:
        kernel = re.fullmatch(r"([1-9]\d{0,4})C([1-9]\d?)(?:s([1-9]\d?))?(?:p(\d\d?))?(A?)", word)
        if not (kernel or word in words) or (kernel and kernel[3] and kernel[5]):
            known = ", ".join([*_NAMED, "or nCk, nCkpP, nCksSpP, nCkA, nCkpPA, A, T, FC, G-FC"])
            raise ValueError(f"{what} {text!r}: {word!r}, expected one of {known}")
        if kernel:
            n, k, s, p = (int(number or 1) for number in kernel.groups()[:4])
            words[word] = Conv(n, k + 1, 2, p, mean=True) if kernel[5] else Conv(n, k, s, p)
        layers.append(words[word])
    if [layer.kind == "dense" for layer in layers] != [False] * (len(layers) - 1) + [True]:
        raise ValueError(f"{what} {text!r}: expected FC or G-FC at its end and nowhere else")
    return tuple(layers)


NETWORKS = {name: network(name) for name in _NAMED}


def with_dropout(net, rate):
    """Return net with dropout of `rate` after the CQ of every convolution."""
    return tuple(replace(f, dropout=rate) if f.kind == "conv" else f for f in net)


def output_shapes(net, shape, classes, first=0):
    """Return the shape of each layer's output, (H, W, O) or (O,), for images of `shape`.
    Raises ValueError naming the layer and the size there where the network cannot take it."""
    shapes = []
    for i, layer in enumerate(net, first):
        if layer.kind == "dense":
            shape = (layer.units or classes,)
        else:
            size = [n + 2 * layer.pad for n in shape[:2]] if len(shape) == 3 else [0, 0]
            if min(size) < layer.size:
                found, kernel = "x".join(map(str, shape[:-1])), f"{layer.size}x{layer.size}"
                where = f"layer {i} ({layer.kind} {kernel}): input {found or 'flat'}"
                raise ValueError(f"{where}, padded by {layer.pad}; expected at least {kernel}")
            channels = layer.channels if layer.kind == "conv" else shape[2]
            shape = (*((n - layer.size) // layer.stride + 1 for n in size), channels)
        shapes.append(shape)
    return shapes


def init_params(net, shape, classes, rng):
    """Return float32 parameters for images of `shape` (H, W, C), drawn from the Generator rng.
    Weights are normal with variance 2 / fan-in, 1 / fan-in in the last layer."""
    params, outputs = {}, output_shapes(net, shape, classes)
    for i, (layer, before, out) in enumerate(zip(net, [shape, *outputs], outputs)):
        if layer.kind == "pool":
            continue
        if layer.kind == "depthwise":
            w = np.full((layer.size, layer.size, before[-1]), 1 / layer.size**2)
        else:
            fan_in = before[-1:] if layer.mean else (math.prod(before),)
            if layer.kind == "conv":
                fan_in = (layer.size - layer.mean, layer.size - layer.mean, before[-1])
            variance = (2 if layer.norm else 1) / math.prod(fan_in)
            w = rng.normal(0, math.sqrt(variance), (*fan_in, out[-1]))
        params[f"{i}.w"] = w.astype(np.float32)
        starts = {"gamma": GAMMA_START, "beta": 0, "mean": 0, "var": 1} if layer.norm else {"b": 0}
        for name, value in starts.items():
            params[f"{i}.{name}"] = np.full(out[-1], value, np.float32)
    return params


@one_blas_thread
def whiten(net, params, x):
    """Let a first convolution start as what decorrelates its K x K patches of images x (N, H, W, C)
    in [0, 1]: the eigenvectors of their covariance, largest eigenvalue first, each divided by the
    root of it and with both signs, for as many channels as there are; in place on params. Returns
    params; those of a network that begins otherwise, or whose K x K no image holds, stay."""
    if net[0].kind != "conv" or len(params["0.w"]) > min(x.shape[1:3]):
        return params
    xp, w, count, total, square = array_module(x), params["0.w"], 0, 0, 0
    for _, rows in column_blocks(x, len(w), 1, 0, x.dtype):
        count, total = count + len(rows), total + rows.sum(0, dtype=np.float64)
        square = square + (rows.T @ rows).astype(np.float64)
    mean = total / count
    variance, vectors = xp.linalg.eigh(square / count - xp.outer(mean, mean))  # rising
    kept = min(w.shape[3] // 2, len(mean))
    vectors = (vectors / xp.sqrt(xp.maximum(variance, 0) + WHITEN_EPS))[:, ::-1][:, :kept]
    w[..., : 2 * kept] = xp.concatenate([vectors, -vectors], 1).reshape(*w.shape[:3], -1)
    return params


def linear(layer, x, w):
    """Apply the weighted sum of a layer (of a CNN or a converted one) to x, without its bias.
    The type of w carries the sum; a pooling, whose weights are 1, gets any array of that type."""
    if isinstance(w, WinogradKernel):
        return winograd(x, w, layer.pad)
    if layer.kind in ("conv", "depthwise"):
        return (conv if layer.kind == "conv" else depthwise)(x, w, layer.stride, layer.pad)
    return sum_pool(x, layer.size, w.dtype) if layer.kind == "pool" else dense(x, w)


def linear_backward(layer, dz, cache, input_gradient=True):
    """Return dx and {"w": dw} of `linear`."""
    if layer.kind == "conv":
        tiled = isinstance(cache[1], WinogradKernel)
        return (winograd_backward if tiled else conv_backward)(dz, cache, input_gradient)
    others = {"depthwise": depthwise_backward, "pool": sum_pool_backward, "dense": dense_backward}
    return others[layer.kind](dz, cache)


def applied_weights(layer, w, shape):
    """Return a layer's weights w as they meet inputs of `shape`, with the mean that it takes: of
    2x2 outputs of a convolution, or of all positions, w / (H*W) at each of them."""
    if layer.kind == "pool" or not layer.mean:
        return w
    if layer.kind == "dense":
        positions = math.prod(shape[:-1])
        return array_module(w).tile(w / positions, (positions, 1))
    wide = array_module(w).zeros((layer.size, layer.size, *w.shape[2:]), w.dtype)
    for k, m in itertools.product(range(2), repeat=2):
        wide[k : k + len(w), m : m + len(w)] += w / 4
    return wide


def applied_weights_backward(layer, dw, shape):
    """Return the gradient by weights of `shape` from that by the applied ones."""
    if layer.kind == "dense":
        return dw.reshape(-1, *shape).mean(0)
    if layer.mean:
        dw = sum(dw[k : k + shape[0], m : m + shape[0]] for k in range(2) for m in range(2)) / 4
    return dw


class LayerTape(NamedTuple):
    """What backward needs of a layer; lists have one item for each shard."""

    unit: float  # inputs are activations times this: 1, or the levels L
    inputs: list  # what the layer before passed on
    inside: list  # where the layer before let gradients pass; None: everywhere
    kept: list  # caches of its `dropout`, or None
    caches: list  # of `linear`
    sums: list | None  # before batch normalisation, where there is one
    norm: tuple | None  # cache of `batch_norm`


def outputs(layer, how, unit, norm, z, seed):
    """Return what a layer passes on from its sums z, levels while quantised; where it lets
    gradients pass, and the cache of its dropout, or None. A pooling's mean is not clamped: behind a
    dropout, which scales what it keeps, it may pass 1 in training."""
    inside = kept = None
    activation, levels, shift = how
    if layer.kind != "pool":
        z, inside = activate(z, *how, norm)
    elif activation == "quantize":
        # pixels are rounded to floats: a first layer's mean is off by less than this, where L does
        # not pass 1,000; a true one, a multiple of 1/T or 1/255 over K*K, is further from a level
        square = layer.size**2
        off = min((square + 4) * 2**-24 * levels, 2**-10 / square) if unit == 1 else 0
        z = array_module(z).floor(z * (levels / unit) + (shift + off))
    if seed is not None:
        z, kept = dropout(z, layer.dropout, seed)
    return z, inside, kept


def outputs_backward(net, tape, i, da, k):
    """From what layer i passed on of shard k to its sums: du, in place of da, and what gradients of
    its parameters need: `norm_sums` of a batch normalisation, or sum du of a bias."""
    layer, entry, inside = net[i], tape[i], None
    if i + 1 < len(net):
        inside, kept = tape[i + 1].inside[k], tape[i + 1].kept[k]
        da = da if kept is None else dropout_backward(da, kept)[0]
    if layer.norm:
        return norm_sums(entry.sums[k], da, inside, entry.norm[0])
    if layer.kind == "pool":
        return da / layer.size**2, None
    da = da if inside is None else activate_backward(da, inside)[0]
    return da, da.reshape(-1, da.shape[-1]).sum(0)


@one_blas_thread
def forward(
    net, params, x, activation="clamp", levels=None, shift=0.0, rng=None,
    threads=None, momentum=0.1, ranks=ALONE, bf16=False,
):  # fmt: skip
    """Run the CNN on x (N, H, W, C), floats in [0, 1]; return logits (N, classes) and a tape.
    activation is "relu", "clamp" or "quantize" (with levels L and shift 0 or 1/2). A Generator
    rng means training: dropout, and batch statistics, which move i.mean and i.var in place by the
    momentum; bf16, on a CPU, rounds operands of every convolution but the first to bfloat16.
    A rank reads its own shards of x alone, has a tape of them, and returns all logits.
    Shards wait for each other once a layer, where batch normalisation needs them all."""
    check_choice("activation", activation, ACTIVATIONS)
    if (activation == "quantize") != (levels is not None):
        raise ValueError(f"levels: {levels}, expected a number with quantize and with it alone")
    parts, unit, tape, how = shards(x), 1, [], (activation, levels, shift)
    zs = [x[part] for part in ranks.ours(parts)]
    seeds, passed_on = [None] * len(zs), lambda x, seed: (x, None, None)
    for i, layer in enumerate(net):
        p = {name: params.get(f"{i}.{name}") for name in ("w", "b", "gamma", "beta", "mean", "var")}
        # the batch's first shard, not a rank's: every rank takes the same algorithm
        few = parts[0].stop, *zs[0].shape[1:]
        w = None if layer.kind == "pool" else applied_weights(layer, p["w"], few[1:]) / unit
        if bf16 and i > 0 and layer.kind == "conv":  # pixels have more bits
            w = bfloat16(w)
        elif m := tile_size(layer, w, few, rng is not None):
            w = winograd_kernel(w, layer.stride, m)
        counted = layer.norm and rng is not None

        def run(z, seed):
            a, inside, kept = passed_on(z, seed)
            z, cache = linear(layer, a, a if w is None else w)
            if layer.kind == "pool":
                z = z / layer.size**2  # in units still, so that whole numbers stay whole
            z = z if p["b"] is None else z + p["b"]
            return a, inside, kept, cache, z, moments(z) if counted else None

        *entry, zs, found = zip(*over_shards(run, zs, seeds, threads=threads))
        norm = norm_cache = None
        if layer.norm:
            found = ranks.gather(found) if counted else None
            affine = (p[name] for name in ("gamma", "beta", "mean", "var"))
            norm, norm_cache = batch_norm(found, *affine, momentum)
        tape.append(LayerTape(unit, *entry, zs if layer.norm else None, norm_cache))
        passed_on = functools.partial(outputs, layer, how, unit, norm)
        seeds = [None] * len(zs)
        if rng is not None and layer.kind == "conv" and layer.dropout:
            seeds = ranks.ours([int(seed) for seed in rng.integers(2**63, size=len(parts))])
        unit = levels or 1
    return array_module(x).concatenate(ranks.gather(zs)), tape


@one_blas_thread
def backward(net, params, tape, dlogits, threads=None, ranks=ALONE):
    """Return the gradients of the loss by all trained parameters, from dlogits (N, classes)."""
    grads, last = {}, len(net) - 1
    over, numbers = functools.partial(over_shards, threads=threads), itertools.count
    das = [dlogits[part] for part in ranks.ours(shards(dlogits))]
    dus, sums = zip(*over(lambda da, k: outputs_backward(net, tape, last, da, k), das, numbers()))
    for i in reversed(range(len(net))):
        layer, entry, w, norm = net[i], tape[i], params.get(f"{i}.w"), None
        if layer.norm:
            norm, found = batch_norm_backward(sum_over_shards(ranks.gather(sums)), entry.norm)
            grads |= {f"{i}.{name}": g for name, g in found.items()}
        elif layer.kind != "pool":
            grads[f"{i}.b"] = sum_over_shards(sums, ranks)
        # of activations times unit, and w / unit: dz times unit makes dx one by activations
        unit = 1 if w is None else entry.unit
        norm = norm and (norm[0], norm[1] * unit, *norm[2:])

        def run(du, k):
            dz = norm_input_gradient(entry.sums[k], du, *norm) if norm else du * unit
            dx, dw = linear_backward(layer, dz, entry.caches[k], i > 0)
            du, sums = outputs_backward(net, tape, i - 1, dx, k) if i else (None, None)
            return du, sums, dw

        dus, sums, dws = zip(*over(run, dus, numbers()))
        if w is not None:
            dw = sum_over_shards([dw["w"] for dw in dws], ranks, threads)
            if isinstance(kernel := entry.caches[0][1], WinogradKernel):
                dw = winograd_kernel_backward(dw, kernel.stride, kernel.m)
            dw /= unit**2  # for inputs and for dz
            grads[f"{i}.w"] = applied_weights_backward(layer, dw, w.shape)
    return grads


# 4  Training --------------------------------------------------------------------------------------

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al., 2024
NORM_RATE, DENSE_RATE, DENSE_DECAY = 0.23, 1.15, 1e-3  # beside Muon's own rate
FADED = 2**-64  # smaller momenta become 0: subnormal ones made Muon's step seven times as long


def adam(params, grads, state, rate, threads=None, bf16=False, beta1=0.9, beta2=0.999, eps=1e-8):
    """One step of Adam (Kingma and Ba, 2015), the paper's optimiser; params, state in place.
    state is {} at first; it gets the step number and both moments, "m.i.name", "v.i.name"."""
    step = state.setdefault("step", np.zeros((), np.int64))
    step += 1
    correction1, correction2 = 1 - beta1 ** int(step), 1 - beta2 ** int(step)
    for name, (key, g) in itertools.product("mv", grads.items() if step == 1 else ()):
        state[f"{name}.{key}"] = array_module(g).zeros_like(g)

    def move(g, key):
        for name, beta, now in (("m", beta1, g), ("v", beta2, g * g)):
            moment = state[f"{name}.{key}"]
            moment *= beta
            moment += (1 - beta) * now
        slope = array_module(g).sqrt(state[f"v.{key}"] / correction2) + eps
        params[key] -= rate / correction1 * state[f"m.{key}"] / slope

    over_shards(move, list(grads.values()), list(grads), threads=threads)


def orthogonalise(g, bf16=False):
    """Return the matrix g with singular values near 1: X <- g / |g|, then three times M = X' X,
    X <- a X + X (b M + c M M) (Jordan et al., 2024); bf16 rounds what large products take."""
    x, (a, b, c) = g / (array_module(g).linalg.norm(g) + 1e-7), NEWTON_SCHULZ
    for _ in range(3):
        if bf16:
            short, m, step = bfloat16(x), np.zeros((x.shape[1],) * 2, x.dtype), np.empty_like(x)
            bfloat16_matmul(short, short, m, turned=True)
            bfloat16_matmul(short, bfloat16(b * m + c * (m @ m)), step)
        else:
            m = x.T @ x
            step = x @ (b * m + c * (m @ m))
        x = a * x + step
    return x


def muon(params, grads, state, rate, threads=None, bf16=False, momentum=0.6, others=0.85):
    """One step, in place: Muon on convolution weights, Nesterov SGD on the rest. These weights, as
    a matrix (K*K*C, O), are scaled to the norm sqrt(O), which their batch normalisation hides, and
    move by `rate` times the orthogonalised gradient. state: {} at first, then momenta m.i.name."""
    for key, g in () if state else grads.items():
        state[f"m.{key}"] = array_module(g).zeros_like(g)

    def move(g, key):
        w, moment, keep = params[key], state[f"m.{key}"], momentum if g.ndim == 4 else others
        if key.endswith(".w") and g.ndim == 2:
            g = g + DENSE_DECAY * w
        moment *= keep
        moment += g
        moment *= abs(moment) > FADED
        g = g + keep * moment  # Nesterov: the gradient after the coming step of momentum
        if g.ndim == 4:
            w *= math.sqrt(w.shape[-1]) / (array_module(g).linalg.norm(w) + 1e-7)
            w -= rate * orthogonalise(g.reshape(-1, g.shape[-1]), bf16).reshape(w.shape)
        else:
            w -= rate * (NORM_RATE if key.endswith((".gamma", ".beta")) else DENSE_RATE) * g

    largest_first = sorted(grads, key=lambda key: -grads[key].size)
    over_shards(move, [grads[key] for key in largest_first], largest_first, threads=threads)


OPTIMIZERS = {"adam": adam, "muon": muon}


def limit_weights(net, params, most):
    """Make gamma smaller, in place, where w gamma / sqrt(var + eps) passes `most` thresholds; 0: no
    limit. The largest weight decides S. A layer with a mean applies means of w: smaller."""
    for i, layer in enumerate(net):
        if layer.norm and most:
            w, gamma, var = (params[f"{i}.{name}"] for name in ("w", "gamma", "var"))
            deviation = array_module(w).sqrt(var + BATCH_NORM_EPS)
            largest = abs(w).max(tuple(range(w.ndim - 1))) * abs(gamma) / deviation
            gamma *= most / largest.clip(most)


def rate_at(progress, peak, ramp=0.1):
    """Return the learning rate at `progress` (0 to 1) of a stage: up for a tenth, then to 0."""
    return peak * min(progress / ramp, (1 - progress) / (1 - ramp)) if progress < 1 else 0.0


@dataclass(frozen=True)
class Recipe:
    """All that decides a training but data and seed: network, stages, optimiser, input, CQ."""

    net: str
    relu_epochs: int = 0
    clamp_epochs: int = 20
    quantize_epochs: int = 10
    optimizer: str = "adam"
    lr: float = 3e-3  # the highest rate; it rises and falls once in every stage
    batch: int = 64
    smoothing: float = 0.0  # of the labels
    dropout: float = 0.0  # after the CQ of convolutions
    move: int = 0  # pixels, each way, by which images are shifted at random
    flip: bool = False  # mirror images left to right in every second epoch
    turn: float = 0.0  # degrees, each way, by which images are turned at random
    noise: float = 0.0  # deviation of Gaussian noise on pixels, white is 1
    cutout: int = 0  # side of the square that is painted over, pixels
    most_weight: float = 0.0  # of weights by running statistics, in thresholds; 0: no limit
    whiten: bool = False  # the first convolution starts as what decorrelates patches of images
    encoding: str = "spikes"
    steps: int = 32
    levels: int = 32
    shift: float = 0.0
    tf32: bool = False  # products in TF32 (`use_tf32`)
    bf16: bool = False  # products of convolutions but the first, and of Muon, in bfloat16

    @property
    def stages(self):
        """The stages that have epochs, in order: (activation, epochs)."""
        return [(name, n) for name in ACTIVATIONS if (n := getattr(self, f"{name}_epochs"))]

    def stage_of(self, epoch):
        """Return (activation, epochs done in the stage, epochs of the stage) of a run's epoch."""
        return [(name, done, n) for name, n in self.stages for done in range(n)][epoch]

    def how(self, activation):
        """Return what `forward` takes for a stage: activation, levels, shift."""
        return activation, *((self.levels, self.shift) if activation == "quantize" else (None, 0.0))


def look_up(images, row, column):
    """The pixels at rows and columns, each broadcast to (N, H, W), of images; borders reflect."""
    xp = array_module(images)
    pairs = zip((row, column), images.shape[1:3])
    row, column = ((k - 1) - abs((k - 1) - a % max(1, 2 * k - 2)) for a, k in pairs)
    return images[xp.arange(len(images))[:, None, None], row, column]


def turn_about_middle(images, row, column, angle):
    """The pixels where `look_up` has (row, column), turned by angle (N,) radians about the middle
    of the image, as the mean of the four around that place weighted by nearness."""
    xp = array_module(images)
    middle_row, middle_column = ((k - 1) / 2 for k in images.shape[1:3])
    cos, sin = xp.cos(angle)[:, None, None], xp.sin(angle)[:, None, None]
    down, right = row - middle_row, column - middle_column
    row = middle_row + cos * down - sin * right
    column = middle_column + sin * down + cos * right
    top, left = xp.floor(row).astype(np.int64), xp.floor(column).astype(np.int64)
    below, beyond = ((a - b).astype(np.float32)[..., None] for a, b in ((row, top), (column, left)))
    upper, lower = (
        look_up(images, r, left) * (1 - beyond) + look_up(images, r, left + 1) * beyond
        for r in (top, top + 1)
    )
    return upper * (1 - below) + lower * below


def augment(images, mirrored, move, rng, turn=0.0, noise=0.0, cutout=0, part=slice(None)):
    """Change images (N, H, W, C) uint8 at random, as many pixels uint8 again: mirror those of
    mirrored (N,) bool, shift each by up to `move` pixels each way and turn it by up to `turn`
    degrees, every pixel looked up where it comes from and the border reflected; add Gaussian
    noise of deviation `noise` (white is 1); paint a square of `cutout` pixels a side, its middle
    anywhere, in the image's mean colour. Draws for all images; returns those of `part`."""
    xp, shape = array_module(images), images.shape
    n, height, width, _ = shape
    images, mirrored = images[part], mirrored[part]
    down, right = xp.asarray(rng.integers(-move, move + 1, (2, n, 1))[:, part])
    column = xp.arange(width)
    column = (xp.where(mirrored[:, None], width - 1 - column, column) + right)[:, None]
    row = (xp.arange(height) + down)[:, :, None]  # (N, H, 1), and columns (N, 1, W)
    if turn:
        angle = xp.asarray(np.deg2rad(rng.uniform(-turn, turn, n)[part]))
        images = turn_about_middle(images, row, column, angle)
    else:
        images = look_up(images, row, column)
    if noise:
        device_rng = xp.random.default_rng(int(rng.integers(2**63)))
        images = images + 255 * noise * device_rng.standard_normal(shape, dtype=np.float32)[part]
    if cutout:
        corner = xp.asarray(rng.integers((height, width), size=(n, 2))[part] - cutout // 2)
        rows, columns = (xp.arange(k) - corner[:, [a]] for a, k in enumerate((height, width)))
        rows, columns = ((a >= 0) & (a < cutout) for a in (rows, columns))
        hidden = (rows[:, :, None] & columns[:, None])[..., None]
        images = xp.where(hidden, images.mean((1, 2), keepdims=True), images)
    return images if images.dtype == np.uint8 else xp.rint(images).clip(0, 255).astype(np.uint8)


def mirrored_images(n, seed, epoch):
    """Which of n images an epoch mirrors: a random half at first, then the others, in turn."""
    return (np.random.default_rng(seed).integers(2, size=n) + epoch) % 2 == 1


def encode(pixels, steps):
    """Return the spikes that each pixel (uint8) emits in `steps` steps: floor(p * T / 255)."""
    check_range("steps", steps, 1, 2**31 - 1)
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels: {pixels.dtype}, expected uint8")
    table = np.arange(256, dtype=np.int64) * steps // 255
    return array_module(pixels).asarray(table.astype(integer_dtype(steps)))[pixels]


def network_input(pixels, steps, encoding):
    """Return pixels (uint8) as the CNN sees them, float32 in [0, 1]: what the SNN will get.
    Encoding "spikes": floor(p * T / 255) / T. "direct": p / 255."""
    counts = encode(pixels, steps) if encoding == "spikes" else pixels
    return counts.astype(np.float32) / (steps if encoding == "spikes" else 255)


def first_not_finite(net, params, tape, logits):
    """Return the first layer in which something is not finite, a 0-d array; 0 where all is well.
    NaN or infinity in a layer's sums shows in their batch mean; a layer without batch
    normalisation is judged by its weights, the last one by its logits."""
    xp, layers = array_module(logits), enumerate(zip(net[:-1], tape))
    none = xp.zeros(1)  # of a pooling
    judged = [e.norm[0] if f.norm else params.get(f"{i}.w", none) for i, (f, e) in layers]
    return xp.stack([xp.isfinite(a).all() for a in (*judged, logits)]).argmin()


@one_blas_thread
def train_epoch(
    net, params, state, images, labels, recipe, seed, epoch, progress, threads=None, ranks=ALONE
):
    """Train for the run's epoch number `epoch` (from 0); params and optimiser state in place.
    images (N, H, W, C) uint8, labels (N,). All randomness comes from seed and epoch, so that
    an epoch can be run again to the same bits. progress(n) is told of every n images done.
    Returns mean loss and accuracy. Raises FloatingPointError where the loss is not finite,
    naming the epoch and the layer where that began."""
    xp, n = array_module(images), len(images)
    rng = np.random.default_rng([seed, epoch])
    activation, epochs_done, epochs = recipe.stage_of(epoch)
    order = xp.asarray(rng.permutation(n))
    mirrored = xp.asarray(mirrored_images(n, seed, epoch) if recipe.flip else np.zeros(n, bool))
    loss, correct = xp.zeros((), np.float64), xp.zeros((), np.int64)
    origin = xp.full((), -1)  # the layer where NaN or infinity began: kept on the device
    for start in range(0, n, recipe.batch):
        chosen = order[start : start + recipe.batch]
        changes = recipe.move, rng, recipe.turn, recipe.noise, recipe.cutout
        team = ranks.of(chosen)
        parts = team.ours(shards(chosen))
        ours = slice(parts[0].start, parts[-1].stop)
        pixels = augment(images[chosen], mirrored[chosen], *changes, ours)
        x = xp.empty((len(chosen), *pixels.shape[1:]), np.float32)  # filled where forward reads it
        x[ours] = network_input(pixels, recipe.steps, recipe.encoding)
        how = {"threads": threads, "ranks": team, "bf16": recipe.bf16}
        logits, tape = forward(net, params, x, *recipe.how(activation), rng, **how)
        batch_loss, dlogits = cross_entropy(logits, labels[chosen], recipe.smoothing)
        first = (origin < 0) & ~xp.isfinite(batch_loss)
        origin = xp.where(first, first_not_finite(net, params, tape, logits), origin)
        grads = backward(net, params, tape, dlogits, threads, team)
        del tape  # its memory serves the next batch
        rate = rate_at((epochs_done + start / n) / epochs, recipe.lr)
        OPTIMIZERS[recipe.optimizer](params, grads, state, rate, threads, recipe.bf16)
        limit_weights(net, params, recipe.most_weight)
        loss += batch_loss * len(chosen)
        correct += (logits.argmax(1) == labels[chosen]).sum()
        progress(len(chosen))
    if not math.isfinite(loss):
        where = f"layer {int(origin)} ({net[int(origin)].kind})"
        wrong = f"epoch {epoch + 1} ({activation}): the loss is {float(loss)}"
        raise FloatingPointError(f"{wrong}, which began in {where}")
    if ranks.size > 1:
        bits = hashlib.sha256(b"".join(to_host(a).tobytes() for a in params.values())).digest()
        if len(set(ranks.gather([bits]))) > 1:
            raise ValueError("ranks: other parameters on each, expected machines of the same kind")
    return float(loss) / n, float(correct) / n


def take_statistics(net, params, images, recipe, rng, threads=None, ranks=ALONE):
    """Take i.mean and i.var anew for the quantised network, in place: their average over batches
    of the training images (N, H, W, C) as they are, neither moved nor cut, with weights at rest.
    Running statistics are those of augmented images, and lag behind the weights."""
    net, order = with_dropout(net, 0.0), rng.permutation(len(images))
    few = min(recipe.batch, len(images))
    for k, start in enumerate(range(0, len(images) - few + 1, few), 1):
        chosen = array_module(images).asarray(order[start : start + few])
        x = network_input(images[chosen], recipe.steps, recipe.encoding)
        forward(net, params, x, *recipe.how("quantize"), rng, threads, 1 / k, ranks.of(x))


def accuracy(net, params, images, labels, recipe, activation, batch=250, threads=None, ranks=ALONE):
    """Return the fraction of images (N, H, W, C) uint8 that the CNN classifies as labelled."""
    correct = 0  # stays on the device until the end
    for start in ranks.ours(range(0, len(images), batch)):
        x = network_input(images[start : start + batch], recipe.steps, recipe.encoding)
        logits, _ = forward(net, params, x, *recipe.how(activation), threads=threads)
        correct = correct + (logits.argmax(1) == labels[start : start + batch]).sum()
    return sum(ranks.gather([int(correct)])) / len(images)


# 5  Conversion: a trained CNN becomes whole numbers -----------------------------------------------

LAYER_ARRAYS = ("w", "b", "theta", "v0")
ENCODINGS = ("spikes", "direct")


@dataclass(frozen=True, eq=False)
class SpikingLayer:
    """One layer as the SNN file stores it; its current is w . s + b and nothing else.
    w int32 (conv (K, K, C, O), depthwise (K, K, C), dense (in, O)) and b int32 (O,) are None
    for a pooling; theta and v0 int32, scalar or (O,). A layer that does not fire is the last."""

    kind: str
    size: int
    stride: int
    pad: int
    fires: bool
    w: np.ndarray | None
    b: np.ndarray | None
    theta: np.ndarray
    v0: np.ndarray

    channels = units = property(lambda self: self.w.shape[-1])

    @functools.cached_property
    def absolute_sums(self):
        """The sum of |w| over all that each output channel (O,) reads, int64."""
        return np.abs(self.w.astype(np.int64)).reshape(-1, self.w.shape[-1]).sum(0)

    @functools.cached_property
    def factored(self):
        """The power of two, up to 16, in all weights, F or more, and the largest |w| over it."""
        factor = math.gcd(int(np.bitwise_or.reduce(self.w, axis=None)), 16)
        return factor, max(int(self.w.max()), -int(self.w.min())) // factor

    @functools.cached_property
    def in_bfloat16(self):
        """The weights in bfloat16, for where that has them."""
        return bfloat16(self.w)

    @functools.cached_property
    def winograd(self):
        """The weights of a convolution as Winograd's algorithm takes them, float32, and the bound
        of its sums for inputs of 0 and 1."""
        kernel = winograd_kernel(self.w.astype(np.float32), self.stride)
        return kernel, winograd_bound(kernel.u, 1)


@dataclass(frozen=True, eq=False)
class SpikingNetwork:
    """A converted network: layers, and how its input comes. `unit` is F of `integer_layer`,
    head_start what the function of that name has given it, levels the L of `at_steps`, if any."""

    steps: int
    input_shape: tuple
    classes: int
    weight_bits: int
    unit: int
    encoding: str
    layers: tuple
    head_start: tuple = (0, 0)
    levels: int | None = None

    @functools.cached_property
    def shapes(self):
        """The shape of the input and of each layer's output."""
        return [self.input_shape, *output_shapes(self.layers, self.input_shape, self.classes)]

    @functools.cached_property
    def fans(self):
        """The `fan_out` of each layer."""
        return [fan_out(layer, shape) for layer, shape in zip(self.layers, self.shapes)]

    def largest_input(self, i):
        """The largest value that layer i receives in one step: a spike, or a white pixel."""
        return 255 if i == 0 and self.encoding == "direct" else 1


def fold(net, params, shape):
    """Return each layer's float64 weights and bias with batch normalisation folded in.
    W = w gamma / sqrt(var + eps), B = beta - mean gamma / sqrt(var + eps); a pooling is None.
    Means become part of the weights, see `applied_weights`."""
    folded, names = [], ("w", "b", "gamma", "beta", "mean", "var")
    shapes = [shape, *output_shapes(net, shape, len(params[f"{len(net) - 1}.b"]))]
    for i, (layer, before) in enumerate(zip(net, shapes)):
        p = {n: to_host(params[k]).astype(np.float64) for n in names if (k := f"{i}.{n}") in params}
        w, b = p.get("w"), p.get("b")
        if layer.norm:
            scale = p["gamma"] / np.sqrt(p["var"] + BATCH_NORM_EPS)
            w, b = w * scale, p["beta"] - p["mean"] * scale
        folded.append(None if w is None else (applied_weights(layer, w, before), b))
    return folded


def weight_scale(w, bits, where, channels=False):
    """Return S = floor((2**(bits - 1) - 1) / max|w|), one for the layer, or one for each channel.
    All-zero weights take 2**(bits - 1) - 1; a channel's S is that of a largest weight of at least
    1/256, so that its threshold stays within 32 bits. Raises ValueError where S would be 0."""
    largest = np.abs(w).max(axis=tuple(range(w.ndim - 1)))  # (O,)
    worst, top = int(largest.argmax()), 2 ** (bits - 1) - 1
    peak = float(largest[worst])
    if not math.isfinite(peak):
        raise ValueError(f"{where}: channel {worst} has the weight {peak}, expected finite ones")
    scale = math.floor(top / peak) if peak > 0 and top / peak < math.inf else top
    found = f"{where}: channel {worst} has the outsize weight {peak:.4g}"
    if scale < 1:
        raise ValueError(f"{found}, expected at most {top} for {bits} bits")
    if scale < 2 ** (bits - 1) / 16:
        few = f"leaves {'it' if channels else 'others'} few of {bits} bits: S = {scale}"
        warnings.warn(f"{found}, which {few}", stacklevel=3)
    peaks = np.where(largest > 0, np.maximum(largest, 1 / 256), 1)
    return np.floor(top / peaks).astype(np.int64) if channels else scale


def in_32_bits(arrays):
    """Return {name: array of whole numbers, or None} in int32; None where one passes 2**31."""
    fit = all(np.abs(a).max() < 2**31 for a in arrays.values() if a is not None)  # NaN does not
    return {n: a if a is None else a.astype(np.int32) for n, a in arrays.items()} if fit else None


def integer_layer(layer, folded, scale, shift, unit, whole, fires):
    """Return a layer in whole numbers (int32), its input in units of 1/whole, or None where they
    pass 2**31: w = F rint(W S), b = rint(B S F whole), theta = S F whole, v0 = rint(shift theta);
    a pooling has weights 1 and theta = K*K whole."""
    w, b, theta = None, None, np.asarray(layer.size**2 * whole, np.float64)
    if folded is not None:
        scale = np.asarray(scale, np.float64)  # as an int it may pass 2**63
        w, b = unit * np.rint(folded[0] * scale), np.rint(folded[1] * scale * unit * whole)
        theta = scale * unit * whole
    v0 = np.rint(shift * theta if fires else 0 * theta)
    found = in_32_bits({"w": w, "b": b, "theta": theta, "v0": v0})
    return found and SpikingLayer(layer.kind, layer.size, layer.stride, layer.pad, fires, **found)


def largest_sum(layer, largest_input, steps):
    """Bound every partial sum of a layer's charge: max_o(sum|w| x + |b| steps + |v0|), an int.
    x is the largest value an input may have: in one step, or as its count over all of them."""
    v0 = np.abs(layer.v0.astype(object))  # Python's numbers: neither |-2**31| nor a sum overflows
    if layer.kind == "pool":
        return layer.size**2 * largest_input + int(np.max(v0))
    sums, b = layer.absolute_sums.astype(object), np.abs(layer.b.astype(object))
    return int((sums * largest_input + b * steps + v0).max())


def convert(
    net, params, shape, steps, weight_bits=8, shift=0.0, encoding="spikes", channel_scales=False
):
    """Turn a trained CNN for images of `shape` into a SpikingNetwork of `weight_bits` weights.
    shift is that of the CQ activation; weights do not depend on steps. F is 16, or the largest
    power of two below it with which everything fits in 32 bits. With channel_scales each output
    channel has its own S, and so its own threshold, except in the last: logits are compared.
    Raises ValueError, naming the layer, where weights do not fit. Warns of an outsize weight."""
    check_choice("encoding", encoding, ENCODINGS)
    check_range("weight_bits", weight_bits, 2, 16)
    check_range("steps", steps, 1, 2**31 - 1)
    if shift not in (0, 0.5):
        raise ValueError(f"shift: {shift}, expected 0 or 0.5")
    last, folded, scales = len(net) - 1, fold(net, params, shape), []
    for i, (layer, wb) in enumerate(zip(net, folded)):
        where = f"layer {i} ({layer.kind})"
        channels = channel_scales and i < last
        scales.append(None if wb is None else weight_scale(wb[0], weight_bits, where, channels))
        if wb is not None and not np.isfinite(wb[1]).all():
            raise ValueError(f"{where}: a bias of {wb[1].sum()}, expected finite ones")
    for unit in (16, 8, 4, 2, 1):
        layers = []
        for i, parts in enumerate(zip(net, folded, scales)):
            whole = 255 if i == 0 and encoding == "direct" else 1
            layers.append(integer_layer(*parts, shift, unit, whole, i < last))
        if None not in layers:
            break
    else:
        too_large = max(i for i, layer in enumerate(layers) if layer is None)
        wrong = f"layer {too_large}: its weights are too small beside its bias and threshold 1"
        raise ValueError(f"{wrong}: at {weight_bits} bits these pass 2**31, expected less")
    classes = len(params[f"{last}.b"])
    whole = int(steps), tuple(map(int, shape)), classes, int(weight_bits), unit
    snn = SpikingNetwork(*whole, encoding, tuple(layers))
    check_network(snn)
    return snn


def charged(i, layer, b, v0):
    """Return layer i with another bias and initial potential, whole numbers. Raises ValueError."""
    found = in_32_bits({"b": b, "v0": v0})
    if found is None:
        raise ValueError(f"layer {i}: b or v0 passes 2**31, expected a smaller head start or T")
    return replace(layer, **found)


MOST_HEAD_START = 1000  # units


def head_start(snn, first, others):
    """Return snn with v0 raised by `first` units in the first layer and by `others` thetas in the
    others that have weights, rounded toward 0 to a multiple of T, and b lowered by as much over T
    steps; in place of the head start that it has. T b + v0 stays, and with it the integer CNN.
    The unit is theta; with spikes as input sqrt(sum w**2 / 12), and v0 becomes (O,): how far
    potentials deviate while pixels are 0 to 1 spike short of k0 t / T, the floor in `Source`, if
    these lags are uniform and independent. What it is for: README, Conventions."""
    starts = snn.head_start, (float(first), float(others))
    if not all(abs(x) <= MOST_HEAD_START for x in starts[1]):
        raise ValueError(f"head start: {starts[1]}, expected up to {MOST_HEAD_START} either way")
    layers = list(snn.layers)
    for i, layer in enumerate(layers):
        if layer.fires and layer.w is not None and starts[0][i > 0] != starts[1][i > 0]:
            unit = layer.theta
            if i == 0 and snn.encoding == "spikes":
                unit = np.linalg.norm(layer.w.reshape(-1, layer.channels), axis=0) / math.sqrt(12)
            old, new = (np.trunc(unit * start[i > 0] / snn.steps) for start in starts)
            each = (new - old).astype(np.int64)
            layers[i] = charged(i, layer, layer.b - each, layer.v0 + each * snn.steps)
    return replace(snn, layers=tuple(layers), head_start=starts[1])


def at_steps(snn, steps, levels=None):
    """Return snn for another T: the same weights, thresholds and, without head start, biases.
    With levels, the L that it was trained at, T steps round to the same mean. A charge is whole,
    so floor((U + v0) / theta) is (U + v0 - (theta - 1) / 2) / theta in the mean, and T / L of what
    is beside U stays if v0 grows by (1 - T / L) ((theta - 1) / 2 - v0): through b where there is
    one, which a head start is over. Little is left to do where h = 1/2. Raises ValueError, also for
    a network that this was done to, which is not undone."""
    if snn.levels is not None:
        raise ValueError(f"network: changed for L = {snn.levels} before, expected it as trained")
    levels = steps if levels is None else levels
    for name, value in (("steps", steps), ("levels", levels)):
        check_range(name, value, 1, 2**31 - 1)
    start, snn = snn.head_start, replace(head_start(snn, 0, 0), steps=int(steps))
    layers = list(snn.layers)
    for i, layer in enumerate(layers):
        charge = (1 - steps / levels) * ((layer.theta - 1) / 2 - layer.v0)
        if layer.fires and layer.w is None:
            layers[i] = charged(i, layer, None, layer.v0 + np.rint(charge))
        elif layer.fires:
            layers[i] = charged(i, layer, layer.b + np.rint(charge / steps), layer.v0)
    levels = None if levels == steps else int(levels)
    return head_start(replace(snn, layers=tuple(layers), levels=levels), *start)


def encoded(snn, encoding):
    """Return snn for an encoding of its input, "direct" or "spikes": if it is another, without head
    start, and the first layer's b, theta and v0 in units 255 times finer or coarser. At T = 255,
    where a spike is a grey level, both have one integer CNN. Raises ValueError if they cannot."""
    check_choice("encoding", encoding, ENCODINGS)
    if encoding == snn.encoding:
        return snn
    snn = head_start(snn, 0, 0)
    first, *others = snn.layers
    finer = 255.0 if encoding == "direct" else 1 / 255
    arrays = {name: getattr(first, name) for name in ("b", "theta", "v0")}
    found = in_32_bits({n: a if a is None else np.rint(a * finer) for n, a in arrays.items()})
    if found is None or found["theta"].min() < 1:
        raise ValueError(f"layer 0: b, theta or v0 does not fit in 32 bits with {encoding} input")
    return replace(snn, encoding=encoding, layers=(replace(first, **found), *others))


def scales(net, params, snn):
    """Return [S, max|W|] of each layer, W folded; None for a pooling, which needs no scale.
    S is a list where each channel has its own."""
    rows = []
    for i, wb in enumerate(fold(net, params, snn.input_shape)):
        scale = (snn.layers[i].theta // (snn.unit * snn.largest_input(i))).tolist()
        rows.append(None if wb is None else [scale, float(abs(wb[0]).max())])
    return rows


# 6  Simulation: integrate and fire, in whole numbers ----------------------------------------------


def check_input(snn, k0):
    """Raise ValueError unless k0 is what snn takes: counts 0 to T, or pixels where direct."""
    if k0.shape[1:] != tuple(snn.input_shape) or len(k0) == 0:
        expected = ", ".join(map(str, ("N", *snn.input_shape)))
        raise ValueError(f"input: shape {k0.shape}, expected ({expected})")
    direct, kind = snn.encoding == "direct", k0.dtype.kind
    if direct and k0.dtype != np.uint8:
        raise ValueError(f"input: {k0.dtype} values, expected uint8 pixels (direct encoding)")
    if not direct and (kind not in "iu" or k0.min() < 0 or k0.max() > snn.steps):
        found = f"{k0.dtype} values {k0.min()} to {k0.max()}"
        raise ValueError(f"input: {found}, expected counts of 0 to {snn.steps} spikes")


class Reference(NamedTuple):
    """What the integer CNN computes: the counts of each firing layer, the logits (N, classes)."""

    counts: list
    logits: np.ndarray


@one_blas_thread
def integer_forward(snn, k0, threads=None):
    """Run the integer CNN: k_out = clamp(floor((w . k_in + T b + v0) / theta), 0, T).
    k0 (N, H, W, C): counts 0 to T from `encode`, or uint8 pixels where snn.encoding is
    "direct". The last layer gives its logits, w . k_in + T b. Exact whole numbers."""
    check_input(snn, k0)
    xp, steps = array_module(k0), snn.steps
    parts, layers = shards(k0), range(len(snn.layers))
    sums = [Sums(snn, i, xp, snn.largest_input(i) * steps, steps, parts[0].stop) for i in layers]

    def run(inputs):
        counts = [inputs.astype(sums[0].integer) * (steps if snn.encoding == "direct" else 1)]
        for layer, current in zip(snn.layers, sums):
            charge = current(counts[-1], steps)
            if layer.fires:
                charge += xp.asarray(layer.v0)
                counts.append(xp.clip(charge // xp.asarray(layer.theta), 0, steps))
        return counts[1:], charge

    counts, logits = zip(*over_shards(run, [k0[part] for part in parts], threads=threads))
    return Reference([xp.concatenate(parts) for parts in zip(*counts)], xp.concatenate(logits))


class Sums:
    """The weights of layer i and its bias, in types that hold its sums exactly: of inputs up to
    `largest`, with `steps` times the bias. `images` is how many are worked at once.
    Where all weights hold the factor F, so do sums of products: a float holds them as well as their
    quotients by F. Where shorter floats do, a convolution takes those: `half_matmul` on a GPU,
    `bfloat16_matmul` where MKL has it."""

    def __init__(self, snn, i, xp, largest, steps, images, integer=None):
        layer = self.layer = snn.layers[i]
        self.integer = integer or integer_dtype(largest_sum(layer, largest, steps))
        b = xp.zeros(snn.shapes[i + 1][-2:], self.integer)  # (W, O): long rows add faster
        self.b = b if layer.b is None else b + xp.asarray(layer.b, self.integer)
        bound = largest_sum(layer, largest, 0)
        if xp is not np:
            use_tf32(False)
        if layer.w is None:
            self.w = xp.ones((), exact_dtype(bound))
            return
        self.of_spikes, (factor, quotient) = largest == 1, layer.factored
        carrier = exact_dtype(bound // factor)
        most = 2048 if xp is not np else 256 if mkl_product() else 0  # exact in short floats
        if layer.kind == "conv" and carrier is np.float32 and max(largest, quotient) <= most:
            self.w = layer.in_bfloat16 if xp is np else xp.asarray(layer.w).astype(np.float16, "C")
            return
        if xp is np and tile_size(layer, layer.w, (images, *snn.shapes[i])):
            self.w, bound_of_one = layer.winograd  # whole multiples of factor / 4
            if bound_of_one * largest * 4 / factor < 2**24:
                return
        self.w = xp.asarray(layer.w, carrier)

    def products(self, x):
        """Return w . x, whole numbers carried by floats, for x (N, ...)."""
        signed = isinstance(self.w, WinogradKernel) and self.of_spikes and x.dtype == np.uint8
        return linear(self.layer, x.view(np.int8) if signed else x, self.w)[0]

    def __call__(self, x, steps):
        """Return w . x + b * steps as integers."""
        current = self.products(x).astype(self.integer)
        current += self.b * self.integer(steps)
        return current


def delay_of(schedule, steps):
    """Return the delay d of a schedule: "streaming" 0, "synchronous" T, or d itself, 0 to T."""
    delay = str({"streaming": 0, "synchronous": steps}.get(schedule, schedule))
    if not delay.isdecimal() or int(delay) > steps:
        expected = f"streaming, synchronous or a delay of 0 to {steps}"
        raise ValueError(f"schedule: {schedule!r}, expected {expected}")
    return int(delay)


def steps_to_answer(snn, schedule):
    """Return the steps from the first input to the last: T + d * (firing layers)."""
    return snn.steps + delay_of(schedule, snn.steps) * sum(f.fires for f in snn.layers)


class Source:
    """The input of a block of images as spikes: s(t) = floor(k0 t / T) - floor(k0 (t-1) / T),
    or, where it is direct, the pixels themselves at every step: constant."""

    def __init__(self, k0, steps, encoding):
        self.xp = array_module(k0)
        self.k0 = k0.astype(integer_dtype(steps * (255 if encoding == "direct" else steps)))
        self.steps, self.constant, self.now = steps, encoding == "direct", 0
        self.emitted = self.xp.zeros_like(self.k0)

    def counts(self, m):
        """Return the sum of the next m steps (N, H, W, C)."""
        if self.constant:
            return self.k0 * m
        self.now += m
        before, self.emitted = self.emitted, self.k0 * self.now // self.steps
        return self.emitted - before

    def spikes(self, m):
        """Return the next m steps (m, N, H, W, C) uint8."""
        return self.xp.stack([self.counts(1).astype(np.uint8) for _ in range(m)])


FIRE = """
extern "C" __global__ void fire(const REAL *__restrict__ products, unsigned own, const WHOLE *bias,
    const WHOLE *theta, unsigned biases, unsigned thetas, unsigned steps, WHOLE *v, int *total,
    unsigned char *__restrict__ spikes, unsigned n) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x, step = own > 1 ? n : 0;
  if (i >= n) return;  // i is a neuron, its potential in a register
  WHOLE potential = v[i], b = bias[i % biases], threshold = theta[i % thetas];
  int count = 0;
  for (unsigned t = 0; t < steps; t++) {
    potential += (WHOLE)products[(size_t)t * step + i] + b;
    bool spike = potential >= threshold;
    if (spike) potential -= threshold;
    count += spikes[(size_t)t * n + i] = spike;
  }
  v[i] = potential;
  total[i] += count;
}"""


class Population:
    """The IF neurons of one layer for a block of images, at a point of their own time.
    They integrate the first d steps of their input in silence, all at once; then, at each of T
    steps, the next input if any is left, and fire where v >= theta. What is left
    when the input is over is a charge v that pays for floor(v / theta) spikes, one a step."""

    def __init__(self, shape, sums, first_sums, below, steps, delay, chunk, record):
        self.xp = xp = array_module(sums.w)
        self.sums, self.below, self.chunk = sums, below, chunk
        self.theta = xp.asarray(sums.layer.theta, sums.integer)
        v = first_sums(below.counts(delay), delay) if delay else xp.zeros(shape, sums.integer)
        self.v = v.reshape(shape)
        self.v += xp.asarray(sums.layer.v0, sums.integer)
        self.inputs_left = steps - delay
        self.total = xp.zeros(shape, np.int32)
        self.kept, self.constant = [] if record else None, False

    def spikes(self, m):
        """Return the next m firing steps (m, N, ...), uint8."""
        xp = self.xp
        spikes = xp.empty((m, *self.v.shape), np.uint8)
        fed = min(m, self.inputs_left)
        if fed:
            x = self.below.spikes(1 if self.below.constant else fed)
            products = self.sums.products(x.reshape(-1, *x.shape[2:]))
            self.fire(products.reshape(len(x), *self.v.shape), spikes[:fed])
            self.inputs_left -= fed
        if m > fed:
            step = xp.arange(m - fed, dtype=self.v.dtype).reshape(-1, *(1,) * self.v.ndim)
            xp.greater(self.discharge(m - fed), step, out=spikes[fed:].view(bool))
        if self.kept is not None:
            self.kept.append(spikes)
        return spikes

    def counts(self, m):
        """Return how often each neuron fires in its next m firing steps (N, ...), int32."""
        one_by_one, before = min(m, self.inputs_left) if self.kept is None else m, self.total.copy()
        for start in range(0, one_by_one, self.chunk):
            self.spikes(min(self.chunk, one_by_one - start))
        if m > one_by_one:
            self.discharge(m - one_by_one)
        return self.total - before

    def fire(self, products, spikes):
        """v += w . s + b; where v >= theta a spike, and v -= theta. One product may do for all."""
        if self.xp is not np:
            inputs = self.xp.ascontiguousarray(products), len(products), self.sums.b, self.theta
            how = self.sums.b.size, self.theta.size, len(spikes), self.v, self.total, spikes
            launch(FIRE, self.v.size, *inputs, *how, REAL=products.dtype, WHOLE=self.v.dtype)
            return
        change = np.empty_like(self.v)
        for product, spike in zip(itertools.cycle(products), spikes):
            change[...] = product  # a whole number, now in the integer type
            change += self.sums.b
            self.v += change
            np.greater_equal(self.v, self.theta, out=spike.view(bool))
            np.multiply(spike, self.theta, out=change)
            self.v -= change
        self.total += spikes.sum(0, dtype=np.int32)

    def discharge(self, m):
        """Fire m steps without input, in closed form; return the counts."""
        counts = self.v // self.theta
        self.xp.clip(counts, 0, m, out=counts)
        self.v -= counts * self.theta
        self.total += counts
        return counts


@dataclass(frozen=True, eq=False)
class Run:
    """What a simulation gives. counts: int32 (N, ...) for each firing layer; logits
    (N, classes) and logits_over_time (T, N, classes), integers; synops (N,). Where recorded, else
    None: spikes, uint8 (T, N, ...) for each firing layer over its own T firing steps, and
    potentials (N, ...), what is left after them."""

    counts: list
    logits: np.ndarray
    logits_over_time: np.ndarray
    synops: np.ndarray
    spikes: list | None
    potentials: list | None


BLOCK_BYTES, CHUNK_BYTES = 2**22, 2**24  # currents of the largest layer: a step's, a chunk's


def memory_limits(snn, xp, images, batch, chunk, threads):
    """Return how many images to simulate together and how many steps, where not given: by the
    cache of a core, and so that no thread is idle; or by what is free on a GPU. There a quarter is
    for all potentials and counts, 16 bytes a neuron, and a quarter for a chunk of the largest
    layer, 32 bytes for each current with what it is made from."""
    neurons = [math.prod(shape) for shape in snn.shapes]
    if xp is np:
        largest = 4 * max(neurons)  # bytes of a step, an image
        most = max(1, min(64, BLOCK_BYTES // largest))
        batch = batch or -(-images // (threads * -(-images // (most * threads))))
        return batch, chunk or max(1, min(snn.steps, CHUNK_BYTES // (largest * batch)))
    quarter = (xp.cuda.runtime.memGetInfo()[0] + xp.get_default_memory_pool().free_bytes()) // 4
    batch = batch or max(1, min(1024, quarter // max(16 * sum(neurons), 32 * max(neurons))))
    return batch, chunk or max(1, min(snn.steps, quarter // (32 * max(neurons) * batch)))


@one_blas_thread
def simulate(snn, k0, schedule="streaming", record=False, batch=None, chunk=None, threads=None):
    """Simulate the SNN spike by spike for T = snn.steps steps, k0 as in `integer_forward`; return
    a Run. Time runs in chunks and images in blocks of `batch`, one block a thread; neither changes
    any bit. Memory grows with T by logits_over_time, and what `record` keeps, alone."""
    check_input(snn, k0)
    for name, given in (("batch", batch), ("chunk", chunk), ("threads", threads)):
        check_range(name, 1 if given is None else given, 1, 2**31 - 1)
    xp, delay = array_module(k0), delay_of(schedule, snn.steps)
    batch, chunk = memory_limits(snn, xp, len(k0), batch, chunk, threads or CORES)

    def prepared(i):
        layer, largest = snn.layers[i], snn.largest_input(i)
        integer = integer_dtype(snn.steps * largest_sum(layer, largest, 1))
        first = Sums(snn, i, xp, largest * delay, delay, batch, integer) if delay else None
        if delay == snn.steps and layer.fires:  # nothing is left after the delay
            return first, first
        return Sums(snn, i, xp, largest, 1, batch * chunk, integer), first

    sums = over_shards(prepared, range(len(snn.layers)), threads=threads if xp is np else 1)
    blocks = [k0[start : start + batch] for start in range(0, len(k0), batch)]
    how = (delay, chunk, record)
    runs = over_shards(lambda block: _run_block(snn, sums, block, *how), blocks, threads=threads)
    counts, over_time, spikes, left, synops = zip(*runs)
    counts, left = ([xp.concatenate(parts) for parts in zip(*lists)] for lists in (counts, left))
    over_time = xp.concatenate(over_time, axis=1)
    spikes = [xp.concatenate(parts, axis=1) for parts in zip(*spikes)]
    recorded = (spikes, left) if record else (None, None)
    return Run(counts, over_time[-1], over_time, xp.concatenate(synops), *recorded)


def _run_block(snn, sums, k0, delay, chunk, record):
    """Return counts, logits over time, spikes (to record), potentials, SynOps of some images."""
    xp, populations = array_module(k0), []
    below = Source(k0, snn.steps, snn.encoding)
    for (step_sums, first_sums), shape in zip(sums[:-1], snn.shapes[1:-1]):
        shape = (len(k0), *shape)
        below = Population(shape, step_sums, first_sums, below, snn.steps, delay, chunk, record)
        populations.append(below)
    logits, over_time = 0, []
    for start in range(0, snn.steps, chunk):
        x = below.spikes(min(chunk, snn.steps - start))
        currents = sums[-1][0](x.reshape(-1, *x.shape[2:]), 1)
        over_time.append(logits + currents.reshape(*x.shape[:2], -1).cumsum(0))
        logits = over_time[-1][-1]
    spikes = [xp.concatenate(p.kept) for p in populations if record]
    counts, potentials = [p.total for p in populations], [p.v for p in populations if record]
    synops = synaptic_operations(snn, k0, counts)
    return counts, xp.concatenate(over_time), spikes, potentials, synops


def fan_out(layer, shape):
    """Return how many weights of `layer` a spike of its input (H, W, C) or (in,) meets, by
    position: (H, W) or (). Borders and strides are respected, zero weights count."""
    outputs = 1 if layer.kind in ("depthwise", "pool") else layer.w.shape[-1]
    if layer.kind == "dense":
        return np.full(shape[:-1], outputs, np.int64)
    reach = []
    for n in shape[:2]:
        first = np.arange((n + 2 * layer.pad - layer.size) // layer.stride + 1) * layer.stride
        met = (first[:, None] + np.arange(layer.size) - layer.pad).ravel()
        reach.append(np.bincount(met[(met >= 0) & (met < n)], minlength=n))
    return np.multiply.outer(*reach) * outputs


def synaptic_operations(snn, k0, counts):
    """Return the SynOps of each image (N,): every spike times the weights it meets.
    A direct input has no spikes: see `macs`."""
    xp = array_module(k0)
    total = xp.zeros(len(k0), np.int64)
    for i, spikes in enumerate([k0, *counts]):
        if i > 0 or snn.encoding == "spikes":
            x = spikes.reshape(-1, spikes.shape[-1])
            x = x.astype(exact_dtype(snn.steps * x.shape[1]))  # a product sums faster than sum
            fan, met = snn.fans[i].ravel(), x @ xp.ones(x.shape[1], x.dtype)
            total += met.astype(np.int64).reshape(len(k0), -1) @ xp.asarray(fan)
    return total


def macs(snn):
    """Return the multiply-adds of each layer for one image, by the rules of SynOps: what they
    would be if every input spiked once. A pooling, which only adds, has 0."""
    sums = [fan.sum() * shape[-1] for fan, shape in zip(snn.fans, snn.shapes)]
    return [0 if f.kind == "pool" else int(n) for f, n in zip(snn.layers, sums)]


def effective_operations(snn, k0, counts):
    """Return (MACs, ACs) of all images together, as NeuroBench counts them: at each step, each
    input that is not zero times the nonzero weights it meets. A direct input's are MACs, those of
    spikes ACs; poolings and biases have none. A layer with weights 0 and 1 adds them up."""
    xp, found, direct = array_module(k0), [], snn.encoding == "direct"
    inputs = [(k0 != 0) * np.int64(snn.steps) if direct else k0, *counts]
    for layer, x, dense in zip(snn.layers, inputs, macs(snn)):
        met = 0
        if layer.kind != "pool":
            w = xp.asarray(layer.w != 0).astype(exact_dtype(len(k0) * snn.steps * dense))
            met = int(linear(layer, x.sum(0, dtype=np.int64, keepdims=True), w)[0].sum())
        found.append(met)
    return (found[0], sum(found[1:])) if direct else (0, sum(found))


def neurobench(snn, schedule, images, spikes, operations):
    """Return what NeuroBench 2.3 (Yik et al., 2025) measures, under its names, for `images` images
    with `spikes` spikes and the effective_operations of all of them. What is measured steps every
    layer until the answer and holds the arrays of the SNN file that play a part: w and b, and
    theta and v0 where a layer fires, int32; Footprint_packed, ours, with each w / unit in 1 byte,
    2 from 9 bits on. Dense: what all steps cost if all inputs and weights are nonzero."""
    steps, (mac, ac) = steps_to_answer(snn, schedule), operations
    weights = [f.w for f in snn.layers if f.kind != "pool"]
    held = [a for f in snn.layers for a in (f.b, *((f.theta, f.v0) if f.fires else ()))]
    connections, others = sum(w.size for w in weights), sum(a.size for a in held if a is not None)
    outputs = images * steps * sum(math.prod(shape) for shape in snn.shapes[1:-1])
    return {
        "Footprint": 4 * (connections + others),
        "Footprint_packed": (1 if snn.weight_bits <= 8 else 2) * connections + 4 * others,
        "ConnectionSparsity": sum(int((w == 0).sum()) for w in weights) / connections,
        "ActivationSparsity": (outputs - spikes) / max(outputs, 1),
        "SynapticOperations": {
            "Effective_MACs": mac / images,
            "Effective_ACs": ac / images,
            "Dense": float(steps * sum(macs(snn))),
        },
    }


def predicted(snn, images):
    """Return what simulate and integer_forward take for images (N, H, W, C) uint8."""
    return images if snn.encoding == "direct" else encode(images, snn.steps)


@one_blas_thread
def evaluate(
    snn, images, labels, schedules, *, batch=250, progress=lambda n: None, threads=None, ranks=ALONE
):
    """Classify images (N, H, W, C) uint8 with the integer CNN and the SNN of each schedule.
    Returns integer_accuracy and, for each schedule: accuracy, curve (accuracy after t = 1 to T
    of the last layer's steps), wrong_counts (fraction of each firing layer's neurons whose
    count is not the integer CNN's), spikes_per_neuron, synops_per_image, steps_to_answer,
    neurobench and seconds (the mean of ranks). progress(n) is told of n images of a schedule."""
    n, correct, rows = len(images), 0, {s: [] for s in schedules}
    images, labels = ranks.ours(images), ranks.ours(labels)
    for start in range(0, len(images), batch):
        k0, truth = predicted(snn, images[start : start + batch]), labels[start : start + batch]
        reference = integer_forward(snn, k0, threads)
        correct += int((reference.logits.argmax(1) == truth).sum())
        for schedule in rows:
            began = time.perf_counter()
            run = simulate(snn, k0, schedule, threads=threads)
            right = to_host((run.logits_over_time.argmax(2) == truth).sum(1))
            seconds = time.perf_counter() - began  # a GPU is done when its answer is here
            wrong = [int((c != k).sum(0).sum()) for c, k in zip(run.counts, reference.counts)]
            spikes = sum(int(c.sum(0).sum()) for c in run.counts)  # (0): or CuPy has one block
            synops = int(run.synops.sum()), *effective_operations(snn, k0, run.counts)
            rows[schedule].append((right, wrong, spikes, synops, seconds))
            progress(len(k0) * ranks.size)
    neurons = np.array([n * math.prod(shape) for shape in snn.shapes[1:-1]])
    report = {}
    for schedule, parts in rows.items():
        every = zip(*ranks.gather(parts))
        right, wrong, spikes, synops, seconds = (sum(map(np.asarray, p)) for p in every)
        report[schedule] = {
            "accuracy": float(right[-1] / n),
            "curve": (right / n).tolist(),
            "wrong_counts": (wrong / neurons).tolist(),
            "spikes_per_neuron": float(spikes / max(neurons.sum(), 1)),
            "synops_per_image": float(synops[0] / n),
            "steps_to_answer": steps_to_answer(snn, schedule),
            "neurobench": neurobench(snn, schedule, n, int(spikes), synops[1:].tolist()),
            "seconds": float(seconds) / ranks.size,
        }
    return sum(ranks.gather([correct])) / n, report


def moved_levels(net, params, snn, images, recipe, batch=100, threads=None, ranks=ALONE):
    """Return, for each firing layer, the fraction of levels of the CQ network (L = T) that the
    integer CNN has otherwise: what rounding the weights has moved. images (N, H, W, C) uint8."""
    moved = 0
    for start in ranks.ours(range(0, len(images), batch)):
        part = images[start : start + batch]
        x = network_input(part, snn.steps, snn.encoding)
        _, tape = forward(net, params, x, *recipe.how("quantize"), threads=threads)
        exact = integer_forward(snn, predicted(snn, part), threads).counts
        xp, pairs = array_module(x), zip(tape[1:], exact)
        moved += np.array([int((xp.concatenate(t.inputs) != c).sum()) for t, c in pairs])
    neurons = np.array([len(images) * math.prod(shape) for shape in snn.shapes[1:-1]])
    return (sum(ranks.gather([moved])) / neurons).tolist()


class LayerCertificate(NamedTuple):
    """What `certify` proves of a layer, for every image and for any spikes at its input."""

    current: tuple  # the smallest and the largest of any neuron in one step
    potential: tuple  # of the potential when it is compared with theta, and before
    bits: int  # of a two's complement register that holds it; theta may be beyond its reach
    carrier: type  # the float type in which sums of one step are exact
    early: int  # how many spikes too many a count can have, for the spike counts it receives
    late: int  # how many too few
    early_in_all: int  # the same against the integer CNN: errors of the layers before included
    late_in_all: int


def count_errors(layer, lowest, highest, steps, delay):
    """Bound how far the counts of a layer can be from clamp(floor(U / theta), 0, T), arrays like
    `lowest` and `highest`, the currents that each neuron can have in a step. Let N = max(0,
    -lowest), X = max(0, highest), d the delay, P(s) the charge after s steps of input (v0 and the
    currents), Q(j) = P(min(d + j, T)) what the j-th comparison has seen, and U = P(T).
    Early: let the last of c spikes fire at time s < T. Then c <= s - d, c theta <= P(s) <= v0 +
    s X, and U >= P(s) - (T - s) N: the excess is at most min(c, ceil((T - s) N / theta)).
    Late: let j be the last firing step without a spike, at which c_j >= floor(Q(j) / theta);
    then U <= Q(j) + (T - d - j) X, and T - j spikes follow: the lack is at most
    min(j, ceil((T - d - j) X / theta) - (T - j)). Both vanish for N = 0, X <= theta (law 5), and
    for d >= T - 1, where every comparison sees the whole charge U."""
    theta, v0 = (np.broadcast_to(a.astype(np.int64), lowest.shape) for a in (layer.theta, layer.v0))
    down, up = np.maximum(-lowest, 0), np.maximum(highest, 0)
    early = late = np.zeros(lowest.shape, np.int64)
    for s in range(delay + 1, steps):
        most = np.minimum(s - delay, (v0 + s * up) // theta)
        early = np.maximum(early, np.minimum(most, -(-(steps - s) * down // theta)))
    for j in range(1, steps - delay):
        lack = -(-(steps - delay - j) * up // theta) - (steps - j)
        late = np.maximum(late, np.minimum(j, lack))
    return early, late


def potential_range(layer, lowest, highest, steps, delay):
    """Return the smallest and largest potential that any neuron of a layer can have when it is
    compared, with N and X as in `count_errors`. Down: never a spike, v0 - T N, or N at each step
    after one, when v >= 0. Up: (d + 1) X at the first comparison, then at most X - theta more at
    each; or theta - 1 where it last did not fire, and X more. The last layer only sums up."""
    down, up = np.maximum(-lowest, 0), np.maximum(highest, 0)
    if not layer.fires:
        return -steps * int(down.max()), steps * int(up.max())
    v0, theta = (a.astype(np.int64) for a in (layer.v0, layer.theta))
    left, growth = max(steps - delay - 1, 0), np.maximum(highest - theta, 0)
    first = v0 + min(delay + 1, steps) * up + left * growth
    later = theta - 1 + up + (left - 1) * growth if left else first
    smallest = np.minimum(v0 - steps * down, -left * down)
    return int(smallest.min()), int(np.maximum(first, later).max())


def certify(snn, schedule="streaming"):
    """Return a LayerCertificate for each layer of a SpikingNetwork under a schedule.
    A neuron's extreme currents are those of its positive, and of its negative weights, all
    inputs spiking: of `linear` on ones, so borders are respected. An input count off by e moves
    the charge by w e, and the count it stands for by at most ceil(|w| e / theta)."""
    steps, delay, rows = snn.steps, delay_of(schedule, snn.steps), []
    early_in_all = late_in_all = np.zeros(snn.input_shape)  # the encoder is exact (law 3)
    for i, (layer, shape) in enumerate(zip(snn.layers, snn.shapes[1:])):
        largest = snn.largest_input(i)
        bound = largest_sum(layer, largest, 1)
        exact_dtype(steps * bound)  # or floats would not hold what follows
        w = np.ones(()) if layer.w is None else layer.w.astype(np.float64)

        def sums(x, sign, layer=layer, shape=shape, w=w):
            x = x[None] * (sign > 0 or layer.kind != "pool")  # a pooling has weights 1 alone
            return linear(layer, x, np.maximum(sign * w, 0))[0].reshape(shape).astype(np.int64)

        white = np.full(snn.shapes[i], float(largest))
        b = 0 if layer.b is None else layer.b.astype(np.int64)
        lowest, highest = b - sums(white, -1), b + sums(white, 1)
        early = late = np.zeros(shape, np.int64)
        constant = i == 0 and snn.encoding == "direct" and layer.v0.min() >= 0  # law 4
        if layer.fires and not (constant and (layer.v0 < layer.theta).all()):
            early, late = count_errors(layer, lowest, highest, steps, delay)
        more = sums(early_in_all, 1) + sums(late_in_all, -1)
        less = sums(late_in_all, 1) + sums(early_in_all, -1)
        theta = layer.theta.astype(np.int64) if layer.fires else 1
        early_in_all, late_in_all = (
            np.minimum(own - (-moved // theta), steps if layer.fires else 2**62).astype(np.float64)
            for own, moved in ((early, more), (late, less))
        )
        potential = potential_range(layer, lowest, highest, steps, delay)
        bits = max(max(end, 0).bit_length() for end in (-potential[0] - 1, potential[1])) + 1
        current = int(lowest.min()), int(highest.max())
        errors = (int(a.max()) for a in (early, late, early_in_all, late_in_all))
        rows.append(LayerCertificate(current, potential, bits, exact_dtype(bound), *errors))
    return rows


class Divergence(NamedTuple):
    """Where the spikes of a layer leave what its counts in the integer CNN need. A spike train is
    astray from the step at which it has one spike too many, or too few steps left for the rest."""

    wrong: np.ndarray  # (N, neurons): the count minus the integer CNN's
    ties: np.ndarray  # (N,) comparisons in which a potential met theta exactly
    first_step: np.ndarray  # (N,) the layer's own time step at which a neuron first is astray, or 0
    first_neuron: np.ndarray  # (N,) that neuron, an index into H, W, C order


@one_blas_thread
def divergence(snn, k0, schedule="streaming", threads=None):
    """Simulate k0 (N, H, W, C), recording; return the Run, the Reference and a Divergence for
    each firing layer. Memory grows with N T: a few images at a time."""
    run = simulate(snn, k0, schedule, True, threads=threads)
    reference = integer_forward(snn, k0, threads)
    xp, steps, delay, rows = array_module(k0), snn.steps, delay_of(schedule, snn.steps), []
    x, seen_at = Source(k0, steps, snn.encoding).spikes(steps), xp.arange(steps)
    steps_left, seen_at = steps - 1 - seen_at, xp.minimum(seen_at + delay, steps - 1)
    for i, (layer, spikes, exact) in enumerate(zip(snn.layers, run.spikes, reference.counts)):
        sums = Sums(snn, i, xp, snn.largest_input(i), 1, steps * len(k0))
        charge = sums(x.reshape(-1, *x.shape[2:]), 1).reshape(spikes.shape).cumsum(0, np.int64)
        charge += xp.asarray(layer.v0)  # P(t), then the potential that each comparison meets
        fired = spikes.cumsum(0, dtype=np.int64)  # (T, N, ...)
        potential = charge[seen_at] - xp.asarray(layer.theta) * (fired - spikes)
        ties = (potential == xp.asarray(layer.theta)).reshape(steps, len(k0), -1).sum((0, 2))
        left = steps_left.reshape(-1, *(1,) * (fired.ndim - 1))
        astray = ((fired > exact) | (fired + left < exact)).reshape(steps, len(k0), -1)
        when = xp.where(astray.any(0), astray.argmax(0), steps)  # (N, neurons)
        first = when.argmin(1)
        step = when[xp.arange(len(k0)), first] + 1
        wrong = (fired[-1] - exact).reshape(len(k0), -1)
        rows.append(Divergence(wrong, ties, xp.where(step > steps, 0, step), first))
        x = spikes
    return run, reference, rows


def spike_digest(snn, k0, schedule="streaming", together=8, **how):
    """Return SHA-256 over, image by image, the spikes (T, H, W, C) of one firing layer after the
    other, a byte each, and its logits at the end, little-endian int64: to compare machines by."""
    found = hashlib.sha256()
    for start in range(0, len(k0), together):
        run = simulate(snn, k0[start : start + together], schedule, True, **how)
        for n, logits in enumerate(to_host(run.logits)):
            for spikes in run.spikes:
                found.update(to_host(spikes[:, n]).tobytes())
            found.update(logits.astype("<i8").tobytes())
    return found.hexdigest()


# 7  Files -----------------------------------------------------------------------------------------


def write_file(path, write, stale=None):
    """Let write(file) fill a binary file that appears at `path` only when it is whole: written
    beside it, flushed to the disk and renamed. Just before, the file `stale` is removed."""
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)  # what a link points to
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: no plain file, expected one or a new name")
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with open(partial, "w+b") as file:  # h5py, below a NIR file, reads what it writes
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if stale is not None:
            Path(stale).unlink(missing_ok=True)
        os.replace(partial, path)
    except OSError as error:  # a full disk, say: name the file that was asked for
        if error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        with contextlib.suppress(OSError):  # which would hide the error
            partial.unlink()


def lock(file):
    """Make an open file ours until it is closed, if it can be, or raise BlockingIOError."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        if isinstance(error, BlockingIOError):
            raise


LARGEST_FILE = 2**31  # bytes that a file may unpack to: no more is read of any


def unpack(path):
    """Return the bytes of a .gz file, or raise ValueError where they are more than LARGEST_FILE."""
    with gzip.open(path) as file:  # in blocks: at once it would take LARGEST_FILE for any file
        blocks = iter(lambda: file.read(2**20), b"")
        data = b"".join(itertools.islice(blocks, LARGEST_FILE // 2**20 + 1))
    if len(data) > LARGEST_FILE:
        raise ValueError(f"unpacks to more than {LARGEST_FILE:,} bytes")
    return data


def one_line(error):
    """Return what an error says, or else its name, in one printable line of 200 characters."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(text.split())[:200] or type(error).__name__


@contextlib.contextmanager
def refusing(path, wrong):
    """Turn whatever a damaged or hostile file brings about into one ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:
        raise ValueError(f"{path}: {wrong.format(one_line(error))}") from None


def read_npz(path, file_format=None):
    """Return the arrays of a .npz file, of a format of ours where one is named, or raise
    ValueError with its name and reason. No pickle. At most LARGEST_FILE is unpacked, and an array
    made only where its header agrees with its bytes: it could ask for any amount of memory."""
    arrays = {}
    with refusing(path, "damaged or not a .npz file ({})"), zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > LARGEST_FILE:
            raise ValueError(f"unpacks to {unpacked:,} bytes, expected up to {LARGEST_FILE:,}")
        for entry in archive.infolist():
            if b"PK\1\2" in entry.comment + entry.extra:  # a wrong length hides entries behind it
                raise ValueError(f"{entry.filename}: holds another entry of the directory")
            with archive.open(entry) as packed:  # read whole, or nobody checks its CRC
                file = io.BytesIO(packed.read(entry.file_size))
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if file.tell() + math.prod(shape) * dtype.itemsize != file.getbuffer().nbytes:
                raise ValueError(f"{entry.filename}: {entry.file_size} bytes for shape {shape}")
            file.seek(0)
            name = entry.filename.removesuffix(".npy")
            arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    found = None if file_format is None else str(arrays.pop("format", "none"))
    if not arrays:
        raise ValueError(f"{path}: holds no arrays, expected some")
    if found != file_format:
        raise ValueError(f"{path}: format {found!r}, expected {file_format!r}")
    return arrays


SNN_FORMAT, MODEL_FORMAT, VECTORS_FORMAT = "cqsnn-snn/1", "cqsnn-model/1", "cqsnn-vectors/1"


def save_snn(path, snn, stale=None):
    """Write an SNN file: JSON `network`, int32 i.w, i.b, i.theta, i.v0. stale: see `write_file`."""
    unsaid, arrays = {"head_start": (0, 0), "levels": None}, {}
    network = {n: v for n, v in asdict(snn).items() if n not in unsaid or v != unsaid[n]}
    for i, layer in enumerate(network["layers"]):
        arrays |= {f"{i}.{name}": layer.pop(name) for name in LAYER_ARRAYS}
    arrays = {"network": json.dumps(network)} | {k: a for k, a in arrays.items() if a is not None}
    write_file(path, lambda f: np.savez_compressed(f, format=SNN_FORMAT, **arrays), stale)


def load_snn(path):
    """Read an SNN file. Raises ValueError, with its name, where it is not a whole one."""
    arrays = read_npz(path, SNN_FORMAT)
    with refusing(path, "not a whole SNN file: {}"):
        network = json.loads(str(arrays.pop("network")))
        layers = []
        for i, entry in enumerate(network.pop("layers")):
            parts = {name: arrays.pop(f"{i}.{name}", None) for name in LAYER_ARRAYS}
            layers.append(SpikingLayer(**entry, **parts))
        if arrays:
            raise ValueError(f"array {min(arrays)} belongs to no layer")
        network |= {n: tuple(network[n]) for n in ("input_shape", "head_start") if n in network}
        snn = SpikingNetwork(**network, layers=tuple(layers))
        check_network(snn)
    return snn


def check_network(snn):
    """Raise ValueError unless a network's numbers and arrays fit each other."""
    for name, high in (("steps", 2**31 - 1), ("classes", 2**31 - 1), ("unit", 16)):
        check_range(name, getattr(snn, name), 1, high)
    check_range("weight_bits", snn.weight_bits, 2, 16)
    check_range("levels", 1 if snn.levels is None else snn.levels, 1, 2**31 - 1)
    check_choice("encoding", snn.encoding, ENCODINGS)
    if len(snn.head_start) != 2 or not all(abs(x) <= MOST_HEAD_START for x in snn.head_start):
        raise ValueError(f"head_start {snn.head_start}, expected two, up to {MOST_HEAD_START}")
    for n in snn.input_shape:
        check_range("input_shape", n, 1, 2**15)
    shape = snn.input_shape
    if len(shape) != 3 or not snn.layers:
        raise ValueError(f"input_shape {shape} and {len(snn.layers)} layers, expected 3 and some")
    for i, layer in enumerate(snn.layers):
        _check_layer(layer, i, shape)
        (shape,) = output_shapes([layer], shape, snn.classes, i)
        if layer.fires is not (i < len(snn.layers) - 1):
            raise ValueError(f"layer {i} fires: {layer.fires}; every layer fires but the last")
    if shape != (snn.classes,):
        raise ValueError(f"the last layer gives {shape}, expected {snn.classes} classes")
    first = snn.layers[0]
    waits = snn.encoding == "spikes" and snn.head_start[0] and first.fires and first.w is not None
    if waits and first.v0.ndim == 0:  # of a version before 2026-11-26, in thresholds
        raise ValueError(f"array 0.v0: () with a head start, expected {first.b.shape}")


def _check_layer(layer, i, shape):
    """Raise ValueError unless the arrays of layer i fit each other and its input's shape."""
    check_choice(f"layer {i} kind", layer.kind, ("conv", "depthwise", "pool", "dense"))
    for name, low in (("size", 1), ("stride", 1), ("pad", 0)):
        check_range(f"layer {i} {name}", getattr(layer, name), low, 2**15)
    pool, square = layer.kind == "pool", (layer.size, layer.size)
    if pool and (layer.stride, layer.pad) != (layer.size, 0):
        raise ValueError(f"layer {i}: a pool's stride is its size, and it has no pad")
    out = shape[-1:] if layer.w is None else layer.w.shape[-1:]
    if out == (0,):
        raise ValueError(f"array {i}.w: {layer.w.shape}, expected at least one output channel")
    kernel = {"conv": (*square, shape[-1], *out), "depthwise": (*square, shape[-1])}
    w, b = (None, None) if pool else (kernel.get(layer.kind, (math.prod(shape), *out)), out)
    allowed = {"w": (w,), "b": (b,), "theta": ((), out), "v0": ((), out)}
    for name, shapes in allowed.items():
        array = getattr(layer, name)
        found = None if array is None else array.shape
        if found not in shapes or (array is not None and array.dtype != np.int32):
            kind = "" if array is None else f" {array.dtype}"
            raise ValueError(f"array {i}.{name}: {found}{kind}, expected {shapes[-1]} int32")
    if layer.theta.min() < 1:
        raise ValueError(f"array {i}.theta: {layer.theta.min()}, expected at least 1")


def save_model(path, params, state, meta, stale=None):
    """Write a checkpoint: parameters, optimiser state, `meta` (JSON). stale: see `write_file`."""
    arrays = {"meta": json.dumps(meta)} | {f"params/{k}": to_host(a) for k, a in params.items()}
    arrays |= {f"state/{key}": to_host(a) for key, a in state.items()}
    write_file(path, lambda f: np.savez(f, format=MODEL_FORMAT, **arrays), stale)


def load_model(path):
    """Read a checkpoint; return params, state, meta. Raises ValueError, with its name."""
    arrays = read_npz(path, MODEL_FORMAT)
    with refusing(path, "not a whole checkpoint: {}"):
        meta = json.loads(str(arrays.pop("meta")))
        named = {"params": {}, "state": {}}
        for (part, name), array in ((key.split("/", 1), a) for key, a in arrays.items()):
            named[part][name] = array
    return named["params"], named["state"], meta


def load_state(path):
    """Return the tensors of a PyTorch state dict saved as .npz (in its order) or .safetensors
    (which keeps none: names sorted, numbers in them as numbers). No pickle is read."""
    if Path(path).suffix != ".safetensors":
        return read_npz(path)
    try:
        from safetensors.numpy import load_file
    except ImportError:
        raise ValueError(f"{path}: reading it needs the package safetensors") from None
    with refusing(path, "damaged or not .safetensors ({})"):  # or of types that NumPy lacks
        arrays = load_file(path)
    head = {k: k.partition(".")[0] for k in arrays}  # "features", "classifier", or a number
    convolutions = {head[k] for k in arrays if arrays[k].ndim == 4}
    last = {head[k] for k in arrays if arrays[k].ndim == 2} - convolutions  # the dense layers

    def place(k):
        words = re.split(r"(\d+)", k)
        return head[k] in last, [int(x) if x.isdecimal() else x for x in words]

    return {name: arrays[name] for name in sorted(arrays, key=place)}


def _state_modules(arrays):
    """Sort a state dict by module, {module: {leaf: float32 array}}, in its order."""
    modules = {}
    for name, array in arrays.items():
        module, _, leaf = name.rpartition(".")
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{name}: {array.dtype}, expected numbers")
        if leaf != "num_batches_tracked":
            modules.setdefault(module, {})[leaf] = array.astype(np.float32)
    return modules


def from_state(net, arrays, shape, classes):
    """Return float32 parameters of net from a PyTorch state dict {name: array}, for images of
    `shape` (H, W, C) and so many classes. Tensors are told by their shape and order, whatever
    their modules are called: weights, see `channels_last`, go to the layers that have any, one
    after another; weight, bias, running_mean and running_var of each norm to those that have one.
    A convolution's bias is taken off the running mean; without any norm, beta is that bias and the
    norm otherwise changes nothing. Raises ValueError that names the tensor, found and expected."""
    modules, params, outputs = _state_modules(arrays), {}, output_shapes(net, shape, classes)
    weighted = [name for name, m in modules.items() if m.get("weight", np.zeros(1)).ndim > 1]
    norms = [name for name, m in modules.items() if "running_mean" in m]
    plain = not norms

    def tensor(module, leaf, shape, default=None):
        array = modules[module].pop(leaf, None)
        if array is None and default is not None:
            return np.full(shape, default, np.float32)
        found = "none" if array is None else f"shape {array.shape}"
        if array is None or array.shape != shape or not np.isfinite(array).all():
            raise ValueError(f"{module}.{leaf}: {found}, expected shape {shape} of finite numbers")
        return array

    for i, (layer, before, out) in enumerate(zip(net, [shape, *outputs], outputs)):
        if layer.kind == "pool":
            continue
        if not weighted or (layer.norm and not plain and not norms):
            lacks = "a norm for each convolution, or none at all" if weighted else "its weights"
            raise ValueError(f"layer {i} ({layer.kind}): no tensors left, expected {lacks}")
        module, one, kernel = weighted.pop(0), out[-1:], (layer.size - layer.mean,) * 2
        inputs = {"conv": (before[-1], *kernel), "depthwise": (1, *kernel)}
        inputs["dense"] = (before[-1] if layer.mean else math.prod(before),)
        w = tensor(module, "weight", one + inputs[layer.kind])
        params[f"{i}.w"] = channels_last(layer, w, before[-1])
        bias = tensor(module, "bias", one, 0)
        values = {"gamma": 1, "beta": bias, "mean": 0, "var": 1 - BATCH_NORM_EPS}
        if layer.norm and not plain:
            norm = norms.pop(0)
            values = {"gamma": tensor(norm, "weight", one, 1), "beta": tensor(norm, "bias", one, 0)}
            values["mean"] = tensor(norm, "running_mean", one) - bias
            values["var"] = tensor(norm, "running_var", one)
        for name, value in (values if layer.norm else {"b": bias}).items():
            params[f"{i}.{name}"] = np.full(len(w), value, np.float32)
    unused = [f"{module}.{leaf}" for module, m in modules.items() for leaf in m]
    if unused:
        raise ValueError(f"{unused[0]}: belongs to no layer, expected {len(params)} parameters")
    return params


def channels_last(layer, w, channels):
    """Return PyTorch's weights of a layer as ours: (O, C, K, K) as (K, K, C, O), (C, 1, K, K) as
    (K, K, C), (O, C*H*W) as (H*W*C, O), for inputs of that many channels."""
    if layer.kind == "dense":
        w = w.reshape(len(w), channels, -1).T.reshape(-1, len(w))
    else:
        w = w[:, 0].transpose(1, 2, 0) if layer.kind == "depthwise" else w.transpose(2, 3, 1, 0)
    return np.ascontiguousarray(w)


NIR_NOTE = (
    "cqsnn: whole numbers; neurons fire at v >= v_threshold and then lose v_threshold (soft "
    "reset), which NIR cannot say: spikingjelly needs import_from_nir(..., dt=1.0) and "
    "IFNode.v_reset = None, sinabs spike_fn = SingleSpike and min_v_mem = None. float32 is exact "
    "while potentials stay below 2**24. The last node sums up without firing."
)


def to_nir(snn):
    """Return a SpikingNetwork as a NIR graph (package nir): Conv2d, Affine and SumPool2d, each but
    the last followed by IF, channels first; `NIR_NOTE` is its metadata.
    Raises ValueError for what NIR cannot carry: depthwise layers, initial potentials, and numbers
    that are none in float32, which is what its readers make of them."""
    import nir

    def exact(name, array):
        wrong = array[array.astype(np.float32) != array]  # int32 and float32 compare as float64
        if wrong.size:
            raise ValueError(f"{name}: {wrong[0]}, expected numbers that float32 holds, as NIR's")
        return np.ascontiguousarray(array, np.float32)

    nodes = [nir.Input(input_type=np.array([snn.input_shape[2], *snn.input_shape[:2]]))]
    for i, (layer, before, out) in enumerate(zip(snn.layers, snn.shapes, snn.shapes[1:])):
        if layer.kind == "depthwise" or (layer.fires and layer.v0.any()):
            lacks = "depthwise layer" if layer.kind == "depthwise" else "initial potential"
            raise ValueError(f"layer {i}: NIR has no {lacks}, expected a network without one")
        if layer.kind == "conv":
            w, b = exact(f"{i}.w", layer.w.transpose(3, 2, 0, 1)), exact(f"{i}.b", layer.b)
            nodes.append(nir.Conv2d(before[:2], w, layer.stride, layer.pad, 1, 1, b))
        elif layer.kind == "dense":
            if len(before) == 3:
                nodes.append(nir.Flatten({"input": np.array([before[2], *before[:2]])}, 0, -1))
            w = layer.w.reshape(-1, before[-1], *out).T.reshape(*out, -1)  # (O, C*H*W)
            nodes.append(nir.Affine(exact(f"{i}.w", w), exact(f"{i}.b", layer.b)))
        else:
            square = np.array([layer.size, layer.size])
            nodes.append(nir.SumPool2d(square, square, np.array([0, 0])))
        if layer.fires:
            theta = exact(f"{i}.theta", np.broadcast_to(layer.theta, out))
            theta = np.moveaxis(theta, -1, 0).copy()  # (O, H, W)
            nodes.append(nir.IF(np.ones_like(theta), theta, np.zeros_like(theta)))
    nodes.append(nir.Output(output_type=np.array([snn.classes])))
    names = [f"{n}_{type(node).__name__.lower()}" for n, node in enumerate(nodes)]
    edges = list(itertools.pairwise(names))
    return nir.NIRGraph(dict(zip(names, nodes)), edges, {"note": NIR_NOTE})


def save_nir(path, snn):
    """Write a network as a NIR file, without the v_reset of IF nodes: nir up to 1.0.5, and with
    it sinabs, cannot read one that has it; later ones read 0, which is what it would be."""
    import h5py
    import nir

    graph = to_nir(snn)

    def write(file):
        nir.write(file, graph)
        with h5py.File(file, "r+") as h5:
            for node in h5["node/nodes"].values():
                node.pop("v_reset", None)

    write_file(path, write)


def save_vectors(path, snn, k0, schedule="streaming", threads=None):
    """Write golden vectors of images k0 under a schedule, for hardware to be compared with; the
    README has their format. Spikes are bits, (T, N, neurons / 8 rounded up), neurons in H, W, C
    order, the first in the highest bit."""
    run, steps = simulate(snn, k0, schedule, record=True, threads=threads), snn.steps
    delay, spiking = delay_of(schedule, steps), snn.encoding == "spikes"

    def packed(spikes):
        return np.packbits(to_host(spikes).reshape(steps, len(k0), -1), axis=2)

    source = Source(k0, steps, snn.encoding)
    arrays = {"input": packed(source.spikes(steps)) if spiking else to_host(k0)}
    for i, (spikes, potential) in enumerate(zip(run.spikes, run.potentials)):
        arrays[f"{i}.spikes"] = packed(spikes)
        arrays[f"{i}.potential"] = to_host(potential).astype(np.int64)
    arrays["logits"] = to_host(run.logits_over_time).astype(np.int64)
    meta = {"schedule": str(schedule), "delay": delay, "steps": steps, "images": len(k0)}
    text = json.dumps(meta | {"encoding": snn.encoding, "shapes": snn.shapes})
    write_file(path, lambda f: np.savez_compressed(f, format=VECTORS_FORMAT, meta=text, **arrays))


def load_vectors(path):
    """Read golden vectors; return meta and the arrays, spikes unpacked as uint8 (T, N, ...).
    Raises ValueError, with the file's name, where it is not a whole one."""
    arrays = read_npz(path, VECTORS_FORMAT)
    with refusing(path, "not whole golden vectors: {}"):
        meta = json.loads(str(arrays.pop("meta")))
        steps, images, shapes = (meta[name] for name in ("steps", "images", "shapes"))
        check_choice("encoding", meta["encoding"], ENCODINGS)
        if meta["delay"] != delay_of(meta["schedule"], steps):
            raise ValueError(f"delay {meta['delay']}, its schedule is {meta['schedule']!r}")
        inner, direct = list(enumerate(shapes[1:-1])), meta["encoding"] == "direct"
        bits = {f"{i}.spikes": shape for i, shape in inner} | {"input": shapes[0]}
        expected = {f"{i}.potential": ((images, *shape), np.int64) for i, shape in inner}
        expected["logits"] = (steps, images, *shapes[-1]), np.int64
        if direct:
            expected["input"] = (images, *bits.pop("input")), np.uint8
        for name, shape in bits.items():
            expected[name] = (steps, images, -(-math.prod(shape) // 8)), np.uint8
        found = {name: (a.shape, a.dtype) for name, a in arrays.items()}
        for name in found | expected:
            if found.get(name) != expected.get(name):
                raise ValueError(f"{name}: {found.get(name)}, expected {expected.get(name)}")
        for name, shape in bits.items():
            spikes = np.unpackbits(arrays[name], axis=2, count=math.prod(shape))
            arrays[name] = spikes.reshape(steps, images, *shape)
    return meta, arrays


class DataSet(NamedTuple):
    """Where a data set's files lie under the data folder, what they hold, where they come from."""

    folder: str
    train: tuple  # names of files: images and labels (IDX), or batches (CIFAR)
    test: tuple
    classes: int
    source: str  # what the names of `downloads` follow on the web
    archive: str | None = None  # the official archive that may lie in the data folder instead
    label: int | str = 0  # bytes of it in a CIFAR record, the last one counts; or, pickled, its key


_IDX = tuple((f"{p}-images-idx3-ubyte", f"{p}-labels-idx1-ubyte") for p in ("train", "t10k"))
_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR10 = ("cifar-10-batches-bin", tuple(f"{name}.bin" for name in _BATCHES), ("test_batch.bin",))
_CIFAR100 = ("cifar-100-binary", ("train.bin",), ("test.bin",))
_KRIZ = "https://www.cs.toronto.edu/~kriz/"
_FASHION = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
DATASETS = {
    "digits": DataSet("digits", *_IDX, 10, "the project's folder data/digits"),
    "mnist": DataSet("mnist", *_IDX, 10, "https://ossci-datasets.s3.amazonaws.com/mnist/"),
    "fashion-mnist": DataSet("fashion-mnist", *_IDX, 10, _FASHION),
    "cifar10": DataSet(*_CIFAR10, 10, _KRIZ, "cifar-10-binary.tar.gz", 1),
    "cifar100": DataSet(*_CIFAR100, 100, _KRIZ, "cifar-100-binary.tar.gz", 2),
}
PICKLED = {  # CIFAR's Python version, as torchvision leaves it
    "cifar10": DataSet("cifar-10-batches-py", _BATCHES, ("test_batch",), 10, _KRIZ, label="labels"),
    "cifar100": DataSet("cifar-100-python", ("train",), ("test",), 100, _KRIZ, label="fine_labels"),
}
# bytes and SHA-256 of a data set's files, in its order, or archive, as TensorFlow Datasets has them
_CHECKSUMS = """
mnist 9912422 440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609
mnist 28881 3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c
mnist 1648877 8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6
mnist 4542 f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6
fashion-mnist 26421880 3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84
fashion-mnist 29515 a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845
fashion-mnist 4422102 346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073
fashion-mnist 5148 67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5
cifar10 170052171 c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd
cifar100 168513733 58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec
"""
DOWNLOADS = {name: {} for name in DATASETS}  # data set: {file: (bytes, SHA-256)}
for _name, _bytes, _digest in (line.split() for line in _CHECKSUMS.split("\n")[1:-1]):
    _set, _known = DATASETS[_name], DOWNLOADS[_name]
    _files = [_set.archive] if _set.archive else [f"{f}.gz" for f in _set.train + _set.test]
    _known[_files[len(_known)]] = int(_bytes), _digest


def transfer(url, file, size, progress):
    """Append what is missing of url to the open file, up to `size` bytes; return what ended that
    early, if anything did. A server that refuses raises ConnectionError; one that cannot continue
    sends it all again."""
    have = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        raise ConnectionError(f"{url}: {one_line(error)}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a bad redirect
        return one_line(getattr(error, "reason", error))
    with response:
        if have and response.status != 206:
            progress(-file.tell())
            file.truncate(file.seek(0))
        while file.tell() < size:
            try:
                block = response.read(min(2**16, size - file.tell()))
            except (OSError, http.client.HTTPException):
                block = b""
            if not block:
                return "the connection broke"
            file.write(block)
            progress(len(block))


def fetch(url, path, size, sha256, progress=lambda n: None):
    """Download url to path, which appears only once its size and SHA-256 are right.
    What has come stays in .NAME.partial and is gone on from, now or at the next call; after
    three attempts that get no further it raises ConnectionError, while another process is at it
    BlockingIOError, for a wrong file, which is deleted, ValueError. progress(n): n more bytes."""
    partial, failures = path.with_name(f".{path.name}.partial"), 0
    try:
        with open(partial, "ab") as file:
            lock(file)
            most = file.tell()  # a server that sends it all again may get less far each time
            progress(most)
            while file.tell() < size:
                reason = transfer(url, file, size, progress)
                failures = 0 if file.tell() > most else failures + 1
                most = max(most, file.tell())
                if failures == 3:
                    raise ConnectionError(f"{url}: {reason}")
                time.sleep(failures)
            file.flush()
            os.fsync(file.fileno())
            found = hashlib.sha256(partial.read_bytes()).hexdigest()
            if found != sha256 or partial.stat().st_size != size:
                raise ValueError(f"{url}: SHA-256 {found}, expected {sha256}; it was deleted")
        os.replace(partial, path)
    except BlockingIOError:
        raise BlockingIOError(f"{url}: another process is downloading it") from None
    except ConnectionError:
        if partial.stat().st_size == 0:
            partial.unlink()
        raise  # and keep what came
    except (OSError, ValueError):
        partial.unlink(missing_ok=True)
        raise


def download(name, data_dir, progress=lambda n: None):
    """Fetch the official files of a data set that are not yet under data_dir; see `fetch`."""
    check_choice("download", name, [name for name in DATASETS if DOWNLOADS[name]])
    dataset = DATASETS[name]
    folder = Path(data_dir) if dataset.archive else Path(data_dir) / dataset.folder
    folder.mkdir(parents=True, exist_ok=True)
    for file, (size, sha256) in DOWNLOADS[name].items():
        if (folder / file).exists():
            continue
        try:
            fetch(dataset.source + file, folder / file, size, sha256, progress)
        except ConnectionError as error:
            offline = f"without a network, put {', '.join(DOWNLOADS[name])} into {folder}"
            raise ConnectionError(f"{error}; {offline}") from None


def read_data_files(data_dir, dataset):
    """Return where each file of a data set was found, plain, as .gz or in the official archive,
    and its bytes, by name. An archive is checked as a whole; its paths are not followed."""
    folder, found, members = Path(data_dir) / dataset.folder, {}, None
    archive = Path(data_dir) / dataset.archive if dataset.archive else None
    for name in dataset.train + dataset.test:
        choices = [folder / name, folder / f"{name}.gz", *([archive] if archive else ())]
        where = next((path for path in choices if path.exists()), None)
        if where is None:
            files = ", ".join(dataset.train + dataset.test)
            wrong = f"{choices[0]}: not found, nor {choices[-1]}"
            raise FileNotFoundError(f"{wrong}; expected {files}, from {dataset.source}")
        with refusing(where, "damaged or not readable ({})"):
            if where == archive:
                members = members or tarfile.open(fileobj=io.BytesIO(unpack(where)))  # noqa: SIM115
                member = members.getmember(f"{dataset.folder}/{name}")
                if not member.isfile():  # extractfile would follow links, in circles too
                    raise tarfile.ReadError(f"{member.name} is no plain file")
                data = members.extractfile(member).read()
            else:
                data = unpack(where) if where.suffix == ".gz" else where.read_bytes()
        found[name] = where, data
    return found


def parse_idx(where, data, axes):
    """Return the uint8 array of an IDX file: 0, 0, 8, number of axes, then sizes, then bytes."""
    start = 4 + 4 * axes
    if data[:4] != bytes((0, 0, 8, axes)) or len(data) < start:
        raise ValueError(f"{where}: starts with {data[:4].hex()}, expected 0000080{axes} (IDX)")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", axes, 4))
    if len(data) != start + math.prod(shape) or 0 in shape[1:]:
        raise ValueError(f"{where}: {len(data)} bytes, expected {'x'.join(map(str, shape))} values")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def parse_cifar(where, data, label_bytes):
    """Return images (N, 32, 32, 3) and labels (N,) of CIFAR's binary version."""
    record = label_bytes + 3072
    if len(data) % record or not data:
        raise ValueError(f"{where}: {len(data)} bytes, expected whole {record:,}-byte records")
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    images = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), rows[:, label_bytes - 1]


class PickledArray:
    """What NumPy's names become in a pickle of CIFAR: something that keeps what it is given."""

    def __init__(self, *made):
        self.made, self.state = made, None

    def __setstate__(self, state):
        self.state = state


class CifarUnpickler(pickle.Unpickler):
    """Constructs numbers, strings, lists, dicts and PickledArray; any other name is refused."""

    def find_class(self, module, name):
        """Return PickledArray for the three names that a pickled NumPy array needs."""
        allowed = ("core.multiarray._reconstruct", "_core.multiarray._reconstruct")
        if f"{module}.{name}" not in [f"numpy.{n}" for n in (*allowed, "ndarray", "dtype")]:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")
        return PickledArray


def parse_cifar_pickle(where, data, label_key):
    """Return images (N, 32, 32, 3) and labels (N,) of a batch of CIFAR's Python version."""
    with refusing(where, "damaged or not a CIFAR batch ({})"):
        tuples = 0
        for op, argument, _ in pickletools.genops(data):
            tuples += "TUPLE" in op.name  # a batch has six; hash() of many nested ones crashes
            if tuples > 16 or ("PUT" in op.name and argument > 2**20):  # a memo of that length
                raise ValueError(f"{op.name} {argument} after {tuples} tuples")
        batch = CifarUnpickler(io.BytesIO(data), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: v for key, v in batch.items()}
        labels = batch[label_key]
        if type(labels) is not list or not all(type(label) is int for label in labels):
            raise ValueError(f"{label_key} is no list of whole numbers")
        labels = np.array(labels, np.uint8)
        _, shape, dtype, by_columns, pixels = batch["data"].state
        images = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        kind = (shape, dtype.made[0] in ("u1", b"u1"), bool(by_columns), labels.shape)
        if kind != ((len(images), 3072), True, False, (len(images),)):
            wrong = f"{len(pixels)} bytes of pixels, {len(labels)} labels"
            raise ValueError(f"{wrong}, not N rows of 3,072 bytes and N labels")
    return np.ascontiguousarray(images), labels


# where the digits lie that come with the module: beside it, or where pip puts them
SHIPPED = Path(__file__).parent / "data", Path(sys.prefix) / "share" / "cqsnn"


def load_dataset(name, data_dir="data"):
    """Return (images, labels) to train and to test: uint8 (N, H, W, C), int64 (N,).
    Raises FileNotFoundError naming what was looked for, ValueError for damaged files."""
    check_choice("dataset", name, DATASETS)
    dataset, parts = DATASETS[name], []
    for folder in SHIPPED if (name, str(data_dir)) == ("digits", "data") else ():
        if not Path(data_dir, name).is_dir() and Path(folder, name).is_dir():
            data_dir = folder
    packed = [Path(data_dir) / part for part in (dataset.folder, dataset.archive) if part]
    if name in PICKLED and not any(path.exists() for path in packed):
        folder = Path(data_dir) / PICKLED[name].folder
        dataset = PICKLED[name] if folder.is_dir() else dataset
    every = read_data_files(data_dir, dataset)
    for files in (dataset.train, dataset.test):
        found = [every[file] for file in files]
        if dataset.label:
            parse = parse_cifar_pickle if isinstance(dataset.label, str) else parse_cifar
            batches = [parse(*item, dataset.label) for item in found]
            images, labels = (np.concatenate(arrays) for arrays in zip(*batches))
        else:
            images, labels = parse_idx(*found[0], 3)[..., None], parse_idx(*found[1], 1)
        if not len(images) == len(labels) > 0 or labels.max() >= dataset.classes:
            wrong = f"{found[-1][0]}: {len(labels)} labels up to {max(labels, default='none')}"
            raise ValueError(f"{wrong}, expected {len(images)} > 0 below {dataset.classes}")
        parts.append((images, labels.astype(np.int64)))
    sizes = [images.shape[1:] for images, _ in parts]
    if sizes[0] != sizes[1]:
        where = every[dataset.test[0]][0]
        raise ValueError(f"{where}: images of {sizes[1]}, expected {sizes[0]} as in training")
    return tuple(parts)
