"""What quantised layers of other libraries have to be told before a policy both samples and trains them."""

from torch import nn

from fastgfn import checks


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers from repacking their weights for inference.

    On a CPU with AVX512-BF16 they do so in place, in the first pass of a model that is in eval(), as a Policy
    always is; the products of that layout have no gradient, and those of training would be wrong.

    Raises:
        InputError: a layer has repacked its weights already.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            state = getattr(module.weight, "quant_state", None)
            is_packed = getattr(state, "packing_format_for_cpu", False)
            want, fix = "as it was loaded", "load it again and make the Policy before its first pass"
            checks.check(not is_packed, "Policy", name, want, "4-bit weights packed for inference", fix)
            module.support_avx512bf16_for_cpu = False
