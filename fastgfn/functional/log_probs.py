"""Log-probabilities of target tokens and of stopping, from hidden states and a head or from logits."""

import math

import torch
from torch import Tensor, nn

from fastgfn import checks
from fastgfn.functional import values
from fastgfn.ops import linear_log_probs as linear_ops
from fastgfn.ops import log_probs_from_logits as logits_ops
from fastgfn.types import LogProbs

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("auto", "torch", "triton")


def linear_log_probs(
    hidden: Tensor,  # (R, D) float16 | bfloat16 | float32 | float64
    weight: Tensor,  # (V, D) same dtype as hidden
    targets: Tensor,  # (M,) int32 | int64
    *,
    rows: Tensor | None = None,  # (M,) int32 | int64
    termination_token_id: int | None = None,
    bias: Tensor | None = None,  # (V,)
    logit_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    final_logit_softcap: float | None = None,
    temperature: float = 1.0,
    allowed: Tensor | None = None,  # (U, ceil(V / 8)) uint8
    allowed_row: Tensor | None = None,  # (R,) int32 | int64
    return_lse: bool = False,
    ignore_index: int = -100,
) -> LogProbs:
    """Log-probability of each target and of stopping, without storing the (R, V) logits.

    Equal to log_softmax(z)[rows, targets] and log_softmax(z)[:, termination_token_id] with, in this order,
    x = logit_scale * (hidden @ weight.T + bias), x = c * tanh(x / c) for the softcap c,
    z = (x + logit_bias) / temperature, and z = -inf where the row's mask in `allowed` lacks the token.

    Args:
        hidden: final hidden states; may be a strided slice.
        weight: the head. If it and `bias` need no gradient, backward has no product over the vocabulary.
        targets: token ids in [0, V), or ignore_index.
        rows: the hidden row of each target, in [0, R); None: target i is read from row i, and M == R.
        termination_token_id: the stop token, read from every row, or None.
        logit_bias: a constant vocabulary mask, e.g. -99 at excluded tokens, or None.
        temperature: > 0, divides the logits; no unit. logit_scale has none either, the softcap is in logits.
        allowed: masks of tokens in packed bits, that of token v being bit v % 8 of byte v // 8, as of
            numpy.packbits with bitorder="little"; each allows a token.
        allowed_row: the mask of every row, -1 for none.
        return_lse: also return the log-normaliser of z.

    Returns:
        LogProbs: log_pf (M,), 0 at ignored targets; log_pterm (R,) or None without a stop token; lse (R,) or
        None. float32 (float64 for float64 input). Differentiable, once, in hidden, weight and bias.

    Raises:
        InputError: a shape, device or value disagrees; a token or row out of range. On CUDA that is seen only
            with FASTGFN_DEBUG=1, which waits for the GPU; otherwise that log_pf is NaN, without gradient.
        InputTypeError: a dtype disagrees. NotImplementedError: the weight is quantised or wrapped.

    Numerics: logits, softmax and sums in float32; for 16-bit input the gradient's products are in the input
        dtype. Extra memory O(R (D + 512) + M D), on CUDA O(R D) and 512 MiB of logits. Same bits on repeat.
    Source: `reference/linear_log_probs.py` derives the gradient.
    """
    name = "linear_log_probs"
    rows = _check_linear(name, hidden, weight, targets, rows, bias)
    options = _options(termination_token_id, logit_scale, final_logit_softcap, temperature, ignore_index)
    _check_options(name, targets, weight, logit_bias=logit_bias, **options)
    masks = _check_masks(name, hidden, weight, allowed, allowed_row)
    targets, bad_targets = values.clamped(targets, weight.shape[0], ignore_index)
    rows, bad_rows = values.clamped(rows, hidden.shape[0])
    log_pf, log_pterm, lse = linear_ops.linear_log_probs(
        hidden, weight, targets, rows, bias=bias, logit_bias=logit_bias, **masks, **options
    )
    return LogProbs(values.marked(log_pf, bad_targets, bad_rows), log_pterm, lse if return_lse else None)


