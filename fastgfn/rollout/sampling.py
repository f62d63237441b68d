"""`sample`: the request, checked, and the memory that it will take."""

import contextlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgfn import checks
from fastgfn.models import Policy
from fastgfn.ops.quantized import FLOAT8, LEAST_CAPABILITY
from fastgfn.phases import phase
from fastgfn.rollout.drafts import Drafts
from fastgfn.rollout.draws import Drawer
from fastgfn.rollout.engine import Engine, Request, is_out_of_memory
from fastgfn.rollout.hooks import Tool
from fastgfn.rollout.options import SamplingOptions
from fastgfn.rollout.static import StaticEngine
from fastgfn.types import Constraints, Grammar, Rollouts

# Merging the adapter costs one pass over the weights, which this many decode steps without it repay.
MERGE_FROM = 6
# Trajectories that run at a time, unless memory says less: more gain little per token.
BATCH_SIZE = 512
# Of the memory that is free, what keys and values may take by default.
MEMORY_SHARE = 0.5


@torch.no_grad()
@phase("decode")
def sample(
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    policy: Policy,
    constraints: Constraints,
    num_samples: int,
    temperature: float | Tensor = 1.0,
    target_temperature: float | None = None,
    options: SamplingOptions | None = None,
    grammar: Grammar | None = None,
    tool: Tool | None = None,
    drafts: Drafts | None = None,
    seed: int = 0,
    first_trajectory: int = 0,
    batch_size: int | None = None,
    merge: bool = True,
    precision: torch.dtype | None = None,
) -> Rollouts:
    """Draw `num_samples` sequences for each of G prompts.

    Args:
        prompts: G token-id sequences, none empty.
        constraints: the sequence set; its vocabulary mask and limits bind every draw.
        temperature: divides the logits of the draw, one number or (G * num_samples,) float; > 0. The
            log-probs that enter a loss never see it: they come from `score`.
        target_temperature: sets a conditioned policy's q for this call, as `policy.at_temperature` does.
        options: filters, uniform draws and given prefixes of the behaviour policy.
        grammar: which tokens may follow each sequence; part of q, whose log-probs are renormalised over them.
            `pack` needs it, too. At max_length a sequence ends, whether or not the grammar accepts it.
        tool: appends observations to a sequence; they count towards max_length, which cuts them off.
        drafts: guesses of next tokens, verified in the same passes; no draw changes. It counts acceptance.
        seed, first_trajectory: the noise of trajectory i is keyed by (seed, first_trajectory + i).
        batch_size: most that run at a time; None: 512, or what half of the free memory holds. Keys and values
            take `policy.node_bytes` per token: prompts and batch_size (GPU: next power of 2) * max_length;
            those of a draft model come on top.
        merge: draw with the adapter merged into copies of the weights: faster, for a copy of the linear
            layers. In 16 bits merging rounds small adapters; compare `log_pf` with the score's. Nothing is
            merged under torch.autocast, nor, with a warning, where memory has no room for the copies.
        precision: dtype of those copies, e.g. torch.bfloat16 under a float32 policy, torch.int8 (CPU) or
            torch.float8_e4m3fn (CUDA; see `check_precision`); None: the base's. What is drawn is then
            another, nearby, behaviour policy, of its own log-probs, which off-policy objectives allow.

    Returns: Rollouts with N = G * num_samples trajectories, ordered by prompt.

    Raises:
        InputError: an empty prompt, one longer than the model's context allows, a termination token outside
            the vocabulary, a temperature <= 0, a target temperature that the policy cannot take or lacks, a
            batch_size whose keys and values do not fit into memory.
        OutOfMemory: memory ran out with a single trajectory running; the finished ones are in it. With more
            of them a warning is given, and the unfinished ones start again in half the batch.
    """
    options = SamplingOptions() if options is None else options
    hooks, counts = (grammar, tool, drafts), (num_samples, first_trajectory)
    request = _request(prompts, policy, constraints, temperature, options, hooks, *counts)
    _check_numbers(seed, merge, precision, policy.device)
    drawer = Drawer(policy, constraints, options, seed)
    with contextlib.ExitStack() as block:
        if target_temperature is not None:
            block.enter_context(policy.at_temperature(target_temperature))
        return _draw(policy, request, drawer, batch_size, merge, precision)


