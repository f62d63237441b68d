"""The CUDA half of csrc compiles: nvcc needs no GPU, and no .cu file includes torch."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

CUDA_SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
KERNELS = sorted(CUDA_SOURCES.glob("*.cu"))
REGISTRATIONS = sorted(CUDA_SOURCES.glob("*.cpp"))

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def test_sources_exist():
    assert KERNELS and REGISTRATIONS


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_include_no_torch(source):
    own = [source, *source.parent.parent.glob("subtb.h")]
    included = [line for path in own for line in path.read_text().splitlines() if line.startswith("#include")]
    assert not [line for line in included if "ATen" in line or "torch" in line or "c10" in line]


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_compile(source, arch, tmp_path):
    output = tmp_path / "kernel.o"
    command = ["nvcc", "-c", "-O3", f"-arch={arch}", "-Xptxas", "-v", str(source), "-o", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert output.stat().st_size > 0
    spills = [line for line in run.stderr.splitlines() if "spill stores" in line]
    assert spills and all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


@needs_nvcc
@pytest.mark.parametrize("source", REGISTRATIONS, ids=lambda path: path.name)
def test_registrations_parse(source, tmp_path):
    if torch.version.cuda is None:
        # A CPU build of torch ships its CUDA headers without this one, which only lists build options.
        macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
        macros.parent.mkdir(parents=True)
        macros.touch()
    # nvcc hands a .cpp file to the host compiler and adds the toolkit's headers.
    command = ["nvcc", "-c", "-std=c++20", "-Xcompiler", "-fsyntax-only", str(source)]
    command += [f"-I{folder}" for folder in [tmp_path, *include_paths()]]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
