import pytest
import torch
from torch.library import opcheck

from fastgfn.functional.tree import build_tree
from fastgfn.ops import tree as ops
from fastgfn.reference import tree as ref
from fastgfn.rewards import node_sequences
from fastgfn.testing import random_sequences
from fastgfn.types import Constraints, Role, as_int64

NAMES = ("tokens", "position", "end", "parent", "count", "group", "role", "leaf")
CONSTRAINTS = Constraints(termination_token_id=99, max_length=10**6)


def padded(sequences, dtype=torch.int64):
    width = max((len(s) for s in sequences), default=0)
    # The padding is a token that no sequence holds: reading it would add nodes.
    rows = [list(s) + [77] * (width - len(s)) for s in sequences]
    return torch.tensor(rows, dtype=dtype).reshape(len(sequences), width)


def arguments(prompts, sequences, group, roles=None):
    lengths = as_int64([len(s) for s in sequences])
    roles = None if roles is None else padded(roles, torch.int8)
    return [as_int64(p) for p in prompts], padded(sequences), lengths, as_int64(group), roles


def assert_same_tree(args):
    for name, have, want in zip(NAMES, ops.build_tree(*args), ref.build_tree(*args), strict=True):
        assert have.dtype == want.dtype and torch.equal(have, want), name


def example(seed=0, num_groups=3):
    generator = torch.Generator().manual_seed(seed)
    return random_sequences(generator, num_groups=num_groups, per_group=7, max_length=6, vocab=3)


def example_tree(seed=0):
    prompts, sequences, group = example(seed)
    return build_tree(sequences, prompts=prompts, group=group, constraints=CONSTRAINTS)


