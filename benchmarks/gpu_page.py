"""The page of what was measured on a GPU."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness import markdown

_HEAD = "# metalit on a GPU\n\nWritten by `scripts/gpu.sh`, from `{file}`.\n"
_TINY = "Tiny sizes on the CPU, to see that it runs: the figures say nothing.\n"


def page(whole: dict[str, Any]) -> str:
    """All sections that there is something for."""
    stages = whole["stages"]
    parts = [
        _HEAD.format(file="gpu.json"),
        *[_TINY] * whole["quick"],
        *(f"{note}\n" for note in whole.get("notes", [])),
    ]
    for make in (_card, _tests, _small, _alone, _large):
        parts += [part for part in [make(whole, stages)] if part]
    parts += [f"`{name}`: {found['failed']}\n" for name, found in stages.items() if "failed" in found]
    parts += [
        f"Compiling `{name}` beforehand: {why}\n" for name, why in whole.get("compiled before", {}).items() if why
    ]
    return "\n".join(parts)


def _card(_: dict[str, Any], stages: dict[str, Any]) -> str:
    found = stages.get("card", {})
    if "machine" not in found:
        return ""
    rows = [["card", str(found.get("card", "none"))]]
    if "memory" in found:
        rows += [["memory", f"{found['memory'] / 2**30:.0f} GiB"], ["CUDA", f"{found['cuda']}"]]
        rows += [["compute capability", found["capability"]]]
    rows += [["Triton, C compiler", f"{found['triton']}, {found['compiler']}"]]
    if "copy" in found:
        rows += [["copy, bytes read and written", f"{found['copy'] / 1e12:.2f} TB/s"]]
    rows += [[name, f"{found[name] / 1e12:.1f} TFLOP/s"] for name in found if name.startswith("product, ")]
    return f"{found['machine']}\n\n{markdown(['card', ''], rows)}\n"


def _tests(whole: dict[str, Any], _: dict[str, Any]) -> str:
    tests = whole["tests"]
    if not tests:
        return ""
    counts = {kind: sum(test["outcome"] == kind for test in tests) for kind in ("passed", "skipped")}
    head = f"{counts['passed']} of {len(tests)} tests passed, {counts['skipped']} were skipped."
    rows = []
    for test in tests:
        more = f"{test['error']:.2g}" if "error" in test else ""
        failed = test["why"][-2:] if test["outcome"] not in counts else []
        told = [line for line in test.get("told", []) if "not compiled" in line or "memory" in line]
        cells = [_cell(test["test"].removeprefix("test_")), test["outcome"], f"{test['seconds']:.1f}", more]
        rows.append([*cells, _cell(" ".join(told + failed))])
    about = (
        "`error` is the distance from what the CPU or full precision finds, as a share of the way that training went "
        "(of the gradient, where one is compared)."
    )
    return f"## Tests\n\n{head} {about}\n\n{markdown(['test', 'outcome', 'seconds', 'error', ''], rows)}\n"


def _small(_: dict[str, Any], stages: dict[str, Any]) -> str:
    rows = [row for name in ("small", "small, compiled") for row in stages.get(name, {}).get("rows", [])]
    columns: dict[str, Callable[[Any], str]] = {
        "tasks": lambda row: f"{row['tasks']}{', on the card' * (not row['drawn'])}{', compiled' * row['compiled']}",
        "`fused_steps`": lambda row: str(row["fused_steps"]),
        "ms per step": lambda row: f"{row['ms per step']:.3g}",
        "tasks per second": lambda row: f"{1e3 * row['tasks'] / row['ms per step']:,.0f}",
        "kernels": lambda row: f"{row['kernels']:.0f}",
        "launches": lambda row: f"{row['launches']:.0f}",
        "copies": lambda row: f"{row['copies']:.1f}",
        "waits": lambda row: f"{row['waits']:.1f}",
        "card works": _percent,
    }
    about = (
        "A fit by the Trainer: MAML, 1-40-40-1, 10 + 10 points, one inner step, second order, Adam, nothing logged. "
        "Tasks are drawn by the CPU, or lie on the card before. Counts are of one outer step; `card works` is the time "
        "of its kernels and copies, of that of the step."
    )
    return _section("Small networks: launches, and how busy the card is", about, columns, rows)


def _alone(_: dict[str, Any], stages: dict[str, Any]) -> str:
    names = [name for name in stages if name.startswith("step alone")]
    rows = [row for name in names for row in stages[name].get("rows", [])]
    columns: dict[str, Callable[[Any], str]] = {
        "": lambda row: row["name"],
        "inner steps": lambda row: str(row["inner_steps"]),
        "µs per step": lambda row: f"{1e6 * row['seconds']:.0f}" if "seconds" in row else _cell(row["failed"]),
        "error": lambda row: f"{row['error']:.2g}" if "error" in row else "",
    }
    versions = {f"JAX: {stages[name]['jax']}." for name in names if "jax" in stages[name]}
    about = (
        "The same outer step of 25 tasks, Adam included, without a Trainer; a CUDA graph is replayed on tasks that lie "
        "still. JAX's products are in full single precision, as torch's are. `error`: Adam's first moments after five "
        f"steps, beside a loop in double precision on the CPU. {' '.join(sorted(versions))}"
    )
    return _section("The step alone: CUDA graphs and JAX", about, columns, rows)


def _large(_: dict[str, Any], stages: dict[str, Any]) -> str:
    card = stages.get("card", {})
    names = ("large", "large, compiled", "supervised")
    rows = [row for name in names for row in stages.get(name, {}).get("rows", [])]

    def share(row: Any) -> str:
        ceiling = card.get("product, bfloat16" if row["precision"] == "bf16-mixed" else "product, float32")
        return f"{100 * row['rate'] / ceiling:.0f} %" if ceiling else ""

    columns: dict[str, Callable[[Any], str]] = {
        "": lambda row: f"{row['what']}{', compiled' * row['compiled']}",
        "precision": lambda row: row["precision"],
        "ms per step": lambda row: f"{row['ms per step']:.3g}",
        "TFLOP/s": lambda row: f"{row['rate'] / 1e12:.3g}",
        "of the card's product": share,
        "card works": _percent,
        "peak GiB": lambda row: f"{row['peak bytes'] / 2**30:.1f}" if "peak bytes" in row else "",
    }
    about = "Fits by the Trainer, three layers 4096 wide; the rate counts matrix products alone."
    return _section("Large networks: the share of the matrix rate", about, columns, rows)


def _section(title: str, about: str, columns: dict[str, Callable[[Any], str]], rows: Sequence[Any]) -> str:
    if not rows:
        return ""
    lines = sorted({line for row in rows for line in row.get("told", []) if "not compiled" in line})
    table = markdown(list(columns), [[cell(row) for cell in columns.values()] for row in rows])
    return "\n\n".join([f"## {title}", about, table, *lines]) + "\n"


def _percent(row: Any) -> str:
    return f"{100 * row['share of the time']:.0f} %"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
