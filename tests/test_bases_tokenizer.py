"""bases/tokenizer.py: a tokenizer that is not the base's is refused with the reason."""

import json
import shutil

import pytest

from bases.architectures import read_config
from bases.tokenizer import context_of, load_processor


@pytest.fixture
def base(tiny_base, tmp_path):
    """Ids: 0 <unk>, 1 <s>, 2 </s>, 3 to 258 bytes, then pieces, <image> and <pad> last; 384 rows."""
    return shutil.copytree(tiny_base, tmp_path / "base")


def edit(base, change) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    change(tokenizer)
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))


def swap(a: str, b: str):
    def change(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        vocab[a], vocab[b] = vocab[b], vocab[a]
        for token in tokenizer["added_tokens"]:
            token["id"] = vocab.get(token["content"], token["id"])

    return change


def add(piece: str, token: int):
    return lambda tokenizer: tokenizer["model"]["vocab"].update({piece: token})


def move_image(tokenizer) -> None:
    """<image> and <pad> change places."""
    for token in tokenizer["added_tokens"]:
        if token["content"] in ("<image>", "<pad>"):
            token["content"] = "<pad>" if token["content"] == "<image>" else "<image>"


def forget_image(tokenizer) -> None:
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] not in ("<image>", "<pad>")]
    config_id = max(tokenizer["model"]["vocab"].values()) + 1
    tokenizer["model"]["vocab"]["picture"] = config_id


def test_the_bases_own(base):
    config = read_config(base)
    processor = load_processor(base, config)
    assert processor.prompt_ids("Why?").count(config.image_id) == 4


@pytest.mark.parametrize(
    "change, reason",
    [
        (add("strange", 384), "it has ids up to 384, the base has 384 rows"),
        (swap("</s>", "<0x41>"), r"id 2, which ends an answer, is '<0x41>' and no special token"),
        (swap("<s>", "<0x41>"), r"id 1, which begins a text, is '<0x41>' and no special token"),
        (swap("<0x41>", "<0x42>"), r"<0x41> is 69, and <0x00> is 3"),  # 3 + 66, where 3 + 65 belongs
        (move_image, r"<image> is \d+ in the tokenizer and \d+ in config.json"),
        (forget_image, r"<image> is None in the tokenizer and \d+ in config.json"),
    ],
)
def test_another_bases(base, change, reason):
    edit(base, change)
    with pytest.raises(SystemExit, match=f"base: the tokenizer is not this base's: {reason}"):
        load_processor(base, read_config(base))


def test_a_published_vocabulary_permuted(base):
    """32,064 rows are Llama's: id 278 must be "▁the". Here it is another piece."""
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["vocab_size"] = 32064
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="id 278 is 'i', not '▁the'"):
        load_processor(base, read_config(base))


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"version": "1.0", "model": {"type"', "tokenizer.json: broken JSON"),
        ("{}", "tokenizer.json: holds no vocabulary"),
        ('{"model": []}', "tokenizer.json: holds no vocabulary"),
        ('{"model": {"vocab": 3}}', "tokenizer.json: holds no vocabulary"),
        ("[]", "tokenizer.json: holds a list"),
    ],
)
def test_a_file_that_is_no_tokenizer(base, text, message):
    (base / "tokenizer.json").write_text(text)
    with pytest.raises(SystemExit, match=message):
        load_processor(base, read_config(base))


@pytest.mark.parametrize(
    "config, tokens",
    [
        ({}, 4096),
        ({"max_position_embeddings": 2048}, 2048),  # Bunny's, and the original LLaVA's
        ({"text_config": {"max_position_embeddings": 300}, "max_position_embeddings": 7}, 300),  # the hub's layout
    ],
)
def test_how_much_a_base_was_taught_to_read(tmp_path, config, tokens):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_of(tmp_path) == tokens


def test_truncation_and_padding_that_a_trainer_left_in_the_file_do_nothing(base):
    """Both cut or filled every text, unseen: with 20 tokens at most even the system text was not whole."""
    question = "What is in the picture? " * 9
    whole = load_processor(base, read_config(base)).prompt_ids(question)
    truncation = {"direction": "Right", "max_length": 20, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    edit(base, lambda tokenizer: tokenizer.update(truncation=truncation, padding=padding))
    assert load_processor(base, read_config(base)).prompt_ids(question) == whole


def test_dropout_in_the_tokenizer(base):
    edit(base, lambda tokenizer: tokenizer["model"].update(dropout=0.1))
    with pytest.raises(SystemExit, match="tokenizer.json: BPE dropout 0.1"):
        load_processor(base, read_config(base))
