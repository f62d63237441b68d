import torch

from fastgfn.packing import pack
from fastgfn.testing import random_sequences
from fastgfn.types import Constraints, Role, Rollouts


def _pack(prompts, sequences, group, max_length=6, stop=99):
    tokens = torch.full((len(sequences), max_length), -7)
    for row, s in zip(tokens, sequences, strict=True):
        row[: len(s)] = torch.tensor(s, dtype=torch.int64)
    lengths = torch.tensor([len(s) for s in sequences])
    prompts = tuple(torch.tensor(p) for p in prompts)
    constraints = Constraints(stop, max_length=max_length)
    return pack(
        Rollouts(prompts, torch.tensor(group), tokens, lengths, torch.zeros(len(sequences)), constraints)
    )


def test_the_example_of_the_docstring():
    tree = _pack([[7]], [[5, 6], [5], [5, 6]], [0, 0, 0])
    assert tree.tokens.tolist() == [7, 5, 6]
    assert tree.end.tolist() == [3, 3, 3] and tree.parent.tolist() == [-1, 0, 1]
    assert tree.count.tolist() == [3, 3, 2] and tree.leaf.tolist() == [2, 1, 2]
    assert tree.length.tolist() == [0, 1, 2] and tree.is_state.tolist() == [True] * 3
    assert tree.role.tolist() == [Role.PROMPT, Role.ACTION, Role.ACTION]


def test_every_distinct_prefix_is_one_node_and_ranges_are_ancestry():
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        prompts, sequences, group = random_sequences(
            generator, num_groups=3, per_group=6, max_length=6, vocab=3
        )
        tree = _pack(prompts, sequences, group)
        paths = []
        for node in range(tree.num_nodes):
            ancestors = [j for j in range(node + 1) if node < int(tree.end[j])]
            paths.append((int(tree.group[node]), tuple(tree.tokens[ancestors].tolist())))
            assert int(tree.position[node]) == len(ancestors) - 1
        assert len(set(paths)) == len(paths)
        full = [(g, tuple(prompts[g] + s)) for s, g in zip(sequences, group, strict=True)]
        assert [paths[leaf] for leaf in tree.leaf.tolist()] == full
        for node, (g, path) in enumerate(paths):
            through = sum(h == g and p[: len(path)] == path for h, p in full)
            assert int(tree.count[node]) == through
            assert int(tree.length[node]) == max(0, len(path) - len(prompts[g]))
            assert bool(tree.is_state[node]) == (len(path) >= len(prompts[g]))
        wanted = {(g, p[:k]) for g, p in full for k in range(1, len(p) + 1)}
        assert set(paths) == wanted


def test_samples_of_one_prompt_share_it():
    """20 samples of up to 20 tokens over a 60-token prompt: the prompt is held once."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(1000, (n,), generator=generator).tolist() for n in range(1, 21)]
    tree = _pack([list(range(60))], sequences, [0] * 20, max_length=20, stop=1000)
    assert tree.num_nodes == 60 + sum(range(1, 21)) < sum(60 + n for n in range(1, 21)) / 5
