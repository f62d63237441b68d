"""What load_policy refuses of models and adapters on disk and on the hub."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgfn.checks import InputError
from fastgfn.models import load_adapter_weights, load_policy, save_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A local folder with a tiny Llama and a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=5, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(model, tmp_path):
    save_adapter(load_policy(str(model), lora_rank=2), tmp_path)
    return tmp_path


def test_a_model_folder_with_an_adapter_is_refused(model, adapter):
    """A new adapter would take the place of the one that transformers loads."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, adapter)
    with pytest.raises(InputError, match="a base model, got .* holds an adapter; pass it as adapter="):
        load_policy(str(adapter))


def _less(tensors):
    return {k: v for k, v in tensors.items() if "layers.0" in k}


def _more(tensors):
    return tensors | {"base_model.model.model.layers.9.q_proj.lora_A.weight": torch.zeros(2, 16)}


def _wider(tensors):
    return {k: torch.cat([v, v]) if "lora_A" in k else v for k, v in tensors.items()}


@pytest.mark.parametrize("change", [_less, _more, _wider])
def test_an_adapter_has_exactly_the_tensors_of_the_model(model, adapter, change, recwarn):
    path = adapter / "adapter_model.safetensors"
    tensors = change(load_file(path))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="adapter must be an intact adapter of this model"):
        load_policy(str(model), adapter=adapter)
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]
    policy = load_policy(str(model), lora_rank=2)
    before = [p.detach().clone() for _, p in policy.parameters()]
    with pytest.raises(InputError, match="adapter must be an intact adapter of this model"):
        load_adapter_weights(policy, tensors)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize(
    "text", ["[]", "null", "{", "{}", '{"peft_type": "X"}', '{"peft_type": "LORA", "r": "x"}']
)
def test_an_odd_adapter_config_is_refused(model, adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match="adapter must be an intact adapter of this model"):
        load_policy(str(model), adapter=adapter)


def test_a_hub_id_of_an_adapter_is_refused(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--adapter" / "snapshots" / ("0" * 40)
    for path, text in (
        (snapshot / "adapter_config.json", "{}"),
        (snapshot.parents[1] / "refs/main", "0" * 40),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with pytest.raises(InputError, match="a base model, got 'some/adapter', which holds an adapter"):
        load_policy("some/adapter")


def test_an_unreachable_hub_is_one_line_and_quick(tmp_path):
    """Port 9 refuses at once: what took 50 s and wrote 23 lines was the hub client's retries."""
    code = (
        "import time, sys; from fastgfn.models import load_policy\n"
        "import transformers.models.auto, peft; start = time.monotonic()\n"
        "try: load_policy('no/such-model')\n"
        "except ValueError as error: print(error, file=sys.stderr)\n"
        "print(time.monotonic() - start)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr.startswith("load_policy: model must be") and "'no/such-model'" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert float(done.stdout) < 10.0
