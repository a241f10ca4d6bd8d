#!/usr/bin/env python3
"""Tables and plots of a results folder: summary.md and an SVG for each that has one. Standard library only; measures nothing."""

import glob
import json
import math
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
    out.append("## KV from one process to another\n")
    out.append("| path | GB/s, median | min to max | of a plain copy | of raw TCP |")
    out.append("| --- | --- | --- | --- | --- |")
    for path in report["paths"]:
        rates = path["samples_gb_per_s"]
        if not rates:
            out.append(f"| {path['path']} | not measured: {path['missing']} | | | |")
            continue
        out.append(
            f"| {path['path']} | {path['gb_per_s']:.2f} | {min(rates):.2f} to {max(rates):.2f} "
            f"| {path['of_memcpy']:.0%} | {path['of_raw_tcp']:.0%} |"
        )
    out.append(f"\nShares are medians of the ratios within a round. Load average {report['load_average'].split()[0]}.\n")


def migration(rows, out):
    out.append("## The gap that a client sees when its request moves\n")
    out.append("| transport | way | context | bytes a move | step, ms | extra gap p50, ms | in steps | max, ms | the move, s |")
    out.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    again = defaultdict(list)
    for row in rows:
        m = row["measured"]
        again[row["context_tokens"]].append(m["recompute_ms"])
        out.append(
            f"| {row['transport']} | {row['way']} | {row['context_tokens']} | {m['bytes_per_move'] / 1e6:.1f} MB "
            f"| {m['step_ms']:.0f} | {m['extra_gap_ms_p50']:.0f} | {m['extra_gap_in_steps_p50']:.2f} "
            f"| {m['extra_gap_ms_max']:.0f} | {m['move_seconds_p50']:.2f} |"
        )
    times = "; ".join(f"{length}: {statistics.median(ms) / 1e3:.1f} s" for length, ms in sorted(again.items()))
    moves = sorted({row["measured"]["n_moves"] for row in rows})
    out.append(f"\n{' or '.join(map(str, moves))} moves a row. Computing the context again, by length: {times}.\n")
    return {length: statistics.median(ms) for length, ms in again.items()}


def move_interference(report, out):
    out.append("## Requests that stay while a neighbour moves\n")
    out.append("| transport | rate limit | time between tokens at the source | at the destination | quartiles | a move, s |")
    out.append("| --- | --- | --- | --- | --- | --- |")
    for row in report["rows"]:
        m = row["measured"]
        quartiles = [
            "{0:.2f} to {2:.2f}".format(*statistics.quantiles(m[f"itl_ratios_at_{end}"], n=4))
            for end in ("source", "destination")
        ]
        out.append(
            f"| {row['transport']} | {row['move_rate']} | x {m['itl_ratio_at_source_p50']:.3f} "
            f"| x {m['itl_ratio_at_destination_p50']:.3f} | {quartiles[0]}; {quartiles[1]} | {m['move_seconds_p50']:.2f} |"
        )
    first = report["rows"][0]["measured"]
    out.append(
        f"\nMedians over {first['n_moves']} moves of {first['context_tokens']} tokens of the mean time between tokens during "
        f"a move over the 1.5 s before it, {first['n_others_each']} others on each instance. "
        f"Load average at the end {report['load_average'].split()[0]}.\n"
    )


def handoff(report, out):
    out.append("## What of a handoff the compute does not hide\n")
    out.append("| transport | prompt | KV | TTFT p50, ms | exposed p50, ms | share of TTFT | max |")
    out.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in report["rows"]:
        out.append(
            f"| {row['transport']} | {row['prompt_tokens']} | {row['kv_bytes'] / 1e6:.0f} MB | {row['ttft_ms_p50']:.0f} "
            f"| {row['exposed_ms_p50']:.2f} | {row['exposed_share_of_ttft_p50']:.3%} | {row['exposed_share_of_ttft_max']:.3%} |"
        )
    out.append("")


