"""Every CUDA source of cqsnn compiles for the GPUs of CuPy, with every type that it is used with.

    python tests/audit/cupy_compile.py      # with CuPy and NVRTC installed; no GPU, no driver

NVRTC, by CuPy's own binding, gets what `cqsnn.cuda_kernel` would have it compile on a GPU, for
compute capability 7.0, 8.0 and 9.0 (V100, A100, H100). CUDA 12 has all three; 13 has dropped 7.0:
so install cupy-cuda12x and nvidia-cuda-nvrtc-cu12. A source with a mistake must be refused.
"""

import itertools
import re
import sys
from pathlib import Path

import cupy
from cupy_backends.cuda.libs import nvrtc

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cqsnn

ARCHITECTURES = ("70", "80", "90")
CUPYS_OWN = ("--device-as-default-execution-space",)  # what CuPy adds to a RawKernel's options
TYPES = {
    "REAL": ("float32", "float64"),
    "WHOLE": ("int32", "int64"),
    "ELEMENT": ("float16", "float32", "float64", "complex128"),
}


def compiled(code, name, options):
    """Return the bytes of machine code of a kernel for each architecture; for cupy.RawKernel."""
    assert re.search(rf"\b{name}\(", code)
    sizes = []
    for arch in ARCHITECTURES:
        program = nvrtc.createProgram(code, f"{name}.cu", (), ())
        try:
            nvrtc.compileProgram(program, (*options, f"-arch=sm_{arch}", *CUPYS_OWN))
            sizes.append(len(nvrtc.getCUBIN(program)))
        except nvrtc.NVRTCError:
            raise ValueError(nvrtc.getProgramLog(program)) from None
        finally:
            nvrtc.destroyProgram(program)
    return sizes


def main():
    """Compile all; return 1 unless the wrong source, and it alone, is refused."""
    cupy.RawKernel, count = compiled, 0
    sources = {n: s for n, s in vars(cqsnn).items() if "__global__" in str(s) and n.isupper()}
    for name, source in sources.items():
        macros = [macro for macro in TYPES if re.search(rf"\b{macro}\b", source)]
        for kinds in itertools.product(*(TYPES[macro] for macro in macros)):
            types = dict(zip(macros, kinds))
            sizes = cqsnn.cuda_kernel(source, **types)
            print(f"{name:22} {' '.join(kinds):16} sm_{', sm_'.join(ARCHITECTURES)}: {sizes} bytes")
            count += len(sizes)
    version = ".".join(map(str, nvrtc.getVersion()))
    print(f"NVRTC {version}, CuPy {cupy.__version__}: {count} kernels compiled")
    try:
        cqsnn.cuda_kernel(source.replace("unsigned i =", "unsigned ="), **types)
    except ValueError:
        written = Path(cqsnn.__file__).read_text().count("__global__")
        return 0 if len(sources) == written else 1
    print("a source with a mistake was compiled")
    return 1


if __name__ == "__main__":
    sys.exit(main())
