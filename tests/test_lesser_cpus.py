"""The kernels as lesser CPUs than this one get them.

`FASTQ_ISA` chooses a tier, and with it the dot product; how wide all other vectors are, and how
tables are read, depends on the CPU. So a process of its own compiles for one without AVX-512, and
for one without AVX, and runs the tests of what is done to whole arrays.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fastq.kernels.isa import ISAS, missing

AVX2 = ("64bit,cmov,cx8,fxsr,sse,sse2,sse3,ssse3,sse4.1,sse4.2,popcnt,cx16,xsave,avx,avx2,fma,f16c,"
        "bmi,bmi2,lzcnt,movbe")  # fmt: skip
CPUS = {"haswell": AVX2, "x86-64": ""}
TESTS = {
    "test_ops.py": "aligned or wherever or quantize or dequantize or grid or histogram",
    "test_pointwise.py": "not assembly",
    "test_norms.py": "",
    "test_recurrent.py": "parity or extremes",
}


@pytest.mark.parametrize("cpu", CPUS)
def test_the_same_integers(cpu: str) -> None:
    (avx2,) = (isa for isa in ISAS if isa.name == "avx2")
    if platform.machine().lower() not in ("x86_64", "amd64") or missing(avx2):
        pytest.skip("this CPU lacks avx2")
    features = ",".join(f"+{name}" for name in CPUS[cpu].split(",") if name)
    given = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    here = Path(__file__).parent
    for file, chosen in TESTS.items():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                   "--show-capture=no", str(here / file), "-k", chosen]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        done = subprocess.run(
            command, env=environment | given, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:]
