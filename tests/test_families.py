"""Every model family as a policy: tree forward, decoding and rollouts against transformers' own forward."""

import pytest
import torch
from family_models import EXPLICIT, FAMILIES, SINGLE, VOCAB, make_model, make_policy, path_to, random_tree
from transformers import AutoModelForCausalLM, GPTNeoConfig, GptOssConfig

from fastgfn.attention import KeyValues, PathAttention, TreeAttention
from fastgfn.checks import InputError
from fastgfn.models import Policy, explicit, load_policy
from fastgfn.ops.attention import TreeMask
from fastgfn.packing import pack
from fastgfn.rewards import LMReward, log_reward
from fastgfn.rollout import Drafts, ModelDrafts, sample
from fastgfn.scoring import score
from fastgfn.types import Constraints, Role

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
# Longer than every window of FAMILIES.
PROMPTS = [[1, 2, 3, 4, 5, 6], [7, 3]]


def bound(family, dtype):
    if dtype == torch.float32:
        return 1e-5
    return 1e-6 if family in SINGLE else 1e-9


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_tree_hidden_states_equal_the_per_sequence_forward(family, dtype):
    prompts, sequences, groups, tree = random_tree()
    policy, plain = make_policy(family, dtype), make_model(family, "plain", dtype)
    with torch.no_grad():
        hidden = policy.tree_hidden(tree.tokens, tree.position, tree.end)
        for n, sequence in enumerate(sequences):
            ids = torch.tensor(prompts[groups[n]] + sequence)
            want = plain.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            path = path_to(tree, int(tree.leaf[n]))
            assert tree.tokens[path].tolist() == ids.tolist()
            torch.testing.assert_close(hidden[path], want, rtol=0, atol=bound(family, dtype))


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_the_tree_forward(family, dtype):
    """Step k decodes the k-th action node of every path: rows of several depths, beside pads."""
    tree = random_tree()[-1]
    policy = make_policy(family, dtype)
    is_prompt = tree.role == Role.PROMPT
    kv = KeyValues(tree.num_nodes)
    with torch.no_grad():
        hidden = policy.tree_hidden(tree.tokens, tree.position, tree.end)
        nodes = is_prompt.nonzero()[:, 0]
        ends = is_prompt.cumsum(0)
        mask = TreeMask(ends[tree.end[nodes].long() - 1].int(), tree.position[nodes])
        policy.hidden(tree.tokens[nodes], tree.position[nodes], TreeAttention(mask, kv, nodes))
        depths = 0
        for k in range(1, int(tree.length.max()) + 1):
            nodes = ((tree.length == k) & ~is_prompt).nonzero()[:, 0]
            length = tree.position[nodes] + 1
            depths = max(depths, len(length.unique()))
            path = torch.zeros(len(nodes), int(length.max()) + 2, dtype=torch.int32)
            for row, node in zip(path, nodes.tolist(), strict=True):
                own = path_to(tree, node)
                row[: len(own)] = torch.tensor(own)
            attention = PathAttention(kv, nodes, path, length)
            got = policy.hidden(tree.tokens[nodes], tree.position[nodes], attention)
            torch.testing.assert_close(got, hidden[nodes], rtol=0, atol=bound(family, dtype))
    assert depths > 1


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_carry_the_log_probs_of_the_score_and_of_transformers(family, dtype):
    policy, plain = make_policy(family, dtype), make_model(family, "plain", dtype)
    bias = torch.where(torch.arange(VOCAB) < 8, 0.0, -99.0)
    constraints = Constraints(0, max_length=6, logit_bias=bias)
    rollouts = sample(PROMPTS, policy=policy, constraints=constraints, num_samples=6, seed=3)
    assert rollouts.terminated.any() and not rollouts.terminated.all()
    tree = pack(rollouts)
    with torch.no_grad():
        scored = score(tree, policy=policy)
    reward = log_reward(tree, reward=LMReward(policy.reference, logit_bias=bias))

    def same(got, want):
        torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=1e-5)

    for n, sequence in enumerate(rollouts.sequences()):
        prompt, size = PROMPTS[int(rollouts.group[n])], len(sequence)
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([prompt + sequence]), use_cache=False).logits[0]
        log_p = (logits[len(prompt) - 1 :].double() + bias).log_softmax(-1)
        log_pf = log_p[torch.arange(size), torch.tensor(sequence, dtype=torch.int64)]
        log_pterm = torch.where(torch.arange(size + 1) < constraints.max_length, log_p[:, 0], 0.0)
        nodes = path_to(tree, int(tree.leaf[n]))[len(prompt) - 1 :]
        for got in (scored.log_pf[nodes[1:]], rollouts.log_pf[n, :size]):
            same(got, log_pf)
        for got in (scored.log_pterm[nodes], rollouts.log_pterm[n, : size + 1]):
            same(got, log_pterm)
        value = torch.cat([log_p.new_zeros(1), log_pf.cumsum(0)]) + log_p[:, 0]
        torch.testing.assert_close(reward[nodes].double(), value, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["gemma3", "gptj", "mistral-window", "neox"])
