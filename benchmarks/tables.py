"""Puts the results of the benchmarks into the documentation, as Markdown tables between markers.

    python benchmarks/tables.py

reads every ``packed*.json``, ``training*.json`` and ``gpu*.json`` of benchmarks/results, so that results of several
processors stand side by side (rename a file to keep it: packed-avx2.json), and rewrites what stands between
``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` in the pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench_training import table as training_table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "scaling.md")
Rows = list[dict[str, Any]]


def rows_to_markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table whose first column is text and whose others are numbers."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def replace_between(text: str, name: str, body: str) -> str:
    """Return ``text`` with ``body`` between the markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there is no {begin} ... {end} to write between")
    return pattern.sub(lambda _: f"{begin}\n\n{body}\n\n{end}", text)


def layers(rows: Rows) -> str:
    """Return the table of binary convolutions, with what they take together as its last lines."""
    peak = next(row["popcount peak, GMAC/s a core"] for row in rows if "popcount peak, GMAC/s a core" in row)
    timed = [row for row in rows if "layer" in row]
    lines = []
    for threads in sorted({row["threads"] for row in timed}):
        group = [row for row in timed if row["threads"] == threads]
        lines += [_layer(row, peak) for row in group]
        count = sum(row["count"] for row in group)
        ms = {name: sum(row["count"] * row["ms"].get(name, 0) for row in group) for name in group[0]["ms"]}
        best = sum(row["count"] * _float32(row["ms"]) for row in group)
        lines.append([f"**all {count}**", threads, *_times(ms, best), "", ""])
    head = ["layer", "threads", "float32, ms", "int8", "packed", "packed bfloat16", "float32 / packed", "at peak"]
    table = rows_to_markdown([*head, "share of peak"], lines)
    if peak is None:
        return table
    return f"{table}\n\nPopcount peak of a core: {peak:.0f} GMAC/s."


def _layer(row: dict[str, Any], peak: float | None) -> list[object]:
    name = f"{row['layer']}, {row['count']} times"
    times = _times(row["ms"], _float32(row["ms"]))
    if peak is None:
        return [name, row["threads"], *times, "", ""]
    share = row["GMAC/s"] / (peak * row["threads"])
    return [name, row["threads"], *times, f"{row['ms']['packed'] * share:.2f}", f"{share:.0%}"]


def _float32(ms: dict[str, float]) -> float:
    return min(ms["float32 NCHW"], ms["float32 NHWC"])


def _times(ms: dict[str, float], float32: float) -> list[str]:
    int8 = f"{ms['int8']:.2f}" if "int8" in ms else ""
    ours = (f"{ms[name]:.2f}" for name in ("packed", "packed bfloat16"))
    return [f"{float32:.2f}", int8, *ours, f"{float32 / ms['packed']:.2f}"]


def networks(rows: Rows) -> str:
    """Return the table of whole networks: seconds, and in float32 how many times longer than packed."""
    names = list(rows[0]["seconds"])
    bases = [name for name in names if "float32" in name and not name.startswith("packed")]
    head = ["pixels", "threads", *(f"{name}, s" for name in names), *(f"{name} / packed" for name in bases)]
    lines = []
    for row in rows:
        seconds = row["seconds"]
        ratios = (seconds[name] / seconds["packed float32"] for name in bases)
        cells = (*(f"{seconds[name]:.3f}" for name in names), *(f"{ratio:.2f}" for ratio in ratios))
        lines.append([f"{row['size']}x{row['size']}", row["threads"], *cells])
    return rows_to_markdown(head, lines)


def _arithmetic(ms: dict[str, float]) -> float:
    """Return how long a layer's arithmetic takes at the peak; of counting alone, in results that have no more."""
    return ms.get("arithmetic", ms["counting"])


def roofline(rows: Rows) -> str:
    """Return the table of what bounds the layers, and the one of what a step consists of."""
    head = [
        "layer, one thread",
        "float32, ms",
        "packed",
        "counting",
        "arithmetic",
        "a copy",
        "float32 / packed",
        "at most",
    ]
    timed = [row for row in rows if "layer" in row and row["ms"]["counting"] is not None]
    lines = []
    for row in timed:
        ms = row["ms"]
        arithmetic = _arithmetic(ms)
        times = [f"{ms[name]:.2f}" for name in ("float32", "packed", "counting")]
        one_after_another = f"{ms['float32'] / (arithmetic + ms['copy']):.1f}"
        lines.append(
            [
                row["layer"],
                *times,
                f"{arithmetic:.2f}" if "arithmetic" in ms else "",
                f"{ms['copy']:.2f}",
                f"{ms['float32'] / ms['packed']:.1f}",
                f"{one_after_another} to {ms['float32'] / max(arithmetic, ms['copy']):.1f}",
            ]
        )
    whole = next(row for row in rows if "parts" in row)
    total = sum(whole["parts"].values())
    parts = [[name, f"{seconds:.3f}", f"{seconds / total:.0%}"] for name, seconds in whole["parts"].items()]
    step, threads = whole["seconds"], whole["threads"]
    least = sum(row["count"] * (_arithmetic(row["ms"]) + row["ms"]["copy"]) for row in timed) / 1e3 / threads
    # The profiler's seconds are not those of the timing, but their shares are.
    reached = step["packed"] * (1 - whole["parts"]["binary convolutions"] / total) + least
    return "\n\n".join(
        [
            rows_to_markdown(head, lines),
            f"A step at {whole['size']}x{whole['size']} on {whole['threads']} threads, {step['packed']:.3f} s, against "
            f"{step['full precision']:.3f} s of the full-precision twin, by operator:",
            rows_to_markdown(["part", "s", "share"], parts),
            f"With nothing but arithmetic at the peak and one copy in each of its binary convolutions, {least:.3f} s, "
            f"a step would take {reached:.3f} s: the twin takes {step['full precision'] / step['packed']:.2f} times as "
            f"long as it does, and would take {step['full precision'] / reached:.2f} times as long as that."
            if timed
            else "",
        ]
    )


