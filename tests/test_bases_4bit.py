"""4-bit bases of bitsandbytes, against a policy of their dequantised weights; skipped without the package.

transformers also needs accelerate to load them.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

from transformers import BitsAndBytesConfig  # noqa: E402

from fastgfn.checks import InputError  # noqa: E402
from fastgfn.models import Policy  # noqa: E402
from fastgfn.models.load import add_adapter  # noqa: E402
from fastgfn.ops.tree import path_nodes  # noqa: E402
from fastgfn.packing import pack  # noqa: E402
from fastgfn.passes import add_gradients  # noqa: E402
from fastgfn.rewards import LMReward, log_reward  # noqa: E402
from fastgfn.rollout import sample  # noqa: E402
from fastgfn.scoring import score  # noqa: E402
from fastgfn.types import Constraints  # noqa: E402

PROMPTS = [[1, 2, 3, 4, 5, 6], [7, 3]]
CONSTRAINTS = Constraints(0, max_length=8)
# blocks of 64 weights have to divide the rows, in the layout that CPUs with AVX512-BF16 prefer
WIDTHS = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=61, num_hidden_layers=2, max_position_embeddings=64, **WIDTHS)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return path


def loaded(folder, compute=None, nested=False):
    options = dict(attn_implementation="fastgfn", dtype=torch.float32)
    if compute is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=nested,
        )
        options["device_map"] = {"": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def with_adapter(model):
    torch.manual_seed(4)
    model = add_adapter(model.requires_grad_(False), rank=2, alpha=2.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape))
    return model


def road(policy, tree=None):
    rollouts = sample(PROMPTS, policy=policy, constraints=CONSTRAINTS, num_samples=6, seed=2)
    own = pack(rollouts)
    scored = score(own, policy=policy).log_pf.detach()
    nodes = path_nodes(own.parent, own.leaf, rollouts.lengths, CONSTRAINTS.max_length)
    drift = (scored[nodes.clamp(min=0)] - rollouts.log_pf)[rollouts.action_mask()].abs().max()
    tree = own if tree is None else tree
    reward = LMReward(policy.reference)
    scored, values = score(tree, policy=policy), log_reward(tree, reward=reward)
    result = add_gradients(tree, policy=policy, reward=reward)
    grads = [p.grad.double() for _, p in policy.parameters()]
    return rollouts, tree, float(drift), (scored.log_pf, scored.log_pterm, values, result.loss), grads


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_road_over_a_4bit_base_is_that_over_its_dequantised_weights(folder, compute, nested):
    packed, plain = loaded(folder, compute, nested), loaded(folder)
    layers = {n: m for n, m in packed.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == 14 and all(m.weight.dtype == torch.uint8 for m in layers.values())
    for name, layer in layers.items():
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        gap = plain.get_submodule(name).weight - weight
        assert 0.01 < float(gap.abs().max()) and gap.shape == weight.shape
        plain.get_submodule(name).weight.data = weight.float()
    truth, policy = Policy(with_adapter(plain)), Policy(with_adapter(packed))
    assert policy.num_linear_weights == truth.num_linear_weights
    assert policy.merged_bytes() == 0 < truth.merged_bytes()
    drawn, tree, _, want, want_grads = road(truth)
    got_drawn, _, drift, got, grads = road(policy, tree)
    exact = compute == torch.float32
    if exact:
        assert got_drawn.sequences() == drawn.sequences()
    assert drift <= (1e-5 if exact else 0.1)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=3e-5 if exact else 0.2)
    # with weights that were repacked for inference the gradients are off by more than their norm
    for a, b in zip(grads, want_grads, strict=True):
        assert float(b.norm()) > 0 and float((a - b).norm()) <= (1e-4 if exact else 0.1) * float(b.norm())
    assert all(m.weight.dtype == torch.uint8 for m in layers.values())


def test_weights_that_were_packed_for_inference_are_refused(folder):
    model = loaded(folder, torch.float32).eval()
    layer = model.model.layers[0].self_attn.q_proj
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16")
    with torch.no_grad():
        layer(torch.zeros(1, 64))
    want = (
        "Policy: .*q_proj.* must be as it was loaded, got 4-bit weights packed for inference; load it again"
    )
    with pytest.raises(InputError, match=want):
        Policy(with_adapter(model))
