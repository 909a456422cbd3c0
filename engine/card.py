"""The model card of a run: README.md with the hub's metadata.

All it takes then is `hf upload NAME RUN --exclude "checkpoint-*/*"`.
"""

CARD = """---
base_model: {base}
library_name: peft
tags: [{tags}]
---

# {recipe} on {base}

A LoRA adapter for {base}, trained by preference optimisation: {terms}.

| setting | value |
|---|---|
{settings}

| step | loss | reward margin | chosen reward | accuracy |
|---|---|---|---|---|
{steps}

{pairs} pairs (sha256 of texts and picture names `{data}`). Made with {made}.
"""
SHOWN = "lr epochs batch warmup beta delta anchors rejected_image lora_r lora_alpha quant seed".split()
NAMES = {"dpo": "L_DPO", "copo": "L_CoPO (mDPO)", "ancpo": "L_AncPO (mDPO)"}


def model_card(base: str, settings: dict, rows: list[dict]) -> str:
    """`rows` of log.jsonl: the first, the middle and the last are shown."""
    steps = []
    for row in (rows[0], rows[len(rows) // 2], rows[-1]) if rows else ():
        margin, chosen = row["rewards/margins"], row["rewards/chosen"]
        accuracy = row["rewards/accuracies"]
        steps.append(f"| {row['step']} | {row['loss']:.4f} | {margin:.4f} | {chosen:.4f} | {accuracy:.2f} |")
    made = settings["made"]
    return CARD.format(
        base=base,
        tags=", ".join(["lora", "preference-optimization", "vision-language", settings["recipe"]]),
        recipe=settings["recipe"],
        terms=" + ".join(NAMES[name] for name in settings["terms"]),
        settings="\n".join(f"| {name} | {settings[name]} |" for name in SHOWN),
        steps="\n".join(steps),
        pairs=settings["pairs"],
        data=settings["data_sha256"][:16],
        made=f"torch {made['packages']['torch']} on {made['device']}, commit {made['commit'] or 'not known'}",
    )
