"""Triton kernels, imported as fastgfn.kernels; they import torch and triton and nothing of ours."""

if __name__ != "fastgfn.kernels":
    # The repository root is on sys.path, and another package may look for the one named kernels on PyPI. It
    # finds a version too old to use, and none of these modules, which would be a second copy of ours.
    __version__ = "0"
    __path__ = []