# A vocabulary of 3 makes shared prefixes and duplicates frequent; with roles they split again.
@pytest.mark.parametrize("with_roles", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_build_tree_equals_reference(seed, with_roles):
    prompts, sequences, group = example(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(group), generator=generator).tolist()
    sequences, group = [sequences[i] for i in order], [group[i] for i in order]
    roles = [torch.randint(1, 4, (len(s),), generator=generator).tolist() for s in sequences]
    assert_same_tree(arguments(prompts, sequences, group, roles if with_roles else None))


def test_gathers_equal_reference_with_gradients():
    tree = example_tree()
    num_nodes = torch.minimum(tree.length[tree.leaf].long() + 1, as_int64(4))
    path = ops.path_nodes(tree.parent, tree.leaf, num_nodes, 5)
    assert torch.equal(path, ref.path_nodes(tree.parent, tree.leaf, num_nodes, 5))
    values = torch.randn(tree.num_nodes, dtype=torch.float64, requires_grad=True)
    out = ops.gather_nodes(values, path)
    want = ref.gather_nodes(values, path)
    assert torch.equal(out, want) and (out[path < 0] == 0).all()
    upstream = torch.randn_like(out)
    have = torch.autograd.grad(out, values, upstream)[0]
    assert torch.allclose(have, torch.autograd.grad(want, values, upstream)[0], rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda v: ops.gather_nodes(v, path), values)
    assert torch.autograd.gradgradcheck(lambda v: ops.gather_nodes(v, path).square(), values)
    edges = torch.randn(path.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: ops.scatter_add_nodes(e, path, tree.num_nodes), edges)
    assert torch.allclose(
        ops.scatter_add_nodes(edges, path, tree.num_nodes),
        ref.scatter_add_nodes(edges, path, tree.num_nodes),
        rtol=0,
        atol=1e-14,
    )


def test_float32_scatter_sums_in_double():
    grad = torch.full((100_000,), 0.1)
    total = ops.scatter_add_nodes(grad, torch.zeros(100_000, dtype=torch.int64), 2)
    assert torch.equal(total, torch.tensor([grad[0].double() * 100_000, 0.0]).float())


def test_derived_fields():
    action, observation, suffix = int(Role.ACTION), int(Role.OBSERVATION), int(Role.SUFFIX)
    tree = build_tree(
        [[5, 6], [5], [5, 6], [5, 8]],
        roles=[[action, action], [action], [action, suffix], [observation, action]],
        prompts=[[7, 7], [7, 7]],
        group=[0, 0, 0, 0],
        constraints=CONSTRAINTS,
    )
    assert tree.tokens.tolist() == [7, 7, 5, 6, 6, 5, 8, 7, 7]
    assert tree.end.tolist() == [7, 7, 5, 4, 5, 7, 7, 9, 9]
    assert tree.count.tolist() == [4, 4, 3, 1, 1, 1, 1, 0, 0]
    assert tree.leaf.tolist() == [3, 2, 4, 6]
    assert tree.length.tolist() == [0, 0, 1, 2, 1, 1, 2, 0, 0] and tree.length.dtype == torch.int32
    # node 5, an observation, is where the action 8 was chosen
    assert tree.is_state.tolist() == [False, True, True, True, False, True, True, False, True]
    assert tree.is_root_state.nonzero()[:, 0].tolist() == [1, 8]


def test_a_state_is_where_the_policy_chose():
    """An action that a tool answered is none, unless another trajectory ends or goes on there; within the
    answer only its last token is one, or the token at which max_length ends a trajectory."""
    action, tool = int(Role.ACTION), int(Role.OBSERVATION)
    sequences = [[5, 1, 2, 6], [5, 1, 2], [4, 1, 2], [4], [3, 1, 2], [3, 9], [8, 1]]
    roles = [[action, tool, tool, action], [action, tool, tool], [action, tool, tool], [action],
             [action, tool, tool], [action, action], [action, tool]]  # fmt: skip
    tree = build_tree(sequences, roles=roles, prompts=[[7]], group=[0] * 7, constraints=CONSTRAINTS)
    prefixes = map(tuple, node_sequences(tree, torch.arange(1, tree.num_nodes)))
    found = dict(zip(prefixes, tree.is_state[1:].tolist(), strict=True))
    not_states = {(5,), (5, 1), (4, 1), (3, 1), (8,)}
    assert found == {z: z not in not_states for z in found} and len(found) == 13


# No sequence, one-token trajectory, only empty sequences, no prompt, and a chain too deep for recursion.
def test_odd_shapes():
    assert_same_tree(arguments([[1, 2]], [], []))
    assert_same_tree(arguments([[1]], [[2]], [0]))
    assert_same_tree(arguments([[1], [1]], [[], []], [1, 1]))
    empty = ops.build_tree(*arguments([], [], []))
    assert [x.numel() for x in empty] == [0] * 8
    assert build_tree([], prompts=[], group=[], constraints=CONSTRAINTS).num_groups == 0
    depth = 100_000
    chain = ops.build_tree(*arguments([[1]], [[3] * depth, [3] * (depth - 1) + [4]], [0, 0]))
    assert chain[0].shape[0] == depth + 2 and chain[7].tolist() == [depth, depth + 1]
    assert chain[1][-1] == depth and chain[3][-1] == depth - 1
    none = ops.path_nodes(chain[3], chain[7], as_int64([0, 1]), 1)
    assert none.tolist() == [[-1], [depth + 1]]
    assert ops.path_nodes(chain[3], chain[7][:0], as_int64([]), 0).shape == (0, 0)
    assert ops.gather_nodes(torch.ones(3), as_int64([])).shape == (0,)
    assert ops.gather_nodes(torch.tensor([True, False]), as_int64([[0, -1]])).tolist() == [[True, False]]
    assert ops.scatter_add_nodes(torch.ones(0), as_int64([]), 2).tolist() == [0, 0]


def test_one_group_for_all_sequences_may_be_expanded_or_strided():
    prompts, tokens, lengths, _, _ = arguments([[7], [8]], [[5], [6], [5]], [])
    for group in (as_int64(1).expand(3), as_int64([[0, 9], [1, 9], [0, 9]])[:, 0]):
        assert_same_tree((prompts, tokens, lengths, group))


def test_token_ids_of_any_size():
    assert_same_tree(arguments([[2**40]], [[2**62, -1], [2**62, 0]], [0, 0]))


def test_repeat_gives_equal_bits():
    args = arguments(*example())
    first, second = ops.build_tree(*args), ops.build_tree(*args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    index = torch.randint(-1, 5, (20_000,))
    grad = torch.randn(20_000)
    threads = torch.get_num_threads()
    sums = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            sums.append(ops.scatter_add_nodes(grad, index, 5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*sums)


def test_opcheck():
    tree = example_tree()
    one_prompt = (as_int64([7, 8]), as_int64([0, 2]), as_int64([5, 5]), torch.ones(2, dtype=torch.int8))
    opcheck(torch.ops.fastgfn.build_tree.default, (*one_prompt, as_int64([0, 1, 2]), as_int64([0, 0])))
    num_nodes = tree.length[tree.leaf].long()
    opcheck(torch.ops.fastgfn.path_nodes.default, (tree.parent, tree.leaf, num_nodes, 8))
    path = ops.path_nodes(tree.parent, tree.leaf, num_nodes, 8)
    values = torch.randn(tree.num_nodes, requires_grad=True)
    opcheck(torch.ops.fastgfn.gather_nodes.default, (values, path))
    edges = torch.randn(path.shape, requires_grad=True)
    opcheck(torch.ops.fastgfn.scatter_add_nodes.default, (edges, path, tree.num_nodes))


def build(sequences=((5,),), prompts=((7,),), group=(0,), constraints=CONSTRAINTS, **kwargs):
    return build_tree(sequences, prompts=prompts, group=group, constraints=constraints, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompts": [[]]}, r"build_tree: prompts\[0\] must be a non-empty"),
        ({"group": [1]}, r"build_tree: group must be in \[0, 0\], got \[1\]"),
        ({"group": [0, 0]}, r"build_tree: group must be \(1,\)"),
        ({"sequences": None}, "build_tree: sequences must be given"),
        ({"tokens": as_int64([[5]])}, "build_tree: sequences must be the only input form"),
        ({"roles": [[1, 1]]}, "build_tree: roles must be as ragged as sequences"),
        ({"roles": [[0]]}, "build_tree: roles must be action"),
        ({"sequences": [[99]]}, "build_tree: sequences must be free of the termination tokens \\(99,\\)"),
        ({"constraints": Constraints(1, max_length=1), "sequences": [[5, 6]]}, "max_length = 1 tokens long"),
        (
            {"sequences": None, "tokens": as_int64([[5]]), "lengths": as_int64([2])},
            r"build_tree: lengths must be in \[0, 1\], got \[2\]",
        ),
    ],
)
def test_build_tree_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_refuses_bad_dtypes_and_indices():
    with pytest.raises(TypeError, match="build_tree: tokens must be int32 or int64, got torch.float32"):
        build(sequences=None, tokens=torch.ones(1, 1), lengths=as_int64([1]))
    with pytest.raises(TypeError, match="build_tree: roles must be int8, got torch.int64"):
        build(sequences=None, tokens=as_int64([[5]]), lengths=as_int64([1]), roles=as_int64([[1]]))
    tree = example_tree()
    with pytest.raises(
        ValueError, match="path_nodes: leaf and num_nodes must be a node and at most its depth"
    ):
        ops.path_nodes(tree.parent, tree.leaf[:1], as_int64([50]), 50)
    with pytest.raises(ValueError, match=r"path_nodes: num_nodes must be in \[0, width = 1\], got 2"):
        ops.path_nodes(tree.parent, tree.leaf[:1], as_int64([2]), 1)
    for function, tensor in ((ops.gather_nodes, torch.ones(2)), (ops.scatter_add_nodes, torch.ones(1))):
        rest = () if function is ops.gather_nodes else (2,)
        with pytest.raises(ValueError, match=rf"{function.__name__}: index must be -1 or in \[0, 2\), got 2"):
            function(tensor, as_int64([2]), *rest)
    raw = (as_int64([7]), as_int64([0, 1]), as_int64([5]), torch.ones(1, dtype=torch.int8))
    with pytest.raises(ValueError, match="build_tree: offsets must be non-decreasing from 0"):
        torch.ops.fastgfn.build_tree(*raw, as_int64([0, 2]), as_int64([0]))
