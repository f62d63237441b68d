"""A policy: a causal LM with a LoRA adapter, its head, and the reference view with the adapter off."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastgfn import checks
from fastgfn.attention import NAME, TreeAttention
from fastgfn.models import explicit
from fastgfn.models.checkpointing import CheckpointedLayer, checkpoint_layers
from fastgfn.models.decode_layer import DecoderLayer, take_over_layers
from fastgfn.models.linear import Linear, merged_bytes, take_over
from fastgfn.models.log_probs import paired_log_probs, tree_log_probs
from fastgfn.models.mlp import GatedMLP, take_over_mlps
from fastgfn.models.probe import probe, refuse_local_attention
from fastgfn.models.quantised import keep_gradients
from fastgfn.models.temperature import Conditioning, at_temperature
from fastgfn.ops.attention import TreeMask
from fastgfn.types import LogProbs, TokenTree

# Of a GPU's memory, what merged copies may keep between calls, and what sampling may.
KEPT_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Head:
    """The language-model head: logits = softcap(logit_scale * (hidden @ weight.T + bias))."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None


class Policy:
    """A causal LM whose adapter is trained, its tokenizer and its head.

    `reference` is the same model with the adapter off (the base model); both have `hidden(...)` and `head`.
    The base may be quantised but for its head. Without an adapter the trainable weights of the base are
    trained, and there is no reference.

    Raises:
        InputError: dropout in the adapter, an adapted or quantised head, a model class that cannot take the
            token tree or decode from a pool of keys and values.
    """

    def __init__(self, model: nn.Module, tokenizer=None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._backbone = getattr(causal, causal.base_model_prefix)
        self.config = causal.config
        output = causal.get_output_embeddings()
        _refuse_other_heads(output)
        self.head = Head(
            weight=output.weight,
            bias=getattr(output, "bias", None),
            logit_scale=_logit_scale(self.config),
            softcap=getattr(self.config, "final_logit_softcapping", None),
        )
        _refuse_dropout(model)
        keep_gradients(model)
        self._takes_function = causal._can_set_attn_implementation()
        refuse_local_attention(self.config, self._takes_function)
        self._linear = take_over(self._backbone)
        self.kept = None  # what `sample` keeps here between calls
        self.flow_head: nn.Module | None = None  # (R, D) hidden states, (R,) lengths -> (R,) log F
        self.conditioning: Conditioning | None = None
        take_over_mlps(self._backbone)
        self._packed = [p for m in take_over_layers(self._backbone) for p in (m.qkv, m.gate_up)]
        self._is_checkpointed = False
        # Of one token: the keys and values of all layers. And whether CUDA graphs may hold a decoding step.
        self.node_bytes, self.has_static_step = probe(self)

    @property
    def reference(self) -> "Reference":
        """The base model: this one with the adapter off.

        Raises:
            InputError: there is no adapter but trainable weights, so no frozen base is left to refer to.
        """
        frozen = hasattr(self.model, "disable_adapter") or not self.parameters()
        want = "a LoRA adapter or frozen weights"
        checks.check(frozen, "Policy.reference", "model", want, "trainable base weights", "use load_policy")
        return Reference(self)

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def max_positions(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def num_linear_weights(self) -> int:
        """Weights of the base's linear layers, quantised ones too, head and embeddings not among them."""
        return sum(
            m.in_features * m.out_features if isinstance(m, nn.Linear) else m.weight.numel()
            for name, m in self._backbone.named_modules()
            if isinstance(m, (nn.Linear, Conv1D)) and ".lora_" not in name
        )

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters by name, in a fixed order."""
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def hidden(self, tokens: Tensor, position: Tensor, attention) -> Tensor:
        """(T, D) final hidden states of one packed row; `attention` is a TreeAttention or PathAttention."""
        if self._takes_function:
            inputs = dict(input_ids=tokens[None], position_ids=position[None], use_cache=False)
            inputs["attention"] = attention
        else:
            dtype = self._backbone.get_input_embeddings().weight.dtype
            inputs = explicit.arguments(tokens, position, attention, dtype)
        return self._backbone(**inputs).last_hidden_state.flatten(0, 1)

    def tree_hidden(self, tokens: Tensor, position: Tensor, end: Tensor) -> Tensor:
        """(T, D) final hidden states of a token tree."""
        return self.hidden(tokens, position, TreeAttention(TreeMask(end, position)))

    def tree_log_probs(
        self,
        tree: TokenTree,
        logit_bias: Tensor | None = None,
        *,
        no_stop_below: int = 0,
        masked: bool = False,
    ) -> LogProbs:
        """Node-aligned log p of this model, see fastgfn.models.log_probs."""
        return tree_log_probs(self, tree, logit_bias, no_stop_below, masked)

    def paired_log_probs(
        self,
        tree: TokenTree,
        logit_bias: Tensor | None = None,
        reference_logit_bias: Tensor | None = None,
        *,
        no_stop_below: int = 0,
        masked: bool = False,
    ) -> tuple[LogProbs, LogProbs]:
        """`tree_log_probs` of this model and of its reference, which share one pass over the head."""
        return paired_log_probs(self, tree, logit_bias, reference_logit_bias, no_stop_below, masked)

    def at_temperature(self, temperature: float):
        """Within the block a conditioned policy is that of this target temperature, in sampling, scoring and
        the backward pass; see fastgfn.models.temperature.

        Raises:
            InputError: a policy that is not conditioned, a temperature outside of its trained range.
        """
        return at_temperature(self, temperature)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether a layer keeps only its inputs for backward and runs again there: less memory, same bits."""
        return self._is_checkpointed

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        checkpoint_layers(self._backbone, enabled)
        self._is_checkpointed = enabled

    @contextlib.contextmanager
    def merged(self, dtype: torch.dtype | None = None):
        """Within the block every linear layer holds W + scale B A, packed for products with few rows.

        For sampling: fewer and faster products per token, for one pass over the weights and a copy of them.
        Queries, keys and values share one copy, as do gates and ups, where decoding has few kernels for it. A
        layer whose adapter is not plain LoRA is left as it is. Below float32 the sum is rounded, which may
        lose part of a small adapter; the log-probs of a loss come from unmerged weights.

        dtype: of the copies, e.g. bfloat16 under a float32 policy; the products convert. None: the base's.
            int8 (CPU) and float8_e4m3fn (CUDA): see fastgfn.ops.quantized.
        Yields the number of layers that are merged.
        """
        try:
            done = {id(m) for p in self._packed if p.merge(dtype) for m in p.members}
            for layer in self._linear:
                if id(layer) not in done:
                    layer.merge(dtype)
            yield sum(layer.merged is not None for layer in self._linear)
        finally:
            merged = [layer.merged for layer in self._linear if layer.merged is not None]
            copies = {id(x): x for m in merged for x in m.tensors}.values()  # some are shared
            keep = self.may_keep(sum(x.numel() * x.element_size() for x in copies))
            for layer in self._linear:
                layer.unmerge(keep)

    def merged_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Memory that `merged(dtype)` takes."""
        return merged_bytes(self._linear, dtype)

    @property
    def path_bytes(self) -> int:
        """Of one token on the path of one row: what a class outside AttentionInterface gathers to decode, the
        keys and values of one layer at a time."""
        return 0 if self._takes_function else self.node_bytes // max(1, self.config.num_hidden_layers)

    def may_keep(self, num_bytes: int) -> bool:
        """Whether so much memory may stay taken between calls of `sample`, for its CUDA graphs."""
        if self.device.type != "cuda":
            return False
        return num_bytes <= KEPT_SHARE * torch.cuda.get_device_properties(self.device).total_memory

    def addresses(self) -> tuple:
        """Equal as long as forwards without gradient read the same memory in the same way."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        merged = [layer.merged or (None, None) for layer in self._linear]
        places = (
            tuple(map(_address, tensors)),
            tuple((_address(m[0]), _address(m[1]), *m[2:]) for m in merged),
        )
        adapters = tuple(
            (m.disable_adapters, *m.active_adapters, *m.scaling.values())
            for m in self.model.modules()
            if hasattr(m, "lora_A")
        )
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return places, adapters, autocast, torch.get_float32_matmul_precision()

    @contextlib.contextmanager
    def plain(self):
        """Within the block `model` is as transformers and peft made it: their forwards, SDPA attention."""
        taken = {
            module: module.__dict__.pop("forward")
            for module in self.model.modules()
            if isinstance(module.__dict__.get("forward"), (Linear, GatedMLP, DecoderLayer, CheckpointedLayer))
        }
        if self._takes_function:
            self.model.set_attn_implementation("sdpa")
        try:
            yield self.model
        finally:
            if self._takes_function:
                self.model.set_attn_implementation(NAME)
            for module, forward in taken.items():
                module.forward = forward

    def free_bytes(self) -> int:
        """Memory that is free on the policy's device."""
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + cached
        # peft needs it too
        import psutil

        return psutil.virtual_memory().available

    @contextlib.contextmanager
    def _adapter_off(self):
        """The base model. Coming back, peft would train every weight of the adapter, frozen ones too."""
        if not hasattr(self.model, "disable_adapter"):
            yield
            return
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for p in frozen:
                p.requires_grad_(False)

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            checks.fail("encode", "tokenizer", "loaded", None, "pass token ids, or Policy(model, tokenizer)")
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids: list[int]) -> str:
        if self.tokenizer is None:
            checks.fail(
                "decode", "tokenizer", "loaded", None, "read token ids, or pass Policy(model, tokenizer)"
            )
        return self.tokenizer.decode(ids)


class Reference:
    """The base model: the policy's passes with the adapter off, without gradient."""

    flow_head = None

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @property
    def head(self) -> Head:
        return self.policy.head

    @torch.no_grad()
    def hidden(self, tokens: Tensor, position: Tensor, attention) -> Tensor:
        """(T, D) final hidden states of the base model, within `merged` too; see `Policy.hidden`."""
        with self.policy._adapter_off():
            return self.policy.hidden(tokens, position, attention)

    @torch.no_grad()
    def tree_hidden(self, tokens: Tensor, position: Tensor, end: Tensor) -> Tensor:
        with self.policy._adapter_off():
            return self.policy.tree_hidden(tokens, position, end)

    @torch.no_grad()
    def tree_log_probs(
        self,
        tree: TokenTree,
        logit_bias: Tensor | None = None,
        *,
        no_stop_below: int = 0,
        masked: bool = False,
        hidden: Tensor | None = None,
    ) -> LogProbs:
        """Node-aligned log p of the base model, see fastgfn.models.log_probs; `hidden` is what tree_hidden
        returned for this tree, if it is known."""
        return tree_log_probs(self, tree, logit_bias, no_stop_below, masked, hidden)


def _address(tensor: Tensor | tuple[Tensor, ...] | None) -> object:
    """Equal to itself alone where a tensor, quantised or packed, keeps its memory to itself."""
    if isinstance(tensor, tuple):
        return tuple(map(_address, tensor))
    if tensor is None:
        return None
    is_plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_mkldnn
    return tensor.data_ptr() if is_plain else object()


def _logit_scale(config) -> float:
    return float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )


def _refuse_dropout(model: nn.Module) -> None:
    """eval() silences every dropout; a LoRA dropout > 0 still says that the user expects it in training."""
    for name, config in getattr(model, "peft_config", {}).items():
        dropout = getattr(config, "lora_dropout", 0.0)
        checks.check(
            dropout == 0.0,
            "Policy",
            f"lora_dropout of adapter '{name}'",
            "0",
            dropout,
            "set lora_dropout=0: with dropout the scored policy is not the sampled policy",
        )


def _refuse_other_heads(output: nn.Module) -> None:
    """The head's ops read its weight: neither an adapter nor a quantised form of it."""
    weight = getattr(output, "weight", None)
    want, fix = "a linear layer of floating-point weights", "leave the head out of the quantisation (lm_head)"
    quantised = isinstance(weight, Tensor) and not weight.is_floating_point()
    plain = type(output).__module__.startswith("torch.nn")
    if not quantised:
        want, fix = "a plain linear layer", "leave the head out of target_modules and modules_to_save"
    have = type(output).__name__
    checks.check(plain and not quantised, "Policy", "the output head", want, have, fix)
