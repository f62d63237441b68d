import pytest
import torch

from fastgfn.checks import InputError
from fastgfn.packing import pack, split_tree
from fastgfn.testing import random_sequences
from fastgfn.types import Constraints, Role, Rollouts, TokenTree


def _pack(prompts, sequences, group, max_length=6, stop=99):
    tokens = torch.full((len(sequences), max_length), -7)
    for row, s in zip(tokens, sequences, strict=True):
        row[: len(s)] = torch.tensor(s, dtype=torch.int64)
    lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
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


def _random_tree(generator, num_groups=3, per_group=6):
    prompts, sequences, group = random_sequences(
        generator, num_groups=num_groups, per_group=per_group, max_length=6, vocab=3
    )
    return prompts, sequences, group, _pack(prompts, sequences, group)


def test_parts_are_the_trees_of_their_own_trajectories():
    """Every part equals the tree that its trajectories alone would be packed into, and says where it lies."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        prompts, sequences, group, tree = _random_tree(generator)
        longest = int(tree.position.max()) + 1
        for max_tokens in (longest, longest + 1, longest + 7, tree.num_nodes - 1):
            parts = split_tree(tree, max_tokens=max_tokens)
            assert len(parts) > 1 and all(p.tree.num_nodes <= max_tokens for p in parts)
            held = torch.cat([p.trajectories for p in parts])
            assert sorted(held.tolist()) == list(range(len(sequences)))
            assert tree.leaf[held].tolist() == sorted(tree.leaf.tolist())
            for part in parts:
                chosen = part.trajectories.tolist()
                used = sorted({group[n] for n in chosen})
                alone = _pack(
                    [prompts[g] for g in used],
                    [sequences[n] for n in chosen],
                    [used.index(group[n]) for n in chosen],
                )
                for field in TokenTree.__slots__:
                    if field == "group":
                        assert [used[g] for g in alone.group.tolist()] == part.tree.group.tolist()
                    elif isinstance(want := getattr(alone, field), torch.Tensor):
                        got = getattr(part.tree, field)
                        assert got.dtype == want.dtype and torch.equal(got, want), field
                assert torch.equal(tree.tokens[part.nodes], part.tree.tokens)
                assert torch.equal(part.nodes[part.tree.leaf], tree.leaf[part.trajectories])
            counts = torch.zeros_like(tree.count)
            for part in parts:
                counts.index_add_(0, part.nodes, part.tree.count)
            assert torch.equal(counts, tree.count)


def test_a_part_ends_only_where_the_next_trajectory_does_not_fit():
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        tree = _random_tree(generator, num_groups=2, per_group=9)[-1]
        max_tokens = int(tree.position.max()) + 4
        parts = split_tree(tree, max_tokens=max_tokens)
        for part, following in zip(parts, parts[1:], strict=False):
            node, more = int(following.tree.leaf[0]), set(part.nodes.tolist())
            while node >= 0:
                more.add(int(following.nodes[node]))
                node = int(following.tree.parent[node])
            assert len(more) > max_tokens


def test_a_tree_that_fits_is_its_only_part():
    tree = _random_tree(torch.Generator().manual_seed(6))[-1]
    for max_tokens in (None, tree.num_nodes):
        (part,) = split_tree(tree, max_tokens=max_tokens)
        assert part.tree is tree and part.nodes.tolist() == list(range(tree.num_nodes))
        assert part.trajectories.tolist() == list(range(len(tree.leaf)))


def test_prompts_without_a_sequence_are_in_no_part():
    tree = _pack([[7, 8], [1, 2, 3], [4]], [[5], [6]], [1, 1])
    parts = split_tree(tree, max_tokens=4)
    assert [p.tree.tokens.tolist() for p in parts] == [[1, 2, 3, 5], [1, 2, 3, 6]]
    assert [p.nodes.tolist() for p in parts] == [[2, 3, 4, 5], [2, 3, 4, 6]]
    assert parts[0].tree.group.tolist() == [1] * 4
    assert split_tree(_pack([[7, 8, 9]], [], []), max_tokens=2) == ()


def test_a_trajectory_that_is_too_long_for_a_part_is_refused():
    tree = _pack([[7]], [[5, 6, 4], [5]], [0, 0])
    want = "max_tokens must be >= 4, the nodes of trajectory 0 and its prompt, got 3; raise it, or shorten"
    with pytest.raises(InputError, match=want):
        split_tree(tree, max_tokens=3)


def test_a_sequence_that_begins_with_an_observation_is_refused():
    """The prompt's last node would be no state: no anchor below min_length, no log Z(X) from a flow head."""
    tokens, lengths = torch.tensor([[5, 6], [0, 0]]), torch.tensor([2, 0])
    limits, prompts = Constraints(0, max_length=2), (torch.tensor([7]),)

    def packed(is_action):
        rollouts = Rollouts(
            prompts, lengths * 0, tokens, lengths, torch.zeros(2), limits, is_action=torch.tensor(is_action)
        )
        return pack(rollouts)

    assert packed([[True, False], [False, False]]).is_root_state.tolist() == [True, False, False]
    with pytest.raises(
        InputError, match="pack: is_action must be True of every first token, got False; what"
    ):
        packed([[False, True], [False, False]])
