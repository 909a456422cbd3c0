"""Compares the project with numbers that the reference libraries and the released code wrote down, entry by entry.

    python -m tests.oracles_model --oracles DIR [--tokenizer tokenizer.json]

DIR holds tiny checkpoints in every layout and what transformers, peft and the official LLaVA and Bunny code made of
them; --tokenizer is the real Llama vocabulary. One PASS or FAIL line per entry, exit status 1 on a failure.
Tolerances, all in float32: logits 2e-4, summed log-probs 1e-3, features and hidden states 1e-4; ids and pixels equal.
Not collected by pytest: the project's own tests build the same comparisons on models of their own.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.v2.functional import resized_crop

import losses
import pictures
from bases.adapter import load_adapter
from bases.checkpoint import load_base
from bases.tokenizer import load_tokenizer
from data import BUNNY, BUNNY_RELEASED, Processor
from generate import generate
from lora import add_lora, lora_disabled, lora_modules, merge_lora

LOGITS, LOGPS, FEATURES, EXACT = 2e-4, 1e-3, 1e-4, 0.0


class Report:
    """Prints a line per comparison and counts the failures."""

    def __init__(self):
        self.failed = self.compared = 0

    def close(self, what: str, ours, theirs, bound: float) -> None:
        ours, theirs = (torch.as_tensor(t, dtype=torch.float64) for t in (ours, theirs))
        worst = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else math.inf
        self.line(worst <= bound, f"{what}: {worst:.1e} (bound {bound:.0e})")

    def equal(self, what: str, ours, theirs) -> None:
        self.line(ours == theirs, what if ours == theirs else f"{what}: {ours} instead of {theirs}")

    def line(self, passed: bool, text: str) -> None:
        self.compared, self.failed = self.compared + 1, self.failed + (not passed)
        print("PASS" if passed else "FAIL", text)


def hidden_states(model, ids: Tensor, picture: Tensor) -> list[Tensor]:
    """What transformers calls hidden_states: embeddings, after each layer but the last, after the final norm."""
    states = [model.embed(ids, model.image_features(picture))]
    hooks = [layer.register_forward_hook(lambda _, __, x: states.append(x)) for layer in model.language_model.layers]
    last = model.hidden(ids, picture)
    for hook in hooks:
        hook.remove()
    return [*states[:-1], last]


def vision_states(tower, picture: Tensor) -> list[Tensor]:
    states = []
    modules = [tower.pre_layrnorm, *tower.layers]
    hooks = [m.register_forward_hook(lambda _, __, x: states.append(x)) for m in modules]
    tower(picture)
    for hook in hooks:
        hook.remove()
    return states


# ---- LLaVA ---------------------------------------------------------------------------------------------------------


def prepared(root: Path, names: list[str], spec: pictures.ImageSpec) -> Tensor:
    opened = [pictures.open_image(root / "images" / name) for name in names]
    return torch.stack([pictures.prepare(image, spec) for image in opened])  # (B, 3, S, S)


def check_llava(report: Report, root: Path, name: str, expected, texts: list[dict], vocab_rows: int = 0) -> None:
    """One LLaVA folder against an expected_llava*.npz. vocab_rows: of a layout without the rows the hub added."""
    model, folder = load_base(str(root / name))
    report.equal(f"{name}: no gradient is left on", any(p.requires_grad for p in model.parameters()), False)
    has_tokenizer = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
    processor = Processor(load_tokenizer(folder if has_tokenizer else root / "tiny-llava-hf"), model.config)
    x = prepared(root, [t["image"] for t in texts], processor.template.image)
    main = np.load(root / "expected_llava.npz")
    report.close(f"{name}: pixel_values", x, main["pixel_values"], EXACT)
    ids = {side: torch.tensor(main[f"{side}_input_ids"]) for side in ("chosen", "rejected")}
    ours = {512: model.config.image_id, 513: model.config.pad_id}  # the original layout has neither row
    ids = {side: t.clone().apply_(lambda i: ours.get(i, i)) for side, t in ids.items()}
    for i, t in enumerate(texts):
        prompt = [model.config.image_id if j == 512 else j for j in t["prompt_ids"]]
        report.equal(f"{name}: prompt ids {i}", processor.prompt_ids(t["question"]), prompt)
        for side in ids:
            report.equal(f"{name}: {side} ids {i}", processor.response_ids(t[side]), t[f"{side}_ids"])
    logits = {side: model(t, x) for side, t in ids.items()}
    if vocab_rows:  # log-softmax runs over fewer rows here, so the log-probs differ from the hub layout's
        official = json.loads((root / "official_llava_check.json").read_text())["logps"]
        mask = torch.tensor(main["chosen_labels"]) >= 0
        logps = losses.sequence_logps(logits["chosen"], ids["chosen"], mask)
        report.close(f"{name}: log-probs of the official LLaVA code", logps, official, LOGPS)
    else:
        for side in ids:
            mask = torch.tensor(main[f"{side}_labels"]) >= 0
            logps = losses.sequence_logps(logits[side], ids[side], mask)
            report.close(f"{name}: {side} log-probs", logps, expected[f"{side}_logps"], LOGPS)
        mask = torch.tensor(main["chosen_labels"]) >= 0
        tokens = F.log_softmax(logits["chosen"][:, :-1], -1).gather(-1, ids["chosen"][:, 1:, None])[..., 0]  # (B, T-1)
        theirs = torch.tensor(expected["chosen_token_logps"])
        report.close(f"{name}: token log-probs", tokens[mask[:, 1:]], theirs[mask[:, 1:]], LOGITS)
        prompts = [torch.tensor(processor.prompt_ids(t["question"])) for t in texts]
        greedy = generate(model, prompts, x, 12)
        report.equal(f"{name}: greedy tokens, batched with a cache", greedy, [r.tolist() for r in expected["greedy"]])
    real = torch.tensor(main["chosen_attention_mask"]).bool()
    states = torch.stack([s[0] for s in hidden_states(model, ids["chosen"][:1], x[:1])])
    report.close(f"{name}: hidden states", states[:, real[0]], expected["hidden_states_0"][:, real[0]], FEATURES)
    if "vision_features" in expected:
        theirs = torch.tensor(expected["chosen_logits_01"])[real[:2]]
        rows = vocab_rows or theirs.shape[-1]
        report.close(f"{name}: logits", logits["chosen"][:2][real[:2]], theirs[:, :rows], LOGITS)
        states = torch.stack([s[0] for s in vision_states(model.vision_tower, x[:1])])
        theirs = expected["vision_hidden_states_0"]
        report.close(f"{name}: vision hidden states", states, theirs[: len(states)], FEATURES)
        report.close(f"{name}: vision features", model.vision_tower(x), expected["vision_features"], FEATURES)
        report.close(f"{name}: projector", model.image_features(x), expected["projector_out"], FEATURES)
    if "vision_features" in expected and not vocab_rows:
        rolled = losses.sequence_logps(model(ids["chosen"], x.roll(1, 0)), ids["chosen"], mask)
        report.close(f"{name}: wrong pictures", rolled, expected["chosen_logps_images_rolled"], LOGPS)


def check_text(report: Report, root: Path, facts: dict) -> None:
    """Awkward strings, in both tokenizer files: chunks around <image>, one BOS, the text of </s> never an id."""
    for name, image_id in (("tiny-llava-hf", 512), ("tiny-llava-orig", 512)):
        tokenizer = load_tokenizer(root / name)
        tokenizer.encode_special_tokens = True
        for text, ids in facts["tokenization"].items():
            chunks = [tokenizer.encode(c, add_special_tokens=False).ids if c else [] for c in text.split("<image>")]
            ours = [1, *chunks[0], *(i for c in chunks[1:] for i in [image_id, *c])]
            if ids["official_split_on_image"] is None:
                report.line(2 not in ours, f"{name}: {text!r} holds no end-of-sequence id")
            else:
                report.equal(f"{name}: ids of {text[:30]!r}", ours, ids["official_split_on_image"])


def check_preprocess(report: Report, root: Path) -> None:
    expected = np.load(root / "expected_preprocess.npz")
    for key in expected:
        name, mode = key.split("/")
        picture = pictures.open_image(root / "images" / name)
        if mode in ("pad", "crop"):
            ours = pictures.prepare(picture, pictures.ImageSpec(56, mode))
        else:
            ours = torch.tensor(np.asarray(pictures.square(picture, pictures.ImageSpec(336)))[::7, ::7])
        report.close(f"pixels {key}", ours, expected[key], EXACT)


def check_real_vocabulary(report: Report, file: Path) -> None:
    tokenizer = load_tokenizer(file.parent)
    tokenizer.encode_special_tokens = True

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    golden = {  # the real Llama vocabulary
        "A chat between": [319, 13563, 1546],
        "ASSISTANT:": [319, 1799, 9047, 13566, 29901],
        "Yes": [3869],
        "No": [1939],
        "The image": [450, 1967],
        " The image": [29871, 450, 1967],
        "USER: ": [3148, 1001, 29901, 29871],
        "\nWhat is": [29871, 13, 5618, 338],
    }
    for text, expected in golden.items():
        report.equal(f"real vocabulary: {text!r}", ids(text), expected)


# ---- Bunny ---------------------------------------------------------------------------------------------------------


def check_bunny(report: Report, root: Path, vision: Path | None) -> None:
    label = "tiny-bunny with tiny-siglip" if vision else "tiny-bunny"
    model, folder = load_base(str(root / "tiny-bunny"), vision=vision)
    facts = json.loads((root / "bunny_text.json").read_text())
    expected, texts = np.load(root / "expected_bunny.npz"), facts["pairs"]
    processors = {
        "mdpo": Processor(load_tokenizer(folder), model.config, BUNNY_RELEASED),
        "template": Processor(load_tokenizer(folder), model.config, BUNNY),
    }
    x = prepared(root, [t["image"] for t in texts], processors["mdpo"].template.image)
    report.close(f"{label}: pixel_values", x, expected["pixel_values"], EXACT)
    report.close(f"{label}: vision features", model.vision_tower(x), expected["vision_features"], FEATURES)
    report.close(f"{label}: projector", model.image_features(x), expected["projector_out"], FEATURES)
    for i, t in enumerate(texts):
        prompt = [j for k in t["prompt_ids"] for j in [k] * (model.config.vision.patches if k == -200 else 1)]
        report.equal(f"{label}: prompt ids {i}", processors["mdpo"].prompt_ids(t["question"]), prompt)
        for kind, processor in processors.items():
            for side in ("chosen", "rejected"):
                response = processor.response_ids(t[side])
                report.equal(f"{label}: {side} ids {i}, {kind}", response, t[f"{side}_ids_{kind}"])
                ids = torch.tensor([prompt + response])
                logits = model(ids, x[i : i + 1])
                mask = torch.arange(ids.shape[1])[None] >= len(prompt)
                logps = losses.sequence_logps(logits, ids, mask)[0]
                report.close(f"{label}: {side} log-prob {i}, {kind}", logps, t[f"{side}_logp_{kind}"], LOGPS)
                if (side, kind) == ("chosen", "mdpo") and i < 2:
                    report.close(f"{label}: logits {i}", logits[0], expected[f"chosen_logits_{i}"], LOGITS)
                if (side, kind, i) == ("chosen", "mdpo", 0):
                    states = torch.cat(hidden_states(model, ids, x[:1]))
                    report.close(f"{label}: hidden states", states, expected["hidden_states_0"], FEATURES)
        greedy = generate(model, [torch.tensor(prompt)], x[i : i + 1], 12)[0]
        report.equal(f"{label}: greedy tokens {i}", greedy, t["greedy"])
    for text, ids in facts["tokenization"].items():
        report.equal(f"{label}: ids of {text!r}", processors["mdpo"].encode(text), ids)


def check_crop_draws(report: Report, root: Path) -> None:
    """The geometry of RandomResizedCrop from the same uniform numbers, and its resize from the same boxes."""
    for key, box in json.loads((root / "official_bunny_check.json").read_text())["crop_draws"].items():
        seed, size = (int(part) for part in key.removeprefix("seed").split("_"))
        torch.manual_seed(seed)
        draws = iter(
            [
                torch.empty(1).uniform_(0.01, 0.2).item(),
                torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).item(),
            ]
        )

        class Replay:
            def uniform(self, low, high, draws=draws):
                return next(draws)

            def integers(self, high):
                return 0

        w, h = pictures.crop_box(size, size, Replay(), 0.01, 0.2)[2:]
        report.equal(f"crop size {key}", (w, h), (box["width"], box["height"]))
        x = torch.randn(3, size, size)
        theirs = resized_crop(x, box["top"], box["left"], h, w, [size, size], antialias=False)
        report.close(f"crop pixels {key}", pictures.resized_crop(x, box["top"], box["left"], h, w), theirs, 1e-5)


# ---- LoRA, losses, training ----------------------------------------------------------------------------------------


def check_adapters(report: Report, root: Path) -> None:
    expected, main = np.load(root / "expected_peft.npz"), np.load(root / "expected_llava.npz")
    ids, x = torch.tensor(main["chosen_input_ids"]), torch.tensor(main["pixel_values"])
    mask, real = torch.tensor(main["chosen_labels"]) >= 0, torch.tensor(main["chosen_attention_mask"][0]).bool()
    for name in ("adapter", "adapter_rslora"):
        model, _ = load_base(str(root / "tiny-llava-hf"))
        load_adapter(model, root / name)
        for state in ("adapter", "merged"):
            logits = model(ids, x)
            theirs = expected[f"{name}_logits_0"][real]
            report.close(f"{name}, {state}: logits", logits[0][real], theirs, LOGITS)
            logps = losses.sequence_logps(logits, ids, mask)
            report.close(f"{name}, {state}: log-probs", logps, expected[f"{name}_logps"], LOGPS)
            if state == "adapter":
                with lora_disabled(model):
                    logps = losses.sequence_logps(model(ids, x), ids, mask)
                report.close(f"{name}, off: the base's log-probs", logps, main["chosen_logps"], LOGPS)
                merge_lora(model)
        merged = model.language_model.layers[0].self_attn.q_proj.weight
        report.close(f"{name}: merged q_proj", merged, expected[f"{name}_merged_q_proj_0"], 1e-6)


def check_losses(report: Report, root: Path) -> None:
    facts = json.loads((root / "dpo_losses.json").read_text())
    v = {k: torch.tensor(rows, dtype=torch.float64) for k, rows in facts["inputs"].items()}
    policy, reference = losses.Logps(v["pc"], v["pr"], v["pi"]), losses.Logps(v["rc"], v["rr"], v["ri"])
    for beta in (0.1, 0.5):
        r = losses.rewards(policy, reference, beta)
        report.close(f"dpo_loss, beta {beta}", losses.dpo_loss(r.chosen, r.rejected), facts[f"dpo_beta{beta}"], 1e-9)
        theirs, terms = facts[f"mdpo_beta{beta}"], losses.mdpo_terms(r)
        for ours, name in (("dpo", "response"), ("copo", "image"), ("ancpo", "anchor")):
            report.close(f"mDPO {ours}, beta {beta}", terms[ours], theirs[name], 1e-9)
        total = losses.mdpo_loss(policy, reference, beta)
        report.close(f"mDPO total, beta {beta}", total, theirs["total"], 1e-9)
        report.close(f"mDPO mean, beta {beta}", total.mean(), theirs["mean"], 1e-9)
    r, theirs = losses.rewards(policy, reference), facts["rewards_beta0.1"]
    for ours, name in zip(r, ("chosen", "rejected", "cropped"), strict=True):
        report.close(f"reward {name}", ours, theirs[name], 1e-9)


def check_run(report: Report, root: Path, objective: str) -> None:
    """The five optimiser steps of dpo_run, with its crop boxes: policy and reference have their own there."""
    run, main = root / "dpo_run", np.load(root / "expected_llava.npz")
    s = json.loads((run / "settings.json").read_text())
    facts = json.loads((run / "trajectory.json").read_text())[objective]
    terms = losses.TERMS if objective == "mdpo" else ("dpo",)
    model, _ = load_base(str(root / s["base"]))
    load_adapter(model, run / "adapter_init")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=tuple(s["betas"]), eps=s["eps"], weight_decay=s["weight_decay"])
    sides = {
        n: (torch.tensor(main[f"{n}_input_ids"]), torch.tensor(main[f"{n}_labels"]) >= 0)
        for n in ("chosen", "rejected")
    }
    x = torch.tensor(main["pixel_values"])

    def score(rows, boxes):
        crops = torch.stack([pictures.resized_crop(x[i], *box) for i, box in zip(rows, boxes, strict=True)])
        cases = ((sides["chosen"], x[rows]), (sides["rejected"], x[rows]), (sides["chosen"], crops))
        return losses.Logps(*(losses.sequence_logps(model(i[rows], p), i[rows], m[rows]) for (i, m), p in cases))

    for step, facts_step in enumerate(facts["steps"]):
        total = 0.0
        for micro, rows in enumerate(s["micro_batches"]):
            with torch.no_grad(), lora_disabled(model):
                reference = score(rows, s["boxes"]["reference"][step][micro])
            policy = score(rows, s["boxes"]["policy"][step][micro])
            r = losses.rewards(policy, reference, s["beta"])
            loss = sum(losses.mdpo_terms(r, s["anchor_delta"], terms).values()).mean() / s["grad_accum"]
            loss.backward()
            total += float(loss.detach())
            for who, logps in (("policy", policy), ("reference", reference)):
                theirs = list(facts_step["micro"][micro][who].values())  # chosen, rejected, cropped
                report.close(
                    f"{objective} step {step}.{micro}: {who} log-probs", torch.stack(logps).detach(), theirs, LOGPS
                )
        if (step, objective) == (0, "mdpo"):
            check_gradients(report, model, dict(np.load(run / "grads_step0.npz")))
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, s["max_grad_norm"]))
        optimizer.param_groups[0]["lr"] = facts_step["lr"]
        optimizer.step()
        optimizer.zero_grad()
        report.close(f"{objective} step {step}: loss", total, facts_step["loss"], 1e-4)
        report.close(f"{objective} step {step}: gradient norm", norm, facts_step["grad_norm"], 1e-3)
    final, _ = load_base(str(root / s["base"]))
    load_adapter(final, run / f"adapter_{objective}_final")
    for (name, ours), theirs in zip(lora_modules(model).items(), lora_modules(final).values(), strict=True):
        for ab in ("lora_A", "lora_B"):
            report.close(
                f"{objective} final {name}.{ab}", getattr(ours, ab).detach(), getattr(theirs, ab).detach(), 1e-4
            )


def check_gradients(report: Report, model, theirs: dict) -> None:
    ours = {f"{n}.{ab}": getattr(m, ab).grad for n, m in lora_modules(model).items() for ab in ("lora_A", "lora_B")}
    report.equal("step 0: gradients of the same tensors", len(theirs), len(ours))
    worst = max(
        np.abs(ours[k.removeprefix("base_model.model.model.").removesuffix(".weight")].numpy() - g).max()
        for k, g in theirs.items()
    )
    report.close("step 0: gradients before clipping", worst, 0.0, 1e-4)


def check_start(report: Report, root: Path) -> None:
    """LoRA's start as peft's: B zero, A inside 1/sqrt(in); the same number of trainable parameters."""
    facts = json.loads((root / "peft_facts.json").read_text())
    model, _ = load_base(str(root / "tiny-llava-hf"))
    report.equal("LoRA: trainable parameters", sum(p.numel() for p in add_lora(model, 8, 16)), facts["trainable"])
    report.equal("LoRA: wrapped linears", len(lora_modules(model)), facts["lora_modules"])
    init = load_file(root / "dpo_run" / "adapter_init" / "adapter_model.safetensors")
    shapes = {k.replace("base_model.model.model.language_model", "language_model"): v.shape for k, v in init.items()}
    ours = {
        f"{n}.{ab}.weight": getattr(m, ab).shape for n, m in lora_modules(model).items() for ab in ("lora_A", "lora_B")
    }
    report.equal("LoRA: names and shapes of an adapter file", ours, shapes)


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--oracles", type=Path, required=True, help="folder with the tiny checkpoints and expected numbers")
    p.add_argument("--tokenizer", type=Path, help="tokenizer.json of the real Llama vocabulary")
    args = p.parse_args(argv)
    root, report = args.oracles, Report()
    facts = json.loads((root / "llava_text.json").read_text())
    expected = np.load(root / "expected_llava.npz")
    with torch.no_grad():
        check_llava(report, root, "tiny-llava-hf", expected, facts["pairs"])
        check_llava(report, root, "tiny-llava-tf5", expected, facts["pairs"])
        check_llava(report, root, "tiny-llava-orig", expected, facts["pairs"], vocab_rows=512)
        check_llava(report, root, "tiny-llava-gqa", np.load(root / "expected_llava_gqa.npz"), facts["pairs"])
        check_text(report, root, facts)
        check_preprocess(report, root)
        check_bunny(report, root, None)
        check_bunny(report, root, root / "tiny-siglip")
        check_crop_draws(report, root)
        check_adapters(report, root)
    check_start(report, root)
    check_losses(report, root)
    check_run(report, root, "mdpo")
    check_run(report, root, "dpo")
    if args.tokenizer:
        check_real_vocabulary(report, args.tokenizer)
    print(f"{report.compared} compared, {report.failed} failed")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
