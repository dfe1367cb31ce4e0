"""Write the tables of `docs/performance.md` from `bench/results/*.json`; with `--check`, only compare."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- begin: tools/performance_table.py -->", "<!-- end -->"

Figures = dict[str, Any]
Row = tuple[str, ...]


def main(arguments: list[str]) -> int:
    """Write the page or compare it; 1 if it is out of date or a result is missing."""
    try:
        text = filled(PAGE.read_text(), tables(RESULTS))
    except FileNotFoundError as error:
        print(f"error: {error.filename}: there is no such file; make bench writes the results", file=sys.stderr)
        return 1
    if arguments != ["--check"]:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        print(f"error: {PAGE} is out of date: run python tools/performance_table.py", file=sys.stderr)
        return 1
    return 0


def filled(page: str, content: str) -> str:
    """The page with `content` between its markers. Raises ValueError if it does not have each of them once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs {BEGIN} and {END}, each once")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{content}{END}{rest.partition(END)[2]}"


def tables(folder: Path) -> str:
    """All tables. Raises FileNotFoundError for a result that is missing."""
    step, memory, link, served = (_read(folder, name) for name in ("engine_step", "engine_memory", "link", "served"))
    measured = [*_engine_step(step), *_engine_memory(memory), *_link(link), *_served(served)]
    model = _read(folder, "embedded_model")
    return (
        _table(("figure", "measured", "bar"), measured)
        + "\n"
        + _table(("benchmark", "machine", "commit", "when"), [_origin(run) for run in (step, memory, link, served)])
        + "\n"
        + _table(("the shipped model on its held-out split", "bits per byte"), _embedded_model(model))
        + f"\nTrained in {model['training']['minutes']:.1f} minutes on one {model['training']['hardware']}, evaluated "
        + f"on one {model['evaluation']['hardware']}.\n"
    )


def _engine_step(run: Figures) -> list[Row]:
    return [
        (
            f"engine step, {row['sequences']:,} decoding",
            f"median {row['median_us']:.0f} µs, p99 {row['p99_us']:.0f} µs",
            _bar_of(run["bar"], row["sequences"]),
        )
        for row in run["rows"]
    ]


def _bar_of(bar: str, sequences: int) -> str:
    """The part of "256: median ≤ 250, p99 ≤ 500; 1: ≤ 30; 1,024: ≤ 900 µs" that is about so many sequences."""
    parts = dict(part.split(": ", 1) for part in bar.removesuffix(" µs").split("; "))
    return f"{parts[f'{sequences:,}']} µs"


def _engine_memory(run: Figures) -> list[Row]:
    live = f"{run['bytes_per_live_token']:.1f} bytes a token of {run['live_tokens']:,} live ones"
    first, second = run["bytes_left_by_the_first_million"], run["bytes_left_by_the_second_million"]
    left = f"left by the first million tokens {first:,} bytes ({run['what_is_left']}), by the second {second:,}"
    return [("engine memory", f"{live}; {left}", run["bar"])]


def _link(run: Figures) -> list[Row]:
    shares = f"gate {run['gate_core_share']:.0%}, service {run['service_core_share']:.0%} of a core"
    return [("link between gate and service", f"{run['tokens_per_s']:,.0f} tokens/s: {shares}", run["bar"])]


def _served(run: Figures) -> list[Row]:
    return [
        (
            f"served to {run['streams']} streams, {row['asked_tokens_per_s']:,} tokens/s paced",
            f"{row['tokens_per_s']:,.0f} tokens/s, {row['tokens_per_message']:.2f} tokens a message, "
            f"gaps p50 {row['gap_ms_p50']:.1f} ms, p99 {row['gap_ms_p99']:.1f} ms; of a core: {_shares(row)}",
            run["bar"],
        )
        for row in run["rows"]
    ]


def _shares(row: Figures) -> str:
    return ", ".join(f"{role} {share:.0%}" for role, share in row["core_share"].items())


def _origin(run: Figures) -> Row:
    about = run["environment"]
    commit = about["commit"][:12] + (" with uncommitted changes" if about["uncommitted"] else "")
    machine = f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}, Python {about['python']}"
    return f"`bench/{run['benchmark']}.py`", machine, commit, about["when"]


def _embedded_model(run: Figures) -> list[Row]:
    ngrams = [(name.replace("_", ", "), f"{bits:.3f}") for name, bits in run["ngrams_bits_per_byte"].items()]
    return [*ngrams, ("this model", f"{run['evaluation']['bits_per_byte']:.3f}")]


def _table(head: Row, rows: list[Row]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ("---",) * len(head), *rows))


def _read(folder: Path, name: str) -> Figures:
    figures: Figures = json.loads((folder / f"{name}.json").read_text())
    return figures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
