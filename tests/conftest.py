"""Seeds, and the Triton interpreter where there is no GPU (decided before triton is imported)."""

import os
import random
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not os.path.exists("/dev/nvidiactl"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