def _draw(
    policy: Policy,
    request: Request,
    drawer: Drawer,
    batch_size: int | None,
    merge: bool,
    precision: torch.dtype | None,
) -> Rollouts:
    kind = choose_engine(policy, request, drawer)
    copies = _merged_bytes(policy, request.constraints, merge, precision)
    size, merges = _plan(batch_size, policy, request, kind, copies)
    with contextlib.ExitStack() as block:
        if merges:
            _merge(block, policy, precision)
        return kind(policy, request, drawer, size).run()


def _request(
    prompts, policy, constraints, temperature, options, hooks, num_samples, first_trajectory
) -> Request:
    """The checked request."""
    prompts = tuple(_token_ids(f"prompts[{g}]", p) for g, p in enumerate(prompts))
    check_prompts(prompts, policy, constraints)
    for name, value in (("num_samples", num_samples), ("first_trajectory", first_trajectory)):
        if type(value) is not int:
            checks.fail("sample", name, "an int", repr(value), "round it", kind=checks.InputTypeError)
    checks.check(num_samples >= 1, "sample", "num_samples", ">= 1", num_samples, "raise it")
    is_low = 0 <= first_trajectory < 2**62
    checks.check(is_low, "sample", "first_trajectory", "in [0, 2^62)", first_trajectory, "count from 0")
    is_drafts, have = hooks[2] is None or isinstance(hooks[2], Drafts), type(hooks[2]).__name__
    checks.check(is_drafts, "sample", "drafts", "a Drafts object", have, "pass Drafts(source)")
    group = torch.arange(len(prompts)).repeat_interleave(num_samples)
    temperature = _temperatures(temperature, len(group))
    _check_prefixes(options.prefixes, len(group), policy.vocab_size, constraints)
    return Request(prompts, group, constraints, temperature, first_trajectory, options.prefixes, *hooks)


def _merged_bytes(
    policy: Policy, constraints: Constraints, merge: bool, precision: torch.dtype | None
) -> int | None:
    """Memory that merged copies take, None where none are wanted."""
    if torch.is_autocast_enabled(policy.device.type):
        fix = "autocast says in what dtype to draw: leave it out"
        checks.check(precision is None, "sample", "precision", "None under autocast", precision, fix)
        return None
    merges = merge and (constraints.max_length >= MERGE_FROM or precision is not None)
    return policy.merged_bytes(precision) if merges else None


def _merge(block: contextlib.ExitStack, policy: Policy, precision: torch.dtype | None) -> None:
    """Merge the adapter until the end of the block, unless there is no memory for the copies."""
    try:
        num_merged = block.enter_context(policy.merged(precision))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        warnings.warn("sample: out of memory for merged weights, drawing with unmerged ones", stacklevel=6)
        return
    ok, fix = precision is None or num_merged > 0, "these weights are trained or quantised: leave it out"
    checks.check(ok, "sample", "precision", "None where no layer can be merged", precision, fix)


def choose_engine(policy: Policy, request: Request, drawer: Drawer) -> type[Engine]:
    """Slots on a GPU, wherever a step can be told without looking at what the last one drew."""
    hooks = (request.prefixes, request.grammar, request.tool, request.drafts)
    looks = any(hook is not None for hook in hooks) or drawer.needs_logits
    is_static = policy.device.type == "cuda" and policy.has_static_step and not looks
    return StaticEngine if is_static else Engine


def _token_ids(name: str, prompt: Sequence[int] | Tensor) -> Tensor:
    """int64; numbers with a fraction would lose it."""
    ids = torch.as_tensor(prompt)
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        checks.fail("sample", name, "token ids", ids.dtype, "encode the text", kind=checks.InputTypeError)
    return ids.to("cpu", torch.int64)


