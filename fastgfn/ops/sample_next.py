"""Exact next-token draws: the ops `fastgfn::gumbel_draw`, from logits, and `fastgfn::head_gumbel_draw`, from
hidden states and a head. CPU: csrc/sample_next.cpp. CUDA: Triton, kernels/sample_next.py and
head_sample_next.py, without a host synchronisation and with shapes that depend on shapes alone.

On CUDA no value is checked: a draw whose row, temperature or logits are bad, or that has no token left,
returns the token -1 and NaN log-probs.
"""

import torch
from torch import Tensor

import fastgfn._C  # noqa: F401
from fastgfn import checks
from fastgfn.ops.linear import product

# Logits that the CPU form of head_gumbel_draw holds at a time.
LOGIT_BYTES = 64 * 2**20

Drawn = tuple[Tensor, Tensor, Tensor, Tensor]


def gumbel_draw(
    logits: Tensor,  # (R, V) float32 | float64 (CPU only) | bfloat16, float16 (CUDA only), contiguous rows
    rows: Tensor,  # (K,) int64
    temperature: Tensor,  # (K,) float32
    trajectory: Tensor,  # (K,) int64
    position: Tensor,  # (K,) int64
    seed: int,
    termination_token_id: int,
    forbid_stop: Tensor,  # (K,) bool
) -> Drawn:
    """(token, log_pf, log_pterm, log_behavior), each (K,): see reference.sample_next.gumbel_draw.

    termination_token_id -1 means that no token stops; log_pterm is then -inf.
    """
    return torch.ops.fastgfn.gumbel_draw(
        logits, rows, temperature, trajectory, position, seed, termination_token_id, forbid_stop
    )


def head_gumbel_draw(
    hidden: Tensor,  # (R, D) floating point, any strides; not float64 on CUDA
    weight: Tensor,  # (V, D) same dtype
    bias: Tensor | None,  # (V,)
    logit_bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
    rows: Tensor,  # (K,) int64
    temperature: Tensor,  # (K,) float32
    trajectory: Tensor,  # (K,) int64
    position: Tensor,  # (K,) int64
    seed: Tensor,  # (1,) int64
    termination_token_id: int,
    forbid_stop: Tensor,  # (K,) bool
) -> Drawn:
    """gumbel_draw of the logits softcap(logit_scale * (hidden weight.T + bias)) + logit_bias, in float32.

    On CPU the product is rounded to the dtype of `hidden` and the logits exist for some rows at a time; on
    CUDA it stays in float32 and they never do.
    """
    return torch.ops.fastgfn.head_gumbel_draw(
        hidden,
        weight,
        bias,
        logit_bias,
        logit_scale,
        softcap,
        rows,
        temperature,
        trajectory,
        position,
        seed,
        termination_token_id,
        forbid_stop,
    )


def philox4x32(counter: Tensor, seed: int) -> Tensor:
    """(K, 4) int64 words in [0, 2^32) of (K, 4) counters, the noise of gumbel_draw.

    Token v reads word v % 4 of the counter (v // 4, position, low half, high half of trajectory).
    """
    return torch.ops.fastgfn.philox4x32(counter, seed)


def gumbel_draw_triton(
    logits, rows, temperature, trajectory, position, seed, termination_token_id, forbid_stop
) -> Drawn:
    """The CUDA form of gumbel_draw; also runs on CPU tensors in the Triton interpreter."""
    from fastgfn.kernels.sample_next import draw_from_logits

    name = "gumbel_draw"
    checks.check_shape(name, "logits", logits, ("R", "V"), "pass (R, V)")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        want = "float32, bfloat16 or float16 on CUDA"
        checks.fail(name, "logits", want, logits.dtype, "call .float()", kind=checks.InputTypeError)
    is_contiguous = logits.shape[1] >= 1 and logits.stride(1) == 1
    want = "(R, V) with V >= 1 and contiguous rows"
    checks.check(is_contiguous, name, "logits", want, tuple(logits.stride()), "call .contiguous()")
    _check_draws(name, logits, rows, temperature, trajectory, position, termination_token_id, forbid_stop)
    per_draw = [x.contiguous() for x in (rows, temperature, trajectory, position)]
    key = torch.full((1,), seed, dtype=torch.int64, device=logits.device)
    return draw_from_logits(logits, *per_draw, key, termination_token_id, forbid_stop.contiguous())


torch.library.impl("fastgfn::gumbel_draw", "cuda", gumbel_draw_triton)


