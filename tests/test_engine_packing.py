"""Fast paths against their plain twins: values and gradients, float32 on a CPU, and the traps of shared prefixes."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

import losses
from bases.checkpoint import load_model
from bases.tokenizer import load_tokenizer
from data import PairData, Processor, collate
from engine import head, packing
from engine.device import has_flash
from engine.packing import Span
from engine.reference import CachedReference
from formats.readers import read_pairs
from lora import add_lora, lora_disabled, lora_modules


@pytest.fixture
def world(tiny_base, pairs_file):
    """A tiny model with a non-zero adapter, and its data set with crops."""
    torch.manual_seed(0)
    model = load_model(tiny_base)
    pairs, problems = read_pairs(pairs_file)
    assert not problems
    data = PairData(pairs, Processor(load_tokenizer(tiny_base), model.config), "crop")
    parameters = add_lora(model, r=4, alpha=8)
    for m in lora_modules(model).values():
        torch.nn.init.normal_(m.lora_B, std=0.1)
    return model, data, parameters


def value_and_gradient(logps, parameters):
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5, -1.0])
    total = sum((l * weights[: len(l)] * (i + 1)).sum() for i, l in enumerate(logps))
    return logps, torch.autograd.grad(total, parameters)


def assert_twins(a, b):
    for x, y in zip(a[0], b[0], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for x, y in zip(a[1], b[1], strict=True):
        assert (x - y).abs().max() <= 1e-5 * x.abs().max(), ((x - y).abs().max(), x.abs().max())


@pytest.mark.parametrize("strategy", ["crop", None])
def test_packed_logps_equal_plain_ones(world, strategy):
    model, data, parameters = world
    data.strategy = strategy
    examples = [data[(0, i)] for i in range(5)]
    used = 3 if strategy else 2  # without a strategy no m_l is drawn and image_rejected is None
    plain = losses.plain_logps(model, collate(examples, model.config))
    packed = packing.packed_logps(model, packing.pack(examples))
    assert all(logps is None for logps in (*plain[used:], *packed[used:]))
    assert_twins(value_and_gradient(plain[:used], parameters), value_and_gradient(packed[:used], parameters))


def test_without_pictures(world):
    model, data, parameters = world
    data.strategy, data.with_image = None, False
    examples = [data[(0, i)] for i in range(3)]
    plain = losses.plain_logps(model, collate(examples, model.config))[:2]
    packed = packing.packed_logps(model, packing.pack(examples))[:2]
    assert_twins(value_and_gradient(plain, parameters), value_and_gradient(packed, parameters))


def test_recomputed_activations_change_nothing(world):
    model, data, parameters = world
    examples = [data[(0, i)] for i in range(2)]
    expected = value_and_gradient(packing.packed_logps(model, packing.pack(examples)), parameters)
    model.language_model.checkpointed = 2
    assert_twins(expected, value_and_gradient(packing.packed_logps(model, packing.pack(examples)), parameters))


def test_one_group_alone(world):
    model, data, _ = world
    examples = [data[(0, i)] for i in range(3)]
    with torch.no_grad():
        full = packing.packed_logps(model, packing.pack(examples))
        image = packing.packed_logps(model, packing.pack(examples, which=("image_rejected",)))
    assert image.chosen is None and image.rejected is None
    torch.testing.assert_close(image.image_rejected, full.image_rejected, rtol=1e-5, atol=1e-5)


def test_layout_by_hand(world):
    """One example: prompt P, y_w and y_l restart at P, both first tokens come from the last prompt position."""
    _, data, _ = world
    e = data[(0, 1)]
    P, w, l = len(e.prompt), len(e.chosen), len(e.rejected)
    packed = packing.pack([e])
    second = P + w + l  # where [m_l q | y_w] begins
    positions = packed.positions[0].tolist()
    assert positions[P : P + w] == list(range(P, P + w))
    assert positions[P + w : P + w + l] == list(range(P, P + l))  # y_l's positions restart at the prompt's end
    assert positions[second : second + P] == list(range(P))
    starts = [0, w, w + l]  # first response token of each triple in reading order
    firsts = [packed.predict_from[i].item() for i in starts]
    assert firsts == [P - 1, P - 1, second + P - 1]  # y_l's first token: the last *prompt* position, not y_w's last
    assert packed.predict_from[1].item() == P and packed.predict_from[w + 1].item() == P + w
    assert packed.spans == [Span(0, P + w), Span(P + w, l, 0, P), Span(second, P + w)]
    assert packed.targets.tolist() == [*e.chosen.tolist(), *e.rejected.tolist(), *e.chosen.tolist()]
    assert packed.owner.tolist() == [0] * w + [1] * l + [2] * w
    m_w, m_l = packed.pictures.images  # the tower sees each picture once
    assert torch.equal(m_w, e.image) and torch.equal(m_l, e.image_rejected)


def test_span_attention_is_bottom_right_causal():
    """5 tokens: prompt 0-1, y_w 2, y_l 3-4. One-hot values and equal scores make each weight 1 / (tokens seen)."""
    spans = [Span(0, 3), Span(3, 2, prefix=0, prefix_length=2)]
    q = k = torch.zeros(1, 1, 5, 5)
    v = torch.eye(5)[None, None]
    seen = packing.SpanAttention(spans)(q, k, v)[0, 0]
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0],
            [1 / 2, 1 / 2, 0, 0, 0],
            [1 / 3, 1 / 3, 1 / 3, 0, 0],
            [1 / 3, 1 / 3, 0, 1 / 3, 0],  # y_l's first token: both prompt tokens and itself, not y_w
            [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4],
        ]
    )
    torch.testing.assert_close(seen, expected)


def loop(q, k, v, cu_q, cu_k):
    """What flash's documentation says of varlen's arguments, one sequence after the other. q (T, H, D) -> (T, H, D)."""
    out = []
    for i in range(len(cu_q) - 1):
        a, b = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        heads_first = (x.transpose(0, 1) for x in (q[a], k[b], v[b]))
        mask = torch.ones(len(q[a]), len(k[b]), dtype=torch.bool).tril(len(k[b]) - len(q[a]))  # bottom-right
        out.append(F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(0, 1))
    return torch.cat(out)


@library.custom_op("stand_in::varlen", mutates_args=())
def varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """Opaque to the compiler, as the CUDA kernel is."""
    return loop(q, k, v, cu_q, cu_k)


def varlen_backward(ctx, gradient):
    inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors[:3]]
    with torch.enable_grad():
        out = loop(*inputs, *ctx.saved_tensors[3:])
    return (*torch.autograd.grad(out, inputs, gradient), None, None, None, None)


varlen.register_fake(lambda q, *rest: torch.empty_like(q))
varlen.register_autograd(varlen_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:5]))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2)])
def test_varlen_arguments_by_hand(heads, kv_heads):
    spans = [Span(0, 5), Span(5, 3, prefix=0, prefix_length=2), Span(8, 4)]
    torch.manual_seed(0)
    q, k, v = torch.randn(1, heads, 12, 8), torch.randn(1, kv_heads, 12, 8), torch.randn(1, kv_heads, 12, 8)
    positional, keywords = packing.VarlenAttention(spans, torch.device("cpu")).arguments(q, k, v)
    _, _, _, cu_q, cu_k, max_q, max_k = positional
    assert cu_q.tolist() == [0, 5, 8, 12] and cu_k.tolist() == [0, 5, 10, 14] and (max_q, max_k) == (5, 5)
    assert cu_q.dtype == torch.int32 and keywords == {"window_size": (-1, 0)}
    torch.testing.assert_close(varlen(*positional).transpose(0, 1)[None], packing.SpanAttention(spans)(q, k, v))


def test_varlen_call_fits_every_supported_signature():
    varlen = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    attend = packing.VarlenAttention([Span(0, 4)], torch.device("cpu"))
    positional, keywords = attend.arguments(*(torch.zeros(1, 2, 4, 8) for _ in range(3)))
    inspect.signature(varlen).bind(*positional, **keywords)  # the installed torch

    def torch_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ): ...

    inspect.signature(torch_2_11).bind(*positional, **keywords)


def test_fused_logps_equal_log_softmax():
    torch.manual_seed(0)
    for rows, size in ((1, 1), (7, 100), (head.CHUNK + 3, 1)):  # logits of 1,000 do not overflow; more than one chunk
        hidden = (size * torch.randn(rows, 6)).requires_grad_()
        weight, targets = torch.randn(11, 6) * 3, torch.randint(11, (rows,))
        plain = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        fast = head.token_logps(hidden, weight, targets)
        upstream = torch.randn(rows)
        (a,), (b,) = (torch.autograd.grad((x * upstream).sum(), hidden) for x in (plain, fast))
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
        assert (b - a).abs().max() <= 1e-5 * a.abs().max()


def test_fused_logps_of_a_bfloat16_head_are_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(512, 32).bfloat16()
    targets = torch.randint(512, (64,))
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    fast = head.token_logps(hidden, weight, targets)
    assert fast.dtype == torch.float32
    assert (fast - exact).abs().max() < 1e-5  # bfloat16 logits would be off by up to 0.06 at a logit of 20
    plain = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert (fast - exact).pow(2).mean() <= 1.21 * (plain - exact).pow(2).mean()  # RMS error <= 1.1 x the plain path's


def test_split_keeps_every_example_once_and_the_budget(world):
    _, data, _ = world
    examples = [data[(0, i % 5)] for i in range(12)]
    longest = max(e.tokens() for e in examples)
    rows = packing.split_by_tokens(examples, budget=2 * longest)
    assert sorted(id(e) for row in rows for e in row) == sorted(id(e) for e in examples)
    assert all(packing.pack(row).input_ids.shape[1] <= 2 * longest for row in rows)
    assert len(rows) < 12
    lengths = [sum(e.tokens() for e in row) for row in rows]
    assert min(lengths) > 0.8 * max(lengths)  # no small row is left at the end
    assert [len(row) for row in packing.split_by_tokens(examples, budget=1)] == [1] * 12  # too long: alone, never cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_keys_have_the_values_and_gradients_of_index_select(dtype):
    """To the bit: a token's two gradients meet in one addition in either."""
    spans = [Span(0, 5), Span(5, 3, prefix=0, prefix_length=2), Span(8, 4), Span(12, 6, prefix=8, prefix_length=4)]
    keys = packing.KeyOrder(spans, torch.device("cpu"))
    assert keys.index.tolist() == [*range(5), 0, 1, 5, 6, 7, *range(8, 12), 8, 9, 10, 11, *range(12, 18)]
    torch.manual_seed(0)
    x = torch.randn(18, 2, 4, dtype=dtype, requires_grad=True)
    upstream = torch.randn(24, 2, 4, dtype=dtype)
    plain, fast = x.index_select(0, keys.index), keys.gather(x)
    assert torch.equal(plain, fast)
    (a,), (b,) = (torch.autograd.grad(y, x, upstream) for y in (plain, fast))
    assert torch.equal(a, b)


