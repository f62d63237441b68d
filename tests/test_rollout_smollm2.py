"""Sampling from the bundled 135M-parameter model: sampled against scored, and batch against batch."""

import pytest
import torch

from fastgfn.models import load_policy
from fastgfn.ops.scan import tree_cumsum
from fastgfn.packing import pack
from fastgfn.reference.sample_next import gumbel, noise_words
from fastgfn.rollout import Drafts, ModelDrafts, PromptLookup, sample
from fastgfn.scoring import score
from fastgfn.types import Constraints

TEXTS = ["The cat sat on the mat. The cat sat on", "Once upon a time there was"]
SEED = 12
# Two scores of one draw that are nearer than this may change places with the rounding of another batch.
TIE = 1e-4


@pytest.fixture(scope="module")
def policy():
    made = load_policy("smollm2-135m", lora_rank=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.parameters():
            if "lora_B" in name:
                p.normal_(std=0.02, generator=generator)
    return made


@pytest.fixture(scope="module")
def setting(policy):
    prompts = [policy.encode(text) for text in TEXTS]
    constraints = Constraints(policy.encode("A sentence.")[-1], min_length=1, max_length=12)
    return dict(policy=policy, constraints=constraints, num_samples=6, seed=SEED), prompts


@pytest.fixture(scope="module")
def rollouts(setting):
    options, prompts = setting
    return sample(prompts, **options)


def scored(policy, rollouts):
    tree = pack(rollouts)
    with torch.no_grad():
        log_probs = score(tree, policy=policy)
    return (tree_cumsum(log_probs.log_pf, tree.parent) + log_probs.log_pterm)[tree.leaf], log_probs, tree


def test_sampled_densities_are_the_scored_ones(policy, rollouts):
    density, log_probs, tree = scored(policy, rollouts)
    torch.testing.assert_close(rollouts.log_behavior, density, rtol=0, atol=2e-3)
    for n, length in enumerate(rollouts.lengths.tolist()):
        node = int(tree.leaf[n])
        for k in range(length, 0, -1):
            assert abs(float(rollouts.log_pf[n, k - 1] - log_probs.log_pf[node])) < 2e-4
            node = int(tree.parent[node])


def gap(policy, prompt, prefix, trajectory, tokens):
    """Difference of the scores, log q plus noise, of two tokens that two batches drew at one place."""
    ids = torch.tensor(prompt + prefix)
    size = len(ids)
    with torch.no_grad():
        hidden = policy.tree_hidden(ids, torch.arange(size), torch.full((size,), size, dtype=torch.int32))
        log_q = (hidden[-1].double() @ policy.head.weight.double().T).log_softmax(-1)
    place = torch.tensor([trajectory]), torch.tensor([len(prefix)])
    scores = log_q + gumbel(noise_words(SEED, *place, policy.vocab_size))[0]
    return abs(float(scores[tokens[0]] - scores[tokens[1]]))


@pytest.mark.parametrize(
    ("make", "acceptance"),
    [
        (lambda policy: dict(batch_size=5), None),
        (lambda policy: dict(drafts=Drafts(PromptLookup(), 3)), 0.0),
        (lambda policy: dict(drafts=Drafts(ModelDrafts(policy.reference), 3)), 0.8),
    ],
    ids=["batch", "lookup", "base"],
)
def test_draws_differ_by_ties_at_most(setting, rollouts, make, acceptance, capsys):
    options, prompts = setting
    other = make(options["policy"])
    got = sample(prompts, **options, **other)
    stop, ties = options["constraints"].termination_token_id, 0
    for n, (a, b) in enumerate(zip(rollouts.sequences(), got.sequences(), strict=True)):
        if a == b:
            continue
        a, b = [*a, stop], [*b, stop]
        k = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        prompt = prompts[int(rollouts.group[n])]
        assert gap(options["policy"], prompt, a[:k], n, (a[k], b[k])) < TIE
        ties += 1
    with capsys.disabled():
        print(f" {ties} ties in {got.num_tokens} draws", end="")
    assert ties <= 1
    if "drafts" in other:
        assert other["drafts"].offered > 0 and other["drafts"].acceptance >= acceptance


def test_a_lower_precision_draws_from_a_nearby_policy(setting):
    """Copies in bfloat16: log q within its rounding, and the density is the one that drew."""
    options, prompts = setting
    got = sample(prompts, precision=torch.bfloat16, **options)
    density, _, _ = scored(options["policy"], got)
    gaps = (got.log_behavior - density).abs()
    assert 1e-4 < float(gaps.mean()) < 0.5


def test_a_precision_of_8_bits_returns_the_density_that_drew():
    """In float64 another batch moves nothing that is rounded to 8 bits: draws are equal in all of them, and
    log q is that of the same copies, teacher-forced; without the copies it is nearby."""
    policy = load_policy("smollm2-135m", lora_rank=4, dtype=torch.float64)
    limits = Constraints(policy.encode("A sentence.")[-1], min_length=1, max_length=6)
    options = dict(policy=policy, constraints=limits, num_samples=4, seed=SEED, precision=torch.int8)
    prompts = [policy.encode(text) for text in TEXTS]
    got, other = sample(prompts, **options), sample(prompts, batch_size=3, **options)
    assert got.sequences() == other.sequences() == sample(prompts, **options).sequences()
    torch.testing.assert_close(got.log_pf, other.log_pf, rtol=0, atol=1e-5)
    with policy.merged(torch.int8):
        density, log_probs, tree = scored(policy, got)
    torch.testing.assert_close(got.log_behavior.double(), density.double(), rtol=0, atol=1e-4)
    for n, length in enumerate(got.lengths.tolist()):
        node = int(tree.leaf[n])
        for k in range(length, 0, -1):
            assert abs(float(got.log_pf[n, k - 1] - log_probs.log_pf[node])) < 1e-5
            node = int(tree.parent[node])
    gaps = (got.log_behavior - scored(policy, got)[0]).abs() / (got.lengths + 1)
    assert 1e-3 < float(gaps.mean()) < 0.2


def test_copies_in_8_bits_take_a_quarter_of_float32(policy):
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        with policy.merged(dtype):
            shared = {id(x): x for layer in policy._linear for x in layer.merged.tensors}
            sizes[dtype] = sum(x.numel() * x.element_size() for x in shared.values())
    assert sizes[torch.float32] == 4 * policy.num_linear_weights == 2 * sizes[torch.bfloat16]
    assert 1.0 < sizes[torch.int8] / policy.num_linear_weights < 1.01
