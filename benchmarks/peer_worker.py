"""What a measured process does: prepare one case, then run it once for each line it is sent.

bench.py writes the case as one line of JSON and gets one back; then a line for every run. Nothing
of cqsnn or PyTorch is imported here: each engine's process has only its own thread pools.
"""

import contextlib
import json
import resource
import sys
import time
from pathlib import Path


def peak_memory():
    """Return the most bytes this process has held in memory.
    VmHWM begins anew with the program; getrusage's ru_maxrss would keep that of the parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def page_faults():
    """Return how often this process has been given a page of memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def answer(message):
    """Write one line of JSON."""
    print(json.dumps(message), flush=True)


def serve(prepare):
    """Answer bench.py until it closes the pipe.
    prepare(case) returns run(), which comes back when the work is done, memory(), the most bytes
    held, and facts; a fact "wrong" says why the engine must not be timed."""
    imported = peak_memory()
    run, memory, facts = prepare(json.loads(sys.stdin.readline()))
    with contextlib.suppress(OSError):  # VmHWM begins anew, without what the check needed
        Path("/proc/self/clear_refs").write_text("5")
    answer({"imported": imported} | facts)
    for _ in sys.stdin:
        faults, began = page_faults(), time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        answer({"seconds": seconds, "faults": page_faults() - faults, "peak": memory()})
