"""What load_policy refuses of models and adapters on disk and on the hub."""

import shutil

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
