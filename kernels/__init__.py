"""Triton kernels, imported as fastgfn.kernels; they import torch and triton and nothing of ours."""

if __name__ != "fastgfn.kernels":
    raise ImportError("import fastgfn.kernels, not kernels; run `make install` and use the pytest script")
