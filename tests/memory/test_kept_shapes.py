"""What torch keeps of the shapes of products on a CPU, with the limits that a rank sets."""

import os
import subprocess
import sys

from qwen_dist.train.world import FEW_SHAPES_KEPT

SCRIPT = """
import ctypes, os, sys, torch
os.environ.update(word.split("=") for word in sys.argv[1:])
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Heap = type("Heap", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
heap = ctypes.CDLL(None).mallinfo2
heap.restype = Heap
weight = torch.randn(1024, 256, dtype=torch.bfloat16)
def multiply(rows):
    for count in rows:
        torch.nn.functional.linear(torch.randn(count, 256, dtype=torch.bfloat16), weight)
multiply(range(1, 20))
before = heap().uordblks
multiply(range(100, 400))
print((heap().uordblks - before) / 1e6)
"""


def test_memory_does_not_grow_with_the_number_of_shapes():
    """300 shapes keep about 166 MB by torch's own limits (2.13), 25 MB with ours."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *(f"{name}={value}" for name, value in limits.items())],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for limits in (FEW_SHAPES_KEPT, dict.fromkeys(FEW_SHAPES_KEPT, "1024"))
    ]
    few_mb, many_mb = (float(process.communicate()[0]) for process in processes)
    assert few_mb < many_mb / 2
