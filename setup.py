"""Builds the kernels where there is a compiler; everything else is in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup

KERNELS = Extension(
    "dstlib.engine._kernels",
    sources=sorted(glob("dstlib/engine/csrc/*/*.cpp")),
    depends=sorted(path for kind in ("h", "inc", "def") for path in glob(f"dstlib/**/*.{kind}", recursive=True)),
    extra_compile_args=["-O3", "-std=gnu++17", "-fvisibility=hidden", "-fno-math-errno"],
    extra_link_args=["-lpthread", "-ldl"],
    optional=True,  # without a compiler, or with one that takes other options, the engine computes with torch
)

setup(ext_modules=[KERNELS])
