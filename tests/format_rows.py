"""Rows and files that the tests of formats/ share."""

import io
import json

import pytest
from PIL import Image

Q, Y_W, Y_L = "What is this?", "A red bus.", "A dog."
TEMPLATED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nWhat is this? ASSISTANT:"
)


def png() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((24, 24), 50).convert("RGB").save(out, "PNG")
    return out.getvalue()


PNG = png()


def rating(*values):
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    return {aspect: {"Rating": value, "Rationale": ""} for aspect, value in zip(aspects, values, strict=True)}


def write(folder, rows, name="data.json"):
    file = folder / name
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)) + "\n")
    return file
