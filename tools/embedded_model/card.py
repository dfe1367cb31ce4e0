"""The model card and the result file, both from the records that the other stages left."""

import hashlib
import platform
from pathlib import Path
from typing import Any

from safetensors import safe_open

from embedded_model.records import read_record, write_record
from embedded_model.samples import MAX_TOKENS, SEED, TOP_P, Sample, draw_samples

Facts = dict[str, Any]

TEMPLATE = Path(__file__).with_name("card.md")


def write_card(build: Path, model_folder: Path, results: Path) -> None:
    """Draws samples, writes the result file, and from it `README.md` into the model folder."""
    facts: Facts = {
        "machine": f"{platform.machine()}, Python {platform.python_version()} (corpus, n-grams, samples)",
        "corpus": read_record(build / "corpus.json"),
        "model": _describe(model_folder),
        "training": read_record(build / "training.json"),
        "evaluation": read_record(build / "evaluation.json"),
        "ngrams_bits_per_byte": read_record(build / "ngrams.json"),
        "samples": draw_samples(model_folder),
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    write_record(results, facts)
    text = TEMPLATE.read_text(encoding="utf-8").format(**_fields(facts))
    samples = "".join(_sample(sample) for sample in facts["samples"])
    (model_folder / "README.md").write_text(text + samples, encoding="utf-8")


def _describe(model_folder: Path) -> Facts:
    file = model_folder / "model.safetensors"
    with safe_open(file, "pt") as tensors:
        parameters = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    return {
        "parameters": parameters,
        "size_bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "config": read_record(model_folder / "config.json"),
    }


def _fields(facts: Facts) -> Facts:
    """What the card's text names, under its names."""
    model, training = facts["model"], facts["training"]
    return {
        **model["config"],
        **facts["ngrams_bits_per_byte"],
        **training,
        **training["recipe"],
        **_corpus_fields(facts["corpus"]),
        **_evaluation_fields(facts["evaluation"]),
        "minutes": training["minutes"],
        "steps": training["steps"],
        "parameters": model["parameters"],
        "parameters_millions": f"{model['parameters'] / 1e6:.1f}",
        "size_bytes": model["size_bytes"],
        "tokens_millions": training["tokens"] / 1e6,
        "context": model["config"]["max_position_embeddings"],
        "torch": training["versions"]["torch"],
        "warmup_percent": 100 * training["recipe"]["warmup"],
        "validation": training["validation_nats_per_token"],
        "mixture": ", ".join(f"{name} {share:.0%}" for name, share in training["recipe"]["mixture"].items()),
        "max_tokens": MAX_TOKENS,
        "sample_seed": SEED,
        "top_p": TOP_P,
    }


def _corpus_fields(corpus: Facts) -> Facts:
    sizes = {f"{split}_mb": size / 1e6 for split, size in corpus["bytes"].items()}
    return {
        **sizes,
        **{f"{split}_files": count for split, count in corpus["files"].items()},
        "files": f"{sum(corpus['files'].values()):,}",
        "megabytes": sum(sizes.values()),
        "python": corpus["python"],
        "corpus_sha256": corpus["sha256"],
        "held_out_bytes": corpus["bytes"]["held_out"],
    }


def _evaluation_fields(evaluation: Facts) -> Facts:
    return {
        "model_bits": evaluation["bits_per_byte"],
        "transformers": evaluation["versions"]["transformers"],
        "evaluation_hardware": evaluation["hardware"],
        "window": evaluation["window_tokens"],
    }


def _sample(sample: Sample) -> str:
    how = f"temperature {sample['temperature']}" if sample["temperature"] else "greedy"
    end = "ended by itself" if sample["ended"] else "cut off"
    text = str(sample["text"]).rstrip()
    if sample["kind"] == "chat":
        return f"\nChat, {how}, {end}: “{sample['prompt']}”\n```python\n{text}\n```\n"
    return f"\nText, {how}, {end}; the prompt is part of it:\n```python\n{sample['prompt']}{text}\n```\n"
