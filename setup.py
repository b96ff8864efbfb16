"""The part of the build that pyproject.toml cannot say: the C++ kernels.

Without a compiler the package installs all the same, and runs on the kernels in PyTorch.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# -g0: Python's own flags ask for what debuggers need, which makes the library seven times as large.
# -ffp-contract: products and sums in one instruction. -Wno-psabi: vectors never leave a file.
# -fopenmp: compiled for it and not linked to it, see kernels/cpu/library.py.
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
if sys.platform == "linux":
    FLAGS += ["-fopenmp", "-Wno-psabi"]


class BuildExt(build_ext):
    """As setuptools', with as many compilers at once as there are cores."""

    def build_extension(self, ext):
        compile_all = self.compiler.compile

        def compile_each(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_all([source], **options), sources)
                return list(chain.from_iterable(made))

        self.compiler.compile = compile_each
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        Extension(
            "octavo.kernels.cpu._native",
            sources=sorted(glob("native/*.cpp")),
            depends=sorted(glob("native/*.h")),
            extra_compile_args=FLAGS,
            language="c++",
            optional=True,
        )
    ],
)
