"""Write the results of the benchmarks into the documentation, as Markdown tables between markers.

    python benchmarks/tables.py

reads the JSON files of benchmarks/results and replaces the text between ``<!-- NAME:begin -->`` and
``<!-- NAME:end -->`` in the pages. To keep the results of several machines, rename their files (packed-avx2.json);
the tables of all of them are shown.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from binarize.tables import Column, Table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "quality.md")
Results = dict[str, list[dict[str, Any]]]
"""The rows of one section, by results file."""

VARIANTS = {
    "textbook": "textbook, float32",
    "textbook-apart": "textbook, float32, large blocks apart",
    "exact": "ours, float32, exact",
    "compact": "ours, float32, compact",
    "textbook-bf16": "textbook, bfloat16",
    "exact-bf16": "ours, bfloat16, exact",
    "compact-bf16": "ours, bfloat16, compact",
}


def replace_between(text: str, name: str, body: str) -> str:
    """Return ``text`` with ``body`` between the markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the page has no markers {begin} ... {end}")
    return pattern.sub(lambda _: f"{begin}\n\n{body}\n\n{end}", text)


def numbers(name: str, form: str = ".2f") -> Column:
    """Return a column of numbers."""
    return Column(name, form, "right")


def packed_layers(results: Results) -> str:
    """Return how much faster than PyTorch each binary convolution is on one thread, for the last machine and in sum."""
    ratios = (numbers("float32 / packed"), numbers("int8 / packed"))
    columns = [Column("layer"), numbers("packed, ms"), *ratios, numbers("share of peak", ".0%")]
    lines: list[list[Any]] = []
    sums: list[list[Any]] = []
    for file, rows in results.items():
        lines, total = [], [0.0, 0.0, 0.0]
        for row in rows[1:]:
            if row["threads"] == 1:
                ms = row["ms"]
                times = [ms["packed"], min(ms["float32 NCHW"], ms["float32 NHWC"]), ms.get("int8", math.nan)]
                layer = row["layer"].partition(" -> ")[2]
                lines.append([layer, times[0], times[1] / times[0], times[2] / times[0], row["share of peak"]])
                total = [old + row["count"] * new for old, new in zip(total, times, strict=True)]
        sums.append([f"all, {file}", total[0], total[1] / total[0], total[2] / total[0], None])
    return Table(columns, lines, footer=sums).to_markdown()


def packed_roofline(results: Results) -> str:
    """Return the composition of a denoising step on the last machine, and what bounds its parts."""
    step = next(row for row in list(results.values())[-1] if "parts" in row)
    bounds, lines = step.get("bounds", {}), []
    for part, seconds in step["parts"].items():
        bound = bounds.get(part)
        share = f"{seconds / sum(step['parts'].values()):.0%}"
        lines.append([part, share, 1e3 * seconds, None if bound is None else 1e3 * bound])
    lines.append(["a step without the profiler", None, 1e3 * step["seconds"]["packed"], None])
    columns = ["part", Column("share", align="right"), numbers("ms", ".0f"), numbers("bound, ms", ".0f")]
    width = len(columns) if bounds else len(columns) - 1  # older results have no bounds
    return Table(columns[:width], [line[:width] for line in lines]).to_markdown()


def int8_networks(results: Results) -> str:
    """Return the times of packed networks and of the full-precision twin in other runtimes."""
    rows = list(results.values())[-1]
    names = (f"{row['size']}x{row['size']}, {row['threads']} thread{'s' * (row['threads'] > 1)}" for row in rows)
    columns = [numbers(name, ".3f") for name in names]
    lines = [[name, *(row["seconds"][name] for row in rows)] for name in rows[0]["seconds"]]
    return Table([Column("network", align="left"), *columns], lines).to_markdown()


def packed_networks(results: Results) -> str:
    """Return the times of whole networks on two threads."""
    names = ("textbook float32", "full precision float32", "packed float32", "packed bfloat16")
    lines = []
    for file, rows in results.items():
        for row in rows:
            if row["threads"] == 2:
                seconds = [row["seconds"][name] for name in names]
                lines.append([file, row["size"], *seconds, seconds[1] / seconds[2]])
    columns = [numbers(name, ".3f") for name in names]
    return Table(["results", "side", *columns, numbers("full precision / packed")], lines).to_markdown()


