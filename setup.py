"""Everything static is in pyproject.toml; this file holds only what it cannot say."""

import glob
import os

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

# Decided by the toolkit and the torch build, never by a visible GPU; FASTGFN_CPU=1 forces a CPU build.
cuda = torch.version.cuda is not None and CUDA_HOME is not None and os.getenv("FASTGFN_CPU") != "1"
sources = sorted(glob.glob("csrc/*.cpp"))
if cuda:
    sources += sorted(glob.glob("csrc/cuda/*.cpp")) + sorted(glob.glob("csrc/cuda/*.cu"))

setup(
    packages=[
        "fastgfn",
        "fastgfn.reference",
        "fastgfn.ops",
        "fastgfn.functional",
        "fastgfn.models",
        "fastgfn.replay",
        "fastgfn.objectives",
        "fastgfn.rollout",
        "fastgfn.evaluate",
        "fastgfn.tasks",
        "fastgfn.lab",
        "fastgfn.integrations",
        "fastgfn.cli",
        "fastgfn.behavior",
        "fastgfn.config",
    ]
    + ["fastgfn.kernels"],
    package_dir={"fastgfn.kernels": "kernels"},
    package_data={"fastgfn": ["py.typed"], "fastgfn.lab": ["*.json"]},
    ext_modules=[
        (CUDAExtension if cuda else CppExtension)(
            "fastgfn._C",
            sources,
            depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/cuda/*.h")),
            extra_compile_args={
                "cxx": ["-O3", "-g0", "-fopenmp"],
                "nvcc": ["-O3"],
            },
            extra_link_args=["-fopenmp"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
