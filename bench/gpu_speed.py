"""Speed and memory sections of `python -m bench.gpu_check`: kernels, block, generate, memory, profile."""

import contextlib
import dataclasses
import functools
import statistics
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from bench.gpu_correct import run_both
from bench.measuring import (
    Report,
    Sizes,
    adapted_model,
    examples,
    fill_row,
    milliseconds,
    seconds,
    training_spans,
    wait,
)
from data import normalised
from engine import packing
from engine.device import autocast_for, compile_blocks, has_flash
from engine.memory import GIB
from generate import generate as answer
from lora import lora_disabled, lora_modules
from model import rope_table

BANDWIDTH = 4.3e12  # bytes a second that an H200 reads in practice

# ---- kernels -------------------------------------------------------------------------------------------------------


def kernels(s: Sizes, report: Report) -> None:
    large_products(s, report)
    lora_products(s, report)
    if has_flash(s.device):
        attention_of_a_row(s, report)
        decode_attention(s, report)
    gathered_keys(s, report)


def normal(s: Sizes, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=s.device).bfloat16()


def large_products(s: Sizes, report: Report) -> None:
    """The frozen linears' products in bfloat16, and in float8 where the card has it."""
    T, C, inner = s.row, s.full.width, s.full.ffn
    best = 0.0
    for rows, k, n in ((T, C, C), (T, C, inner), (T, inner, C), (T // 4, C, inner), (T, C, 3 * C), (T, C, 2 * inner)):
        a, b = normal(s, rows, k), normal(s, n, k)
        spent = milliseconds(lambda a=a, b=b: a @ b.T, s.device)
        rate = 2 * rows * k * n / spent / 1e9
        best = max(best, rate)
        report.measured(f"base product {rows} x {k} x {n}: {spent:.3f} ms, {rate:.0f} TFLOP/s")
        if s.cuda and torch.cuda.get_device_capability() >= (8, 9) and rows == T:
            spent = float8_product(a, b, s)
            report.measured(
                f"    in float8, scales by row: {spent:.3f} ms, {2 * rows * k * n / spent / 1e9:.0f} TFLOP/s"
            )
    if s.cuda and "H200" in torch.cuda.get_device_name():
        report.at_least("largest matmul rate, TFLOP/s", best, 650)


def float8_product(a: torch.Tensor, b: torch.Tensor, s: Sizes) -> float:
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    by_row, by_column = torch.ones(len(a), 1, device=s.device), torch.ones(1, len(b), device=s.device)
    product = functools.partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)
    return milliseconds(lambda: product(a8, b8.T, by_row, by_column), s.device)


def lora_products(s: Sizes, report: Report) -> None:
    """LoRA's narrow products; on the card they are bound by reading x and y."""
    T, r = s.row, 64
    for k in (s.full.width, s.full.ffn):
        x, A, B, y = normal(s, T, k), normal(s, r, k), normal(s, k, r), normal(s, T, k)
        low = x @ A.T
        into = milliseconds(lambda x=x, A=A: x @ A.T, s.device)
        out = milliseconds(lambda low=low, B=B: low @ B.T, s.device)
        added = milliseconds(lambda y=y, low=low, B=B: y.add_(low @ B.T), s.device)
        fused = milliseconds(lambda y=y, low=low, B=B: y.addmm_(low, B.T), s.device)
        floor = 1e3 * 2 * T * k / BANDWIDTH
        report.measured(
            f"LoRA at {k}: x A {into:.3f} ms (reading x takes {floor:.3f}), B {out:.3f}, added {added:.3f}, "
            f"by addmm {fused:.3f}"
        )


def attention_of_a_row(s: Sizes, report: Report) -> None:
    prompt, response = s.full.vision.patches + s.prompt, s.response
    spans = training_spans(5, prompt, response)
    attend = packing.VarlenAttention(spans, s.device)
    shape = (1, s.full.heads, spans[-1].end, s.full.head_dim)
    q, k, v = (normal(s, *shape).requires_grad_() for _ in range(3))
    forward = milliseconds(lambda: attend(q, k, v), s.device)
    both = milliseconds(lambda: torch.autograd.grad(attend(q, k, v).sum(), (q, k, v)), s.device)
    pairs = 5 * (prompt**2 + 3 * prompt * response + 1.5 * response**2)  # of query and key, seen ones
    rate = 4 * pairs * s.full.width / forward / 1e9
    report.measured(
        f"flash and gathers, {spans[-1].end} tokens: forward {forward:.3f} ms ({rate:.0f} TFLOP/s), both {both:.3f} ms"
    )
    report.at_least("flash forward with gathers, TFLOP/s", rate, 100)


def decode_attention(s: Sizes, report: Report) -> None:
    """One query against a cache that has a new length each time: what cuDNN's plan for each of them costs."""
    medians = {}
    for on in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(on)
        spent = []
        for length in range(700, 706):
            keys, query = normal(s, 8, 32, length, 128), normal(s, 8, 32, 1, 128)
            mask = torch.ones(8, 1, 1, length, dtype=torch.bool, device=s.device)
            run = functools.partial(F.scaled_dot_product_attention, query, keys, keys, mask)
            spent.append(1e3 * seconds(run, s.device))
        medians[on] = statistics.median(spent[1:])
        report.measured(f"decode attention at a new length, cuDNN {'on' if on else 'off'}: {medians[on]:.2f} ms")
    report.at_most("decode attention without cuDNN at a new length, ms", medians[False], 1.0)


def gathered_keys(s: Sizes, report: Report) -> None:
    """The keys' gradient: two reads against torch's own sum with atomics."""
    spans = training_spans(5, s.full.vision.patches + s.prompt, s.response)
    keys = packing.KeyOrder(spans, s.device)
    x = normal(s, spans[-1].end, s.full.heads, s.full.head_dim).requires_grad_()
    upstream = torch.randn_like(keys.gather(x))

    def backward(gather) -> float:
        y = gather(x)
        return milliseconds(lambda: torch.autograd.grad(y, x, upstream, retain_graph=True), s.device)

    own = backward(keys.gather)
    torchs = backward(lambda x: x.index_select(0, keys.index))
    report.measured(f"gradient of gathered keys: {own:.3f} ms, by index_select's own backward {torchs:.3f} ms")
    if s.cuda:
        report.at_most("gathered keys, time in torch's own", own / torchs, 1.0)


# ---- one decoder block ---------------------------------------------------------------------------------------------


def block(s: Sizes, report: Report) -> None:
    """Layer 1 of a 7B decoder on a row as in training: eager, then compiled."""
    spans = training_spans(5 if s.cuda else 2, s.full.vision.patches + s.prompt, s.response)
    T, c = spans[-1].end, dataclasses.replace(s.full, layers=3)
    rope = rope_table(torch.arange(T, device=s.device)[None], c.rope_dim, c.rope_theta)
    spent = {}
    for compiled in [False, True] if has_flash(s.device) else [False]:
        torch._dynamo.reset()
        model = adapted_model(c, torch.bfloat16, s.device)
        if compiled:
            compile_blocks(model.language_model.layers)
        layer = model.language_model.layers[1]
        attend = attention_for(spans, s)
        x = normal(s, 1, T, c.width).requires_grad_()

        def forward(layer=layer, attend=attend, x=x, weight=model.lm_head.weight) -> torch.Tensor:
            with autocast_for(weight):
                return layer(x, rope, attend)

        def both(forward=forward, x=x) -> None:
            forward().backward(x.detach())

        first = seconds(both, s.device)
        kept = kept_bytes(forward, s) / T
        name = "compiled" if compiled else "eager"
        spent[name] = milliseconds(both, s.device)
        with torch.no_grad(), lora_disabled(model):
            reference = milliseconds(forward, s.device)
        report.measured(
            f"block, {T} tokens, {name}: policy forward and backward {spent[name]:.2f} ms, reference {reference:.2f} "
            f"ms, {kept:,.0f} bytes kept a token; first call {first:.0f} s"
        )
        if compiled:
            report.at_most("compiled block, KiB kept a token", kept / 1024, 140)
            report.at_most("compiled block, time in eager's", spent["compiled"] / spent["eager"], 0.9)


def attention_for(spans: list[packing.Span], s: Sizes):
    if has_flash(s.device):
        return packing.VarlenAttention(spans, s.device)
    return packing.SpanAttention(spans, torch.bfloat16, s.device)


def kept_bytes(forward, s: Sizes) -> float:
    """What a forward pass leaves for its backward pass; 0 on a CPU, where nobody counts."""
    if not s.cuda:
        return 0.0
    before = torch.cuda.memory_allocated()
    y = forward()
    after = torch.cuda.memory_allocated()
    del y
    return after - before


# ---- answering -----------------------------------------------------------------------------------------------------


def generate(s: Sizes, report: Report) -> None:
    """Tokens a second of greedy answers that never end, by rows at once, with the adapter and without."""
    model = adapted_model(s.full, torch.bfloat16, s.device)
    for module in lora_modules(model).values():
        module.to(torch.bfloat16)  # as generate.load_model does
    model.config = dataclasses.replace(s.full, eos_id=-1)
    new = 48 if s.cuda else 4
    weights = 2 * sum(p.numel() for name, p in model.language_model.named_parameters() if "lora_" not in name)
    for rows in (1, 16, 64) if s.cuda else (2,):
        made = examples(s.full, rows, s.prompt, s.response)
        prompts = [example.prompt for example in made]
        images = normalised(torch.stack([e.image for e in made]), made[0].spec, s.device).bfloat16()
        cached = 2 * 2 * rows * 700 * s.full.layers * s.full.width  # keys and values of 700 tokens
        floor = (weights + cached) / BANDWIDTH
        for adapter in (False, True):
            with contextlib.nullcontext() if adapter else lora_disabled(model):
                run = functools.partial(answer, model, prompts, images)
                run(2)
                start = seconds(lambda run=run: run(2), s.device)
                step = (seconds(lambda run=run: run(new), s.device) - start) / (new - 2)
            report.measured(
                f"{rows} rows, adapter {'on' if adapter else 'off'}: prefill {1e3 * start:.0f} ms, "
                f"step {1e3 * step:.1f} ms (reading weights and cache {1e3 * floor:.1f}), {rows / step:.0f} tokens/s"
            )
            if s.cuda and not adapter:
                report.at_least(f"{rows} rows, tokens/s", rows / step, {1: 100, 16: 1200, 64: 3500}[rows])
    report.at_least("answers, tokens each", len(run(new)[0]), new)


# ---- memory --------------------------------------------------------------------------------------------------------

EXPECTED = {  # GiB of a compiled step of 7B with AdamW's state, by tokens; with 0, 16 and 32 layers recomputed
    2048: (24.0, 20.2, 16.4),
    8192: (49.0, 33.8, 18.8),
    16384: (82.7, 51.3, 22.5),
}


def memory(s: Sizes, report: Report) -> None:
    """Peak of one policy step by the row's length and the layers recomputed, against the table of the memory plan."""
    model = adapted_model(s.full, torch.bfloat16, s.device)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad) / GIB
    layers = s.full.layers
    made = examples(s.full, 12, s.prompt, s.response)
    for compiled in [False, True] if has_flash(s.device) else [False]:
        torch._dynamo.reset()
        if compiled:
            compile_blocks(model.language_model.layers)
        for tokens in (2048, 8192, 16384) if s.cuda else (s.row,):
            row = fill_row(made, tokens)
            for i, recomputed in enumerate((0, layers // 2, layers)):
                model.language_model.checkpointed = recomputed
                peak, spent = peak_of_a_step(model, row, s)
                peak += 2 * trained  # both moments
                report.measured(
                    f"{'compiled' if compiled else 'eager'}, {row.input_ids.shape[1]} tokens, {recomputed} layers "
                    f"recomputed: {peak:.1f} GiB with AdamW's state, {spent:.0f} ms"
                )
                if s.cuda and compiled:
                    bound = 1.1 * EXPECTED[tokens][i]
                    report.at_most(f"GiB at {tokens} tokens with {recomputed} recomputed", peak, bound)
                    if tokens == 2048 and recomputed == layers:
                        report.at_most("one example in GB, as a 20 GB card counts", peak * GIB / 1e9, 20)


def peak_of_a_step(model, row: packing.Packed, s: Sizes) -> tuple[float, float]:
    """(GiB allocated at most, milliseconds) of forward and backward; infinite where memory runs out."""
    model.zero_grad(set_to_none=True)
    wait(s.device)
    if not s.cuda:
        return 0.0, 1e3 * seconds(lambda: step(model, row), s.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step(model, row)
        spent = 1e3 * seconds(lambda: step(model, row), s.device)
    except torch.OutOfMemoryError:
        return float("inf"), float("inf")
    return torch.cuda.max_memory_allocated() / GIB, spent


def step(model, row: packing.Packed) -> None:
    row = row.to(model.lm_head.weight.device)  # each time: what the tower makes of its pictures is kept
    with autocast_for(model.lm_head.weight):
        total = sum(logps.sum() for logps in packing.packed_logps(model, row) if logps is not None)
    total.backward()


# ---- where the time goes -------------------------------------------------------------------------------------------

KINDS = {  # what a kernel's name tells, by the first that fits: flash's own kernels have CUTLASS's types in their names
    "attention": ("flash", "fmha", "attention"),
    "triton": ("triton",),
    "matmul": ("gemm", "cutlass", "nvjet", "cublas", "addmm", "aten::mm", "aten::bmm"),
    "copies and indexing": ("copy", "index", "gather", "cat", "memcpy", "memset"),
}


def profile(s: Sizes, report: Report) -> None:
    """Time by kind of kernel over three micro-batches of policy and reference, and the heaviest kernels."""
    model = adapted_model(s.full, torch.bfloat16, s.device)
    if has_flash(s.device):
        compile_blocks(model.language_model.layers)
    made = examples(s.full, 8, s.prompt, s.response)
    row = fill_row(made, s.row)
    for _ in range(3 if s.cuda else 1):
        run_both(model, row.to(s.device))  # each time: what the tower makes of its pictures is kept
    wait(s.device)
    with torch_profile(activities=[ProfilerActivity.CUDA if s.cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            run_both(model, row.to(s.device))
        wait(s.device)
    own = {event.key: time_of(event, s) for event in profiler.key_averages()}
    by_kind = defaultdict(float)
    for name, spent in own.items():
        by_kind[kind_of(name)] += spent
    total = sum(by_kind.values())
    for name, spent in sorted(by_kind.items(), key=lambda item: -item[1]):
        report.measured(f"{name:22} {spent / 3e3:9.2f} ms a micro-batch, {spent / total:.1%}")
    for name, spent in sorted(own.items(), key=lambda item: -item[1])[:30]:
        report.measured(f"    {spent / 3e3:9.3f} ms  {name[:100]}")
    report.at_least("share of the time in matrix products", by_kind["matmul"] / total, 0.6 if s.cuda else 0.05)


def time_of(event, s: Sizes) -> float:
    """Microseconds of the kernel alone."""
    return event.self_device_time_total if s.cuda else event.self_cpu_time_total


def kind_of(name: str) -> str:
    lower = name.lower()
    for kind, words in KINDS.items():
        if any(word in lower for word in words):
            return kind
    return "other"
