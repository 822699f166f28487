"""Builds pyengine._C: one extension, one object per instruction set and op, chosen at run time.

The stem of a kernel file names its instruction set and so selects its compiler flags. A set that the compiler
does not know is left out of the build, and then out of the kernel table.
"""

import glob
import json
import os
import platform
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# {instruction set: processors that may have it, compiler flags}. -fno-tree-pre and -fno-schedule-insns keep
# GCC from hoisting loads in the tile loops, which would spill accumulators. -Wno-*uninitialized: GCC 12 finds
# that in its own AVX-512 header.
ISAS = json.loads(Path("csrc/isas.json").read_text())
ARCH = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
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
        isas = {
            name: isa["flags"]
            for name, isa in ISAS.items()
            if isa["arch"] == ARCH and self.knows(isa["flags"])
        }
        ext.define_macros += [(f"PYENGINE_{name.upper()}", "1") for name in isas]
        ext.sources = [s for s in ext.sources if stem(s) in isas or stem(s) not in ISAS]
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
    depends=[
        "csrc/isas.json",
        *glob.glob("csrc/**/*.h", recursive=True),
        *glob.glob("csrc/**/*.inc", recursive=True),
    ],
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
