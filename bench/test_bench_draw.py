"""The draw of the next token from logits: token, log-probs at temperature 1, log-prob of the draw.

Every provider adds the vocabulary mask, draws at temperature 1.5 and returns log p(token) and log p(stop) at
temperature 1 and log p(token) at 1.5. Draws differ, so the check reads the log-probs at the provider's own
tokens, and holds the mean log-prob of the draws to its expectation.
"""

from typing import NamedTuple

import torch
from suite import Bench, Case, NotAvailable, Outputs, Provider, Step, make_cases, worst_error
from torch import Tensor

from fastgfn import backend_info
from fastgfn.functional import sample_next

STOP = 3
TEMPERATURE = 1.5
# Standard deviations of the mean log-prob of the draws: never reached by chance in a run.
MOST_SIGMAS = 6.0
SHAPES = {
    "short": [dict(R=64, V=1000)],
    "cpu": [dict(R=20, V=49152), dict(R=64, V=49152), dict(R=64, V=128256)],
    "cuda": [dict(R=64, V=49152), dict(R=64, V=128256), dict(R=256, V=128256)],
}


class Inputs(NamedTuple):
    logits: Tensor  # (R, V) float32
    bias: Tensor  # (V,) float32, -99 at every tenth token


def cases(device: str, shapes: str) -> list[Case]:
    shapes = SHAPES[device if shapes == "full" else "short"]
    return make_cases("draw", device, ["logits"], ["float32"], shapes)


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator(case.device).manual_seed(case["V"])
    logits = 3 * torch.randn(case["R"], case["V"], generator=generator, device=case.device)
    bias = torch.zeros(case["V"], device=case.device)
    bias[::10] = -99.0
    return Inputs(logits, bias)


def fastgfn(case: Case, inputs: Inputs) -> Step:
    backend = backend_info()["ops"]["sample_next"][case.device]
    if backend.startswith("none"):
        raise NotAvailable(f"sample_next on {case.device}: {backend}")
    position = torch.zeros(case["R"], dtype=torch.int64, device=case.device)

    def run() -> Outputs:
        # Other noise every time, as in a rollout.
        position.add_(1)
        draw = sample_next(
            inputs.logits,
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


def draw_gumbel(logits: Tensor, bias: Tensor) -> Outputs:
    log_p, tempered = log_probs(logits, bias)
    noise = torch.empty_like(tempered).exponential_().log()
    return read(log_p, tempered, (tempered - noise).argmax(-1))


def draw_multinomial(logits: Tensor, bias: Tensor) -> Outputs:
    log_p, tempered = log_probs(logits, bias)
    return read(log_p, tempered, torch.multinomial(tempered.exp(), 1)[:, 0])


def eager(draw):
    return lambda case, inputs: Step(torch.no_grad()(lambda: draw(*inputs)))


def compiled(draw):
    def prepare(case: Case, inputs: Inputs) -> Step:
        run = torch.compile(draw, dynamic=False, fullgraph=True)
        return Step(torch.no_grad()(lambda: run(*inputs)))

    return prepare


def truth(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return log_probs(inputs.logits.double(), inputs.bias.double())


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
    """The logits read once; two exponentials and a noise per logit, each counted as one FLOP."""
    return 3.0 * case["R"] * case["V"], 4.0 * (case["R"] * case["V"] + case["V"])


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
    tolerance={"float32": (1e-5, 1e-4)},
    work=work,
)


def test_draw(case, measure):
    measure(BENCH, case)
