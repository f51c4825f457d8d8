"""Compile kernels for a GPU that is not here: in a process of its own, because the tests' own interprets them."""

import json
import os
import subprocess
import sys
from typing import Any

# A stand-in driver names the target, and the launchers run as they are up to the launch itself, so what is compiled is
# what users get. A program goes on from here: it hands `describe_each` a function of a kernel's name, the compiled
# kernel and its options, and launches.
STAND_IN = """
import json, re, subprocess, sys, tempfile
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver, jit

capability = int(sys.argv[1])

class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

class Driver:
    utils = Utils()
    get_current_target = lambda self: GPUTarget("cuda", capability, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_active_torch_device = lambda self: torch.device("cpu")
    map_python_to_cpp_type = lambda self, kind: kind

driver.set_active(Driver())
compiled = []
run = jit.JITFunction.run

def assembled(kernel):
    "What ptxas says of a compiled kernel."
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        target = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

def spilled(said):
    "Bytes a thread, from what ptxas says."
    return int(re.search(r"(\\d+) bytes spill stores", said).group(1))

def describe_each(describe):
    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=(1,), warmup=True, **options)
        compiled.append(describe(self.__name__, kernel, options))

    jit.JITFunction.run = compile_only
"""


def compiled_by(program: str, capability: int) -> list[Any]:
    """What the program's `describe` said of each kernel that it launched, in order."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", f"{STAND_IN}{program}print(json.dumps(compiled))", str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
