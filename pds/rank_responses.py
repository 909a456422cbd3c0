"""How good each answer is: r_i = R_T(q, y_i) (PDS-DPO 3.3, equation 9).

    python -m pds.rank_responses answers.jsonl --out ranked.jsonl
    python -m pds.rank_responses answers.jsonl --out ranked.jsonl --classifier Skywork/Skywork-Reward-V2-Llama-3.1-8B

IN has a row per answer: {id, prompt, responder, answer, ...} or {id, prompt, responder, error}. OUT has these rows with
`score` and `rewards`, 19 by name for ArmoRM. What is judged is what would be exported: the question without
`<image>`, the answer without the question repeated before it; OUT's `answer` is that.

Deviations from the paper and its release
1. The release judges question and answer together, with a literal `<image>` in the question.
2. The judge is a model of text, here as there: it never sees the picture. docs/pds.md says what follows from that.
3. Any sequence classifier of transformers with one output can take ArmoRM's place.
"""

import argparse
import math
from pathlib import Path

import torch

from pds import armorm, candidates, library, origin, runner
from pds.runner import Row

NEEDED = {"prompt": str, "responder": str, "answer": str}
TOKEN_BYTES = 300_000  # of the activations of an 8B Llama, which are not kept


# ---- any sequence classifier ---------------------------------------------------------------------------------------


class Classifier:
    """A transformers model with one output: score(questions, answers) -> (score, no rewards by name) each."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.max_length = min(tokenizer.model_max_length, model.config.get_text_config().max_position_embeddings)
        self.pads = tokenizer.pad_token is not None and model.config.get_text_config().pad_token_id is not None

    def ids(self, question: str, answer: str) -> list[int]:
        """By the chat template, or, where there is none, as BERT's pair of texts."""
        question, answer = question.strip(), answer.strip()
        if not self.tokenizer.chat_template:
            return self.tokenizer(question, answer)["input_ids"]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return list(self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])

    def length(self, question: str, answer: str) -> int:
        return len(self.ids(question, answer))

    @torch.no_grad()
    def score(self, questions: list[str], answers: list[str]) -> list[tuple[float, dict[str, float]]]:
        rows = [self.ids(question, answer) for question, answer in zip(questions, answers, strict=True)]
        # the library reads the score at the last token that is not padding: without such a token, one at a time
        groups = [rows] if self.pads else [[row] for row in rows]
        scores = []
        for group in groups:
            padded = {"input_ids": group[:1], "attention_mask": [[1] * len(group[0])]}
            if self.pads:
                padded = self.tokenizer.pad({"input_ids": group}, padding_side="right")
            batch = {name: torch.tensor(padded[name]).to(self.model.device) for name in ("input_ids", "attention_mask")}
            scores += self.model(**batch).logits[:, 0].float().tolist()  # (B, 1) -> (B,)
        return [(score, {}) for score in scores]


def load_classifier(folder: Path, dtype: torch.dtype, device: str) -> Classifier:
    """A folder -> the classifier. SystemExit if it cannot be trusted to be a reward model."""
    model = library.load("sequence classifier", folder, dtype, device)
    if model.config.num_labels != 1:
        raise SystemExit(f"{folder}: {model.config.num_labels} outputs; a reward model has one")
    return Classifier(model, library.read_beside(runner.optional("transformers").AutoTokenizer, folder))


# ---- the stage -----------------------------------------------------------------------------------------------------


def as_exported(row: Row) -> Row:
    """A row whose answer is what would be exported."""
    if "error" in row:
        return row
    return row | {"answer": candidates.without_echo(row["prompt"], row["answer"])}


def judged(judge, rows: list[Row]) -> list[Row]:
    """Rows with `score` and `rewards`, or with `error` where the model cannot read or score them."""
    results, fitting = [], []
    for row in rows:
        length = judge.length(candidates.bare(row["prompt"]), row["answer"])
        if length <= judge.max_length:
            fitting.append(len(results))
        results.append(runner.failed(row, f"{length} tokens, the judge reads {judge.max_length}"))
    if not fitting:
        return results
    questions = [candidates.bare(rows[i]["prompt"]) for i in fitting]
    answers = [rows[i]["answer"] for i in fitting]
    for i, (score, rewards) in zip(fitting, judge.score(questions, answers), strict=True):
        if math.isfinite(score):
            results[i] = rows[i] | {"score": score, "rewards": rewards}
        else:
            results[i] = runner.failed(rows[i], "the score is not a finite number")
    return results


def parse_args(argv=None) -> argparse.Namespace:
    p = runner.stage_parser(__doc__, "answers.jsonl: {id, prompt, responder, answer}")
    either = p.add_mutually_exclusive_group()
    either.add_argument("--armorm", type=Path, metavar="FOLDER", help=f"default: {armorm.REPOSITORY} from the hub")
    either.add_argument("--classifier", metavar="NAME", help="another judge: folder or hub name, needs transformers")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the body: default bfloat16 on CUDA, else float32"
    )
    args = p.parse_args(argv)
    runner.check_flags(p, args)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    inputs = [as_exported(row) for row in runner.read_inputs(args.input, NEEDED)]
    folder = library.find(args.classifier, "--classifier") if args.classifier else armorm.find_folder(args.armorm)
    name = args.classifier or str(args.armorm or armorm.REPOSITORY)
    settings = {
        "stage": "rank_responses",
        "in": runner.beside(args.input, args.out),
        "judge": origin.describe_model(name, folder, library.deciding(folder)),
        "dtype": args.dtype,
        "torch": torch.__version__,
    }

    def load() -> runner.Work:
        dtype = getattr(torch, args.dtype)
        if args.classifier:
            judge = load_classifier(folder, dtype, args.device)
        else:
            judge = armorm.load(folder, dtype, args.device)
        longest = max(len(row["prompt"]) + len(row["answer"]) for row in inputs if "error" not in row)
        return runner.Work(lambda rows: judged(judge, rows), TOKEN_BYTES * longest // 3)  # ~3 letters a token

    # equal lengths together, so that little is padding; longest first, so that what does not fit shows at once
    result = runner.run(
        args, inputs, settings, {"score", "rewards", "error"}, load, order=lambda row: -len(row["answer"])
    )
    runner.report(args, result)


if __name__ == "__main__":
    main()
