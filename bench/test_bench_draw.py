"""The draw of the next token: token, log-probs at temperature 1, log-prob of the draw.

Mode "logits" has float32 logits; in "head" the provider makes them from hidden states and the head. Every
provider adds the vocabulary mask, draws at temperature 1.5 and returns log p(token) and log p(stop) at
temperature 1 and log p(token) at 1.5. Draws differ, so the check reads the log-probs at the provider's own
tokens, and holds the mean log-prob of the draws to its expectation.
"""

from typing import NamedTuple

import torch
from suite import DTYPES, Bench, Case, NotAvailable, Outputs, Provider, Step, make_cases, worst_error
from torch import Tensor

from fastgfn import backend_info
from fastgfn.functional import sample_next, sample_next_from_hidden

STOP = 3
TEMPERATURE = 1.5
# Standard deviations of the mean log-prob of the draws: never reached by chance in a run.
MOST_SIGMAS = 6.0
SHAPES = {
    "short": [dict(R=64, D=64, V=1000)],
    "cpu": [dict(R=20, D=576, V=49152), dict(R=64, D=576, V=49152), dict(R=64, D=2048, V=32000)],
    "cuda": [
        dict(R=64, D=576, V=49152),
        dict(R=64, D=2048, V=128256),
        dict(R=256, D=2048, V=128256),
        dict(R=64, D=4096, V=128256),
    ],
}


class Inputs(NamedTuple):
    logits: Tensor | None  # (R, V) float32, in mode "logits"
    hidden: Tensor | None  # (R, D), in mode "head"
    weight: Tensor | None  # (V, D)
    bias: Tensor  # (V,) float32, -99 at every tenth token

    def make_logits(self) -> Tensor:
        return self.logits if self.hidden is None else (self.hidden @ self.weight.T).float()


def cases(device: str, shapes: str) -> list[Case]:
    shapes = SHAPES[device if shapes == "full" else "short"]
    dtypes = ["float32", "bfloat16"] if device == "cpu" else ["bfloat16"]
    logits = make_cases("draw", device, ["logits"], ["float32"], shapes)
    return logits + make_cases("draw", device, ["head"], dtypes, shapes)


def make_inputs(case: Case) -> Inputs:
    """Logits of standard deviation 3, as of a trained model."""
    rows, width, vocab = case["R"], case["D"], case["V"]
    options = {"generator": torch.Generator(case.device).manual_seed(vocab), "device": case.device}
    bias = torch.zeros(vocab, device=case.device)
    bias[::10] = -99.0
    if case.mode == "logits":
        return Inputs(3 * torch.randn(rows, vocab, **options), None, None, bias)
    hidden, weight = torch.randn(rows, width, **options), torch.randn(vocab, width, **options)
    dtype = DTYPES[case.dtype]
    return Inputs(None, hidden.to(dtype), weight.mul_(3 * width**-0.5).to(dtype), bias)


def fastgfn(case: Case, inputs: Inputs) -> Step:
    backend = backend_info()["ops"]["sample_next"][case.device]
    if backend.startswith("none"):
        raise NotAvailable(f"sample_next on {case.device}: {backend}")
    position = torch.zeros(case["R"], dtype=torch.int64, device=case.device)
    own = (inputs.logits,) if case.mode == "logits" else (inputs.hidden, inputs.weight)
    function = sample_next if case.mode == "logits" else sample_next_from_hidden

    def run() -> Outputs:
        # Other noise every time, as in a rollout.
        position.add_(1)
        draw = function(
            *own,
            temperature=TEMPERATURE,
            logit_bias=inputs.bias,
            termination_token_id=STOP,
            seed=0,
            position=position,
        )
        return draw.token, draw.log_pf, draw.log_pterm, draw.log_behavior

    return Step(run)


def log_probs(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(R, V) log-probs at temperature 1 and at TEMPERATURE."""
    biased = logits + bias
    return biased.log_softmax(-1), (biased / TEMPERATURE).log_softmax(-1)


def read(log_p: Tensor, tempered: Tensor, token: Tensor) -> Outputs:
    at = token[:, None]
    return token, log_p.gather(1, at)[:, 0], log_p[:, STOP], tempered.gather(1, at)[:, 0]


def draw_gumbel(inputs: Inputs) -> Outputs:
    log_p, tempered = log_probs(inputs.make_logits(), inputs.bias)
    noise = torch.empty_like(tempered).exponential_().log()
    return read(log_p, tempered, (tempered - noise).argmax(-1))


def draw_multinomial(inputs: Inputs) -> Outputs:
    log_p, tempered = log_probs(inputs.make_logits(), inputs.bias)
    return read(log_p, tempered, torch.multinomial(tempered.exp(), 1)[:, 0])


def eager(draw):
    return lambda case, inputs: Step(torch.no_grad()(lambda: draw(inputs)))


def compiled(draw):
    def prepare(case: Case, inputs: Inputs) -> Step:
        run = torch.compile(draw, dynamic=False, fullgraph=True)
        return Step(torch.no_grad()(lambda: run(inputs)))

    return prepare


def truth(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    if inputs.hidden is None:
        return log_probs(inputs.logits.double(), inputs.bias.double())
    return log_probs(inputs.hidden.double() @ inputs.weight.double().T, inputs.bias.double())


def error(case: Case, inputs: Inputs, have: Outputs, truth: tuple[Tensor, Tensor]) -> float:
    """Largest error of the log-probs at the drawn tokens; infinite if these do not fit the distribution."""
    log_p, tempered = truth
    p = tempered.exp()
    mean = (p * tempered).sum(1)
    variance = (p * tempered.square()).sum(1) - mean.square()
    found = read(log_p, tempered, have[0])
    sigmas = float((found[3] - mean).sum() / variance.sum().sqrt())
    return worst_error(have[1:], found[1:]) if abs(sigmas) <= MOST_SIGMAS else float("inf")


def work(case: Case) -> tuple[float, float]:
    """Two exponentials and a noise per logit, each counted as one FLOP, and the product in mode "head"; the
    inputs read once."""
    rows, width, vocab = case["R"], case["D"], case["V"]
    if case.mode == "logits":
        return 3.0 * rows * vocab, 4.0 * (rows * vocab + vocab)
    num_bytes = DTYPES[case.dtype].itemsize * (rows + vocab) * width + 4.0 * vocab
    return (3.0 + 2.0 * width) * rows * vocab, num_bytes


BENCH = Bench(
    name="draw",
    cases=cases,
    make_inputs=make_inputs,
    providers={
        "fastgfn": Provider(fastgfn),
        "eager_gumbel": Provider(eager(draw_gumbel)),
        "eager_multinomial": Provider(eager(draw_multinomial)),
        "compile_gumbel": Provider(compiled(draw_gumbel)),
        "compile_multinomial": Provider(compiled(draw_multinomial)),
    },
    truth=truth,
    error=error,
    tolerance={"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 1e-1)},
    work=work,
)


def test_draw(case, measure):
    measure(BENCH, case)
