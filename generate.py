"""Answers from a model: greedy, sampled or beam-searched, for one picture or for a file of questions (questions.py).

    python generate.py --base llava-1.5-7b --image x.jpg --prompt "What is this?"
    python -m evals.answers --base llava-1.5-7b --adapter RUN --questions q.jsonl --out answers.jsonl --beams 3

An answers row is the question's row and {answer, n_tokens (end token counted), finish: eos | length}. A run that was
stopped is gone on with by the same command; answers.settings.json says how the answers were made.

One cache serves all decodings: T slots for the prompt, then K a step (K beams, or 1), and a mask of who sees what.
    slot   0 . . . T-1 | T  T+1  T+2 | T+3 T+4 T+5        Beams are K queries of one row: the prompt is kept and read
           prompt      | step 1      | step 2             once for all of them. When beams are exchanged, only rows of
    beam 0 1 1 1 1 1 . | .   1    .  | 1   .   .          the mask are; no key or value ever moves.
    beam 1 1 1 1 1 1 . | .   1    .  | .   1   .

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

import torch
import torch.nn.functional as F
from torch import Tensor

import pictures
from bases import checkpoint
from bases.adapter import load_adapter
from bases.tokenizer import load_processor as load_base_processor
from data import Processor, bare_question
from lora import merge_lora
from model import LLaVA, causal

# ---- decoding ------------------------------------------------------------------------------------------------------


def take(x: Tensor, beams: Tensor) -> Tensor:
    """Row-wise x[b, beams[b]]: (B, K, n) and (B, K') -> (B, K', n)."""
    return x.gather(1, beams[..., None].expand(-1, -1, x.shape[2]))


class Cache:
    """Keys and values of every layer, (B, Hkv, slots, D), the prompts read into them; and what each query may see."""

    def __init__(self, model: LLaVA, prompts: list[Tensor], images: Tensor | None, beams: int, max_new_tokens: int):
        c, device = model.config, model.lm_head.weight.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=c.pad_id).to(device)  # (B, T)
        self.model, self.vocab = model, c.image_id if c.image_id >= 0 else c.vocab  # from <image> on, no text
        self.used, self.slots = 0, ids.shape[1] + beams * (max_new_tokens - 1)  # the last token is never read
        self.keys, self.values = [None] * c.layers, [None] * c.layers
        self.positions = lengths[:, None]  # (B, 1) rotary position of the next token
        self.visible = torch.arange(self.slots, device=device) < lengths[:, None, None]  # (B, 1, slots)
        hidden = self.run(ids, None if images is None else images.to(device))  # (B, T, C)
        self.prompt_end = hidden[torch.arange(len(prompts), device=device), lengths - 1][:, None]  # (B, C) -> (B, 1, C)
        if not self.prompt_end.isfinite().all():
            raise SystemExit(f"the model gives numbers that are not finite in {hidden.dtype}; try --dtype float32")

    def run(self, input_ids: Tensor, images: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """input_ids (B, T) -> hidden states (B, T, C); the keys and values of all T are kept."""
        attends = [partial(self.attend, layer) for layer in range(len(self.keys))]
        hidden = self.model.hidden(input_ids, images, positions, attends)
        self.used += input_ids.shape[1]
        return hidden

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.keys[layer] is None:
            self.keys[layer], self.values[layer] = (x.new_empty(*x.shape[:2], self.slots, x.shape[3]) for x in (k, v))
        end = self.used + k.shape[2]
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]  # (B, Hkv, end, D)
        keys[:, :, self.used :], values[:, :, self.used :] = k, v
        if self.used == 0:
            return causal(q, k, v)  # the prompt; its padding is on the right, where no token looks
        mask = self.visible[:, None, :, :end]  # (B, 1, K, end)
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=q.shape[1] != k.shape[1])

    def step(self, tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """The next token of each beam and the beam that it continues, (B, K) both -> hidden states (B, K, C)."""
        K = tokens.shape[1]
        if parents is not None:
            self.visible = take(self.visible, parents)  # (B, K, slots)
        self.visible[:, :, self.used : self.used + K] |= torch.eye(K, dtype=torch.bool, device=tokens.device)
        hidden = self.run(tokens, None, self.positions.expand(-1, K))
        self.positions = self.positions + 1
        return hidden

    def keep(self, alive: Tensor) -> Tensor:
        """Drops the rows where alive (B,) is False; returns the old index of each row that is left, (B',).

        Rows from the end move into the holes, so no more is copied than goes.
        """
        n, order = int(alive.sum()), torch.arange(len(alive), device=alive.device)
        holes, movers = order[:n][~alive[:n]], order[n:][alive[n:]]
        for stores in (self.keys, self.values):
            for layer, store in enumerate(stores):
                store[holes, :, : self.used] = store[movers, :, : self.used]
                stores[layer] = store[:n]
        order[holes] = movers
        self.positions, self.visible = self.positions[order[:n]], self.visible[order[:n]]
        return order[:n]


def pick(logits: Tensor, temperature: float, top_p: float, draws: Tensor) -> Tensor:
    """A token for each row of logits (B, V): where draws (B,), uniform in [0, 1), fall among the probabilities. (B,)"""
    probs = (logits / temperature).softmax(-1)  # (B, V)
    if top_p < 1:  # the fewest tokens that hold top_p
        ordered, ids = probs.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # (B, V) what ranks higher
        probs = torch.zeros_like(probs).scatter(1, ids, ordered.where(before < top_p, 0))
    cdf = probs.double().cumsum(-1)  # (B, V)
    return torch.searchsorted(cdf, draws[:, None] * cdf[:, -1:], right=True)[:, 0]  # (B, 1) -> (B,)


@torch.no_grad()
def generate(model: LLaVA, prompts: list[Tensor], images: Tensor | None, max_new_tokens: int, temperature: float = 0.0,
             generator: torch.Generator | list[torch.Generator] | None = None, top_p: float = 1.0, beams: int = 1,
             on_token: Callable[[list[int]], None] | None = None) -> list[list[int]]:  # fmt: skip
    """Prompt ids (one 1-D tensor a row) and pictures (B, 3, S, S) -> new ids of each row, up to and with EOS.

    temperature 0 is greedy; above, tokens are drawn with `generator` (on the CPU), one for all rows or one for each.
    With beams > 1 the best text of a beam search. on_token(ids of row 0 so far) is called in each step but for beams.
    """
    if beams > 1:
        assert not temperature, "beams are not sampled"
        return beam_search(model, prompts, images, max_new_tokens, beams)
    cache = Cache(model, prompts, images, 1, max_new_tokens)
    hidden, answers, rows = cache.prompt_end, [[] for _ in prompts], list(range(len(prompts)))  # rows: whose text it is
    if temperature:
        own = generator if isinstance(generator, list) else [generator] * len(prompts)
        draws = torch.stack([torch.rand(max_new_tokens, generator=g, dtype=torch.float64) for g in own])  # (B, new)
    for i in range(max_new_tokens):
        logits = model.lm_head(hidden[:, 0]).float()[:, : cache.vocab]  # (B, V)
        tokens = logits.argmax(-1)  # (B,)
        if temperature:
            tokens = pick(logits, temperature, top_p, draws[rows, i].to(logits.device))
        for row, token in zip(rows, tokens.tolist(), strict=True):
            answers[row].append(token)
        if on_token:
            on_token(answers[0])
        alive = tokens != model.config.eos_id  # (B,)
        if i == max_new_tokens - 1 or not alive.any():
            break
        if not alive.all():
            kept = cache.keep(alive)
            rows, tokens = [rows[k] for k in kept.tolist()], tokens[kept]
        hidden = cache.step(tokens[:, None])  # (B, 1, C)
    return answers


def beam_search(model: LLaVA, prompts: list[Tensor], images: Tensor | None, max_new_tokens: int,
                beams: int) -> list[list[int]]:  # fmt: skip
    """The best of each row's finished texts, by mean log-prob a token (length_penalty 1).

    A row is done when it has `beams` finished texts and the mean of its best open one is below all of theirs.
    """
    K, V = beams, model.config.vocab
    cache = Cache(model, prompts, images, K, max_new_tokens)
    hidden, finished, rows = cache.prompt_end, [[] for _ in prompts], list(range(len(prompts)))
    scores = torch.zeros(len(prompts), 1, device=hidden.device)  # (B, 1) summed log-probs; a prompt is one beam
    texts = torch.zeros(len(prompts), 1, 0, dtype=torch.long, device=hidden.device)
    for n in range(1, max_new_tokens + 1):
        logps = model.lm_head(hidden).float().log_softmax(-1)  # (B, K, V)
        logps[..., cache.vocab :] = -torch.inf  # after the softmax, as transformers' suppress_tokens
        best, at = (scores[..., None] + logps).flatten(1).topk(2 * K)  # (B, K, V) -> (B, K*V) -> (B, 2K), best first
        parents, tokens = at // V, at % V  # (B, 2K); at most K of them are EOS
        texts = torch.cat([take(texts, parents), tokens[..., None]], dim=-1)  # (B, 2K, n)
        ends = (tokens == model.config.eos_id) | (n == max_new_tokens)  # (B, 2K)
        for b, j in ends[:, :K].nonzero().tolist():  # an end that is not among the K best is forgotten
            ended = (float(best[b, j]) / n, texts[b, j].tolist())
            finished[rows[b]] = sorted([*finished[rows[b]], ended], reverse=True)[:K]
        going = ends.long().argsort(stable=True)[:, :K]  # (B, K) the best that did not end
        scores, parents, tokens, texts = *(x.gather(1, going) for x in (best, parents, tokens)), take(texts, going)
        alive = [len(f := finished[row]) < K or score / n > f[-1][0]
                 for row, score in zip(rows, scores[:, 0].tolist(), strict=True)]  # fmt: skip
        if n == max_new_tokens or not any(alive):
            break
        if not all(alive):
            kept = cache.keep(torch.tensor(alive, device=scores.device))
            rows = [rows[k] for k in kept.tolist()]
            scores, texts, parents, tokens = (x[kept] for x in (scores, texts, parents, tokens))
        hidden = cache.step(tokens, parents)  # (B, K, C)
    return [ended[0][1] for ended in finished]


def own_generator(seed: int, key: str) -> torch.Generator:
    """A question's random numbers: the same in whatever batch, shard or rerun it is answered."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]))


# ---- command line --------------------------------------------------------------------------------------------------


def load_processor(args: argparse.Namespace) -> Processor:
    folder = checkpoint.resolve(args.base, args.weights)
    _, vision = checkpoint.checkpoint_tensors(folder, args.vision_weights)
    processor = load_base_processor(folder, checkpoint.read_config(folder, vision))
    processor.template = replace(processor.template, image=replace(processor.template.image, mode=args.image_mode))
    return processor


def load_model(args: argparse.Namespace) -> LLaVA:
    model, _ = checkpoint.load_base(
        args.base, args.weights, args.vision_weights, getattr(torch, args.dtype), args.device
    )
    if args.adapter:
        load_adapter(model, args.adapter)
        if args.dtype == "float32":  # faster; 16-bit weights would round part of the update away
            merge_lora(model)
    return model


def answer_one(args: argparse.Namespace) -> None:
    """Prints the answer to one question as it is written; with beams, when it is chosen."""
    if problem := pictures.picture_problem(args.image):
        raise SystemExit(problem)
    processor, model, shown = load_processor(args), load_model(args), ""

    def show(ids: list[int]) -> None:
        nonlocal shown
        text = processor.decode(ids)
        if not text.endswith("\ufffd"):  # a character of several tokens, not all there
            print(text[len(shown) :], end="", flush=True)
            shown = text

    prompt = torch.tensor(processor.prompt_ids(bare_question(args.prompt)))
    picture = processor.prepare(pictures.open_image(args.image))[None]  # (1, 3, S, S)
    [ids] = generate(model, [prompt], picture, args.max_new_tokens, args.temperature, own_generator(args.seed, ""),
                     args.top_p, args.beams, show)  # fmt: skip
    print(processor.decode(ids)[len(shown) :])


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--base", required=True, help=f"{', '.join(checkpoint.SOURCES)}, or a checkpoint folder")
    p.add_argument("--weights", type=Path, help="folder of the base's checkpoint, instead of the hub's cache")
    p.add_argument("--vision-weights", type=Path, help="CLIP or SigLIP folder, for layouts without the vision tower")
    p.add_argument("--adapter", type=Path, help="run folder, or any PEFT LoRA folder")
    p.add_argument("--image", type=Path, required=True, help="one picture, with --prompt; the answer is printed")
    p.add_argument("--prompt", required=True, help="one question")
    p.add_argument("--beams", type=int, default=1, help="3 for Object HalBench as published (default 1)")
    p.add_argument("--temperature", type=float, default=0.0, help="default 0: greedy")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the fewest tokens that hold this probability")
    p.add_argument("--seed", type=int, default=0, help="of sampling")
    p.add_argument("--max-new-tokens", type=int, default=1024, help="default 1024")
    p.add_argument("--image-mode", choices=("pad", "crop"), default="pad", help="crop is what the hub's processor does")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default bfloat16 on CUDA, else float32")
    args = p.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or not args.temperature and args.top_p < 1:
        p.error("--temperature must not be negative; --top-p is a probability and needs --temperature")
    if args.beams > 1 and args.temperature:
        p.error("--beams does not sample: leave --temperature out")
    if min(args.beams, args.max_new_tokens) < 1:
        p.error("--beams and --max-new-tokens must be at least 1")
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    answer_one(args)


if __name__ == "__main__":
    main()
