"""Stage 1: prompts -> Rollouts.

sampling.py      `sample`: the request, checked, and its memory
engine.py        the running batch, a row per distinct prefix
static.py        the running batch on a GPU, a slot per trajectory
slots.py         its state and its step
graphs.py        its steps as CUDA graphs, and their memory
trajectories.py  what was drawn
draws.py         the next token of every trajectory of a step
nodes.py         which nodes of the growing token tree exist
options.py       what the behaviour policy adds to the policy
hooks.py         tools
drafts.py        what is drafted ahead: prompt n-grams, a draft model
"""

from fastgfn.rollout.drafts import Drafter, DraftRequest, Drafts, DraftSource, ModelDrafts, PromptLookup
from fastgfn.rollout.engine import OutOfMemory
from fastgfn.rollout.hooks import Tool
from fastgfn.rollout.options import SamplingOptions
from fastgfn.rollout.sampling import check_prompts, sample
from fastgfn.types import Grammar

__all__ = [
    "DraftRequest",
    "DraftSource",
    "Drafter",
    "Drafts",
    "Grammar",
    "ModelDrafts",
    "OutOfMemory",
    "PromptLookup",
    "SamplingOptions",
    "Tool",
    "check_prompts",
    "sample",
]
