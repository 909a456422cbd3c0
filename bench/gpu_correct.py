"""`python -m bench.gpu_check correct`: every path on the GPU against exact numbers from the CPU, and the first loss."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import losses
from bench.measuring import Report, Sizes, adapted_model, examples, milliseconds, relative, rms
from data import Example, collate
from engine import head, packing
from engine.device import autocast_for, compile_blocks, has_flash
from engine.packing import SpanAttention, VarlenAttention
from lora import lora_disabled
from model import LLaVA


class Path(NamedTuple):
    """A way to score a micro-batch."""

    name: str
    dtype: torch.dtype
    packed: bool
    compiled: bool = False
    recomputed: int = 0


PATHS = [
    Path("float32 plain", torch.float32, packed=False),
    Path("float32 packed", torch.float32, packed=True),
    Path("bfloat16 plain", torch.bfloat16, packed=False),
    Path("bfloat16 packed", torch.bfloat16, packed=True),
    Path("bfloat16 packed, recomputed", torch.bfloat16, packed=True, recomputed=2),
    Path("bfloat16 packed, compiled", torch.bfloat16, packed=True, compiled=True),
    Path("bfloat16 packed, compiled, recomputed", torch.bfloat16, packed=True, compiled=True, recomputed=2),
]


def correct(s: Sizes, report: Report) -> None:
    """What compiles comes last: it is the likeliest to break off."""
    head_against_float64(s, report)
    if has_flash(s.device):
        flash_against_float64(s, report)
    first_loss(s, report, compiled=False)
    paths_against_the_cpu(s, report)
    if has_flash(s.device):
        first_loss(s, report, compiled=True)
        compilations(s, report)
    else:
        report.measured("left out without a GPU: flash attention, compiled paths, compilations")


# ---- values and gradients of every path ----------------------------------------------------------------------------


def score(model: LLaVA, made: list[Example], packed: bool) -> losses.Logps:
    device = model.lm_head.weight.device
    with autocast_for(model.lm_head.weight):
        if packed:
            return packing.packed_logps(model, packing.pack(made).to(device))
        return losses.plain_logps(model, collate(made, model.config).to(device))


def values_and_gradients(model: LLaVA, made: list[Example], packed: bool) -> tuple[Tensor, Tensor]:
    """(3, B) log-probs, and the gradient of a fixed sum of them by the whole adapter, in one row."""
    values = torch.stack(list(score(model, made, packed)))  # (3, B)
    weights = torch.tensor([1.0, -2.0, 0.7], device=values.device)[:, None]  # (3, 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((values * weights).sum() / 10, parameters)
    return values.detach().double().cpu(), torch.cat([g.double().cpu().flatten() for g in gradients])


def on_device(exact: LLaVA, path: Path, s: Sizes) -> LLaVA:
    """The exact model's numbers in the path's dtype; the adapter stays float32."""
    model = adapted_model(s.small, path.dtype, s.device, r=16)
    model.load_state_dict(exact.state_dict())  # copied into each parameter's own dtype
    model.language_model.checkpointed = path.recomputed
    if path.compiled:
        torch._dynamo.reset()
        compile_blocks(model.language_model.layers)
    return model


def paths_against_the_cpu(s: Sizes, report: Report) -> None:
    made = examples(s.small, 6, s.prompt, s.response)
    exact = adapted_model(s.small, torch.float32, torch.device("cpu"), r=16)
    values, gradient = values_and_gradients(exact, made, packed=False)
    report.measured(f"exact, float32 plain on the CPU: log-probs from {values.min():.0f} to {values.max():.0f} nats")
    errors = {}
    for path in PATHS:
        if path.compiled and not has_flash(s.device):
            continue
        model = on_device(exact, path, s)
        found, slope = values_and_gradients(model, made, path.packed)
        _, again = values_and_gradients(model, made, path.packed)
        errors[path.name] = rms(found - values)
        report.measured(
            f"{path.name:40} RMS {errors[path.name]:.2e} nats, largest {(found - values).abs().max():.2e}; "
            f"gradient off by {relative(slope, gradient):.2e}, from run to run by {relative(again, slope):.1e}"
        )
        report.at_most(f"{path.name}, gradient", relative(slope, gradient), 1e-3 if "float32" in path.name else 0.1)
        if path.dtype == torch.float32:
            report.at_most(f"{path.name}, RMS of {rms(values):.0f} nats", errors[path.name] / rms(values), 1e-5)
        elif path.packed:
            report.at_most(f"{path.name}, error in plain ones", errors[path.name] / errors["bfloat16 plain"], 1.1)


def first_loss(s: Sizes, report: Report, compiled: bool) -> None:
    """B = 0: policy and reference must be equal, so every term is ln 2. And what another packing changes."""
    made = examples(s.wide, 6, s.prompt, s.response)
    torch._dynamo.reset()
    model = adapted_model(s.wide, torch.bfloat16, s.device, zero=True)
    if compiled:
        compile_blocks(model.language_model.layers)
    off = []
    for part in (made[:2], made[2:]):
        with torch.no_grad(), lora_disabled(model):
            reference = score(model, part, packed=True)
        loss = losses.mdpo_loss(score(model, part, packed=True), reference)
        off.append((loss - 3 * math.log(2)).abs().max().item())
    with torch.no_grad():
        alone = torch.cat([score(model, [example], packed=True).chosen for example in made])  # (B,)
        together = score(model, made, packed=True).chosen  # (B,)
    name = "compiled" if compiled else "eager"
    report.measured(f"{name}: the same answers in another packing differ by {rms(alone - together):.2e} nats RMS")
    report.at_most(f"{name}, first loss off 3 ln 2", max(off), 1e-3)


# ---- parts ---------------------------------------------------------------------------------------------------------


def head_against_float64(s: Sizes, report: Report) -> None:
    c = s.full
    g = torch.Generator(s.device).manual_seed(0)
    hidden = torch.randn(256, c.width, device=s.device, generator=g).bfloat16()
    weight = (0.02 * torch.randn(c.vocab, c.width, device=s.device, generator=g)).bfloat16()
    targets = torch.randint(c.image_id, (256,), device=s.device, generator=g)
    logits = hidden[:64].double() @ weight.double().T  # (64, V)
    exact = logits.log_softmax(-1).gather(1, targets[:64, None])[:, 0]  # (64,)
    with torch.no_grad():
        found = head.token_logps(hidden[:64], weight, targets[:64])
    leaf = hidden.requires_grad_()
    spent = milliseconds(lambda: head.token_logps(leaf, weight, targets), s.device)
    report.measured(f"head, 256 rows with their gradient: {spent:.2f} ms")
    report.at_most("head, nats", (found - exact).abs().max().item(), 1e-4)


def flash_against_float64(s: Sizes, report: Report) -> None:
    """Head sizes of LLaVA (128), Bunny (80) and smaller ones. A wrong alignment would be off by about 1."""
    spans = [
        packing.Span(0, 300),
        packing.Span(300, 70, 0, 220),
        packing.Span(370, 130),
        packing.Span(500, 1, 370, 100),
    ]
    for size in (128, 80, 64):
        q, k, v = (torch.randn(1, 4, 501, size, device=s.device).bfloat16().requires_grad_() for _ in range(3))
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        exact = SpanAttention(spans, torch.float64, s.device)(*wide)
        fast = VarlenAttention(spans, s.device)(q, k, v)
        upstream = torch.randn_like(exact)
        exact_slopes = torch.autograd.grad(exact, wide, upstream)
        slopes = torch.autograd.grad(fast, (q, k, v), upstream.bfloat16())
        worst = max(relative(a, b) for a, b in zip((fast, *slopes), (exact, *exact_slopes), strict=True))
        report.at_most(f"flash, heads of {size}, values and gradients", worst, 1e-2)


def compilations(s: Sizes, report: Report) -> None:
    """Five packings of all triples and of m_l's alone, policy and reference: no graph may hold a length."""
    counters.clear()
    torch._dynamo.reset()
    model = adapted_model(s.small, torch.bfloat16, s.device, r=16, zero=True)
    compile_blocks(model.language_model.layers)
    made = examples(s.small, 12, s.prompt, s.response)
    for n in (1, 2, 5, 9, 3):
        for which in (packing.TRIPLES, ("image_rejected",)):
            run_both(model, packing.pack(made[:n], which).to(s.device))
    report.at_most("compiled graphs", counters["stats"]["unique_graphs"], 3)
    report.at_most("graph breaks", sum(counters["graph_break"].values()), 0)


def run_both(model: LLaVA, packed: packing.Packed, scored: Callable = packing.packed_logps) -> None:
    """One reference and one policy pass."""
    with autocast_for(model.lm_head.weight):
        with torch.no_grad(), lora_disabled(model):
            scored(model, packed)
        policy = scored(model, packed)
        total = sum(logps.sum() for logps in policy if logps is not None)
    total.backward()