def test_drafts_of_the_policy_itself_are_accepted(family):
    """A draft model computes an accepted token and the row after it in one pass, windows or not."""
    policy, drafts = make_policy(family), Drafts(ModelDrafts(make_policy(family)), 3)
    options = dict(constraints=Constraints(0, 2, 12), num_samples=6, seed=3, temperature=3.0)
    want = sample(PROMPTS, policy=policy, **options).sequences()
    assert sample(PROMPTS, policy=policy, drafts=drafts, **options).sequences() == want
    assert drafts.acceptance == 1.0 and drafts.offered > 60


def test_the_families_differ_in_what_they_are_there_for():
    heads = {family: make_policy(family) for family in ("llama", "llama-tied", "gemma2", "gptj", "phi")}
    for family, policy in heads.items():
        embedding = policy.model.get_input_embeddings().weight
        assert (embedding is policy.head.weight) == (family in ("llama-tied", "gemma2"))
        assert (policy.head.bias is not None) == (family in ("gptj", "phi"))
        assert policy.head.bias is None or bool((policy.head.bias != 0).all())
    assert heads["gemma2"].head.softcap == 3.0
    for family in FAMILIES:
        assert make_policy(family)._takes_function == (family not in EXPLICIT)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gptj"])
def test_node_bytes_are_those_of_all_layers(family):
    policy = make_policy(family, torch.float32)
    kv_heads, layers = (4 if family == "gptj" else 2), (3 if family == "gemma3" else 2)
    assert policy.node_bytes == layers * 2 * kv_heads * 8 * 4


@pytest.mark.parametrize("family", ["gptj", "qwen3"])
def test_a_folder_becomes_a_policy_with_an_adapter(family, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    make_model(family, "plain", torch.float32).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), lora_rank=2)
    with torch.no_grad():
        for _, p in policy.parameters():
            p.normal_(std=0.3)
    rollouts = sample(PROMPTS, policy=policy, constraints=Constraints(0, max_length=6), num_samples=4)
    tree = pack(rollouts)
    scored, base = (score(tree, policy=p) for p in (policy, policy.reference))
    for n, size in enumerate(rollouts.lengths.tolist()):
        nodes = path_to(tree, int(tree.leaf[n]))[-size:] if size else []
        torch.testing.assert_close(
            scored.log_pf[nodes].detach(), rollouts.log_pf[n, :size], rtol=0, atol=1e-5
        )
    assert float((scored.log_pf.detach() - base.log_pf).abs().max()) > 0.1
    with policy.plain() as model, torch.no_grad():
        ids = torch.tensor([PROMPTS[0]])
        hidden = policy._backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
        assert model.config._attn_implementation == ("eager" if family == "gptj" else "sdpa")
        position = torch.arange(len(PROMPTS[0]))
    end = torch.full((len(PROMPTS[0]),), len(PROMPTS[0]), dtype=torch.int32)
    got = policy.tree_hidden(ids[0], position, end).detach()
    torch.testing.assert_close(got, hidden, rtol=0, atol=1e-5)


