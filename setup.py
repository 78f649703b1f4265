"""Builds the native extensions: `pysmooth._cpu`, and `pysmooth._cuda` where nvcc and a GPU are.

pybind11 + plain C++17 (and CUDA), compiled by ninja.

Two things need more than setuptools' own build_ext: every kernel source is compiled once per ISA
level with that level's flags, and the compile should be parallel and incremental. So this file
writes a build.ninja and lets ninja do the rest.

Environment:
    PYSMOOTH_WERROR=1       warnings are errors (CI)
    PYSMOOTH_CXXFLAGS=...   extra compiler flags
    PYSMOOTH_LDFLAGS=...    extra linker flags; symbols are then kept
    PYSMOOTH_LEVELS=baseline  only these instruction sets, of baseline,avx2,avx512
    PYSMOOTH_BUILD=name     objects go to build/name: builds of other flags leave each other alone
    PYSMOOTH_CUDA=1|0       build the CUDA module wherever nvcc is found (fail without), or never
    PYSMOOTH_CUDA_ARCHS=90  architectures, separated by commas; else those of the GPUs that are
                            here, or 80,90,100. The last one's PTX goes along for what is newer
    CUDA_HOME=...           where the toolkit is, if nvcc is not on PATH
    LIBOMP=...              macOS: where omp.h and libomp.dylib are, else Homebrew's libomp
"""

from __future__ import annotations

import importlib.metadata
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

MAC = sys.platform == "darwin"

# -ffp-contract=off: a*b+c stays two roundings, on every ISA level and every backend alike.
CXXFLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *(("-Xpreprocessor",) if MAC else ()),  # Apple's clang knows OpenMP, but hides it
    *("-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]

# Kernel sources are compiled once per level, to be chosen from at run time; the rest only once.
KERNELS = {"reduce", "source", "apply", "staging", "draw", "probe", "codec", "aggregate"}
# Kernels that take longest to compile; vectors are written out in them, so -O3 adds a fifth to that
# and nothing to their speed.
SLOW = {"source", "reduce", "apply"}
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    ISA_FLAGS["avx512"] += ["-mfma", "-mf16c"]
if os.environ.get("PYSMOOTH_LEVELS"):
    ISA_FLAGS = {name: ISA_FLAGS[name] for name in os.environ["PYSMOOTH_LEVELS"].split(",")}


# No contraction here either.
NVCCFLAGS = ["-std=c++17", "-O3", "--fmad=false", "--expt-relaxed-constexpr"]
NVCCFLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]
CUDA_BINDINGS = ("aliasing", "direct", "tensor_reader", "watch")  # that both modules have
CUDA_PARTS = 4  # kParts in csrc/cuda/kernels.h