def mixed(rows: Rows) -> str:
    """Return the table of packed layers and torch's in turns."""
    head = ["threads", "packed alone, ms", "torch alone", "in turns", "in turns / apart"]
    lines = [
        [
            row["threads"],
            *(f"{100 * row['seconds'][name]:.2f}" for name in ("packed", "torch", "in turns")),
            f"{row['in turns over apart']:.2f}",
        ]
        for row in rows
    ]
    return rows_to_markdown(head, lines)


def flips(rows: Rows) -> str:
    """Return the table of differences between a packed network and the binary one."""
    head = ["inputs", "worst mean error, of the output's scale", "share of signs that differ"]
    keys = ("worst mean error of the output's scale", "share of flipped signs")
    return rows_to_markdown(head, [[row["inputs"], *(f"{row[key]:.1e}" for key in keys)] for row in rows])


def memory(rows: Rows) -> str:
    """Return the table of the process's peak memory while a picture is enlarged in tiles."""
    lines = [[f"{r['output']}x{r['output']}", r["tile"], f"{r['peak bytes'] / 1e6:.0f}"] for r in rows]
    return rows_to_markdown(["output, pixels", "tile", "peak of the whole process, MB"], lines)


def files(rows: Rows) -> str:
    """Return the table of sizes on disk and times to load."""
    lines = []
    for row in rows:
        seconds = f"{row['load seconds']:.2f}" if "load seconds" in row else ""
        lines.append([row["what"], f"{row['bytes'] / 1e6:.2f}", seconds])
    return rows_to_markdown(["what", "MB", "loads in, s"], lines)


def gpu_networks(rows: Rows) -> str:
    """Return the table of networks on a GPU, launched operator by operator and replayed as a graph."""
    head = ["network, ms (as a graph)", *(f"{row['size']}x{row['size']}, batch {row['batch']}" for row in rows)]

    def cell(row: dict[str, Any], name: str) -> str:
        replay = row["graph ms"].get(name)
        return f"{row['ms'][name]:.1f}" + ("" if replay is None else f" ({replay:.1f})")

    return rows_to_markdown(head, [[name, *(cell(row, name) for row in rows)] for name in rows[0]["ms"]])


def gpu_training(rows: Rows) -> str:
    """Return the table of training steps on a GPU."""
    names = {"textbook": "textbook", "exact": "ours, memory exact", "compact": "ours, memory compact"}
    base = {(r["batch"], r["tf32"]): r for r in rows if r["variant"] == "textbook"}
    lines = []
    for row in rows:
        reference = base[row["batch"], row["tf32"]]
        dtype = "TF32" if row["tf32"] else "float32"
        cells = [names[row["variant"]], dtype, f"{row['size']}x{row['size']}", row["batch"], f"{row['peak MB']:.0f}"]
        cells += [f"{row['peak MB'] / reference['peak MB']:.2f}", f"{row['ms']:.0f}"]
        lines.append([*cells, f"{row['ms'] / reference['ms']:.2f}"])
    head = ["network", "products", "pixels", "batch", "peak memory, MB", "ratio", "a step, ms", "ratio"]
    return rows_to_markdown(head, lines)


TABLES: dict[str, Callable[[Rows], str]] = {
    "packed-layers": layers,
    "packed-roofline": roofline,
    "packed-networks": networks,
    "packed-compiled": networks,
    "packed-mixed": mixed,
    "packed-flips": flips,
    "packed-memory": memory,
    "packed-files": files,
    "gpu-networks": gpu_networks,
    "gpu-training": gpu_training,
    "training": training_table,
}


def machine(results: dict[str, Any]) -> str:
    """Return what a results file says of the machine, as one line."""
    said = results["machine"]
    processor = said.get("processor") or said.get("cpu") or "processor unknown"
    known = (("cores", "{} cores"), ("gpu", "{}"), ("torch", "PyTorch {}"), ("python", "Python {}"))
    return ", ".join([processor, *(form.format(said[key]) for key, form in known if key in said)])


def section(name: str, found: dict[str, dict[str, Any]]) -> str:
    """Return the tables of one section, one for each results file that has it."""
    kind, _, part = name.partition("-")
    made = []
    for file, results in found.items():
        rows = results.get(part or "rows")
        if file.startswith(kind) and rows:
            made.append(f"**{machine(results)}** (`{file}`)\n\n{TABLES[name](rows)}")
    script = f"bench_{kind}.py --only {part}" if part else f"bench_{kind}.py"
    return "\n\n".join(made) or f"*No results yet: `python benchmarks/{script}` makes them.*"


def main() -> None:
    found = {
        path.name: json.loads(path.read_text())
        for kind in ("packed", "training", "gpu")
        for path in sorted(RESULTS.glob(f"{kind}*.json"))
    }
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- ((?:packed|training|gpu)[\w-]*):begin -->", text):
            text = replace_between(text, name, section(name, found))
        page.write_text(text, encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
