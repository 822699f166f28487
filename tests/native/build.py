"""Compiles the native driver with the kernels of some instruction sets.

By hand: python tests/native/build.py FOLDER [--compiler CXX] [--isas portable,avx2] [--flags="-O1 ..."]
"""

import argparse
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ISAS = json.loads((CSRC / "isas.json").read_text())
COMMON = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-g0"]


def sources(isas, wide_flags):
    """(file, flags) of all that the driver links."""
    kernels = [path for path in CSRC.glob("kernels/*/*.cpp") if path.stem not in ISAS]
    rest = [CSRC / "parallel.cpp", CSRC / "cpu_features.cpp", *HERE.glob("*.cpp")]
    wide = [
        (path, [*ISAS[isa]["flags"], *wide_flags])
        for isa in isas
        for path in CSRC.glob(f"kernels/*/{isa}.cpp")
    ]
    return [(path, []) for path in (*kernels, *rest)] + wide


def build(folder, isas, *, compiler="g++", flags=("-O1",), wide_flags=("-O3",), shared=False):
    """folder/driver, and with shared folder/driver.so, of the portable kernels and those of `isas`.

    These are compiled as setup.py does; the portable kernels would take half a minute that way.
    """
    names = ", ".join(f'"{isa}"' for isa in ("portable", *isas))
    defines = [f"-DPYENGINE_{isa.upper()}" for isa in isas] + [f"-DPYENGINE_ISAS={names}"]
    base = [*compiler.split(), *COMMON, *flags, *defines, f"-I{CSRC}", f"-I{HERE}"]
    os.makedirs(folder, exist_ok=True)

    def compile_one(source):
        path, wide = source
        to = Path(folder, f"{path.parent.name}_{path.stem}.o")
        run([*base, *wide, "-c", str(path), "-o", str(to)])
        return str(to)

    order = sorted(sources(isas, wide_flags), key=lambda source: not source[1])  # the longest first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, order))
    driver = Path(folder, "driver")
    run([*compiler.split(), *flags, *objects, "-o", str(driver)])
    if shared:
        run([*compiler.split(), *flags, "-shared", *objects, "-o", f"{driver}.so"])
    return driver


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}"[:4000])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--isas", default="")
    parser.add_argument("--flags", default="-O1", help="of all files")
    parser.add_argument(
        "--wide-flags", default="-O3", help="of the kernels of these instruction sets besides"
    )
    options = parser.parse_args()
    isas = [isa for isa in options.isas.split(",") if isa not in ("", "portable")]
    flags = {"flags": options.flags.split(), "wide_flags": options.wide_flags.split()}
    print(build(options.folder, isas, compiler=options.compiler, shared=True, **flags))
