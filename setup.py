"""Package map, and the native library where UNIFORMER_BUILD_NATIVE=1 asks for it.

Imports nothing but setuptools: pip runs this file where torch is absent. Without the library the
sources travel along, and are compiled when they are first needed.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

KERNELS = Path(__file__).parent / "kernels" / "uniformer_kernels"


class BuildPy(build_py):
    """Compile `csrc/` into the package, for this machine's processor."""

    def run(self) -> None:
        super().run()
        if os.environ.get("UNIFORMER_BUILD_NATIVE") != "1" or self.editable_mode:
            return
        spec = importlib.util.spec_from_file_location("_native", KERNELS / "_native.py")
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        built = Path(self.build_lib, "uniformer_kernels", "libnative.so")
        command = native.cpu_command(os.environ.get("CXX"))
        native.compile_library(native.sources("native"), command, built)


class WithNative(Distribution):
    """A wheel with compiled code is not for any machine."""

    def has_ext_modules(self) -> bool:
        return os.environ.get("UNIFORMER_BUILD_NATIVE") == "1"


setup(
    packages=["uniformer", "uniformer_kernels", "uniformer_kernels.csrc"],
    # One level down, so that a checkout does not shadow the `kernels` package of PyPI.
    package_dir={
        "uniformer": "uniformer",
        "uniformer_kernels": "kernels/uniformer_kernels",
        "uniformer_kernels.csrc": "csrc",
    },
    package_data={
        "uniformer": ["py.typed", "labels/*.txt"],
        "uniformer_kernels": ["py.typed", "tuned.json"],
        "uniformer_kernels.csrc": ["*.cpp", "*.cu", "*.h"],
    },
    cmdclass={"build_py": BuildPy},
    distclass=WithNative,
)
