"""Tables and plots of a results folder of a card: summary.md and SVGs, from the lines of JSON in it. Measures nothing."""

import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import summarize  # noqa: E402

OURS = "#c2571a"
AIMED = "#6b8e4e"


def lines(folder):
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for text in path.read_text().splitlines():
            try:
                found.append(json.loads(text))
            except json.JSONDecodeError:
                # A part that ran out of time may leave half a line.
                found.append({"peer": path.stem, "absent": "a line that ends early"})
    return found


def duration(seconds):
    return f"{seconds * 1e3:.3f} ms" if seconds < 1 else f"{seconds:.2f} s"


def parts(folder, out):
    out.append("## Parts\n\n| part | commit | passed | seconds |\n| --- | --- | --- | --- |")
    for path in sorted(folder.glob("*.json")):
        verdict = json.loads(path.read_text())
        if "part" in verdict:
            passed = "yes" if verdict["passed"] else "**no**"
            out.append(f"| {verdict['part']} | {verdict['commit'][:12]} | {passed} | {verdict['seconds']} |")
    out.append("")


def operators(points, folder, out):
    """Ours beside limit and peers, an operator a table."""
    ours = [point for point in points if point.get("peer") == "baton"]
    theirs = defaultdict(dict)
    for point in points:
        if point.get("peer") != "baton" and "seconds" in point:
            theirs[(point["op"], point["case"])][point["peer"]] = point["seconds"]
    for op in dict.fromkeys(point["op"] for point in ours):
        out.append(f"## {op}\n")
        out.append("| case | time | of limit | the limit | aim | peers: their time over ours |\n| --- | --- | --- | --- | --- | --- |")
        rows = []
        for point in ours:
            if point["op"] != op:
                continue
            aim = point.get("aim")
            met = "-" if aim is None else f"{aim:.0%}, {'met' if point['of_limit'] >= aim else 'missed'}"
            beside = theirs[(op, point["case"])]
            ratios = [f"{peer} {seconds / point['seconds']:.2f}" for peer, seconds in beside.items()]
            gap = f", host gap {point['host_gap_s'] * 1e6:.0f} us" if point.get("host_gap_s") is not None else ""
            out.append(
                f"| {point['case']} | {duration(point['seconds'])}{gap} | {point['of_limit']:.0%} | {point['limit']} | {met} "
                f"| {', '.join(ratios) or '-'} |"
            )
            share = 100 * point["of_limit"]
            rows.append((point["case"], share, OURS if aim is None else AIMED, f"{share:.0f}"))
        out.append("")
        summarize.bars(str(folder / f"{op}.svg"), f"{op}: share of its limit", rows, " %", [(100, "limit")])


def transfer(folder, out):
    """What the doctor has found of ways for KV."""
    path = folder / "kv-between-processes.json"
    if not path.exists() or not path.read_text():
        return
    report = json.loads(path.read_text())
    out.append(f"## KV between processes\n\n{report['bytes_per_pull'] >> 20} MiB a pull; `auto` takes {report['used']}.\n")
    out.append("| way | GB/s, median | of a copy on the host |\n| --- | --- | --- |")
    for way in report["paths"]:
        if way["missing"]:
            out.append(f"| {way['path']} | - | {way['missing']} |")
        else:
            out.append(f"| {way['path']} | {way['gb_per_s']:.1f} | {way['of_memcpy']:.0%} |")
    out.append("")


def serving(points, out):
    rows = [point for point in points if point.get("op") == "serving"]
    if not rows:
        return
    out.append("## Serving\n\n| load | who | output tokens/s | TTFT p50, p99, ms | ITL p50, p99, ms | done |\n| --- | --- | --- | --- | --- | --- |")
    for point in sorted(rows, key=lambda point: point["case"]):
        times = [
            f"{point[f'p50_{what}_ms']:.1f}, {point[f'p99_{what}_ms']:.1f}" if f"p50_{what}_ms" in point else "-"
            for what in ("ttft", "itl")
        ]
        done = f"{point['completed']} of {point['num_prompts']}"
        out.append(f"| {point['case']} | {point['peer']} | {point['output_throughput']:.0f} | {times[0]} | {times[1]} | {done} |")
    out.append("")


def write(folder):
    points = lines(folder)
    out = ["# Tables\n", "Written by `benches/gpu/run` from the files beside it; `machine.txt` says on what.\n"]
    parts(folder, out)
    operators([point for point in points if point.get("op") != "serving" and "absent" not in point], folder, out)
    transfer(folder, out)
    serving(points, out)
    absent = [point for point in points if "absent" in point]
    if absent:
        out.append("## Absent\n")
        out += [f"- {point['peer']}: {point['absent']}" for point in absent]
        out.append("")
    (folder / "summary.md").write_text("\n".join(out))