def test_a_prefix_of_two_other_spans_is_refused():
    """y_l and a third response after one prompt: its tokens would have three places."""
    with pytest.raises(AssertionError, match="another span's too"):
        packing.KeyOrder([Span(0, 3), Span(3, 1, 0, 2), Span(4, 1, 0, 2)], torch.device("cpu"))


@pytest.mark.parametrize(
    "capability, built, kind",
    [
        ((9, 0), True, packing.VarlenAttention),
        ((8, 0), True, packing.VarlenAttention),
        ((7, 5), True, packing.SpanAttention),  # Turing
        ((9, 0), False, packing.SpanAttention),  # a torch without flash
    ],
)
def test_flash_only_where_the_gpu_and_torch_have_it(capability, built, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    assert has_flash(torch.device("cuda")) == (kind is packing.VarlenAttention)
    assert not has_flash(torch.device("cpu"))
    expected = [kind, packing.SpanAttention]  # float32 never takes flash
    chosen = []
    for attention in (packing.VarlenAttention, packing.SpanAttention):
        monkeypatch.setattr(packing, attention.__name__, lambda *_, attention=attention: chosen.append(attention))
    row = SimpleNamespace(input_ids=SimpleNamespace(device=torch.device("cuda")), spans=[Span(0, 4)])
    for dtype in (torch.bfloat16, torch.float32):
        packing.attention(row, SimpleNamespace(lm_head=torch.nn.Linear(1, 1, dtype=dtype)))
    assert chosen == expected


def test_the_tower_runs_once_for_reference_and_policy(world, monkeypatch):
    """On the row's four pictures in epoch 0; in epoch 1, where m_l alone is scored, still once."""
    model, data, _ = world
    seen = []
    tower = type(model.vision_tower).forward
    monkeypatch.setattr(type(model.vision_tower), "forward", lambda t, x: seen.append(len(x)) or tower(t, x))
    cached = CachedReference()
    for epoch in (0, 1):
        seen.clear()
        row = packing.pack([data[(epoch, 0)], data[(epoch, 1)]])
        reference = cached(model, row)
        packing.packed_logps(model, row)
        assert seen == [4]
    with torch.no_grad(), lora_disabled(model):
        expected = packing.packed_logps(model, packing.pack([data[(1, 0)], data[(1, 1)]]))
    torch.testing.assert_close(reference.image_rejected, expected.image_rejected, rtol=1e-5, atol=1e-5)


def test_compiled_block_compiles_at_most_three_times(world, monkeypatch):
    """CUDA's attention object, policy and reference, three packings, all layers: no guard may hold a length."""
    module = pytest.importorskip("torch.nn.attention.varlen")
    model, data, parameters = world
    packings = [packing.pack([data[(0, i)] for i in range(n)]) for n in (1, 2, 4)]
    plain = [value_and_gradient(packing.packed_logps(model, packed), parameters) for packed in packings]
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(module, "varlen_attn", lambda *args, window_size: varlen(*args))
    monkeypatch.setattr(packing, "attention", lambda p, model: packing.VarlenAttention(p.spans, p.input_ids.device))
    torch._dynamo.reset()
    for layer in model.language_model.layers:
        layer.compile(backend=backend, dynamic=True)
    for packed, expected in zip(packings, plain, strict=True):
        with torch.no_grad(), lora_disabled(model):
            packing.packed_logps(model, packed)
        assert_twins(expected, value_and_gradient(packing.packed_logps(model, packed), parameters))
    torch._dynamo.reset()
    assert 1 <= len(compiled) <= 3, f"{len(compiled)} compilations"


# ---- bfloat16 ------------------------------------------------------------------------------------------------------


def bfloat16_errors(world, device: str) -> tuple[float, float]:
    """RMS errors against float32 of the plain and the packed bfloat16 log-probs."""
    model, data, _ = world
    examples = [data[(epoch, i)] for epoch in range(8) for i in range(5)]
    device = torch.device(device)
    with torch.no_grad():
        exact = torch.stack(losses.plain_logps(model, collate(examples, model.config)))
        model.to(device, torch.bfloat16)
        with torch.autocast(device.type, torch.bfloat16):
            plain = torch.stack(losses.plain_logps(model, collate(examples, model.config).to(device))).cpu()
            packed = torch.stack(packing.packed_logps(model, packing.pack(examples).to(device))).cpu()
    return tuple((x - exact).pow(2).mean().sqrt().item() for x in (plain, packed))


def test_packed_bfloat16_is_as_accurate_as_plain(world):
    plain, packed = bfloat16_errors(world, "cpu")
    assert packed <= 1.1 * plain, (packed, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_packed_bfloat16_is_as_accurate_as_plain_on_cuda(world):
    plain, packed = bfloat16_errors(world, "cuda")
    assert packed <= 1.1 * plain, (packed, plain)


@pytest.mark.parametrize("objective, first", [(losses.TERMS, 2.0794), (("dpo",), 0.6931)])
def test_first_loss_in_bfloat16_is_ln2_per_term(world, objective, first):
    """B = 0 adds exactly zero, so on the same packed row policy and reference agree to the bit."""
    model, data, _ = world
    for m in lora_modules(model).values():
        torch.nn.init.zeros_(m.lora_B)
    model.to(torch.bfloat16)
    examples = [data[(0, i)] for i in range(5)]
    batch = packing.pack(examples)
    reference = CachedReference()(model, batch)
    r = losses.rewards(packing.packed_logps(model, batch), reference)
    loss = sum(losses.mdpo_terms(r, terms=objective).values())
    torch.testing.assert_close(loss, torch.full((5,), first), atol=1e-3, rtol=0)


def test_log_probs_are_summed_in_float64(world, monkeypatch):
    """1e8 + 1 - 1e8 is 1; a float32 sum has forgotten the 1."""
    model, data, _ = world
    packed = packing.pack([data[(0, 0)]], which=("chosen",)).to(torch.device("cpu"))
    terms = torch.zeros(len(packed.targets))
    terms[:3] = torch.tensor([1e8, 1.0, -1e8])
    monkeypatch.setattr(packing.head, "token_logps", lambda *_: terms)
    assert packing.packed_logps(model, packed).chosen.item() == 1.0