def test_pads_of_a_step_may_be_nodes_that_were_never_written():
    policy, kv = make_policy("gptj"), KeyValues(5)
    ids, position, end = torch.tensor([1, 2]), torch.arange(2), torch.tensor([2, 2], dtype=torch.int32)
    with torch.no_grad():
        policy.hidden(ids, position, TreeAttention(TreeMask(end, position), kv, torch.arange(2)))
        for pools in kv.layers.values():
            for pool in pools:
                pool[2:] = torch.nan
        path = torch.tensor([[0, 1, 2], [0, 3, 4]], dtype=torch.int32)
        step = PathAttention(kv, torch.tensor([2, 3]), path, torch.tensor([3, 2]))
        assert bool(policy.hidden(ids, torch.tensor([2, 1]), step).isfinite().all())


def test_a_mask_that_is_too_large_is_refused(monkeypatch):
    policy, tree = make_policy("gptj"), random_tree()[-1]
    monkeypatch.setattr(explicit, "MAX_NODES", tree.num_nodes)
    policy.tree_hidden(tree.tokens, tree.position, tree.end)
    monkeypatch.setattr(explicit, "MAX_NODES", tree.num_nodes - 1)
    want = f"tokens must be of at most {tree.num_nodes - 1} nodes .*, got {tree.num_nodes}; lower num_samples"
    with pytest.raises(InputError, match=want):
        policy.tree_hidden(tree.tokens, tree.position, tree.end)


def test_a_class_that_drops_its_keys_and_values_is_refused(monkeypatch):
    from transformers.models.gptj.modeling_gptj import GPTJModel

    forward = GPTJModel.forward

    def forgetful(self, past_key_values=None, attention_mask=None, use_cache=None, **rest):
        if past_key_values is not None and rest["input_ids"].shape[0] > 1:
            past_key_values = attention_mask = None
        return forward(
            self, past_key_values=past_key_values, attention_mask=attention_mask, use_cache=False, **rest
        )

    monkeypatch.setattr(GPTJModel, "forward", forgetful)
    with pytest.raises(
        InputError, match="takes its keys and values in decoding, got GPTJConfig; use a Llama"
    ):
        make_policy("gptj")


def _large(config, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)
    return model


@pytest.mark.parametrize("family", ["bloom", "mamba", "mpt"])
def test_a_class_that_ignores_the_tree_is_refused(family):
    from transformers import BloomConfig, MambaConfig, MptConfig

    config = {
        "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
        "mamba": MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
        "mpt": MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4),
    }[family]
    with pytest.raises(InputError, match="model must be of a class that takes the tree attention"):
        Policy(_large(config))


def test_windows_that_are_counted_in_places_are_refused():
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64)
    local = _large(GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]]))
    want = "model must be without windows that its class does not hand to an attention function"
    with pytest.raises(InputError, match=rf"{want}, got GPTNeoConfig \(local\); use a Llama"):
        Policy(local)
    Policy(_large(GPTNeoConfig(**sizes, attention_types=[[["global"], 2]])))
    model = make_model("gptj", "fastgfn")
    model.config.sliding_window = 4
    with pytest.raises(InputError, match=rf"{want}, got GPTJConfig \(sliding_window=4\)"):
        Policy(model)
    model = make_model("llama", "fastgfn")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(InputError, match=rf"{want}, got LlamaConfig \(chunked_attention\)"):
        Policy(model)


def test_attention_sinks_are_refused():
    config = GptOssConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    with pytest.raises(InputError, match="model must be without attention sinks, got GptOssAttention"):
        Policy(_large(config, attn_implementation="fastgfn"))


def test_another_attention_than_ours_is_refused():
    with pytest.raises(
        InputError, match="takes the tree attention.*loaded with attn_implementation='fastgfn'"
    ):
        Policy(make_model("llama", "sdpa"))