def policy_reward_log_probs(
    policy_hidden: Tensor,  # (R1, D) float16 | bfloat16 | float32 | float64
    reward_hidden: Tensor,  # (R2, D) same dtype
    weight: Tensor,  # (V, D) same dtype
    targets: Tensor | tuple[Tensor, Tensor],  # (M,) int32 | int64, or (M1,) and (M2,)
    *,
    rows: Tensor | tuple[Tensor, Tensor] | None = None,  # (M,) int32 | int64, or (M1,) and (M2,)
    termination_token_id: int | None = None,
    bias: Tensor | None = None,  # (V,)
    policy_logit_bias: Tensor | None = None,  # (V,)
    reward_logit_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    final_logit_softcap: float | None = None,
    temperature: float = 1.0,
    allowed: Tensor | None = None,  # (U, ceil(V / 8)) uint8
    allowed_row: Tensor | None = None,  # (R1,) int32 | int64
    return_lse: bool = False,
    ignore_index: int = -100,
) -> tuple[LogProbs, LogProbs]:
    """`linear_log_probs` of the policy's and of the reward model's hidden states in one pass over their head.

    Equal to linear_log_probs(policy_hidden, ..., logit_bias=policy_logit_bias, allowed=...) and, without
    gradient, linear_log_probs(reward_hidden, ..., logit_bias=reward_logit_bias). The rows are stacked, so
    that a tile of the weight is read once for both; the product that forms the gradient sees the policy's
    rows only.

    Args:
        targets: one tensor: both streams read these tokens; a pair: the policy's and the reward's.
        rows: the row of each target in its stream, in [0, R1) and [0, R2); one tensor serves both streams.
        policy_logit_bias, reward_logit_bias: the mask of each stream.
        allowed, allowed_row: of the policy's rows. Others: as in `linear_log_probs`.

    Returns:
        LogProbs of the policy, log_pf (M1,), log_pterm and lse (R1,), differentiable in policy_hidden, weight
        and bias; LogProbs of the reward, log_pf (M2,), log_pterm and lse (R2,), detached.

    Raises and numerics: as in `linear_log_probs`.
    """
    name = "policy_reward_log_probs"
    targets, rows = _pair(name, "targets", targets), _pair(name, "rows", rows)
    rows = (
        _check_linear(name, policy_hidden, weight, targets[0], rows[0], bias, "policy_hidden"),
        _check_linear(name, reward_hidden, weight, targets[1], rows[1], bias, "reward_hidden"),
    )
    options = _options(termination_token_id, logit_scale, final_logit_softcap, temperature, ignore_index)
    masks = _check_masks(name, policy_hidden, weight, allowed, allowed_row)
    biases = {"policy_logit_bias": policy_logit_bias, "reward_logit_bias": reward_logit_bias}
    for tokens, (arg, logit_bias) in zip(targets, biases.items(), strict=True):
        _check_options(name, tokens, weight, logit_bias=logit_bias, bias_arg=arg, **options)
    targets, bad_targets = _clamped_pair(targets, (weight.shape[0],) * 2, ignore_index)
    rows, bad_rows = _clamped_pair(rows, (policy_hidden.shape[0], reward_hidden.shape[0]))
    streams = linear_ops.policy_reward_log_probs(
        policy_hidden, reward_hidden, weight, targets, rows, bias=bias, **biases, **masks, **options
    )
    return tuple(
        LogProbs(values.marked(pf, *bad), pterm, lse if return_lse else None)
        for (pf, pterm, lse), *bad in zip(streams, bad_targets, bad_rows, strict=True)
    )


def _clamped_pair(pair, highs, ignore=None):
    return zip(*(values.clamped(x, n, ignore) for x, n in zip(pair, highs, strict=True)), strict=True)


def _pair(name: str, arg: str, value):
    """(policy's, reward's) of a pair, or of one tensor or None for both."""
    if value is None or isinstance(value, Tensor):
        return value, value
    ok = isinstance(value, tuple | list) and len(value) == 2
    have = f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__
    checks.check(ok, name, arg, "a tensor or a pair of tensors", have, "pass one, or one per stream")
    return tuple(value)


