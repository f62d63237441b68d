"""Every launcher enters the device of its tensors, which need not be the current one."""

import contextlib

import pytest
import torch

from fastgfn.kernels import head, head_fused, head_sample_next, log_probs, path_attention, sample_next

SCALES = (1.0, None, 1.0)
LAUNCHES = {
    "entry_logits": (
        (head, "_entry_logits_fwd_kernel"),
        lambda x, i: head.entry_logits(x, x, None, None, i, i, 3, SCALES),
    ),
    "row_pass": (
        (head, "_row_pass_fwd_kernel"),
        lambda x, i: head.row_pass(x, x, None, None, (i, i, x[0]), x[:2], 0, 3, 0, 4, SCALES, 1.0),
    ),
    "fused_parts": (
        (head_fused, "_fused_parts_fwd_kernel"),
        lambda x, i: head_fused.fused_parts(x, x, None, None, 3, SCALES, 2),
    ),
    "fused_draw": (
        (head_sample_next, "_fused_draw_kernel"),
        lambda x, i: head_sample_next.fused_draw(x, x, None, None, 1.0, None, i, x[0], i, i, i, 0, i > 0),
    ),
    "draw_from_logits": (
        (sample_next, "_draw_from_logits_kernel"),
        lambda x, i: sample_next.draw_from_logits(x, i, x[0], i, i, i, 0, i > 0),
    ),
    "combine_draws": (
        (sample_next, "_draw_combine_kernel"),
        lambda x, i: sample_next.combine_draws(x, x.int(), x[0]),
    ),
    "path_attention": (
        (path_attention, "_path_attention_fwd_kernel"),
        lambda x, i: path_attention.path_attention(
            *[x[:, None]] * 3, i.int()[:, None], i * 0 + 1, 1.0, 0.0, 0
        ),
    ),
    "shared_prompts": (
        (path_attention, "_shared_prompts_fwd_kernel"),
        lambda x, i: path_attention.path_attention(
            *[x[:, None]] * 3, i.int()[:, None], i * 0 + 1, 1.0, 0.0, 0, i.int()[None], i * 0 + 1
        ),
    ),
    "log_probs_fwd": (
        (log_probs, "_log_probs_fwd_kernel"),
        lambda x, i: log_probs.log_probs_fwd(x, i, 0, None, 1.0, None, 1.0, -100),
    ),
    "log_probs_bwd": (
        (log_probs, "_log_probs_bwd_kernel"),
        lambda x, i: log_probs.log_probs_bwd(x[0], x[0], x[0], x, i, x, 0, None, 1.0, None, 1.0, -100),
    ),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launchers_enter_the_device_of_their_tensors(monkeypatch, name):
    (module, kernel), launch = LAUNCHES[name]
    entered, launched = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor.device)
        yield
        entered.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(list(entered))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for target in {(module, kernel), (sample_next, "_draw_combine_kernel")}:
        monkeypatch.setattr(*target, Kernel())
    launch(torch.randn(4, 4), torch.arange(4))
    assert launched and all(devices == [torch.device("cpu")] for devices in launched)
