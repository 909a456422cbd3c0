"""ArmoRM: how good an answer is, on 19 scales, and how much each of them counts (PDS-DPO 3.3, R_T; Wang et al. 2024).

    <|begin_of_text|> user header, question <|eot_id|> assistant header, answer <|eot_id|>
                                               |                                     |
                                 h[gate] (C,) -> MLP -> g (19,)          h[last] (C,) -> r (19,)

    score = g . (r M)

g, which scales count, depends on the question alone; r are the rewards of the answer. M takes the share that verbosity
explains out of the other scales. The body is our own `model.Decoder`; the hub's remote code is not run (it does not
import beside current libraries).

Deviations from the released code
1. Batches, padded on the right: under a causal mask no real token sees the padding, so scores are the same.
2. The body may be bfloat16, the heads are always float32: near 0.15, where scores lie, bfloat16 makes many equal.
3. What looks like a special token in a question or an answer is read as text: an answer cannot move the gate.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from bases import tensors
from bases.configs import Fields, read_rope, rope_fields
from external import files, hub
from model import Config, Decoder, causal
from pds import runner

REPOSITORY = "RLHFlow/ArmoRM-Llama3-8B-v0.1"
ARCHITECTURE = "LlamaForRewardModelWithGating"
OBJECTIVES = (
    "helpsteer-helpfulness",
    "helpsteer-correctness",
    "helpsteer-coherence",
    "helpsteer-complexity",
    "helpsteer-verbosity",
    "ultrafeedback-overall_score",
    "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness",
    "ultrafeedback-honesty",
    "ultrafeedback-helpfulness",
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    "code-complexity",
    "code-style",
    "code-explanation",
    "code-instruction-following",
    "code-readability",
)


class Judgement(NamedTuple):
    score: float
    rewards: list[float]  # 19, in the order of OBJECTIVES
    gating: list[float]  # 19


# ---- the model -----------------------------------------------------------------------------------------------------


class Gating(nn.Module):
    """h[gate] (B, C) -> weights of the 19 scales (B, 19): a softmax, times a learned scale."""

    def __init__(self, width: int, hidden: int, n_hidden: int, temperature: float):
        super().__init__()
        widths = [width] + [hidden] * n_hidden
        layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        self.layers = nn.ModuleList([*layers, nn.Linear(hidden, len(OBJECTIVES))])
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return (self.layers[-1](x) / self.temperature).softmax(-1) * self.logit_scale


class ArmoRM(nn.Module):
    """Token ids -> rewards and gating (B, 19) each. Attributes are the checkpoint's names."""

    def __init__(self, body: Config, hidden: int, n_hidden: int, temperature: float):
        super().__init__()
        self.model = Decoder(body)
        self.regression_layer = nn.Linear(body.width, len(OBJECTIVES), bias=False)
        self.gating = Gating(body.width, hidden, n_hidden, temperature)
        self.reward_transform_matrix = nn.Parameter(torch.eye(len(OBJECTIVES)))

    def forward(self, ids: Tensor, gates: Tensor, lasts: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, T), right-padded; gates and lasts (B,) positions -> rewards (B, 19), gating (B, 19), float32."""
        positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        hidden = self.model(self.model.embed_tokens(ids), positions, causal)  # (B, T, C)
        rows = torch.arange(len(ids), device=ids.device)
        at_last = hidden[rows, lasts].float()  # (B, T, C) -> (B, C)
        at_gate = hidden[rows, gates].float()
        return self.regression_layer(at_last), self.gating(at_gate)

    def score(self, rewards: Tensor, gating: Tensor) -> Tensor:
        """sum_k g_k (r M)_k: (B, 19) twice -> (B,). Rows of M are rewards that go in, columns those that come out."""
        return (gating * (rewards @ self.reward_transform_matrix)).sum(-1)


# ---- text ----------------------------------------------------------------------------------------------------------


class Chat:
    """Llama 3's template, one question and one answer -> ids, and where the gate is."""

    def __init__(self, tokenizer: Tokenizer, source: Path):
        self.tokenizer = tokenizer
        special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        ids = [tokenizer.token_to_id(token) for token in special]
        if None in ids:
            raise SystemExit(f"{source}: no {special[ids.index(None)]}; this is not Llama 3's tokenizer")
        self.bos, self.start, self.end, self.eot = ids
        self.gate_pattern = [self.eot, *self.header("assistant"), *self.encode("\n\n")]

    def encode(self, text: str) -> list[int]:
        self.tokenizer.encode_special_tokens = True  # "<|eot_id|>" in a text is text
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def header(self, role: str) -> list[int]:
        return [self.start, *self.encode(role), self.end]

    def ids(self, question: str, answer: str) -> list[int]:
        """Contents are stripped: one that began with a newline would merge with the header's, and hide the gate."""
        ids = [self.bos]
        for role, content in (("user", question), ("assistant", answer)):
            ids += [*self.header(role), *self.encode("\n\n" + content.strip()), self.eot]
        return ids

    def gate(self, ids: list[int]) -> int:
        """Where the assistant's header last follows an end of turn: the token that closes the question."""
        width = len(self.gate_pattern)
        for start in range(len(ids) - width, -1, -1):
            if ids[start : start + width] == self.gate_pattern:
                return start
        raise ValueError("no assistant turn in these ids")


