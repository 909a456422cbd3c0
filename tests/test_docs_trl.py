"""docs/trl.md: its code is run inside the installed TRL, on a tiny LLaVA of transformers."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_house import ROOT

PAGE = (ROOT / "docs" / "trl.md").read_text()
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %} ASSISTANT:"
    "{% else %} {% for c in m.content %}{{ c.text }}{% endfor %}</s>{% endif %}{% endfor %}"
)


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_forty_lines_and_a_call():
    code, call = blocks()
    written = [line for line in code.splitlines() if line.strip()]
    assert len(written) <= 40
    compile(code + call, "docs/trl.md", "exec")


@pytest.fixture
def names(tiny_base, pairs_file, monkeypatch, tmp_path):
    """The page's names after its first block, and the model, processor and dataset that its second block asks for."""
    pytest.importorskip("trl", reason="needs trl (extra bench)")
    datasets = pytest.importorskip("datasets", reason="needs datasets (extra bench)")
    import transformers

    monkeypatch.chdir(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_base / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    rows = []
    for row in json.loads(pairs_file.read_text()):
        rows.append(
            {
                "images": [Image.open(pairs_file.parent / row["image"])],
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
        )
    found = {
        "model": transformers.LlavaForConditionalGeneration.from_pretrained(tiny_base, dtype=torch.float32),
        "processor": processor,
        "dataset": datasets.Dataset.from_list(rows),
    }
    exec(compile(blocks()[0], "docs/trl.md", "exec"), found)
    return found


@pytest.mark.slow
def test_it_trains_inside_trl(names):
    call = blocks()[1].replace(
        "gradient_accumulation_steps=32", "gradient_accumulation_steps=5, use_cpu=True, bf16=False"
    )
    exec(compile(call.replace("learning_rate=1e-5", "learning_rate=1e-2"), "docs/trl.md", "exec"), names)
    log = [row for row in names["trainer"].state.log_history if "losses/copo" in row]
    assert len(log) == 3  # 5 rows, 5 accumulated: a step an epoch
    assert log[0]["loss"] == pytest.approx(2.0794, abs=1e-3)  # 3 ln 2
    assert log[0]["losses/copo"] == pytest.approx(0.6931, abs=1e-3)  # ln 2
    assert log[2]["loss"] < 2.0


@pytest.mark.slow
def test_the_log_probs_are_those_of_single_rows(names):
    """Of a padded batch of two: each triple scored alone, without padding, by a log-softmax written out here."""
    names["MDPOCollator"].rng = np.random.default_rng(3)
    batch = names["MDPOCollator"](names["processor"])([names["dataset"][i] for i in (0, 2)])
    assert batch["image_rejected"].shape == (2, 3, 28, 28)
    model = names["model"].eval()
    with torch.no_grad():
        found = names["MDPOTrainer"].logps(None, model, batch)

    def alone(row: int, pixels: torch.Tensor) -> float:
        kept = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][kept]
        answer = batch["completion_mask"][row][kept].bool().nonzero()[:, 0]
        with torch.no_grad():
            logits = model(input_ids=ids[None], pixel_values=pixels[None]).logits[0]
        return sum(float(logits[t - 1].log_softmax(-1)[ids[t]]) for t in answer)

    for i in range(2):
        m_w, m_l = batch["pixel_values"][i], batch["image_rejected"][i]
        assert found.chosen[i].item() == pytest.approx(alone(i, m_w), abs=1e-3)
        assert found.rejected[i].item() == pytest.approx(alone(2 + i, m_w), abs=1e-3)
        assert found.image_rejected[i].item() == pytest.approx(alone(i, m_l), abs=1e-3)
        assert abs(found.image_rejected[i].item() - found.chosen[i].item()) > 1e-2