@torch.library.custom_op("fastgfn::head_gumbel_draw", mutates_args=(), device_types="cpu")
def _head_gumbel_draw(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    rows: Tensor,
    temperature: Tensor,
    trajectory: Tensor,
    position: Tensor,
    seed: Tensor,
    termination_token_id: int,
    forbid_stop: Tensor,
) -> Drawn:
    per_draw = (temperature, trajectory, position)
    num_rows, vocab = _check_head(
        hidden, weight, bias, logit_bias, seed, rows, *per_draw, termination_token_id, forbid_stop
    )
    bad = rows[(rows < 0) | (rows >= num_rows)]
    want = f"in [0, {num_rows})"
    checks.check(not len(bad), HEAD, "rows", want, bad[:1].tolist(), "pass row numbers of hidden")
    token = torch.empty_like(rows)
    out = (token, *(hidden.new_empty(rows.shape, dtype=torch.float32) for _ in range(3)))
    chunk = max(1, LOGIT_BYTES // (4 * vocab))
    for first in range(0, num_rows, chunk):
        logits = product(hidden[first : first + chunk], weight, bias).float()
        if logit_scale != 1.0:
            logits = logits * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if logit_bias is not None:
            logits = logits + logit_bias.to(logits.dtype)
        here = ((rows >= first) & (rows < first + chunk)).nonzero()[:, 0]
        drawn = gumbel_draw(
            logits,
            rows[here] - first,
            *(x[here] for x in per_draw),
            int(seed),
            termination_token_id,
            forbid_stop[here],
        )
        for whole, part in zip(out, drawn, strict=True):
            whole[here] = part
    return out


@_head_gumbel_draw.register_kernel("cuda")
def head_gumbel_draw_triton(
    hidden,
    weight,
    bias,
    logit_bias,
    logit_scale,
    softcap,
    rows,
    temperature,
    trajectory,
    position,
    seed,
    termination_token_id,
    forbid_stop,
) -> Drawn:
    """The CUDA form of head_gumbel_draw; also runs on CPU tensors in the Triton interpreter."""
    from fastgfn.kernels.head_sample_next import fused_draw

    per_draw = (rows, temperature, trajectory, position)
    _check_head(hidden, weight, bias, logit_bias, seed, *per_draw, termination_token_id, forbid_stop)
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        want = "float32, bfloat16 or float16 on CUDA"
        checks.fail(HEAD, "hidden", want, hidden.dtype, "cast it", kind=checks.InputTypeError)
    return fused_draw(
        hidden,
        weight,
        None if bias is None else bias.contiguous(),
        None if logit_bias is None else logit_bias.contiguous(),
        logit_scale,
        softcap,
        *(x.contiguous() for x in per_draw),
        seed,
        termination_token_id,
        forbid_stop.contiguous(),
    )


HEAD = "head_gumbel_draw"


def _check_head(hidden, weight, bias, logit_bias, seed, rows, *draws) -> tuple[int, int]:
    """R and V, after every shape and dtype is checked."""
    checks.check_shape(HEAD, "hidden", hidden, ("R", "D"), "flatten the leading dimensions")
    checks.check_floating(HEAD, "hidden", hidden)
    checks.check_shape(HEAD, "weight", weight, ("V", hidden.shape[1]), "pass the head of the same model")
    vocab = weight.shape[0]
    checks.check(vocab >= 1, HEAD, "weight", "(V, D) with V >= 1", tuple(weight.shape), "pass the whole head")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            want = f"{hidden.dtype} like hidden"
            checks.fail(HEAD, name, want, tensor.dtype, "cast one of the two", kind=checks.InputTypeError)
    for name, tensor in (("bias", bias), ("logit_bias", logit_bias)):
        if tensor is not None:
            checks.check_shape(HEAD, name, tensor, (vocab,), "give one value per token")
            checks.check_floating(HEAD, name, tensor)
    checks.check_shape(HEAD, "seed", seed, (1,), "pass one number in a tensor")
    if seed.dtype != torch.int64:
        checks.fail(HEAD, "seed", "int64", seed.dtype, "cast it to int64", kind=checks.InputTypeError)
    checks.check_same_device(
        HEAD, hidden=hidden, weight=weight, bias=bias, logit_bias=logit_bias, rows=rows, seed=seed
    )
    _check_draws(HEAD, weight.T, rows, *draws)
    return hidden.shape[0], vocab


def _check_draws(name, by_vocab, rows, temperature, trajectory, position, stop, forbid_stop) -> None:
    """Shapes and dtypes of the per-draw arguments, and the stop token; by_vocab (..., V)."""
    wants = (
        ("rows", rows, torch.int64),
        ("temperature", temperature, torch.float32),
        ("trajectory", trajectory, torch.int64),
        ("position", position, torch.int64),
        ("forbid_stop", forbid_stop, torch.bool),
    )
    for arg, tensor, dtype in wants:
        if tensor.dtype != dtype:
            checks.fail(name, arg, dtype, tensor.dtype, f"cast it to {dtype}", kind=checks.InputTypeError)
        checks.check_shape(name, arg, tensor, (rows.numel(),), "give one value per draw")
    checks.check_same_device(
        name,
        logits=by_vocab,
        rows=rows,
        temperature=temperature,
        trajectory=trajectory,
        position=position,
        forbid_stop=forbid_stop,
    )
    vocab, fix = by_vocab.shape[1], "pass an id of the vocabulary"
    checks.check(-1 <= stop < vocab, name, "termination_token_id", f"-1 or in [0, {vocab})", stop, fix)


@torch.library.register_fake("fastgfn::philox4x32")
def _(counter, seed):
    return torch.empty_like(counter, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastgfn::gumbel_draw")
def _(logits, rows, temperature, trajectory, position, seed, termination_token_id, forbid_stop):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_prob = logits.new_empty(rows.shape[0], dtype=dtype)
    return rows.new_empty(rows.shape[0]), log_prob, torch.empty_like(log_prob), torch.empty_like(log_prob)


@_head_gumbel_draw.register_fake
def _(hidden, weight, bias, logit_bias, logit_scale, softcap, rows, *draws):
    log_probs = [hidden.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(3)]
    return rows.new_empty(rows.shape[0]), *log_probs
