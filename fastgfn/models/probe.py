"""What a model class must do for a Policy, tried on four nodes."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgfn import checks
from fastgfn.attention import NAME, KeyValues, PathAttention, TreeAttention
from fastgfn.ops.attention import TreeMask

FAMILIES = "Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3, GPT-2, GPT-J, GPT-NeoX, OPT or Phi"
# Kinds of layers, as configurations name them.
LOCAL = {"local", "sliding_attention"}
READ_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class HostReads(TorchDispatchMode):
    """Notes, in `found`, the ops of its block that hand values to the host, as no CUDA graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        reads = not READ_TAGS.isdisjoint(func.tags)
        if func.overloadpacket in INDEXING:
            # only with a mask, which the tags cannot know
            reads = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        to_host = isinstance(out, Tensor) and out.is_cpu and not all(x.is_cpu for x in tensors)
        if reads or to_host:
            self.found.append(str(func))
        return out


@torch.no_grad()
def probe(policy) -> tuple[int, bool]:
    """Bytes of the keys and values of one node, and whether a decoding step reads no value on the host; from
    three forwards over four nodes.

    Raises:
        InputError: the model class ignores the tree (a sibling sees another), or its keys and values in
            decoding.
    """
    fix = f"use a {FAMILIES} model, loaded with attn_implementation='{NAME}' where the class takes it"
    name, device = type(policy.config).__name__, policy.device

    def run(tokens: list[int], position: list[int], attend) -> Tensor:
        ids, depth = torch.tensor(tokens, device=device), torch.tensor(position, device=device)
        with torch.autocast(device.type, enabled=False):
            return policy.hidden(ids, depth, attend(depth)).float()

    def tree(end: list[int], kv: KeyValues | None = None):
        nodes = torch.arange(len(end), device=device)
        ends = nodes.new_tensor(end, dtype=torch.int32)
        return lambda depth: TreeAttention(TreeMask(ends, depth), kv, nodes)

    def step(depth: Tensor) -> PathAttention:
        path = torch.tensor([[0, 1, 2], [0, 3, 0]], dtype=torch.int32, device=device)
        return PathAttention(kv, depth.new_tensor([2, 3]), path, depth + 1)

    kv = KeyValues(4)
    try:
        alone = run([1, 2], [0, 1], tree([2, 2]))[-1]
        # 1 and its children 0 and 2, 2 below 0
        whole = run([1, 0, 2, 2], [0, 1, 2, 1], tree([4, 3, 3, 4]))
        run([1, 0], [0, 1], tree([2, 2], kv))
        with HostReads() as reads:
            decoded = run([2, 2], [2, 1], step)
    except (*checks.USER_ERRORS, torch.OutOfMemoryError):
        raise
    except (AttributeError, TypeError, LookupError, ValueError, RuntimeError) as error:
        checks.fail("Policy", "model", "of a class that takes the tree attention", f"{name} ({error})", fix)
    # A small trained model is off by 0.3 to 1 where a row misses a node, and by 0.02 where bfloat16 rounds.
    limit = 0.02 if policy.head.weight.dtype.itemsize > 2 else 0.1
    for got, want, what in (
        (whole[3], alone, "takes the tree attention"),
        (decoded, whole[2:], "takes its keys and values in decoding"),
    ):
        gap = float((got - want).norm()) / max(1e-6, float(want.norm()))
        checks.check(gap < limit, "Policy", "model", f"of a class that {what}", name, fix)
    num_bytes = sum(x.numel() * x.element_size() for pair in kv.layers.values() for x in pair)
    return num_bytes // kv.capacity, not reads.found


def refuse_local_attention(config, takes_function: bool) -> None:
    """Four nodes do not show a window: refuse those that nobody would count in depths of the tree.

    takes_function: the class hands each layer's window to our attention function; another class counts it in
        places of its input.

    Raises:
        InputError: the configuration names such layers.
    """
    named = (getattr(config, name, None) or () for name in ("layer_types", "attention_layers"))
    kinds = {kind for layers in named for kind in layers}
    window = None if takes_function else getattr(config, "sliding_window", None)
    local = sorted(kind for kind in kinds if "chunked" in kind or (not takes_function and kind in LOCAL))
    want = "without windows that its class does not hand to an attention function"
    have = f"{type(config).__name__} ({', '.join(local) or f'sliding_window={window}'})"
    checks.check(not local and not window, "Policy", "model", want, have, f"use a {FAMILIES} model")
