"""Builds the C++/CUDA libraries with CMake and ninja; everything else is in pyproject.toml.

Environment: YOCO_EXT_CUDA=0|1|auto (auto: when nvcc and a CUDA PyTorch are there), YOCO_CUDA_ARCHS (default "80;90a",
TORCH_CUDA_ARCH_LIST is respected), YOCO_CPU_ISAS, CUTLASS_DIR, MAX_JOBS, CMAKE_ARGS.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = "0.1.0"


def require_torch():
    """The libraries are compiled against the PyTorch they will run with, so it has to be in this environment."""
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            "\nyoco_ext: PyTorch is not installed in the environment that builds this package.\n"
            "Its kernels are compiled against your PyTorch, so pip must not build it in an isolated environment:\n\n"
            "    pip install 'torch>=2.11' setuptools ninja cmake pybind11\n"
            "    pip install --no-build-isolation .\n"
        )
    import torch

    return torch


def find_nvcc() -> str | None:
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    candidates += [f"{os.environ[name]}/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((path for path in candidates if path and Path(path).exists()), None)


def want_cuda(torch) -> bool:
    choice = os.environ.get("YOCO_EXT_CUDA", "auto").lower()
    if choice not in ("0", "1", "auto"):
        sys.exit(f"YOCO_EXT_CUDA is {choice!r}; allowed: 0, 1, auto")
    missing = []
    if find_nvcc() is None:
        missing.append("nvcc was not found")
    if torch.version.cuda is None:
        missing.append(f"PyTorch {torch.__version__} is a CPU build")
    if choice == "1" and find_nvcc() is None:
        sys.exit("YOCO_EXT_CUDA=1, but nvcc was not found (set CUDACXX or CUDA_HOME)")
    cuda = choice == "1" or (choice == "auto" and not missing)
    reason = "YOCO_EXT_CUDA=0" if choice == "0" else ", ".join(missing)
    print(f"yoco_ext: building the CPU {'and the CUDA back ends' if cuda else f'back end only ({reason})'}", flush=True)
    return cuda


def cuda_archs() -> str:
    if archs := os.environ.get("YOCO_CUDA_ARCHS"):
        return archs
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        numbers = listed.replace("+PTX", "").replace(".", "").replace(";", " ").split()
        # Kernels for Hopper need its architecture-specific target.
        return ";".join("90a" if number == "90" else number for number in numbers)
    return "80;90a"


def jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    free_gb = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**30
    return max(1, min(len(os.sched_getaffinity(0)), free_gb // 2))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = require_torch()
        cuda = want_cuda(torch)
        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # An editable install copies the extension module into the source tree, but not the libraries beside it.
        targets = {package, ROOT / "yoco_ext"} if self.inplace or getattr(self, "editable_mode", False) else {package}
        build = ROOT / "build" / f"cmake-{'cuda' if cuda else 'cpu'}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": str(package),
            "Python_EXECUTABLE": sys.executable,
            "YOCO_VERSION": VERSION,
            "YOCO_EXT_CUDA": "ON" if cuda else "OFF",
        }
        if pybind11 := importlib.util.find_spec("pybind11"):
            options["PYBIND11_DIR"] = f"{pybind11.submodule_search_locations[0]}/share/cmake/pybind11"
        if isas := os.environ.get("YOCO_CPU_ISAS"):
            options["YOCO_CPU_ISAS"] = isas
        if cuda:
            options["CMAKE_CUDA_COMPILER"] = find_nvcc()
            options["YOCO_CUDA_ARCHS"] = cuda_archs()
        arguments = [f"-D{name}={value}" for name, value in options.items()]
        arguments += os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *arguments], check=True)
        subprocess.run(["cmake", "--build", build, "--parallel", str(jobs())], check=True)
        for target in targets:
            target.mkdir(parents=True, exist_ok=True)
            if not cuda:
                # A library of an earlier CUDA build would be loaded in spite of YOCO_EXT_CUDA=0.
                for name in ("libyoco_ext_cuda.so", "libyoco_ext_cuda.kernels.json"):
                    (target / name).unlink(missing_ok=True)
            subprocess.run(["cmake", "--install", build, "--prefix", target], check=True)


if __name__ == "__main__":
    if any(command in sys.argv for command in ("build", "build_ext", "bdist_wheel", "editable_wheel", "install")):
        require_torch()
    setup(
        version=VERSION,
        packages=[*find_packages(include=["yoco_ext", "yoco_ext.*"]), "yoco_ext.bench"],
        package_dir={"yoco_ext.bench": "bench"},
        ext_modules=[Extension("yoco_ext._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
