"""Policies and how to load them. With attention.py, the only importer of transformers and peft.

Every pass runs in eval(): dropout would make the scored policy differ from the sampled one.
"""

from fastgfn.models.adapter import load_adapter_weights, save_adapter
from fastgfn.models.load import BUNDLED, bundled_model_folder, load_policy
from fastgfn.models.policy import Head, Policy, Reference
from fastgfn.models.shapes import SHAPES, random_policy
from fastgfn.models.temperature import Conditioning, condition

__all__ = [
    "BUNDLED",
    "Conditioning",
    "Head",
    "Policy",
    "Reference",
    "SHAPES",
    "bundled_model_folder",
    "condition",
    "load_adapter_weights",
    "load_policy",
    "random_policy",
    "save_adapter",
]
