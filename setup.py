"""Builds the native extension `pysmooth._cpu`: pybind11 + plain C++17, compiled by ninja.

Two things need more than setuptools' own build_ext: every kernel source is compiled once per ISA
level with that level's flags, and the compile should be parallel and incremental. So this file
writes a build.ninja and lets ninja do the rest.

Environment:
    PYSMOOTH_WERROR=1       warnings are errors (CI)
    PYSMOOTH_CXXFLAGS=...   extra compiler flags
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# -ffp-contract=off: a*b+c stays two roundings, on every ISA level and every backend alike.
CXXFLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]

# Kernel sources are compiled once per level, to be chosen from at run time; the rest only once.
KERNELS = {"reduce", "source", "apply", "staging", "draw", "probe"}
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    ISA_FLAGS["avx512"] += ["-mfma", "-mf16c"]


def dlpack_include() -> Path:
    """The DLPack header: from the build requirement, else from an installed torch."""
    for package, folder, header in (
        ("tvm_ffi", "include", "dlpack/dlpack.h"),
        ("torch", "include", "ATen/dlpack.h"),
    ):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (Path(place) / folder / header).is_file():
                return Path(place) / folder
    sys.exit("pysmooth: no DLPack header found; `pip install apache-tvm-ffi` (or torch) and retry")


def ninja() -> str:
    """The ninja program: the build requirement's own, else the one on PATH."""
    try:
        import ninja as package

        return str(Path(package.BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja") or sys.exit("pysmooth: ninja not found; `pip install ninja`")


def escape(text: object) -> str:
    """Quote a path or flag for ninja."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Writes build.ninja for each extension and runs it."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension module."""
        # Not self.build_temp: an editable install gets a fresh one each time, and would start over.
        work = ROOT / "build" / f"{ext.name}-{sys.implementation.cache_tag}-{self.plat_name}"
        work.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(self.ninja_file(target))
        subprocess.run([ninja(), "-C", str(work)], check=True)

    def ninja_file(self, target: Path) -> str:
        """The text of build.ninja for the CPU module."""
        if not (CSRC / "bindings" / "module.cpp").is_file():
            sys.exit("pysmooth: csrc/ is missing; this source distribution is incomplete")
        includes = [pybind11.get_include(), sysconfig.get_path("include"), dlpack_include()]
        # Other people's headers are not ours to fix: -isystem keeps their warnings out of -Werror.
        flags = [*CXXFLAGS, f"-I{CSRC}", *(f"-isystem{path}" for path in includes)]
        flags += [f"-DPYSMOOTH_ISA_LEVELS={len(ISA_FLAGS)}"]
        if os.environ.get("PYSMOOTH_WERROR") == "1":
            flags.append("-Werror")
        flags += os.environ.get("PYSMOOTH_CXXFLAGS", "").split()
        lines = [
            f"cxx = {os.environ.get('CXX', 'g++')}",
            f"flags = {' '.join(escape(f) for f in flags)}",
            "rule compile",
            "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link",
            "  command = $cxx -shared -fopenmp -Wl,--no-undefined-version -s $in -o $out",
            "  description = link $out",
        ]
        objects = []
        for source in sorted(CSRC.glob("bindings/*.cpp")):
            objects.append(f"{source.stem}.o")
            lines.append(f"build {objects[-1]}: compile {escape(source)}")
        for source in sorted(CSRC.glob("cpu/*.cpp")):
            levels = ISA_FLAGS if source.stem in KERNELS else {"baseline": []}
            for level, extra in levels.items():
                objects.append(f"{source.stem}.{level}.o")
                lines.append(f"build {objects[-1]}: compile {escape(source)}")
                lines.append(f"  isa = -DPYSMOOTH_ISA={level} {' '.join(extra)}")
        lines.append(f"build {escape(target)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


setup(ext_modules=[Extension("pysmooth._cpu", [])], cmdclass={"build_ext": NinjaBuild})
