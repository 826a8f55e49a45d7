"""The C extension; everything else about the package is in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup

KERNELS = Path("src/wanda/kernels")

setup(
    ext_modules=[
        Extension(
            "wanda.kernels._native",
            sources=sorted(str(file) for file in KERNELS.glob("*.c")),
            depends=sorted(str(file) for file in KERNELS.glob("*.h")),
            define_macros=[("Py_LIMITED_API", "0x030b0000")],  # one binary for Python 3.11 and all later ones
            py_limited_api=True,
            extra_compile_args=["-O3", "-g0", "-std=c11", "-D_GNU_SOURCE", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,  # without a compiler the package works too, on torch
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