def rebalance(report, title, out):
    out.append(f"## {title}\n")
    keys = ["ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99", "imbalance_p50", "imbalance_max"]
    runs = {name: [r["measured"] for r in report["rows"] if r["rebalance"] == name] for name in ("off", "act")}
    out.append("| | off, median of rounds | act | act over off, median of rounds | in each round |")
    out.append("| --- | --- | --- | --- | --- |")
    for key in keys:
        off, act = ([run[key] for run in runs[name]] for name in ("off", "act"))
        ratios = [b / a for a, b in zip(off, act) if a]
        out.append(
            f"| {key} | {statistics.median(off):.1f} | {statistics.median(act):.1f} "
            f"| {statistics.median(ratios) if ratios else float('nan'):.2f} | {', '.join(f'{r:.2f}' for r in ratios)} |"
        )
    moves = [run["n_moves"] for run in runs["act"]]
    preemptions = {name: [run.get("n_preemptions", "not counted") for run in runs[name]] for name in runs}
    out.append(
        f"\n{runs['act'][0]['n_requests']} requests in the first round; moves in each: {moves}; preemptions in each: "
        f"{preemptions['off']} off, {preemptions['act']} on.\n"
    )


def gaps(path, rows, again):
    """Extra gaps over the context, both logarithmic."""
    lines = defaultdict(list)
    for row in rows:
        gap = max(row["measured"]["extra_gap_ms_p50"], 1.0)
        lines[(row["transport"], row["way"])].append((row["context_tokens"], gap))
    lines[("", "computed again")] = list(again.items())
    steps = sorted({row["context_tokens"]: row["measured"]["step_ms"] for row in rows}.items())
    lines[("", "one step")] = steps
    colors = {"grpc": "#3b6ea5", "shared-memory": "#c2571a", "in-process": "#6b8e4e", "": "#888"}
    largest = max(gap for points in lines.values() for _, gap in points)
    lengths = [length for points in lines.values() for length, _ in points]
    left, top, width, height = 70, 40, 470, 300

    def at(length, gap):
        x = left + width * math.log(length / min(lengths)) / math.log(max(lengths) / min(lengths))
        return x, top + height * (1 - math.log(gap) / math.log(largest))

    svg = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="400" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="8" y="20" font-size="14">Extra gap of a move, median, ms, over the context in tokens</text>',
    ]
    for power in range(int(math.log10(largest)) + 1):
        y = at(min(lengths), 10**power)[1]
        svg.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        svg.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{10**power}</text>')
    for length in sorted(set(lengths)):
        x = at(length, 1)[0]
        svg.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{length}</text>')
    labels = []
    for (transport, way), points in lines.items():
        points = [at(*point) for point in sorted(points)]
        dash = {"live": "", "one step": ' stroke-dasharray="2 3"'}.get(way, ' stroke-dasharray="6 3"')
        path_points = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        svg.append(f'<polyline points="{path_points}" fill="none" stroke="{colors[transport]}" stroke-width="2"{dash}/>')
        labels.append((points[-1][1], f"{transport} {way}".strip(), colors[transport]))
    last = 0
    for y, label, color in sorted(labels):
        last = max(y, last + 15)
        svg.append(f'<text x="{left + width + 10}" y="{last + 4:.1f}" fill="{color}">{label}</text>')
    svg.append("</svg>\n")
    with open(path, "w") as file:
        file.write("\n".join(svg))


def moves(folder, out):
    parts = [read(folder, name) for name in ("migration.json", "migration_long.json", "migration_32k.json")]
    rows = [row for part in parts if part for row in part["rows"]]
    if rows:
        again = migration(rows, out)
        gaps(os.path.join(folder, "migration.svg"), rows, again)
    for name, part in [("move_interference", move_interference), ("handoff", handoff)]:
        report = read(folder, name + ".json")
        if report:
            part(report, out)
    report = read(folder, "rebalance.json")
    if report:
        rebalance(report, "A skewed load with the rebalancer off and on", out)
    full = read(folder, "rebalance_full.json")
    if full:
        rebalance(full, "The same where one side runs out of blocks", out)
    if report or full:
        chosen = (full or report)["rows"]
        runs = {name: [r["measured"] for r in chosen if r["rebalance"] == name] for name in ("off", "act")}
        bar = [
            (f"{label}, {name}", value, color, f"{value:.0f}")
            for key, label in [("ttft_ms_p99", "TTFT p99"), ("itl_ms_p99", "ITL p99"), ("itl_ms_p50", "ITL p50")]
            for name, color in [("off", "#3b6ea5"), ("act", "#c2571a")]
            for value in [statistics.median(run[key] for run in runs[name])]
        ]
        bars(os.path.join(folder, "rebalance.svg"), "Skewed load, rebalancer off and on", bar, " ms")


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
    # The first report of the transports had another form.
    if stream and "paths" in stream:
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
    moves(folder, out)
    with open(os.path.join(folder, "summary.md"), "w") as file:
        file.write("\n".join(out))


if __name__ == "__main__":
    main()
