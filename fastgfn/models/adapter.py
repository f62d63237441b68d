"""An adapter on disk: peft's two files and, where it depends on the target temperature, a third."""

import json
import tempfile
from pathlib import Path

from torch import Tensor, nn

from fastgfn import checks
from fastgfn.models.policy import Policy
from fastgfn.models.temperature import condition, state_at

# Begins the name of every file and folder that is being written; such a name without a writer is a leftover.
PARTIAL = ".fastgfn-"
# Says how a conditioned adapter was made so.
FILE = "conditioning.json"


def save_adapter(policy: Policy, folder: Path, *, temperature: float | None = None) -> None:
    """adapter_model.safetensors and adapter_config.json, as `peft.PeftModel.from_pretrained` reads them; and,
    of a conditioned policy, conditioning.json. With a temperature: an ordinary adapter of that one alone.

    Written beside their place and renamed, so that none is ever half there.
    """
    state = None if temperature is None else state_at(policy, temperature)
    with tempfile.TemporaryDirectory(dir=folder, prefix=PARTIAL) as partial:
        policy.model.save_pretrained(partial, save_embedding_layers=False, state_dict=state)
        names = ["adapter_config.json", "adapter_model.safetensors"]
        if policy.conditioning is not None and temperature is None:
            text = json.dumps(policy.conditioning.to_dict())
            (Path(partial) / FILE).write_text(text + "\n")
            names.insert(0, FILE)
        else:
            (folder / FILE).unlink(missing_ok=True)
        for name in names:
            (Path(partial) / name).replace(folder / name)


def load_adapter_weights(policy: Policy, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of an adapter_model.safetensors into the policy's adapter.

    Raises:
        InputError: a tensor is missing, unknown or of another shape; nothing is changed.
    """
    from peft import set_peft_model_state_dict

    check_adapter_tensors("load_adapter_weights", policy.model, tensors)
    set_peft_model_state_dict(policy.model, tensors)


def check_adapter_tensors(function: str, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Refuse tensors other than those of the adapter of `model`; peft would leave the missing ones random."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    want, have = ({k: tuple(v.shape) for k, v in part.items()} for part in (own, tensors))
    wrong = sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k))
    if wrong:
        example = f"{wrong[0]}: {have.get(wrong[0])} for {want.get(wrong[0])}"
        found = f"{len(wrong)} tensors missing, unknown or of another shape ({example})"
        fix = "pass the whole folder that training wrote"
        checks.fail(function, "adapter", "an intact adapter of this model", found, fix)


def read_conditioning(policy: Policy, folder: Path) -> None:
    """`condition` the policy as the adapter of this folder is, if it is.

    Raises:
        InputError: conditioning.json does not say how.
    """
    path = folder / FILE
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text())
        kind, (low, high) = found["kind"], map(float, found["temperatures"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        have, fix = f"{path} ({type(error).__name__})", "pass the whole folder that training wrote"
        checks.fail("load_policy", FILE, "a kind and two temperatures", have, fix)
    condition(policy, kind, (low, high))
