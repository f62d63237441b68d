"""Copies that several layers share are those of each layer, in 8 bits too."""

import pytest
import torch
from test_models_decode_layer import BOUND, FUSED, decode, make


@torch.no_grad()
@pytest.mark.parametrize("family", FUSED)
def test_packed_copies_of_8_bits_are_those_of_each_layer(family):
    """A row of a weight has a scale of its own, and is quantised from the sum itself."""
    policy, plain = make(family), make(family, fused=False)
    with policy.merged(torch.int8), plain.merged(torch.int8):
        assert len({id(m.weight) for m in merged(policy)}) < len({id(m.weight) for m in merged(plain)})
        for together, alone in zip(merged(policy), merged(plain), strict=True):
            own = slice(*together.rows) if together.rows else slice(None)
            assert torch.equal(together.weight.scale[own], alone.weight.scale)
        torch.testing.assert_close(decode(policy), decode(plain), rtol=0, atol=BOUND)


def merged(policy):
    return [layer.merged for layer in policy._linear]
