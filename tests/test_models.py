import pytest
import torch

from fastgfn.checkpoint import save_adapter
from fastgfn.checks import InputError
from fastgfn.models import bundled_model_folder, load_policy
from fastgfn.packing import pack
from fastgfn.rollout import sample
from fastgfn.scoring import score
from fastgfn.types import Constraints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policy():
    return load_policy(lora_rank=4)


def test_the_bundled_model_is_converted_once(policy):
    folder = bundled_model_folder()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert bundled_model_folder() == folder and (folder / "model.safetensors").stat().st_mtime_ns == before
    assert policy.vocab_size == 49152 and policy.max_positions == 8192
    assert policy.decode(policy.encode("57\n")) == "57\n"
    assert len(policy.encode("100")) == 3, "numbers are spelled digit by digit"


def test_a_new_adapter_changes_nothing_and_the_tree_equals_plain_forwards(policy):
    prompt = policy.encode("The capital of France is")
    rollouts = sample(
        [prompt], policy=policy, constraints=Constraints(2, max_length=5), num_samples=4, seed=1
    )
    tree = pack(rollouts)
    got = score(tree, policy=policy)
    base = score(tree, policy=policy.reference)
    torch.testing.assert_close(got.log_pf.detach(), base.log_pf, rtol=0, atol=1e-5)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(bundled_model_folder(), attn_implementation="sdpa").eval()
    for n, sequence in enumerate(rollouts.sequences()):
        ids = prompt + sequence
        with torch.no_grad():
            log_p = plain(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        want = sum(float(log_p[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))
        path, node = 0.0, int(tree.leaf[n])
        while node >= 0:
            path, node = path + float(got.log_pf[node].detach()), int(tree.parent[node])
        assert path == pytest.approx(want, abs=2e-4)


def test_an_adapter_survives_the_disk(policy, tmp_path):
    with torch.no_grad():
        for name, p in policy.parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
    save_adapter(policy, tmp_path)
    again = load_policy(adapter=tmp_path)
    for (name, a), (other, b) in zip(policy.parameters(), again.parameters(), strict=True):
        assert name == other and torch.equal(a, b)


def test_refuses_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match="adapter must be a folder with adapter_config.json"):
        load_policy(adapter=tmp_path)
    with pytest.raises(InputError, match="model must be 'smollm2-135m', a local folder or a hub id"):
        load_policy(str(tmp_path / "absent"))
    with pytest.raises(InputError, match="lora_rank must be >= 1, got 0"):
        load_policy(lora_rank=0)


def test_a_pass_of_the_base_leaves_frozen_adapter_weights_frozen(tiny_policy):
    policy = tiny_policy()
    for name, p in policy.model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    before = [name for name, _ in policy.parameters()]
    ids = torch.arange(3)
    policy.reference.tree_hidden(ids, ids, torch.full((3,), 3, dtype=torch.int32))
    assert [name for name, _ in policy.parameters()] == before