def _check_numbers(seed: int, merge: bool, precision: torch.dtype | None, device: torch.device) -> None:
    known = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, FLOAT8)
    want = "None or a floating-point dtype of torch or torch.int8"
    checks.check(precision in known, "sample", "precision", want, repr(precision), "use torch.bfloat16")
    checks.check(-(2**63) <= seed < 2**63, "sample", "seed", "a 64-bit integer", seed, "choose a smaller one")
    checks.check(merge or precision is None, "sample", "precision", "None without merge", precision, "merge")
    check_precision(precision, device)


def check_precision(precision: torch.dtype | None, device: torch.device) -> None:
    """Refuse 8 bits of the kind that the device lacks: int8 is for the CPU, float8_e4m3fn for CUDA (sm_89).

    Of 8 bits are the copies of the linear layers and, in their products, the activations, both row by row.
    Head and embeddings stay as they are, as do layers that cannot be merged; a layer with a size that is no
    multiple of 16 is in bfloat16 instead of float8. Next to bfloat16 the copies take half the memory, and
    log q moves further from the policy's, with float8 more than with int8 (bench/NOTES.md). What a product
    costs: fastgfn.ops.quantized.
    """
    if precision == torch.int8:
        fix = "use torch.float8_e4m3fn, or torch.bfloat16"
        is_cpu = device.type == "cpu"
        checks.check(is_cpu, "sample", "precision", f"floating point on {device.type}", precision, fix)
    if precision == FLOAT8:
        want, fix = f"torch.int8 or 16 bits or more on {device.type}", "use torch.int8"
        checks.check(device.type == "cuda", "sample", "precision", want, precision, fix)
        capability = torch.cuda.get_device_capability(device)
        want = f"16 bits or more on a GPU of compute capability {'.'.join(map(str, capability))}"
        is_new = capability >= LEAST_CAPABILITY
        checks.check(is_new, "sample", "precision", want, precision, "use torch.bfloat16")


def _temperatures(temperature: float | Tensor, total: int) -> Tensor:
    values = torch.as_tensor(temperature, dtype=torch.float32)
    one_each = values.dim() == 0 or values.shape == (total,)
    have, want = tuple(values.shape), f"one number or ({total},)"
    checks.check(one_each, "sample", "temperature", want, have, "give one per trajectory")
    positive = bool((values > 0).all())
    checks.check(positive, "sample", "temperature", "> 0", float(values.min()), "use e.g. 1.0")
    return values.expand(total)


def _check_prefixes(prefixes, total: int, vocab: int, constraints: Constraints) -> None:
    if prefixes is None:
        return
    fix = "give one list of tokens per trajectory, empty for none"
    checks.check(len(prefixes) == total, "sample", "prefixes", f"{total} lists", len(prefixes), fix)
    stops, longest = constraints.termination_token_ids, constraints.max_length
    for i, prefix in enumerate(prefixes):
        ok = len(prefix) <= longest and all(0 <= t < vocab and t not in stops for t in prefix)
        want = f"at most {longest} ids in [0, {vocab}) without {list(stops)}"
        checks.check(
            ok, "sample", f"prefixes[{i}]", want, list(prefix)[:20], "shorten it, or use this model's ids"
        )


def _plan(
    batch_size: int | None, policy: Policy, request: Request, kind: type[Engine], copies: int | None
) -> tuple[int, bool]:
    """The batch size, and whether to merge: `copies` are the bytes of it, None not to.

    Merged weights cost a smaller batch where memory is short. A step takes about as long for half the batch,
    and unmerged weights less than twice as long: below that they are not worth it.
    """
    if kind is Engine:
        policy.kept = None
    plain = _batch_size(batch_size, policy, request, kind)
    if copies is None:
        return plain, False
    with contextlib.suppress(checks.InputError):
        size = _batch_size(batch_size, policy, request, kind, copies)
        if 2 * size >= plain:
            return size, True
    have = f"{copies / 2**30:.2f} GiB and keys and values of {plain} sequences"
    warnings.warn(f"sample: no memory for merged weights ({have}), drawing with unmerged ones", stacklevel=6)
    return plain, False


