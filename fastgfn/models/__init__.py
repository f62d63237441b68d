"""Policies and how to load them. With attention.py, the only importer of transformers and peft.

Every pass runs in eval(): dropout would make the scored policy differ from the sampled one.
"""

from fastgfn.models.load import BUNDLED, bundled_model_folder, load_policy
from fastgfn.models.policy import Head, Policy, Reference, load_adapter_weights, save_adapter
from fastgfn.models.shapes import SHAPES, random_policy

__all__ = [
    "BUNDLED",
    "Head",
    "Policy",
    "Reference",
    "SHAPES",
    "bundled_model_folder",
    "load_adapter_weights",
    "load_policy",
    "random_policy",
    "save_adapter",
]