def log_probs_from_logits(
    logits: Tensor,  # (M, V) float16 | bfloat16 | float32 | float64
    targets: Tensor,  # (M,) int32 | int64
    *,
    termination_token_id: int | None = None,
    logit_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    final_logit_softcap: float | None = None,
    temperature: float = 1.0,
    return_lse: bool = False,
    ignore_index: int = -100,
    backend: str = "auto",
) -> LogProbs:
    """Log-probability of each row's target and of stopping, from materialised logits.

    Equal to log_softmax(z)[range(M), targets] and log_softmax(z)[:, termination_token_id], in this order,
    x = logit_scale * logits, x = c * tanh(x / c) for the softcap c, and z = (x + logit_bias) / temperature.

    Args:
        logits: of the head, any strides.
        targets: token ids in [0, V), or ignore_index.
        backend: "triton" (CUDA, not float64), "torch", or "auto": Triton where it runs on a GPU.
        Others: as in `linear_log_probs`.

    Returns:
        LogProbs: log_pf (M,), 0 at ignored targets; log_pterm (M,) or None; lse (M,) or None.
        float32 (float64 for float64 logits). Differentiable, once, in logits.

    Raises:
        InputError: a shape, device or value disagrees; a target out of range, as in `linear_log_probs`.
        InputTypeError: a dtype is not supported.
        RuntimeError: backend="triton" cannot run on these tensors.

    Numerics: float32 inside; the only (M, V) tensor is the gradient. Same bits on repeat.
    """
    name = "log_probs_from_logits"
    num_rows, _ = _check_matrix(name, "logits", logits)
    checks.check_shape(name, "targets", targets, (num_rows,), "pass one target per row of logits")
    checks.check_same_device(name, logits=logits, targets=targets)
    options = {
        "termination_token_id": termination_token_id,
        "logit_bias": logit_bias,
        "logit_scale": logit_scale,
        "final_logit_softcap": final_logit_softcap,
        "temperature": temperature,
        "ignore_index": ignore_index,
    }
    _check_options(name, targets, logits.T, **options)
    backend = _choose_backend(name, backend, logits)
    targets, bad = values.clamped(targets, logits.shape[1], ignore_index)
    log_pf, log_pterm, lse = logits_ops.log_probs_from_logits(logits, targets, backend=backend, **options)
    return LogProbs(log_pf=values.marked(log_pf, bad), log_pterm=log_pterm, lse=lse if return_lse else None)


def _choose_backend(name: str, backend: str, logits: Tensor) -> str:
    known = ", ".join(repr(b) for b in BACKENDS)
    checks.check(backend in BACKENDS, name, "backend", f"one of {known}", repr(backend), "use 'auto'")
    device = logits.device.type
    can_run = logits.dtype != torch.float64 and logits_ops.triton_runs_on(device)
    if backend == "triton" and not can_run:
        checks.fail(
            name,
            "backend",
            "'torch' or 'auto' here",
            f"'triton' with {logits.dtype} on {device}",
            "Triton needs CUDA tensors below float64, or TRITON_INTERPRET=1",
            kind=RuntimeError,
        )
    return "triton" if backend == "triton" or (backend == "auto" and can_run and device != "cpu") else "torch"


def _check_linear(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    arg: str = "hidden",
) -> Tensor:
    """Check the tensors and return the row of every target."""
    check_head(name, weight, "log_probs_from_logits")
    num_rows, width = _check_matrix(name, arg, hidden)
    fix = f"{arg} is {tuple(hidden.shape)}: pass the head of the same model"
    checks.check_shape(name, "weight", weight, ("V", width), fix)
    check_dtype(name, "weight", weight, hidden.dtype, arg)
    if rows is None:
        fix = f"pass one target per row of {arg}, or `rows` for any other layout"
        checks.check_shape(name, "targets", targets, (num_rows,), fix)
        rows = torch.arange(num_rows, device=hidden.device)
    checks.check_shape(name, "targets", targets, ("M",), "flatten it")
    checks.check_integer(name, "rows", rows)
    checks.check_shape(name, "rows", rows, tuple(targets.shape), "pass the hidden row of every target")
    values.check_range(name, "rows", rows, num_rows)
    if bias is not None:
        checks.check_shape(name, "bias", bias, (weight.shape[0],), "pass the bias of the same head")
        check_dtype(name, "bias", bias, hidden.dtype, arg)
    others = {"weight": weight, "targets": targets, "rows": rows, "bias": bias}
    checks.check_same_device(name, **{arg: hidden}, **others)
    return rows