def packed_flips(results: Results) -> str:
    """Return the differences between packed and unpacked networks."""
    error = "worst mean error of the output's scale"
    return "\n".join(
        f"`{file}`, {row['inputs']} inputs: the worst relative mean error is "
        f"{row[error]:.1e}, and {row['share of flipped signs']:.1e} of the signs differ."
        for file, (row,) in results.items()
    )


def packed_memory(results: Results) -> str:
    """Return the peak memory of upscaling in tiles."""
    lines = [
        [f"{row['output']}x{row['output']}", row["tile"], row["peak bytes"] / 1e6]
        for rows in results.values()
        for row in rows
    ]
    return Table(["output", "tile", numbers("peak memory, MB", ".0f")], lines).to_markdown()


def packed_files(results: Results) -> str:
    """Return file sizes and load times."""
    rows = [row for rows in results.values() for row in rows if "load seconds" in row]
    lines = [[row["what"], row["bytes"] / 1e6, row["load seconds"]] for row in rows]
    return Table(["file", numbers("MB"), numbers("load time, s")], lines).to_markdown()


def gpu_networks(results: Results) -> str:
    """Return the times of networks on a GPU, launched kernel by kernel and replayed as a CUDA graph."""
    (rows,) = results.values()

    def cell(row: dict[str, Any], name: str) -> str:
        graph = row["graph ms"].get(name)
        return f"{row['ms'][name]:.1f}" + ("" if graph is None else f" ({graph:.1f})")

    names = (
        "textbook float32",
        "full precision float32",
        "full precision bfloat16",
        "packed float32",
        "packed bfloat16",
    )
    columns = [Column(f"{row['size']}x{row['size']}, batch {row['batch']}", align="right") for row in rows]
    lines = [[name, *(cell(row, name) for row in rows)] for name in names]
    return Table(["network, ms (CUDA graph)", *columns], lines).to_markdown()


def gpu_training(results: Results) -> str:
    """Return training steps on a GPU in float32, of the largest batch."""
    (rows,) = results.values()
    largest = max(row["batch"] for row in rows)
    chosen = [row for row in rows if not row["tf32"] and row["batch"] == largest]
    return training({"gpu": [{**row, "memory": row["peak MB"], "seconds": row["ms"] / 1e3} for row in chosen]})


def training(results: Results) -> str:
    """Return training steps, with ratios to the textbook form of the same image size and batch."""
    lines: list[list[Any]] = []
    several = len({row["batch"] for rows in results.values() for row in rows}) > 1
    for file, rows in results.items():
        base = {(row["size"], row["batch"]): row for row in rows if row["variant"] == "textbook"}
        for row in rows:
            if row["variant"] == "textbook-apart":  # shows the effect of the allocator alone
                continue
            reference = base.get((row["size"], row["batch"]))
            name = VARIANTS[row["variant"]] + (f", batch {row['batch']}" if several else "")
            cells = [f"{file}: {name}" if len(results) > 1 else name]
            for key, form in (("memory", ".0f"), ("seconds", ".2f")):
                ratio = "" if reference is None else f" ({row[key] / reference[key]:.2f})"
                cells.append(f"{row[key]:{form}}{ratio}")
            lines.append(cells)
    columns = [Column(name, align="right") for name in ("peak memory, MB (ratio)", "step, s (ratio)")]
    return Table(["network", *columns], lines).to_markdown()


def bits_layers(results: Results) -> str:
    """Return the milliseconds of a packed layer by the bits of its weights and activations."""
    (rows,) = results.values()
    names = list(rows[0]["ms"])
    lines = [[f"{r['channels']}, 3x3, {r['side']}x{r['side']}", *r["ms"].values()] for r in rows]
    return Table(["layer, ms", *map(numbers, names)], lines).to_markdown()


def bits_unet(results: Results) -> str:
    """Return seconds, peak memory and file sizes of a U-Net of Stable Diffusion's size."""
    (rows,) = results.values()
    whole = next(row for row in rows if row["stage"] == "float")
    lines: list[list[Any]] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [row for row in rows if row["method"] == method]
        seconds = {key: value for row in found for key, value in row["seconds"].items()}
        peaks = {key: value for row in found for key, value in row.items() if key.startswith("peak")}
        packing = peaks.get("peak after save")
        lines.append(
            [
                method,
                *(seconds.get(name) for name in ("pack", "save", "load", "step")),
                None if packing is None else packing / whole["peak after build"],
                (peaks["peak after load"] if "peak after load" in peaks else peaks["peak after build"]) / 1e6,
                peaks["peak after step"] / 1e6,
                next((row["file bytes"] for row in found if "file bytes" in row), 4 * whole["parameters"]) / 1e6,
            ]
        )
    columns = [numbers(f"{name}, s", ".1f") for name in ("pack", "save", "load", "step")]
    columns += [numbers("peak of packing / float model", ".2f"), numbers("peak once loaded, MB", ".0f")]
    columns += [numbers("peak of a step, MB", ".0f"), numbers("file, MB", ".0f")]
    return Table(["weights/activations", *columns], lines).to_markdown()


