#!/usr/bin/env python3
"""Tables and plots of a results folder: summary.md, limits.svg, serving.svg. Standard library only; measures nothing."""

import glob
import json
import os
import re
import statistics
import sys
from collections import defaultdict

MODES = ["disaggregated", "balanced", "mixed", "auto"]
COLORS = {"disaggregated": "#c2571a", "balanced": "#8a63a8", "mixed": "#3b6ea5", "auto": "#6b8e4e"}
METRICS = [
    ("p50_ttft_ms", "TTFT p50, ms"),
    ("p99_ttft_ms", "TTFT p99, ms"),
    ("p50_itl_ms", "ITL p50, ms"),
    ("p99_itl_ms", "ITL p99, ms"),
    ("output_throughput", "out tokens/s"),
]


def read(folder, name):
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return json.load(file)


def model_steps(report, out):
    out.append("## Model steps\n")
    out.append("| case | tokens/s | of read bandwidth | of bf16 peak | of the nearer limit | min to max of it |")
    out.append("| --- | --- | --- | --- | --- | --- |")
    for case in report["cases"]:
        of_limit = [
            max(case["bytes"] / s["read_gb_s"], case["flops"] / s["peak_gflop_s"]) / 1e9 / s["seconds"]
            for s in case["samples"]
        ]
        out.append(
            f"| {case['case']} | {case['tokens_per_s']:.1f} | {case['of_read_bandwidth']:.0%} | {case['of_peak']:.0%} "
            f"| {case['of_nearer_limit']:.0%} | {min(of_limit):.0%} to {max(of_limit):.0%} |"
        )
    read_gb_s = [s["read_gb_s"] for c in report["cases"] for s in c["samples"]]
    peak = [s["peak_gflop_s"] for c in report["cases"] for s in c["samples"]]
    load = [s["load_average"] for c in report["cases"] for s in c["samples"]]
    out.append(
        f"\nLimits in the same run, median (min to max): read {statistics.median(read_gb_s):.1f} GB/s "
        f"({min(read_gb_s):.1f} to {max(read_gb_s):.1f}), bf16 dot products {statistics.median(peak):.0f} GFLOP/s "
        f"({min(peak):.0f} to {max(peak):.0f}); load average {min(load):.1f} to {max(load):.1f}.\n"
    )


def kv_stream(report, out):
    out.append("## KV stream over loopback\n")
    out.append("| path | GB/s, median | min to max |")
    out.append("| --- | --- | --- |")
    for path, rates in report["samples_gb_per_s"].items():
        out.append(f"| {path} | {statistics.median(rates):.2f} | {min(rates):.2f} to {max(rates):.2f} |")
    summary = report["summary"]
    out.append(
        f"\nMedians of the ratios within a round: gRPC over raw TCP {summary['grpc tcp / raw tcp']:.2f}, "
        f"over raw Unix sockets {summary['grpc unix / raw unix']:.2f}. Load average {report['load_average'].split()[0]}.\n"
    )


def serving(folder, out):
    # runs[load][mode][round]
    runs = defaultdict(lambda: defaultdict(dict))
    for path in sorted(glob.glob(os.path.join(folder, "serving", "*.*.*.json"))):
        load, mode, round_, _ = os.path.basename(path).split(".")
        with open(path) as file:
            runs[load][mode][round_] = json.load(file)
    if not runs:
        return None
    out.append("## Serving: disaggregated, balanced, mixed, automatic\n")
    out.append("Medians over the rounds; in brackets the median of the ratios to balanced within a round, where both ran.\n")
    out.append("| load | mode | " + " | ".join(title for _, title in METRICS) + " | done / sent |")
    out.append("| --- | --- | " + "--- | " * (len(METRICS) + 1))
    for load, modes in runs.items():
        for mode in MODES:
            rounds = modes[mode]
            if not rounds:
                continue
            cells = []
            for key, _ in METRICS:
                value = statistics.median(run[key] for run in rounds.values())
                cell = f"{value:.1f}"
                ratios = [
                    run[key] / modes["balanced"][r][key]
                    for r, run in rounds.items()
                    if r in modes["balanced"] and modes["balanced"][r][key]
                ]
                if mode != "balanced" and ratios:
                    cell += f" ({statistics.median(ratios):.2f})"
                cells.append(cell)
            done = sum(run["completed"] for run in rounds.values())
            sent = sum(run["num_prompts"] for run in rounds.values())
            out.append(f"| {load} | {mode} | " + " | ".join(cells) + f" | {done} / {sent} |")
    loads = []
    for path in glob.glob(os.path.join(folder, "serving", "*.load")):
        with open(path) as file:
            loads.append(float(file.read()))
    if loads:
        out.append(f"\nLoad average at the ends of the runs: {min(loads):.1f} to {max(loads):.1f}.\n")
    return runs


def scheduler(folder, out):
    path = os.path.join(folder, "scheduler.txt")
    if not os.path.exists(path):
        return
    with open(path) as file:
        text = file.read()
    rows = re.findall(r"^(\S+/\S+)\s+time:\s+\[\S+ \S+ (\S+ \S+) ", text, re.M)
    if rows:
        out.append("## Scheduler\n\n| bench | time |\n| --- | --- |")
        out.extend(f"| {name} | {time} |" for name, time in rows)
        out.append("")


def bars(path, title, rows, unit, marks=()):
    """Horizontal bars: rows are (label, value, color, text); marks are (value, label)."""
    top, height, left, width = 34, 22, 210, 420
    largest = max([value for _, value, _, _ in rows] + [value for value, _ in marks])
    scale = width / largest if largest else 1
    bottom = top + height * len(rows)
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 110}" height="{bottom + 30}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="18" font-size="14">{title}</text>',
    ]
    for i, (label, value, color, text) in enumerate(rows):
        y = top + height * i
        svg.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{label}</text>')
        svg.append(f'<rect x="{left}" y="{y + 2}" width="{value * scale:.1f}" height="{height - 6}" fill="{color}"/>')
        svg.append(f'<text x="{left + value * scale + 5:.1f}" y="{y + 14}">{text}{unit}</text>')
    for value, label in marks:
        x = left + value * scale
        svg.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="black" stroke-dasharray="4 3"/>')
        svg.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    svg.append("</svg>\n")
    with open(path, "w") as file:
        file.write("\n".join(svg))


def main():
    folder = sys.argv[1]
    out = ["# Tables\n", "Written by `benches/summarize.py` from the files beside it.\n"]
    steps = read(folder, "model_steps.json")
    if steps:
        model_steps(steps, out)
        rows = [
            (case["case"], 100 * case["of_nearer_limit"], "#3b6ea5", f"{100 * case['of_nearer_limit']:.0f}")
            for case in steps["cases"]
        ]
        bars(
            os.path.join(folder, "limits.svg"),
            "Share of the nearer physical limit that a step reaches",
            rows,
            " %",
            [(100, "limit of the machine")],
        )
    stream = read(folder, "kv_stream.json")
    if stream:
        kv_stream(stream, out)
    runs = serving(folder, out)
    if runs:
        rows = [
            (f"{load}, {mode}", value, COLORS[mode], f"{value:.0f}")
            for load, modes in runs.items()
            for mode in MODES
            if modes[mode]
            for value in [statistics.median(run["p99_itl_ms"] for run in modes[mode].values())]
        ]
        bars(os.path.join(folder, "serving.svg"), "Time between two tokens, p99", rows, " ms")
    scheduler(folder, out)
    with open(os.path.join(folder, "summary.md"), "w") as file:
        file.write("\n".join(out))


if __name__ == "__main__":
    main()
