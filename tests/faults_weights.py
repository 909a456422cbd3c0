"""Faults in checkpoints, tokenizers and adapters; exports of them."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

import generate
from tests.faults_bench import Bench, Ended, Outcome, call, change_json, fault, holds, refused, used, worst

CHECKPOINTS, ADAPTERS = "Checkpoints", "Adapters"


def answer(bench: Bench, *more) -> Ended:
    """generate.py about one picture."""
    image = bench.folder / "pairs" / "0.png"
    flags = ("--base", bench.base, "--image", image, "--prompt", "What?", "--max-new-tokens", 3)
    return call(generate.main, *flags, *more)


def change_tensors(bench: Bench, change) -> None:
    """The base's tensors by name, changed in place."""
    file = bench.base / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


class Bomb:
    """Runs code when it is unpickled: it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


# ---- weights -------------------------------------------------------------------------------------------------------


@fault("81", CHECKPOINTS, "safetensors cut, empty, with a garbage header")
def torn_weights(bench: Bench) -> Outcome:
    file = bench.base / "model.safetensors"
    whole = file.read_bytes()
    outcomes = {}
    for name, data in {"cut": whole[:-1000], "empty": b"", "garbage": b"\xff" * 64 + whole[64:]}.items():
        file.write_bytes(data)
        outcomes[name] = refused(bench.train(), "model.safetensors", "damaged", left=bench.out)
    return worst(outcomes)


@fault("84", CHECKPOINTS, "a shard that is missing, an index that is missing, no weights at all")
def missing_files(bench: Bench) -> Outcome:
    file = bench.base / "model.safetensors"
    names = list(load_file(file))
    file.rename(bench.base / "model-00001-of-00002.safetensors")
    index = bench.base / "model.safetensors.index.json"
    no_index = refused(bench.train(), "index")
    table = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {names[0]: "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": table}))
    no_shard = refused(bench.train(), "model-00002-of-00002.safetensors")
    index.unlink()
    (bench.base / "model-00001-of-00002.safetensors").unlink()
    return worst({"index": no_index, "shard": no_shard, "weights": refused(bench.train(), "no weights")})


@fault("85", CHECKPOINTS, "a tensor too many, one too few, one of another shape")
def other_tensors(bench: Bench) -> Outcome:
    whole = (bench.base / "model.safetensors").read_bytes()
    norm = "language_model.model.norm.weight"
    changes = {
        "extra": lambda tensors: tensors.update({"language_model.model.extra.weight": torch.ones(3)}),
        "missing": lambda tensors: tensors.pop(norm),
        "shape": lambda tensors: tensors.update({norm: torch.ones(7)}),
    }
    outcomes = {}
    for name, change in changes.items():
        (bench.base / "model.safetensors").write_bytes(whole)
        change_tensors(bench, change)
        outcomes[name] = refused(bench.train(), "extra" if name == "extra" else "norm", left=bench.out)
    return worst(outcomes)


@fault("86", CHECKPOINTS, "a tensor of int32; all of float64")
def dtypes(bench: Bench) -> Outcome:
    name = "language_model.model.norm.weight"
    change_tensors(bench, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    ints = refused(bench.train(), "I32", left=bench.out)
    change_tensors(bench, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items()}))
    return worst({"int32": ints, "float64": used(answer(bench))})


@fault("87", CHECKPOINTS, "a weight that is NaN: train, generate, export")
def nan_weight(bench: Bench) -> Outcome:
    def spoil(tensors: dict) -> None:
        tensors["language_model.model.norm.weight"][0] = float("nan")

    change_tensors(bench, spoil)
    runs = {"train": bench.train(), "generate": answer(bench), "export": bench.export()}
    return worst({name: refused(ended, "finite") for name, ended in runs.items()})


@fault("88", CHECKPOINTS, "an infinite row in lm_head, generate and evals.answers")
def infinite_head(bench: Bench) -> Outcome:
    def spoil(tensors: dict) -> None:
        tensors["language_model.lm_head.weight"][70] = float("inf")

    change_tensors(bench, spoil)
    return worst({"generate": refused(answer(bench), "finite"), "answers": refused(bench.ask(), "finite")})


@fault("89", CHECKPOINTS, "index.json that is a list, a number, {}, cut, with a path out of the folder")
def odd_index(bench: Bench) -> Outcome:
    names = list(load_file(bench.base / "model.safetensors"))
    (bench.base / "model.safetensors").rename(bench.folder / "outside.safetensors")
    outside = json.dumps({"weight_map": dict.fromkeys(names, "../outside.safetensors")})
    texts = {"list": "[1]", "number": "3", "{}": "{}", "cut": '{"weight_map": {', "path": outside}
    outcomes = {}
    for name, text in texts.items():
        (bench.base / "model.safetensors.index.json").write_text(text)
        outcomes[name] = refused(bench.train(), "index.json", left=bench.out)
    return worst(outcomes)


@fault("91", CHECKPOINTS, "a pickle that runs code, as base and as adapter")
def pickled_code(bench: Bench) -> Outcome:
    marker = bench.folder / "ran"
    state = load_file(bench.base / "model.safetensors")
    (bench.base / "model.safetensors").unlink()
    outcomes = {}
    for name, old in (("zip", True), ("legacy", False)):
        torch.save(state | {"x": Bomb(marker)}, bench.base / "pytorch_model.bin", _use_new_zipfile_serialization=old)
        outcomes[name] = refused(bench.train(), "pytorch_model.bin", left=bench.out)
    (bench.base / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    outcomes["raw"] = refused(bench.train(), "pytorch_model.bin")
    return Outcome("BUG", "the code was run") if marker.exists() else worst(outcomes)


# ---- config.json ---------------------------------------------------------------------------------------------------

CONFIGS = [
    ("text_config.num_hidden_layers", '"3"'),
    ("text_config.num_hidden_layers", "0"),
    ("text_config.num_hidden_layers", "1000000000"),
    ("text_config.num_hidden_layers", "2.5"),
    ("text_config.num_attention_heads", "0"),
    ("text_config.num_attention_heads", "8"),
    ("text_config.num_attention_heads", "5"),
    ("text_config.num_key_value_heads", "3"),
    ("text_config.hidden_size", "-32"),
    ("text_config.hidden_size", "null"),
    ("text_config.intermediate_size", "[]"),
    ("text_config.vocab_size", "10"),
    ("text_config.vocab_size", "1e30"),
    ("text_config.rms_norm_eps", "1000000000.0"),
    ("text_config.rms_norm_eps", "-1"),
    ("text_config.rms_norm_eps", '"x"'),
    ("text_config.rope_theta", "0"),
    ("text_config.model_type", '"mistral"'),
    ("text_config", "null"),
    ("text_config", "[]"),
    ("vision_config", "3"),
    ("vision_config.patch_size", "0"),
    ("vision_config.patch_size", "13"),
    ("vision_config.image_size", "1000000"),
    ("vision_config.num_hidden_layers", "1"),
    ("vision_config.num_attention_heads", "3"),
    ("vision_feature_layer", "0"),
    ("vision_feature_layer", "-9"),
    ("vision_feature_layer", '"-2"'),
    ("vision_feature_layer", "[-2, -5]"),
    ("vision_feature_select_strategy", '"full"'),
    ("image_token_index", "70"),
    ("image_token_index", "100000"),
    ("image_token_index", '"x"'),
    ("model_type", '"qwen2_vl"'),
    ("model_type", "null"),
    ("pad_token_id", "-5"),
    ("text_config.eos_token_id", "[2, 5]"),
]


@fault("92", CHECKPOINTS, f"config.json: {len(CONFIGS)} absurd values")
def configs(bench: Bench) -> Outcome:
    whole = (bench.base / "config.json").read_text()
    outcomes = {}
    for name, value in CONFIGS:
        (bench.base / "config.json").write_text(whole)
        bench.config(**{name: json.loads(value)})
        outcomes[f"{name} {value}"] = refused(bench.train("--max-steps", 1), left=bench.out)
    return worst(outcomes)


@fault("92b", CHECKPOINTS, "config.json: cut, empty, a list, missing")
def config_files(bench: Bench) -> Outcome:
    outcomes = {}
    for text in ('{"model_type": "lla', "", "[]"):
        (bench.base / "config.json").write_text(text)
        outcomes[repr(text)] = refused(bench.train(), "config.json", left=bench.out)
    (bench.base / "config.json").unlink()
    return worst(outcomes | {"missing": refused(bench.train(), "config.json")})


# ---- tokenizers ----------------------------------------------------------------------------------------------------


@fault("93", CHECKPOINTS, "a tokenizer of another model: two words exchanged with </s>; <image> elsewhere")
def other_tokenizer(bench: Bench) -> Outcome:
    file = bench.base / "tokenizer.json"
    whole = file.read_text()
    data = json.loads(whole)
    vocab = data["model"]["vocab"]
    vocab["</s>"], vocab["<0x41>"] = vocab["<0x41>"], vocab["</s>"]
    next(token for token in data["added_tokens"] if token["content"] == "</s>")["id"] = vocab["</s>"]
    file.write_text(json.dumps(data))
    end = refused(bench.train(), "tokenizer", left=bench.out)
    data = json.loads(whole)
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<image>"]
    file.write_text(json.dumps(data))
    return worst({"</s>": end, "no <image>": refused(bench.train(), "<image>", left=bench.out)})


@fault("94", CHECKPOINTS, "a tokenizer with more ids than the base has rows")
def too_many_ids(bench: Bench) -> Outcome:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bench.base / "tokenizer.json"))
    tokenizer.add_tokens([f"word{i}" for i in range(200)])
    tokenizer.save(str(bench.base / "tokenizer.json"))
    return refused(bench.train(), "tokenizer", left=bench.out)


@fault("95", CHECKPOINTS, "tokenizer.json cut, {}, empty, missing")
def torn_tokenizer(bench: Bench) -> Outcome:
    file = bench.base / "tokenizer.json"
    whole = file.read_text()
    outcomes = {}
    for name, text in {"cut": whole[:500], "{}": "{}", "empty": ""}.items():
        file.write_text(text)
        outcomes[name] = refused(bench.train(), "tokenizer.json", left=bench.out)
    file.unlink()
    return worst(outcomes | {"missing": refused(bench.train(), "tokenizer.json")})


@fault("96", CHECKPOINTS, "tokenizer.model of garbage, empty")
def sentencepiece(bench: Bench) -> Outcome:
    (bench.base / "tokenizer.json").unlink()
    outcomes = {}
    for name, data in {"garbage": b"\x00\xff" * 300, "empty": b""}.items():
        (bench.base / "tokenizer.model").write_bytes(data)
        outcomes[name] = refused(bench.train(), "tokenizer.model", left=bench.out)
    return worst(outcomes)


# ---- adapters ------------------------------------------------------------------------------------------------------


@fault("97", ADAPTERS, "an adapter with the wrong r, cut, without config, a key missing, a key too many, DoRA")
def damaged_adapters(bench: Bench) -> Outcome:
    run = bench.adapter()
    weights, config = run / "adapter_model.safetensors", run / "adapter_config.json"
    whole, tensors, text = weights.read_bytes(), load_file(weights), config.read_text()
    first = next(iter(tensors))
    changes = {
        "r": lambda: change_json(config, {"r": 7}),
        "cut": lambda: weights.write_bytes(whole[:-500]),
        "empty": lambda: weights.write_bytes(b""),
        "no config": lambda: config.unlink(),
        "key missing": lambda: save_file({n: t for n, t in tensors.items() if n != first}, weights),
        "key too many": lambda: save_file(tensors | {f"{first}.x": torch.ones(1)}, weights),
        "DoRA": lambda: change_json(config, {"use_dora": True}),
        "no LoRA": lambda: change_json(config, {"peft_type": "IA3"}),
        "no weights": lambda: weights.unlink(),
    }
    outcomes = {}
    for name, change in changes.items():
        weights.write_bytes(whole)
        config.write_text(text)
        change()
        outcomes[name] = refused(answer(bench, "--adapter", run))
    return worst(outcomes)


@fault("98", ADAPTERS, "adapter_config.json: r 0, -1, text, 1e12, null; alpha null, text; cut, a list")
def adapter_configs(bench: Bench) -> Outcome:
    run = bench.adapter()
    config = run / "adapter_config.json"
    text = config.read_text()
    outcomes = {}
    values = [("r", value) for value in (0, -1, "64", 10**12, None)]
    for name, value in [*values, ("lora_alpha", None), ("lora_alpha", "x"), ("lora_alpha", [1]), ("peft_type", None)]:
        config.write_text(text)
        change_json(config, {name: value})
        outcomes[f"{name} {value}"] = refused(answer(bench, "--adapter", run), "adapter_config.json")
    for odd in ("{", "[]", ""):
        config.write_text(odd)
        outcomes[repr(odd)] = refused(answer(bench, "--adapter", run), "adapter_config.json")
    return worst(outcomes)


@fault("99", ADAPTERS, "an adapter that names another base, though its shapes fit")
def other_base(bench: Bench) -> Outcome:
    run = bench.adapter()
    change_json(run / "adapter_config.json", {"base_model_name_or_path": "other/model-7b"})
    return used(answer(bench, "--adapter", run), "other/model-7b")


@fault("101", ADAPTERS, "an adapter with NaN: generate, export")
def nan_adapter(bench: Bench) -> Outcome:
    run = bench.adapter()
    file = run / "adapter_model.safetensors"
    save_file({name: tensor.fill_(float("nan")) for name, tensor in load_file(file).items()}, file)
    outcomes = {"generate": answer(bench, "--adapter", run), "export": bench.export("--adapter", run)}
    return worst({name: refused(ended, "finite") for name, ended in outcomes.items()})


@fault("102", ADAPTERS, "an adapter in .bin: generate, evals.answers, export")
def bin_adapter(bench: Bench) -> Outcome:
    run = bench.adapter()
    torch.save(load_file(run / "adapter_model.safetensors"), run / "adapter_model.bin")
    (run / "adapter_model.safetensors").unlink()
    ends = {"generate": answer(bench, "--adapter", run), "answers": bench.ask("--adapter", run)}
    ends["export"] = bench.export("--adapter", run)
    return worst({name: used(ended) for name, ended in ends.items()})


@fault("91b", ADAPTERS, "an adapter in .bin that runs code")
def adapter_code(bench: Bench) -> Outcome:
    run, marker = bench.adapter(), bench.folder / "ran"
    torch.save(load_file(run / "adapter_model.safetensors") | {"x": Bomb(marker)}, run / "adapter_model.bin")
    (run / "adapter_model.safetensors").unlink()
    outcome = refused(answer(bench, "--adapter", run), "adapter_model.bin")
    return Outcome("BUG", "the code was run") if marker.exists() else outcome


@fault("0.12", ADAPTERS, "the adapter of a run, of an epoch, and a folder that is none")
def folders(bench: Bench) -> Outcome:
    run = bench.out
    bench.train("--max-steps", 3)
    epoch = used(answer(bench, "--adapter", run / "epoch-1"))
    return worst(
        {
            "run": used(answer(bench, "--adapter", run)),
            "epoch": epoch,
            "base": refused(answer(bench, "--adapter", bench.base), "adapter_config.json"),
        }
    )


# ---- exports -------------------------------------------------------------------------------------------------------


@fault("A3b", ADAPTERS, "an export answers as base + adapter does; export of the export's own folder")
def exported(bench: Bench) -> Outcome:
    run = bench.adapter()
    ended = used(bench.export("--adapter", run, "--dtype", "float32"))
    if ended.verdict != "OK":
        return ended
    expected = answer(bench, "--adapter", run).text
    bench.base = bench.folder / "merged"
    found = answer(bench).text
    return holds(found == expected, "the same answer", f"{found!r}, not {expected!r}")


@fault("90", CHECKPOINTS, "--weights of another base than --base; a folder that is none")
def other_weights(bench: Bench) -> Outcome:
    shutil.rmtree(bench.base)
    return refused(bench.train(), "base", left=bench.out)