class Judge:
    """score(questions, answers) -> Judgement each."""

    def __init__(self, model: ArmoRM, chat: Chat, max_length: int):
        self.model = model
        self.chat = chat
        self.max_length = max_length

    def length(self, question: str, answer: str) -> int:
        return len(self.chat.ids(question, answer))

    @torch.no_grad()
    def score_ids(self, rows: list[list[int]]) -> list[Judgement]:
        """Rows of ids, of any lengths -> their judgements."""
        device = self.model.regression_layer.weight.device
        gates = [self.chat.gate(ids) for ids in rows]
        gates = torch.tensor(gates, device=device)  # (B,)
        lasts = torch.tensor([len(ids) - 1 for ids in rows], device=device)  # (B,)
        tensors = [torch.tensor(ids) for ids in rows]
        padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)  # (B, T); the padding is never read
        rewards, gating = self.model(padded, gates, lasts)
        scores = self.model.score(rewards, gating)
        judged = zip(scores.tolist(), rewards.tolist(), gating.tolist(), strict=True)
        return [Judgement(score, own_rewards, own_gating) for score, own_rewards, own_gating in judged]

    def score(self, questions: list[str], answers: list[str]) -> list[tuple[float, dict[str, float]]]:
        """The score of each answer, and its rewards by name."""
        ids = [self.chat.ids(question, answer) for question, answer in zip(questions, answers, strict=True)]
        return [(judged.score, dict(zip(OBJECTIVES, judged.rewards, strict=True))) for judged in self.score_ids(ids)]


# ---- files ---------------------------------------------------------------------------------------------------------


def find_folder(folder: Path | None) -> Path:
    if folder is None:
        return hub.download(
            REPOSITORY, ("*.json", "*.safetensors"), "model", f"{REPOSITORY} (15 GB)", "--armorm FOLDER"
        )
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{folder}: no config.json; --armorm takes a folder as the hub has it")
    return folder


class Sizes(NamedTuple):
    """What config.json says: the body, and of the gating."""

    body: Config
    hidden: int
    n_hidden: int
    temperature: float
    max_length: int


def read_config(folder: Path) -> Sizes:
    """config.json -> sizes. SystemExit if it is not an ArmoRM over a plain Llama."""
    file = folder / "config.json"
    c = Fields(files.read_json(file, dict), str(file))
    rope = rope_fields(c)
    wrong = {
        f"architectures {c.get('architectures')}": c.get("architectures") != [ARCHITECTURE],
        f"num_objectives {c.get('num_objectives')}": c.get("num_objectives") != len(OBJECTIVES),
        "rope scaling": rope.get("rope_type", "default") != "default",
        "attention_bias": c.get("attention_bias", False),
        f"hidden_act {c.get('hidden_act')}": c.get("hidden_act", "silu") != "silu",
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise SystemExit(f"{file}: not an ArmoRM ({', '.join(found)}). Another reward model goes with --classifier.")
    body = Config(
        vocab=c.whole("vocab_size", 0),  # 0: there is no default, it must stand there
        width=c.whole("hidden_size", 0),
        layers=c.whole("num_hidden_layers", 0, most=512),
        heads=c.whole("num_attention_heads", 0),
        kv_heads=c.whole("num_key_value_heads", 0),
        ffn=c.whole("intermediate_size", 0),
        eps=c.number("rms_norm_eps", 0, most=0.1),
        rope_theta=read_rope(c, "rope_theta", 0, most=1e9),
    )
    return Sizes(
        body=body,
        hidden=c.whole("gating_hidden_dim", 0),
        n_hidden=c.whole("gating_n_hidden", 0, most=512),
        temperature=c.number("gating_temperature", 0, most=1e6),
        max_length=c.whole("max_position_embeddings", 8192),
    )


def find_tensors(folder: Path) -> dict[str, tensors.Stored]:
    """name -> where it is."""
    weights_files, _ = tensors.shard_files(folder)
    found = {}
    for file in weights_files:
        for stored in tensors.read_stored(file):
            found[stored.name] = stored
    return found


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Judge:
    """A folder in the hub's layout -> the judge. SystemExit names what is missing or of another shape."""
    sizes = read_config(folder)
    stored = find_tensors(folder)
    with torch.device("meta"):
        model = ArmoRM(sizes.body, sizes.hidden, sizes.n_hidden, sizes.temperature)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    runner.refuse_misfits(folder, wanted, {name: tensor.shape for name, tensor in stored.items()})
    for name in wanted:
        own_dtype = dtype if name.startswith("model.") else torch.float32  # the heads
        parent, _, leaf = name.rpartition(".")
        tensor = tensors.read_tensor(stored[name], own_dtype, device)
        tensors.check_finite(tensor, f"{folder}: {name}")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise SystemExit(f"{file}: not there")
    return Judge(model.eval(), Chat(Tokenizer.from_file(str(file)), file), sizes.max_length)
