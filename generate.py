"""Answers from a model: greedy, sampled or by beam search, for one picture.

    python generate.py --base llava-1.5-7b --image x.jpg --prompt "What is this?"

A file of questions is `python -m evals.answers`. `greedy` is the definition: a dozen lines that read everything anew
for each token. `generate` gives the same tokens from a cache of keys and values, in batches, and also samples.

Deviations from transformers' generate(): none for greedy and beams (length_penalty 1, early_stopping False). Sampling
has no top-k (there 50 unless told), and each question has its own random numbers, so that its answer depends neither on
its batch nor on an interruption. Ids that are not text (<image>, padding rows) are never chosen.
"""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import pictures
from bases import checkpoint, tokenizer
from bases.adapter import load_adapter
from data import BadRow, Processor, bare_question
from engine.device import choose_device
from external.flags import number, whole
from external.terminal import set_up_terminal
from lora import lora_modules, merge_lora
from model import LLaVA, causal

MOST_NEW_TOKENS = 32768  # eight times what the bases were taught to read; a cache for more is a slip of the finger

# ---- plain ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: LLaVA, prompt: Tensor, image: Tensor, max_new_tokens: int) -> list[int]:
    """Prompt ids (T,) and a picture (3, S, S) -> the most likely next token, again and again, up to and with EOS."""
    ids = prompt
    for _ in range(max_new_tokens):
        logits = model(ids[None], image[None])[0, -1]  # (1, T, V) -> (V,)
        token = logits[: text_ids(model)].argmax()  # ()
        ids = torch.cat([ids, token[None]])  # (T,) -> (T + 1,)
        if token == model.config.eos_id:
            break
    return ids[len(prompt) :].tolist()


def text_ids(model: LLaVA) -> int:
    """How many ids can be text: from <image> on there are placeholders and padding rows."""
    image_id = model.config.image_id
    return image_id if image_id >= 0 else model.config.vocab  # below 0: the base has no row for <image>


# ---- the cache -----------------------------------------------------------------------------------------------------


def take(x: Tensor, beams: Tensor) -> Tensor:
    """Row-wise x[b, beams[b]]: (B, K, n) and (B, K') -> (B, K', n)."""
    index = beams[..., None].expand(-1, -1, x.shape[2])  # (B, K') -> (B, K', n)
    return x.gather(1, index)  # (B, K', n)


