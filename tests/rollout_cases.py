"""An engine of slots without `sample` around it."""

import torch

from fastgfn.rollout import SamplingOptions, engine, static
from fastgfn.rollout.draws import Drawer


def static_engine(policy, constraints, prompts, num_samples, batch_size, **options):
    group = torch.arange(len(prompts)).repeat_interleave(num_samples)
    tensors = [torch.tensor(p) for p in prompts]
    request = engine.Request(tensors, group, constraints, torch.ones(len(group)), 0)
    drawer = Drawer(policy, constraints, SamplingOptions(), 4)
    return static.StaticEngine(policy, request, drawer, batch_size, **options)
