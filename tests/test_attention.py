import pytest
import torch
from family_models import make_policy, random_tree

from fastgfn.checks import InputError
from fastgfn.ops.attention import TreeMask, tree_attention
from fastgfn.reference import attention as plain
from fastgfn.testing import forest


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("window", [None, 2], ids=["full", "window"])
def test_tree_attention_equals_the_reference_in_values_and_gradients(softcap, window, monkeypatch):
    tree = random_tree()[-1]
    size = tree.num_nodes
    inputs = [torch.randn(h, size, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    options = dict(scale=0.3, softcap=softcap, window=window)
    upstream = torch.randn(4, size, 8, dtype=torch.float64)
    want = plain.tree_attention(*inputs, tree.end, tree.position, **options)
    want_grads = torch.autograd.grad(want, inputs, upstream)
    for rows, mask_bytes in ((128, 2**26), (128, 0), (7, 2**26), (7, 0), (1, 0)):
        monkeypatch.setattr("fastgfn.ops.attention.ROW_BLOCK", rows)
        monkeypatch.setattr("fastgfn.ops.attention.MASK_BYTES", mask_bytes)
        got = tree_attention(*inputs, TreeMask(tree.end, tree.position), **options)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        for a, b in zip(torch.autograd.grad(got, inputs, upstream), want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
def test_tree_attention_of_no_nodes(softcap):
    empty = TreeMask(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int64))
    inputs = [torch.randn(h, 0, 8, requires_grad=True) for h in (4, 2, 2)]
    out = tree_attention(*inputs, empty, scale=0.3, softcap=softcap)
    assert out.shape == (4, 0, 8)
    assert [g.shape for g in torch.autograd.grad(out.sum(), inputs)] == [(4, 0, 8), (2, 0, 8), (2, 0, 8)]


def test_flex_block_mask_equals_the_dense_mask():
    tree = random_tree()[-1]
    mask = TreeMask(tree.end, tree.position)
    size = tree.num_nodes
    for window in (None, 3):
        (block,) = mask.row_blocks(window)
        dense = mask.additive(block, window, torch.float32) == 0
        i, j = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        assert torch.equal(mask.block_mask(window).mask_mod(0, 0, i, j), dense)


def test_a_plain_forward_of_a_registered_model_is_refused():
    model = make_policy("llama").model
    with pytest.raises(InputError, match="attention must be a TreeAttention"):
        model(input_ids=torch.tensor([[1, 2]]))


@pytest.mark.gpu
def test_flex_attention_equals_the_reference_on_cuda():
    tree = random_tree()[-1]
    query, key, value = (torch.randn(h, tree.num_nodes, 64, device="cuda") for h in (4, 2, 2))
    end, position = tree.end.cuda(), tree.position.cuda()
    got = tree_attention(query, key, value, TreeMask(end, position), scale=0.125)
    want = plain.tree_attention(query, key, value, end, position, scale=0.125)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def _forest_of(prompt, samples, length, groups):
    """A star of samples under every prompt."""
    depths = (list(range(prompt)) + list(range(prompt, prompt + length)) * samples) * groups
    return forest(depths)


def test_a_row_block_holds_the_ancestors_of_its_first_row():
    end, position = _forest_of(200, 6, 30, 3)
    mask = TreeMask(end, position)
    blocks = mask.row_blocks(None)
    assert [b.start for b in blocks] == list(range(0, len(end), 128)) and blocks[-1].stop == len(end)
    for block in blocks:
        first = block.start
        assert block.above.tolist() == [j for j in range(first) if end[j] > first]
    assert max(b.num_keys for b in blocks) <= 128 + 230
    # node 640 is the last of the second prompt's third sample, at depth 229
    (within,) = [b for b in mask.row_blocks(40) if b.start == 640]
    assert all(position[640:768].min() - position[j] < 40 for j in within.above)


def test_masks_beyond_the_limit_are_made_again_in_backward(monkeypatch):
    end, position = _forest_of(60, 8, 30, 1)
    kept = {}

    def run(mask_bytes):
        monkeypatch.setattr("fastgfn.ops.attention.MASK_BYTES", mask_bytes)
        mask, saved = TreeMask(end, position), {}
        inputs = [torch.randn(2, len(end), 4, requires_grad=True) for _ in range(3)]

        def pack(x):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outs = [tree_attention(*inputs, mask, scale=0.5) for _ in range(3)]
            kept[mask_bytes] = sum(saved.values())
        return outs

    largest = 128 * (128 + 89) * 4
    run(0), run(2**26)
    assert kept[0] < largest < kept[2**26]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(window=0), "window must be > 0, got 0; omit it"),
        (dict(softcap=0.0), "softcap must be > 0, got 0.0; omit it"),
        (dict(mask=TreeMask(*forest([0, 1, 2, 3]))), r"mask must be \(3,\), got \(4,\)"),
        (
            dict(key=torch.zeros(3, 3, 8), value=torch.zeros(3, 3, 8)),
            "query must be of a multiple of 3 heads, got 4",
        ),
        (dict(value=torch.zeros(2, 3, 4)), r"value must be \(2, 3, 8\), got \(2, 3, 4\)"),
        (dict(query=torch.zeros(3, 8)), r"query must be \(heads, nodes, head dim\), got \(3, 8\)"),
    ],
)
def test_every_provider_refuses_bad_input(change, message):
    good = dict(query=torch.zeros(4, 3, 8), key=torch.zeros(2, 3, 8), value=torch.zeros(2, 3, 8))
    good |= dict(mask=TreeMask(*forest([0, 1, 2])), scale=0.3)
    assert tree_attention(**good).shape == (4, 3, 8)
    with pytest.raises(InputError, match=f"tree_attention: {message}"):
        tree_attention(**good | change)
