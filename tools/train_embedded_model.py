"""Trains the embedded model from this Python's standard library.

    python tools/train_embedded_model.py prepare                  # corpus, tokenizer, n-gram figures
    python tools/train_embedded_model.py train --device cuda      # weights; without a GPU: --minutes 5 --batch 2
    python tools/train_embedded_model.py evaluate                 # held-out bits per byte
    python tools/train_embedded_model.py card                     # samples, model card, result file

Each stage reads what the one before it left in the build folder. `prepare` needs `tokenizers`, `train` only
torch, numpy and safetensors, the last two stages `transformers`. Same seed, same Python, same versions and
same device give the same corpus and schedule; kernels that add in no fixed order may move the last digits.
"""

import argparse
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_BUILD = REPOSITORY / ".embedded_build"
SHIPPED = REPOSITORY / "local/penstock/local/embedded"
RESULTS = REPOSITORY / "bench/results/embedded_model.json"


def main() -> None:
    """Runs one stage."""
    arguments = _parser().parse_args()
    stages = {"prepare": _prepare, "train": _train, "evaluate": _evaluate, "card": _card}
    stages[arguments.stage](arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "train", "evaluate", "card"))
    parser.add_argument("--build", type=Path, default=DEFAULT_BUILD, help="build folder")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="model folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="result file")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--seed", type=int, default=1991)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=7200)
    parser.add_argument("--minutes", type=float, default=60.0, help="training ends here if steps remain")
    parser.add_argument("--batch", type=int, default=64, help="sequences per step")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    return parser


def _prepare(arguments: argparse.Namespace) -> None:
    from embedded_model import prepare
    from embedded_model.llama import LlamaShape

    shape = LlamaShape()
    prepare.prepare(
        arguments.stdlib,
        arguments.build,
        vocab_size=shape.vocab_size,
        context=shape.max_position_embeddings,
        seed=arguments.seed,
    )
    prepare.measure_ngrams(arguments.stdlib, arguments.build)


def _train(arguments: argparse.Namespace) -> None:
    from embedded_model.llama import LlamaShape
    from embedded_model.train import Recipe, train

    recipe = Recipe(
        seed=arguments.seed,
        steps=arguments.steps,
        minutes=arguments.minutes,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        dropout=arguments.dropout,
        optimizer=arguments.optimizer,
        device=arguments.device,
        compiled=arguments.compile,
    )
    train(LlamaShape(), recipe, arguments.build, arguments.model)


def _evaluate(arguments: argparse.Namespace) -> None:
    from embedded_model.evaluate import evaluate

    evaluate(arguments.build, arguments.model, arguments.device)


def _card(arguments: argparse.Namespace) -> None:
    from embedded_model.card import write_card

    write_card(arguments.build, arguments.model, arguments.results)


if __name__ == "__main__":
    main()