def quality(rows: list[dict[str, Any]]) -> str:
    """Return the quality of a model by number of denoising steps."""
    lines = [[row["steps"] or "bicubic", row["psnr"], row["ssim"], row["lpips"]] for row in rows]
    columns = [numbers("PSNR"), numbers("SSIM", ".4f"), numbers("LPIPS (squeeze)", ".4f")]
    return Table([Column("steps", align="left"), *columns], lines).to_markdown()


def photographs(result: dict[str, Any]) -> str:
    """Return PSNR on degraded photographs: that of Lanczos, and what models add to it."""
    rows, noise = result["rows"], result["noise"]
    models = [name for name in noise if name not in ("input", "Lanczos")]
    lines: list[list[Any]] = []
    for row in rows:
        scores = row["psnr"]
        gains = [scores[name] - scores["Lanczos"] for name in models]
        lines.append(
            [row["image"], row["degradation"], f"{scores['Lanczos']:.2f}", *(f"{gain:+.2f}" for gain in gains)]
        )
    sums = [sum(row["psnr"][name] - row["psnr"]["Lanczos"] for row in rows) / len(rows) for name in models]
    lines.append(["mean", "", "", *(f"{gain:+.2f}" for gain in sums)])
    levels = [f"{noise[name]:.1f}" for name in ("Lanczos", *models)]
    lines.append([f"noise of {noise['input']:.1f} levels", "deviation after", *levels])
    columns = [Column(name, align="right") for name in ("Lanczos", *models)]
    return Table(
        [Column("photograph", align="left"), Column("degradation", align="left"), *columns], lines
    ).to_markdown()


TABLES: dict[str, Callable[[Results], str]] = {
    "packed-layers": packed_layers,
    "packed-roofline": packed_roofline,
    "packed-networks": packed_networks,
    "packed-flips": packed_flips,
    "packed-memory": packed_memory,
    "packed-files": packed_files,
    "int8-networks": int8_networks,
    "gpu-networks": gpu_networks,
    "gpu-training": gpu_training,
    "training": training,
    "bits-layers": bits_layers,
    "bits-unet": bits_unet,
}


def machines(found: dict[str, dict[str, Any]]) -> str:
    """Return the machines that results come from."""
    files: dict[tuple[Any, ...], list[str]] = {}
    for name, results in found.items():
        machine = results["machine"]
        where = ", ".join([machine["processor"], *([machine["gpu"]] if "gpu" in machine else [])])
        files.setdefault((where, machine["cores"], machine["torch"]), []).append(f"`{name}`")
    lines = [[", ".join(names), *machine] for machine, names in files.items()]
    return Table(["results", "processor", "cores", "PyTorch"], lines).to_markdown()


def section(name: str, found: dict[str, dict[str, Any]]) -> str:
    """Return the table of one section.

    Args:
        name: The name between the markers of a page.
        found: The contents of the results files, by file name without its suffix.
    """
    if name == "machines":
        return machines(found)
    kind, _, part = name.partition("-")
    if kind == "quality":
        return quality(json.loads((RESULTS / f"{name}.json").read_text())["rows"])
    if kind == "photographs":
        return photographs(json.loads((RESULTS / f"{name}.json").read_text()))
    key = part or "rows"
    results = {file: data[key] for file, data in found.items() if file.startswith(kind) and data.get(key)}
    if results:
        return TABLES[name](results)
    script = f"bench_{kind}.py --only {part}" if part else f"bench_{kind}.py"
    return f"*No results yet: run `python benchmarks/{script}`.*"


def main() -> None:
    found = {
        path.stem: json.loads(path.read_text())
        for kind in ("packed", "training", "gpu", "bits", "int8")
        for path in sorted(RESULTS.glob(f"{kind}*.json"))
    }
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(
            r"<!-- ((?:machines|packed|training|gpu|quality|photographs|bits|int8)[\w-]*):begin -->", text
        ):
            text = replace_between(text, name, section(name, found))
        page.write_text(text, encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
