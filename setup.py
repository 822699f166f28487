"""Builds pyengine._C: one extension, one object per instruction set and op, chosen at run time.

The stem of a kernel file names its instruction set and so selects its compiler flags. A set that the compiler
does not know is left out of the build, and then out of the kernel table.
"""

import glob
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import pybind11
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# -fno-tree-pre keeps GCC from hoisting loads out of the tile loops, which would spill accumulators.
ISA_FLAGS = {"avx2": ["-mavx2", "-mfma", "-mf16c", "-fno-tree-pre"]}
# As system headers, so that our warnings judge our code only.
HEADERS = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wno-sign-conversion", "-Wno-ignored-attributes"]


def stem(source: str) -> str:
    return os.path.splitext(os.path.basename(source))[0]


class BuildExt(build_ext):
    def knows(self, flags):
        command = [*self.compiler.compiler_cxx, *flags, "-x", "c++", "-fsyntax-only", "-"]
        return subprocess.run(command, input=b"", capture_output=True).returncode == 0

    def build_extension(self, ext):
        isas = {name: flags for name, flags in ISA_FLAGS.items() if self.knows(flags)}
        ext.define_macros += [(f"PYENGINE_{name.upper()}", "1") for name in isas]
        ext.sources = [s for s in ext.sources if stem(s) in isas or stem(s) not in ISA_FLAGS]
        compiler = self.compiler
        compile_one = compiler._compile

        def compile_all(sources, output_dir=None, macros=None, include_dirs=None, debug=0, extra_preargs=None,
                        extra_postargs=None, depends=None):  # fmt: skip
            macros, objects, extra, pp_opts, build = compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            cc_args = compiler._get_cc_args(pp_opts, debug, extra_preargs)

            def one(obj):
                source, extension = build[obj]
                compile_one(obj, source, extension, cc_args, [*extra, *isas.get(stem(source), [])], pp_opts)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(one, objects))
            return objects

        compiler.compile = compile_all
        super().build_extension(ext)


werror = ["-Werror"] if os.environ.get("PYENGINE_WERROR") else []
extension = Pybind11Extension(
    "pyengine._C",
    sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/limits/*.cpp") + glob.glob("csrc/kernels/*/*.cpp")),
    include_dirs=["csrc"],
    depends=glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.inc", recursive=True),
    cxx_std=17,
    # Contraction is off so that a multiply and an add are fused only where a kernel says so.
    extra_compile_args=[
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        *HEADERS,
        *WARNINGS,
        *werror,
    ],
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
