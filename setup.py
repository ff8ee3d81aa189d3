"""What pyproject.toml cannot say: where the shipped policies lie, and that the kernels may fail to build."""

from setuptools import Extension, find_packages, setup

# Python's own flags hold -fwrapv, which costs the kernels a third of their speed. No errno and no traps: loops over
# square roots and comparisons can then be vectorised. Products and sums may fuse.
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fopenmp",
    "-fno-wrapv",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]

LEVELS = {
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4"],
    "v4_amx": ["-march=x86-64-v4", "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mavx512bf16"],
}

setup(
    packages=[*find_packages(include=["guard", "guard.*"]), "guard.policies"],
    package_dir={"guard.policies": "policies"},
    ext_modules=[
        Extension(
            f"guard.model._native_{level}",
            sources=["guard/model/native/kernels.cpp"],
            extra_compile_args=[*FLAGS, *flags, "-mprefer-vector-width=512"],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,  # without a compiler, and on other processors, the engine computes with torch
        )
        for level, flags in LEVELS.items()
    ],
)
