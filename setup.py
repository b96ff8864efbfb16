"""The part of the build that pyproject.toml cannot say: the C++ kernels.

Without a compiler the package installs all the same, and runs on the kernels in PyTorch.
"""

import sys
from glob import glob

from setuptools import Extension, setup

# -ffp-contract: products and sums in one instruction. -Wno-psabi: vectors never leave a file.
# -fopenmp: compiled for it and not linked to it, see kernels/cpu/library.py.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
if sys.platform == "linux":
    FLAGS += ["-fopenmp", "-Wno-psabi"]

setup(
    ext_modules=[
        Extension(
            "octavo.kernels.cpu._native",
            sources=sorted(glob("native/*.cpp")),
            depends=sorted(glob("native/*.h")),
            extra_compile_args=FLAGS,
            language="c++",
            optional=True,
        )
    ]
)