class Cache:
    """Keys and values of every layer, (B, Hkv, slots, D), the prompts read into them; and what each query may see.

    One cache serves all decodings: T slots for the prompt, then K a step (K beams, or 1), and a mask of who sees what.

        slot   0 . . . T-1 | T  T+1  T+2 | T+3 T+4 T+5
               prompt      | step 1      | step 2
        beam 0 1 1 1 1 1 . | .   1    .  | 1   .   .
        beam 1 1 1 1 1 1 . | .   1    .  | .   1   .

    Beams are K queries of one row: the prompt is kept and read once for all of them. When beams are exchanged, only
    rows of the mask are; no key or value ever moves.
    """

    def __init__(self, model: LLaVA, prompts: list[Tensor], images: Tensor | None, beams: int, max_new_tokens: int):
        c = model.config
        device = model.lm_head.weight.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=c.pad_id).to(device)  # (B, T)
        self.model = model
        self.used = 0
        self.slots = ids.shape[1] + beams * (max_new_tokens - 1)  # the last token is never read
        self.keys: list[Tensor | None] = [None] * c.layers
        self.values: list[Tensor | None] = [None] * c.layers
        self.positions = lengths[:, None]  # (B, 1) rotary position of the next token
        self.visible = torch.arange(self.slots, device=device) < lengths[:, None, None]  # (B, 1, slots)
        hidden = self.run(ids, None if images is None else images.to(device))  # (B, T, C)
        rows = torch.arange(len(prompts), device=device)  # (B,)
        self.prompt_end = hidden[rows, lengths - 1][:, None]  # (B, C) -> (B, 1, C)
        if not self.prompt_end.isfinite().all():
            narrow = hidden.dtype != torch.float32
            advice = "try --dtype float32" if narrow else "the base's or the adapter's weights are damaged"
            raise SystemExit(f"the model gives numbers that are not finite in {hidden.dtype}; {advice}")

    def run(self, input_ids: Tensor, images: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """input_ids (B, T) -> hidden states (B, T, C); the keys and values of all T are kept."""
        attends = [partial(self.attend, layer) for layer in range(len(self.keys))]
        hidden = self.model.hidden(input_ids, images, positions, attends)
        self.used += input_ids.shape[1]
        return hidden  # (B, T, C)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps k and v (B, Hkv, T, D) in their slots; q (B, H, T, D) sees them and what was kept before."""
        if self.keys[layer] is None:
            self.keys[layer] = k.new_empty(*k.shape[:2], self.slots, k.shape[3])
            self.values[layer] = v.new_empty(*v.shape[:2], self.slots, v.shape[3])
        end = self.used + k.shape[2]
        keys = self.keys[layer][:, :, :end]  # (B, Hkv, end, D)
        values = self.values[layer][:, :, :end]  # (B, Hkv, end, D)
        keys[:, :, self.used :] = k
        values[:, :, self.used :] = v
        if self.used == 0:
            return causal(q, k, v)  # (B, H, T, D) the prompt; its padding is on the right, where no token looks
        mask = self.visible[:, None, :, :end]  # (B, 1, K, end)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=grouped)  # (B, H, K, D)

    def step(self, tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """The next token of each beam and the beam that it continues, (B, K) both -> hidden states (B, K, C)."""
        K = tokens.shape[1]
        if parents is not None:
            self.visible = take(self.visible, parents)  # (B, K, slots)
        self.visible[:, :, self.used : self.used + K] |= torch.eye(K, dtype=torch.bool, device=tokens.device)
        hidden = self.run(tokens, None, self.positions.expand(-1, K))
        self.positions = self.positions + 1
        return hidden  # (B, K, C)

    def keep(self, alive: Tensor) -> Tensor:
        """Drops the rows where alive (B,) is False; returns the old index of each row that is left, (B',).

        Rows from the end move into the holes, so no more is copied than goes. Four rows, of which 0 and 2 are done:

            old index   0   1   2   3       alive   .   1   .   1
            kept        3   1               row 3 moves into the hole 0, row 1 stays: returns [3, 1]
        """
        n = int(alive.sum())
        order = torch.arange(len(alive), device=alive.device)  # (B,)
        holes = order[:n][~alive[:n]]  # (h,) done, in front
        movers = order[n:][alive[n:]]  # (h,) not done, behind
        for stores in (self.keys, self.values):
            for layer, store in enumerate(stores):
                store[holes, :, : self.used] = store[movers, :, : self.used]
                stores[layer] = store[:n]
        order[holes] = movers
        kept = order[:n]  # (B',)
        self.positions = self.positions[kept]
        self.visible = self.visible[kept]
        return kept


# ---- greedy and sampling, with the cache ---------------------------------------------------------------------------


def pick(logits: Tensor, temperature: float, top_p: float, draws: Tensor) -> Tensor:
    """A token for each row of logits (B, V): where draws (B,), uniform in [0, 1), fall among the probabilities. (B,)"""
    below = logits - logits.amax(-1, keepdim=True)  # (B, V) 0 and less: no temperature makes it infinite
    probs = (below.double() / temperature).float().softmax(-1)  # (B, V)
    if top_p < 1:  # the fewest tokens that hold top_p
        ordered, ids = probs.sort(descending=True)  # (B, V) both
        before = ordered.cumsum(-1) - ordered  # (B, V) what ranks higher
        kept = ordered.where(before.double() < top_p, 0)  # (B, V) the first always, its `before` is 0
        probs = torch.zeros_like(probs).scatter(1, ids, kept)  # (B, V)
    cdf = probs.double().cumsum(-1)  # (B, V)
    heights = draws[:, None] * cdf[:, -1:]  # (B, 1)
    return torch.searchsorted(cdf, heights, right=True)[:, 0]  # (B, 1) -> (B,)


def own_generator(seed: int, key: str) -> torch.Generator:
    """A question's random numbers: the same in whatever batch, shard or rerun it is answered."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]))


@torch.no_grad()
def generate(
    model: LLaVA,
    prompts: list[Tensor],
    images: Tensor | None,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    top_p: float = 1.0,
    beams: int = 1,
    on_token: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """Prompt ids (one 1-D tensor a row) and pictures (B, 3, S, S) -> new ids of each row, up to and with EOS.

    temperature 0 gives each row the tokens of `greedy`; above, tokens are drawn with `generator` (on the CPU), one for
    all rows or one for each. With beams > 1 the best text of `beam_search`. on_token(ids of row 0 so far) is called in
    each step but there.
    """
    if beams > 1:
        assert not temperature, "beams are not sampled"
        return beam_search(model, prompts, images, max_new_tokens, beams)
    cache = Cache(model, prompts, images, 1, max_new_tokens)
    hidden = cache.prompt_end  # (B, 1, C)
    answers = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # whose text each row of the cache is
    if temperature:
        own = generator if isinstance(generator, list) else [generator] * len(prompts)
        draws = torch.stack([torch.rand(max_new_tokens, generator=g, dtype=torch.float64) for g in own])  # (B, new)
    for i in range(max_new_tokens):
        logits = model.lm_head(hidden[:, 0]).float()[:, : text_ids(model)]  # (B, V)
        if temperature:
            tokens = pick(logits, temperature, top_p, draws[rows, i].to(logits.device))  # (B,)
        else:
            tokens = logits.argmax(-1)  # (B,)
        for row, token in zip(rows, tokens.tolist(), strict=True):  # the one place where the host waits for the GPU
            answers[row].append(token)
        if on_token:
            on_token(answers[0])
        alive = [answers[row][-1] != model.config.eos_id for row in rows]
        if i == max_new_tokens - 1 or not any(alive):
            break
        if not all(alive):
            kept = cache.keep(torch.tensor(alive, device=tokens.device))  # (B',)
            rows = [rows[k] for k in kept.tolist()]
            tokens = tokens[kept]  # (B',)
        hidden = cache.step(tokens[:, None])  # (B, 1, C)
    return answers


# ---- beams ---------------------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """A finished text; sorted by its mean log-prob a token."""

    mean: float
    ids: list[int]


def beam_search(
    model: LLaVA, prompts: list[Tensor], images: Tensor | None, max_new_tokens: int, beams: int
) -> list[list[int]]:
    """The best of each row's finished texts, by mean log-prob a token (length_penalty 1).

    A row is done when it has `beams` finished texts and the mean of its best open one is below all of theirs.
    """
    K, V = beams, model.config.vocab
    cache = Cache(model, prompts, images, K, max_new_tokens)
    device = cache.prompt_end.device
    hidden = cache.prompt_end  # (B, 1, C) a prompt is one beam
    scores = torch.zeros(len(prompts), 1, device=device)  # (B, 1) summed log-probs
    texts = torch.zeros(len(prompts), 1, 0, dtype=torch.long, device=device)  # (B, 1, 0)
    finished: list[list[Ended]] = [[] for _ in prompts]  # of each prompt, best first
    rows = list(range(len(prompts)))  # whose text each row of the cache is
    for n in range(1, max_new_tokens + 1):
        logps = model.lm_head(hidden).float().log_softmax(-1)  # (B, K, V)
        logps[..., text_ids(model) :] = -torch.inf  # after the softmax, as transformers' suppress_tokens
        totals = (scores[..., None] + logps).flatten(1)  # (B, K, V) -> (B, K*V)
        best, at = totals.topk(2 * K)  # (B, 2K) both, best first; at most K of them are EOS
        parents, tokens = at // V, at % V  # (B, 2K) both
        texts = torch.cat([take(texts, parents), tokens[..., None]], dim=-1)  # (B, 2K, n)
        ends = (tokens == model.config.eos_id) | (n == max_new_tokens)  # (B, 2K)
        for b, j in ends[:, :K].nonzero().tolist():  # an end that is not among the K best is forgotten
            ranked = finished[rows[b]]
            ranked.append(Ended(mean=float(best[b, j]) / n, ids=texts[b, j].tolist()))
            ranked.sort(reverse=True)
            del ranked[K:]
        open_beams = ends.long().argsort(stable=True)[:, :K]  # (B, K) the best that did not end
        scores = best.gather(1, open_beams)  # (B, K)
        parents = parents.gather(1, open_beams)  # (B, K)
        tokens = tokens.gather(1, open_beams)  # (B, K)
        texts = take(texts, open_beams)  # (B, K, n)
        open_means = [total / n for total in scores[:, 0].tolist()]
        alive = [not is_done(finished[row], K, mean) for row, mean in zip(rows, open_means, strict=True)]
        if n == max_new_tokens or not any(alive):
            break
        if not all(alive):
            kept = cache.keep(torch.tensor(alive, device=device))  # (B',)
            rows = [rows[k] for k in kept.tolist()]
            scores = scores[kept]  # (B', K)
            texts = texts[kept]  # (B', K, n)
            parents = parents[kept]  # (B', K)
            tokens = tokens[kept]  # (B', K)
        hidden = cache.step(tokens, parents)  # (B, K, C)
    return [ranked[0].ids for ranked in finished]


def is_done(ranked: list[Ended], beams: int, best_open: float) -> bool:
    """Whether a prompt has all its finished texts, and its best open one is no better than the last of them."""
    return len(ranked) == beams and best_open <= ranked[-1].mean


# ---- command line --------------------------------------------------------------------------------------------------


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """Which model, for every command that answers questions."""
    p.add_argument("--base", required=True, help=checkpoint.BASE_HELP)
    p.add_argument("--weights", type=Path, help="folder of the base's checkpoint, instead of the hub's cache")
    p.add_argument("--vision-weights", type=Path, help="CLIP or SigLIP folder, for layouts without the vision tower")
    p.add_argument("--adapter", type=Path, help="run folder, or any PEFT LoRA folder")
    p.add_argument("--image-mode", choices=("pad", "crop"), default="pad", help="crop is what the hub's processor does")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default bfloat16 on CUDA, else float32")


def add_decoding_flags(p: argparse.ArgumentParser) -> None:
    probability = number(0, 1, above=True)
    p.add_argument("--beams", type=whole(1, 64), default=1, help="3 for Object HalBench as published (default 1)")
    p.add_argument("--temperature", type=number(0), default=0.0, help="default 0: greedy")
    p.add_argument("--top-p", type=probability, default=1.0, help="sample from the fewest tokens that hold so much")
    p.add_argument("--seed", type=whole(0), default=0, help="of sampling")
    p.add_argument("--max-new-tokens", type=whole(1, MOST_NEW_TOKENS), default=1024, help="default 1024")


def parse_flags(p: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The parsed flags of both and others, with the device and the dtype that are meant."""
    args = p.parse_args(argv)
    args.device = choose_device().type
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.top_p < 1 and not args.temperature:
        p.error("--top-p needs --temperature")
    if args.beams > 1 and args.temperature:
        p.error("--beams does not sample: leave --temperature out")
    return args


def load_processor(args: argparse.Namespace) -> Processor:
    folder = checkpoint.resolve(args.base, args.weights)
    _, vision = checkpoint.checkpoint_tensors(folder, args.vision_weights)
    processor = tokenizer.load_processor(folder, checkpoint.read_config(folder, vision))
    image = replace(processor.template.image, mode=args.image_mode)
    processor.template = replace(processor.template, image=image)
    return processor


def load_model(args: argparse.Namespace) -> LLaVA:
    dtype = getattr(torch, args.dtype)
    model, _ = checkpoint.load_base(args.base, args.weights, args.vision_weights, dtype, args.device)
    if args.adapter:
        load_adapter(model, args.adapter)
        if args.dtype == "float32":  # faster; 16-bit weights would round part of the update away
            merge_lora(model)
        else:
            for module in lora_modules(model).values():
                module.to(dtype)  # as autocast reads A and B in training; float32 products are slow on a GPU
    return model


def answer_one(args: argparse.Namespace) -> None:
    """Prints the answer to one question as it is written; with beams, when it is chosen."""
    if problem := pictures.picture_problem(args.image):
        raise SystemExit(problem)
    try:
        args.prompt.encode()
        question = bare_question(args.prompt)
        if not question:
            raise BadRow("no question in it")
        processor = load_processor(args)
        context = tokenizer.context_of(checkpoint.resolve(args.base, args.weights))
        prompt = tokenizer.prompt_of(processor, question, context)  # (T,)
    except UnicodeEncodeError:
        raise SystemExit("--prompt: not UTF-8") from None
    except BadRow as error:
        raise SystemExit(f"--prompt: {': '.join(error.args)}") from None
    model = load_model(args)
    shown = ""

    def show(ids: list[int]) -> None:
        nonlocal shown
        text = processor.decode(ids)
        if not text.endswith("\ufffd"):  # a character of several tokens, not all there
            print(text[len(shown) :], end="", flush=True)
            shown = text

    picture = processor.prepare(pictures.open_image(args.image))[None]  # (1, 3, S, S)
    own = own_generator(args.seed, "")
    [ids] = generate(model, [prompt], picture, args.max_new_tokens, args.temperature, own, args.top_p, args.beams, show)
    print(processor.decode(ids)[len(shown) :])


def main(argv: list[str] | None = None) -> None:
    set_up_terminal()
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--image", type=Path, required=True, help="a picture")
    p.add_argument("--prompt", required=True, help="a question about it; the answer is printed")
    add_model_flags(p)
    add_decoding_flags(p)
    answer_one(parse_flags(p, argv))


if __name__ == "__main__":
    main()