def _check_masks(
    name: str, hidden: Tensor, weight: Tensor, allowed: Tensor | None, allowed_row: Tensor | None
) -> dict[str, Tensor | None]:
    if allowed is None or allowed_row is None:
        both = allowed is None and allowed_row is None
        checks.check(both, name, "allowed", "beside allowed_row", "one of the two", "pass both or neither")
        return {"allowed": None, "allowed_row": None}
    width = -(-weight.shape[0] // 8)
    fix = "pack (U, V) bool with numpy.packbits(..., axis=1, bitorder='little')"
    checks.check_shape(name, "allowed", allowed, ("U", width), fix)
    if allowed.dtype != torch.uint8:
        checks.fail(name, "allowed", "uint8", allowed.dtype, fix, kind=checks.InputTypeError)
    checks.check(len(allowed) > 0, name, "allowed", "one mask at least", "none", "pass None without masks")
    checks.check_integer(name, "allowed_row", allowed_row)
    checks.check_shape(name, "allowed_row", allowed_row, (hidden.shape[0],), "pass the mask of every row")
    checks.check_same_device(name, hidden=hidden, allowed=allowed, allowed_row=allowed_row)
    values.check_range(name, "allowed_row", allowed_row, allowed.shape[0], low=-1)
    return {"allowed": allowed, "allowed_row": allowed_row}


def check_head(name: str, weight: Tensor, instead: str) -> None:
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in DTYPES:
        checks.fail(
            name,
            "weight",
            "a plain floating-point (V, D) tensor (not a quantised or adapter-wrapped head)",
            f"{type(weight).__name__} {getattr(weight, 'dtype', '')}".strip(),
            f"compute the logits with the model's own head and pass them to {instead}",
            kind=NotImplementedError,
        )


def _check_matrix(name: str, arg: str, tensor: Tensor) -> tuple[int, int]:
    checks.check_shape(name, arg, tensor, ("rows", "columns"), "flatten the batch first")
    if tensor.dtype not in DTYPES:
        known = "float16, bfloat16, float32 or float64"
        checks.fail(name, arg, known, tensor.dtype, "cast it", kind=checks.InputTypeError)
    return tensor.shape


def check_dtype(name: str, arg: str, tensor: Tensor, want: torch.dtype, like: str) -> None:
    if tensor.dtype != want:
        fix = "cast one of the two"
        checks.fail(name, arg, f"{want} like {like}", tensor.dtype, fix, kind=checks.InputTypeError)


def _options(stop, logit_scale, softcap, temperature, ignore_index) -> dict:
    return {
        "termination_token_id": stop,
        "logit_scale": logit_scale,
        "final_logit_softcap": softcap,
        "temperature": temperature,
        "ignore_index": ignore_index,
    }


def _check_options(
    name: str,
    targets: Tensor,
    by_vocab: Tensor,  # (V, ...)
    *,
    termination_token_id: int | None,
    logit_bias: Tensor | None,
    logit_scale: float,
    final_logit_softcap: float | None,
    temperature: float,
    ignore_index: int,
    bias_arg: str = "logit_bias",
) -> None:
    vocab, stop, cap = by_vocab.shape[0], termination_token_id, final_logit_softcap
    checks.check(vocab > 0, name, "the vocabulary", "non-empty", vocab, "pass the whole head")
    checks.check_integer(name, "targets", targets)
    values.check_range(name, "targets", targets.masked_fill(targets == ignore_index, 0), vocab)
    if logit_bias is not None:
        checks.check_shape(name, bias_arg, logit_bias, (vocab,), "give one value per vocabulary entry")
        checks.check_floating(name, bias_arg, logit_bias)
        checks.check_same_device(name, **{"targets": targets, bias_arg: logit_bias})
        is_constant = not logit_bias.requires_grad
        checks.check(is_constant, name, bias_arg, "a constant", "requires_grad=True", "detach it")
    in_vocab = stop is None or 0 <= stop < vocab
    fix = "pass the id of the token that ends a sequence"
    checks.check(in_vocab, name, "termination_token_id", f"in [0, {vocab})", stop, fix)
    checks.check(math.isfinite(logit_scale), name, "logit_scale", "finite", logit_scale, "pass the model's")
    is_cap = cap is None or cap > 0
    checks.check(is_cap, name, "final_logit_softcap", "> 0 or None", cap, "pass the model's")
    checks.check(temperature > 0, name, "temperature", "> 0", temperature, "1.0 leaves logits as they are")
