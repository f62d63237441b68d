"""What a sampler has learned.

exact.py  exact distances on enumerable sequence sets
"""

from fastgfn.evaluate.exact import Divergence, divergence, sequence_log_probs

__all__ = ["Divergence", "divergence", "sequence_log_probs"]