def nvcc() -> str | None:
    """The nvcc program."""
    for home in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        if (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def gpus() -> list[str]:
    """Compute capabilities of the GPUs that are here, as nvcc writes them."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({line.strip().replace(".", "") for line in said.splitlines()}, key=int)


def wants_cuda() -> bool:
    """Whether the CUDA module is built: compiling it takes minutes, so not without a use for it."""
    wish = os.environ.get("PYSMOOTH_CUDA", "")
    if wish == "1" and nvcc() is None:
        sys.exit("pysmooth: PYSMOOTH_CUDA=1, but nvcc was not found; set CUDA_HOME or PATH")
    return wish == "1" or (wish != "0" and nvcc() is not None and bool(gpus()))


def cuda_archs() -> list[str]:
    """Architectures to compile for."""
    given = os.environ.get("PYSMOOTH_CUDA_ARCHS", "").replace(";", ",").split(",")
    return [a for a in given if a] or [a for a in gpus() if int(a) >= 80] or ["80", "90", "100"]


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


def notices() -> str:
    """The licences of what is compiled into the modules, as its distributions state them."""
    parts = ["Parts of these packages are compiled into pysmooth's native modules.\n"]
    for name in ("pybind11", "apache-tvm-ffi" if importlib.util.find_spec("tvm_ffi") else "torch"):
        files = importlib.metadata.distribution(name).files or []
        texts = [f.read_text() for f in files if f.name.upper().startswith(("LICEN", "NOTICE"))]
        if not texts:
            sys.exit(f"pysmooth: {name} is installed without its licence")
        what = "headers" if name == "pybind11" else "dlpack.h"
        parts += [f"{name} {importlib.metadata.version(name)} ({what})\n", *texts]
    return f"\n{'=' * 80}\n".join(parts)


def libomp() -> Path:
    """macOS: the OpenMP that is compiled against. The one that runs is torch's."""
    place = os.environ.get("LIBOMP")
    if place is None:
        try:
            brew = ["brew", "--prefix", "libomp"]
            place = subprocess.run(brew, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            sys.exit("pysmooth: no OpenMP found; `brew install libomp`, or set LIBOMP")
    return Path(place)


def link_command() -> str:
    """How ninja links the CPU module."""
    if not MAC:
        ldflags = escape(os.environ.get("PYSMOOTH_LDFLAGS", "-s"))
        return f"$cxx -shared -fopenmp -Wl,--no-undefined-version {ldflags} $in -o $out"
    # Two OpenMP runtimes in a process are a bug: it looks for the one that torch has loaded.
    ldflags = escape(os.environ.get("PYSMOOTH_LDFLAGS", "-Wl,-x"))
    library = escape(libomp() / "lib")
    return (
        f"$cxx -bundle -undefined dynamic_lookup -L{library} -lomp "
        f"-Wl,-rpath,@loader_path/../torch/lib {ldflags} $in -o $out && "
        f"install_name_tool -change {library}/libomp.dylib @rpath/libomp.dylib $out"
    )


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
        work = ROOT / "build" / os.environ.get("PYSMOOTH_BUILD", "")
        work /= f"{ext.name}-{sys.implementation.cache_tag}-{self.plat_name}"
        work.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (CSRC / "bindings" / "module.cpp").is_file():
            sys.exit("pysmooth: csrc/ is missing; this source distribution is incomplete")
        cuda = ext.name.endswith("_cuda")
        lines = self.cuda_lines(target) if cuda else self.cpu_lines(target, work)
        (work / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([ninja(), "-C", str(work)], check=True)
        if not self.editable_mode:
            (target.parent / "THIRD_PARTY_LICENSES").write_text(notices())

    def compile_rule(self, *defines: str) -> list[str]:
        """How ninja compiles C++."""
        includes = [pybind11.get_include(), sysconfig.get_path("include"), dlpack_include()]
        includes += [libomp() / "include"] if MAC else []
        # Other people's headers are not ours to fix: -isystem keeps their warnings out of -Werror.
        flags = [*CXXFLAGS, f"-I{CSRC}", *(f"-isystem{path}" for path in includes)]
        flags += defines
        if os.environ.get("PYSMOOTH_WERROR") == "1":
            flags.append("-Werror")
        flags += os.environ.get("PYSMOOTH_CXXFLAGS", "").split()
        return [
            f"cxx = {os.environ.get('CXX', 'c++' if MAC else 'g++')}",
            f"flags = {' '.join(escape(f) for f in flags)}",
            "rule compile",
            "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
        ]

    def cpu_lines(self, target: Path, work: Path) -> list[str]:
        """build.ninja for the CPU module."""
        lines = [
            *self.compile_rule(f"-DPYSMOOTH_ISA_LEVELS={len(ISA_FLAGS)}"),
            "rule link",
            f"  command = {link_command()}",
            "  description = link $out",
        ]
        objects = []
        for source in self.bindings(work):
            objects.append(f"{source.stem}.o")
            lines += [f"build {objects[-1]}: compile {escape(source)}", "  isa = -O2"]
        # What takes longest comes first, or one core would have it to itself in the end.
        for source in sorted(CSRC.glob("cpu/*.cpp"), key=lambda s: (s.stem not in SLOW, s.stem)):
            levels = ISA_FLAGS if source.stem in KERNELS else {"baseline": []}
            for level, extra in levels.items():
                objects.append(f"{source.stem}.{level}.o")
                lines.append(f"build {objects[-1]}: compile {escape(source)}")
                level_flags = [f"-DPYSMOOTH_ISA={level}", *extra]
                level_flags += ["-O2"] if source.stem in SLOW else []
                lines.append(f"  isa = {' '.join(level_flags)}")
        lines.append(f"build {escape(target)}: link {' '.join(objects)}")
        return lines

    def bindings(self, work: Path) -> list[Path]:
        """What binds the CPU module; but for development, where files change, in one piece.

        Every file that uses pybind11 compiles the same four seconds of it.
        """
        sources = sorted(CSRC.glob("bindings/*.cpp"))
        if self.editable_mode:
            return sources
        whole = work / "bindings.cpp"
        whole.write_text("".join(f'#include "{source}"\n' for source in sources))
        return [whole]

    def cuda_lines(self, target: Path) -> list[str]:
        """build.ninja for the CUDA module: it links the runtime statically, and no libcuda."""
        flags = [*NVCCFLAGS, f"-I{CSRC}"]
        if os.environ.get("PYSMOOTH_WERROR") == "1":
            flags += ["-Werror", "all-warnings"]
        archs = cuda_archs()
        flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        lines = [
            *self.compile_rule('-DPYSMOOTH_BACKEND=\\"cuda\\"', "-DPYSMOOTH_DEVICE=kDLCUDA"),
            f"nvcc = {escape(nvcc())}",
            f"nvccflags = {' '.join(escape(f) for f in flags)}",
            "rule nvcc",
            "  command = $nvcc $nvccflags $part -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $out",
            "rule link",
            "  command = $nvcc -shared -cudart static -Xlinker -s,--exclude-libs=ALL $in -o $out",
            "  description = link $out",
        ]
        objects = []

        def add(rule: str, source: Path, name: str, part: str = "") -> None:
            objects.append(f"{name}.o")
            lines.append(f"build {objects[-1]}: {rule} {escape(source)}")
            lines.append(f"  part = {part}")

        for part in range(CUDA_PARTS):
            add("nvcc", CSRC / "cuda" / "rules.cu", f"rules.{part}", f"-DPYSMOOTH_PART={part}")
        for name in ("common", "launch", "codec", "messages"):
            add("nvcc", CSRC / "cuda" / f"{name}.cu", name)
        for source in [
            *sorted(CSRC.glob("bindings/cuda/*.cpp")),
            *(
                CSRC / "bindings" / f"{x}.cpp"
                for x in ("aliasing", "direct", "tensor_reader", "watch")
            ),
            *sorted(CSRC.glob("cuda/*.cpp")),
        ]:
            add("compile", source, f"{source.parent.name}.{source.stem}")
        lines.append(f"build {escape(target)}: link {' '.join(objects)}")
        return lines


extensions = [Extension("pysmooth._cpu", [])]
if wants_cuda():
    extensions.append(Extension("pysmooth._cuda", []))
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
