"""Tree attention by kernels: the dispatcher ops `fastgfn::tree_attention` and its backward, in Triton
(kernels/tree_attention.py), and the flash-attn package where no node branches. Truth:
`reference/attention.py`. The choice between providers is `ops.attention.tree_attention`."""

import torch
from torch import Tensor

from fastgfn import checks

NAME = "tree_attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_attention(
    query: Tensor,  # (H, T, d) float32 | bfloat16 | float16, last stride 1
    key: Tensor,  # (Hkv, T, d)
    value: Tensor,  # (Hkv, T, d)
    mask,  # ops.attention.TreeMask
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """(H, T, d), a view of (T, H, d) so that the output projection reads it without a copy."""
    kernels = _kernels(query)
    _check(query, key, value, scale, kernels.MAX_HEAD_DIM)
    fwd, grad_kv, grad_q = kernels.table(query, softcap, window)
    plan = mask.plan(fwd.queries, fwd.keys, window)
    plan_q = plan_kv = None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        plan_q = mask.plan(grad_q.queries, grad_q.keys, window)
        plan_kv = mask.plan(grad_kv.queries, grad_kv.keys, window, by_key=True)
    plans = (plan, plan_q, plan_kv)
    nodes = mask.nodes()
    return torch.ops.fastgfn.tree_attention(query, key, value, *nodes, *plans, scale, softcap, window)[0]


def _kernels(query: Tensor):
    try:
        from fastgfn.kernels import tree_attention
    except ImportError:
        checks.missing_package(NAME, "triton", "pass provider='sdpa', or install triton")
    if not (query.is_cuda or tree_attention.IS_INTERPRETED):
        have = f"'triton' on {query.device}"
        checks.fail(NAME, "provider", "'sdpa' or None here", have, "Triton needs CUDA tensors")
    return tree_attention


def check_inputs(query, key, value, end, softcap, window):
    """What every provider needs of the arguments of `ops.attention.tree_attention`."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        want, have = "(heads, nodes, head dim)", tuple(x.shape)
        checks.check(x.dim() == 3, NAME, name, want, have, "drop or add axes")
        checks.check_floating(NAME, name, x)
        if x.dtype != query.dtype:
            want = f"{query.dtype} as query is"
            checks.fail(NAME, name, want, x.dtype, "cast them to one dtype", kind=checks.InputTypeError)
    checks.check_same_device(NAME, query=query, key=key, value=value, mask=end)
    heads, size, width = query.shape
    checks.check_shape(NAME, "key", key, ("heads", size, width), "give one key per query node")
    checks.check_shape(NAME, "value", value, tuple(key.shape), "give one value per key")
    checks.check_shape(NAME, "mask", end, (size,), "build the mask of this tree")
    kv_heads = key.shape[0]
    divides = kv_heads > 0 and heads % kv_heads == 0
    checks.check(divides, NAME, "query", f"of a multiple of {kv_heads} heads", heads, "check the head counts")
    for name, x in (("softcap", softcap), ("window", window)):
        checks.check(x is None or x > 0, NAME, name, "> 0", x, "omit it")


def _check(query, key, value, scale, max_width):
    """What the kernels need beyond that."""
    fix = "pass provider='sdpa'"
    for name, x in (("query", query), ("key", key), ("value", value)):
        ok, want = x.stride(2) == 1 or x.shape[2] == 1, "(heads, nodes, head dim) with a contiguous head dim"
        have = f"shape {tuple(x.shape)}, strides {x.stride()}"
        checks.check(ok, NAME, name, want, have, "copy it with .contiguous()")
    if query.dtype not in DTYPES:
        want = "float32, bfloat16 or float16"
        checks.fail(NAME, "query", want, query.dtype, fix, kind=checks.InputTypeError)
    width = query.shape[2]
    checks.check(width <= max_width, NAME, "query", f"of head dim <= {max_width}", width, fix)
    checks.check(scale > 0, NAME, "scale", "> 0", scale, fix)


@torch.library.custom_op("fastgfn::tree_attention", mutates_args=())
def _tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    end: Tensor,  # (T,) int32
    position: Tensor,  # (T,) int32
    plan: Tensor,
    plan_q: Tensor | None,  # the two of the backward, None where no gradient is needed
    plan_kv: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """out (H, T, d) in the dtype of query; lse (H, T) float32 in nats, differentiable too."""
    from fastgfn.kernels.tree_attention import tree_attention_fwd

    return tree_attention_fwd(query, key, value, end, position, plan, scale, softcap, window)


@torch.library.custom_op("fastgfn::tree_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    end: Tensor,
    position: Tensor,
    plan_q: Tensor,
    plan_kv: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in their dtypes."""
    from fastgfn.kernels.tree_attention_backward import tree_attention_bwd

    saved = (query, key, value, out, lse, end, position, plan_q, plan_kv)
    return tree_attention_bwd(grad_out, grad_lse, *saved, scale, softcap, window)


def _row_major(x: Tensor) -> Tensor:
    """An empty (H, T, d) view of (T, H, d)."""
    return x.new_empty(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)


@_tree_attention.register_fake
def _(query, key, value, end, position, plan, plan_q, plan_kv, scale, softcap, window):
    return _row_major(query), query.new_empty(query.shape[:2], dtype=torch.float32)


@_backward.register_fake
def _(
    grad_out, grad_lse, query, key, value, out, lse, end, position, plan_q, plan_kv, scale, softcap, window
):  # fmt: skip
    return _row_major(query), _row_major(key), _row_major(value)


def _save(ctx, inputs, output):
    query, key, value, end, position, _, plan_q, plan_kv, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output, end, position, plan_q, plan_kv)


def _gradient(ctx, grad_out, grad_lse):
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    grads = torch.ops.fastgfn.tree_attention_backward(
        grad_out, grad_lse.contiguous(), *ctx.saved_tensors, *ctx.options
    )
    return *grads, *[None] * 8


torch.library.register_autograd("fastgfn::tree_attention", _gradient, setup_context=_save)


def flash_attention(query, key, value, mask, scale, softcap, window):
    """tree_attention by flash_attn_varlen_func, for a tree that is a chain or several."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        checks.missing_package(NAME, "flash-attn", "pip install flash-attn, or choose another provider")
    chains = mask.chains()
    if chains is None:
        want = "a chain or several for provider='flash_attn'"
        checks.fail(NAME, "mask", want, "a tree with branches", "choose another provider")
    starts, longest = chains
    out = flash_attn_varlen_func(
        *(x.transpose(0, 1) for x in (query, key, value)),
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=0.0 if softcap is None else softcap,
    )
    return out.transpose(0, 1)
