"""The part of the build that pyproject.toml cannot say: the C++ kernels.

Without a compiler the package installs all the same, and runs on the kernels in PyTorch.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# -g0: Python's own flags ask for what debuggers need, which makes the library seven times as large.
# -fwrapv: what is too large for an integer wraps around. -ffp-contract: products and sums in
# one instruction. -Wno-psabi: vectors never leave a file.
# -fopenmp: compiled for it and not linked to it, see kernels/cpu/library.py.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fwrapv", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-Wall", "-Wextra"]
if sys.platform == "linux":
    FLAGS += ["-fopenmp", "-Wno-psabi"]


def require_gcc(compiler):
    """Refuse what is not there, and clang: its code asks for an OpenMP of its own, whose threads
    PyTorch's would fight with.

    Raises:
        CompileError: which leaves an optional extension out; other errors would end the install.
    """
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise CompileError(f"{compiler} does not run: {error.strerror}") from None
    if "clang" in version:
        raise CompileError(f"{compiler} is clang; on Linux the kernels need g++ (CXX=g++)")


class BuildExt(build_ext):
    """As setuptools', with as many compilers at once as there are cores."""

    def build_extension(self, ext):
        if sys.platform == "linux":
            require_gcc(self.compiler.compiler_cxx[0])
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