def _batch_size(
    batch_size: int | None, policy: Policy, request: Request, kind: type[Engine], copies: int = 0
) -> int:
    """The batch size asked for, if its keys and values fit beside so many bytes of merged copies, or the
    largest up to BATCH_SIZE."""
    total, drafts = len(request.group), request.drafts
    longest = max(map(len, request.distinct)) + request.constraints.max_length
    rows = 1 + request.lookahead  # of a trajectory, at a time
    node_bytes = policy.node_bytes + (0 if drafts is None else drafts.source.node_bytes)

    def num_bytes(size: int) -> int:
        gathered = size * rows * longest * policy.path_bytes
        return kind.capacity(request, size) * node_bytes + gathered

    free = policy.free_bytes() + (0 if policy.kept is None else policy.kept.num_bytes) - copies
    fits = [size for size in (2**i for i in range(1, 10)) if num_bytes(size) <= MEMORY_SHARE * free]
    largest = max(fits, default=1)
    size = min(total, BATCH_SIZE, largest) if batch_size is None else min(batch_size, total)
    checks.check(size >= 1, "sample", "batch_size", ">= 1 or None", batch_size, "raise it")
    need = num_bytes(size)
    have = f"{size}, {need / 2**30:.2f} GiB where {free / 2**30:.2f} GiB are free"
    fix = f"lower batch_size to {largest}" if size > 1 else "shorten the prompts or lower max_length"
    want = "so small that its keys and values fit into memory"
    checks.check(need <= free, "sample", "batch_size", want, have, fix)
    return size


def _pad_token_id(policy: Policy) -> int | None:
    """The token that only pads; None if there is none, or if it also begins or ends texts."""
    found = [getattr(policy.tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    return None if found[0] in found[1:] else found[0]


def check_prompts(prompts: Sequence[Tensor], policy: Policy, constraints: Constraints) -> None:
    """Refuse prompts and constraints that do not fit the model, before any work is done."""
    checks.check(len(prompts) > 0, "sample", "prompts", "at least one prompt", 0, "pass a list of token ids")
    vocab = policy.vocab_size
    checks.check(
        max(constraints.termination_token_ids) < vocab,
        "sample",
        "termination_token_id",
        f"in [0, {vocab})",
        max(constraints.termination_token_ids),
        "pass a token id of this model's vocabulary",
    )
    if constraints.logit_bias is not None:
        checks.check_shape("sample", "logit_bias", constraints.logit_bias, (vocab,), "one entry per token id")
    limit, pad = policy.max_positions, _pad_token_id(policy)
    for g, prompt in enumerate(prompts):
        checks.check(
            prompt.dim() == 1 and len(prompt) > 0,
            "sample",
            f"prompts[{g}]",
            "a non-empty list",
            [],
            "add a token",
        )
        low, high = int(prompt.min()), int(prompt.max())
        checks.check(
            low >= 0 and high < vocab,
            "sample",
            f"prompts[{g}]",
            f"ids in [0, {vocab})",
            (low, high),
            "use this model's tokenizer",
        )
        fix = "pass prompts without padding, of any length each"
        only_pad = pad is not None and low == high == pad
        checks.check(not only_pad, "sample", f"prompts[{g}]", "text", "pad tokens alone", fix)
        longest = len(prompt) + constraints.max_length
        checks.check(
            limit is None or longest <= limit,
            "sample",
            f"prompts[{g}]",
            f"at most {limit} - max_length = {(limit or 0) - constraints.max_length} tokens",
            len(prompt),
            "shorten the prompt or lower max_length",
        )
