"""Measures one front door of known times with `baton bench` and with guidellm, in turn, and compares what they say.

The front door is `baton null`: no model computes anything, the first token comes after a fixed time and the others at fixed
gaps, so both load generators should report those times and what one core costs on top.

    python3 -m venv guidellm && guidellm/bin/pip install guidellm==0.8.1
    cargo build && python3 tests/clients/load_generators.py --guidellm guidellm/bin/guidellm --output DIR

Writes DIR/rounds.json (every round as reported) and DIR/summary.md. Ends with 1 unless counts are equal and the medians of the
rounds are within 5 % or 1 ms of each other. guidellm's "inter-token latency" is one mean per request, which `baton bench`
calls TPOT; so that is what is compared, and the gaps between tokens are held against the server's own.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(baton, first_ms, every_ms):
    """The front door and its URL."""
    command = [baton, "null", "--first-token-after", f"{first_ms}ms", "--token-every", f"{every_ms}ms"]
    command += ["--log-level", "warn"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline()
    if "ready: " not in line:
        raise SystemExit(f"baton null said {line!r}")
    return server, line.split()[-1]


def baton_bench(args, url, folder):
    report = folder / "baton.json"
    command = [args.baton, "bench", "--server", url, "--endpoint", "completions", "--concurrency", str(args.streams)]
    command += ["--num-prompts", str(args.requests), "--input-len", str(args.input), "--output-len", str(args.tokens)]
    command += ["--output", str(report)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = json.loads(report.read_text())
    return {
        "completed": found["completed"],
        "failed": found["failed"],
        "output_tokens": found["total_output_tokens"],
        "ttft_p50_ms": found["p50_ttft_ms"],
        "tpot_p50_ms": found["p50_tpot_ms"],
        "itl_p50_ms": found["p50_itl_ms"],
        "e2e_p50_ms": found["p50_e2el_ms"],
    }


def guidellm(args, url, folder):
    report = folder / "guidellm.json"
    command = [args.guidellm, "run", "--backend", f"kind=openai_http,target={url},request_format=/v1/completions"]
    command += ["--profile", f"kind=concurrent,streams={args.streams}"]
    command += ["--constraint", f"kind=max_requests,count={args.requests}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={ROOT / 'models/demo'}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens={args.input},output_tokens={args.tokens}"]
    command += ["--output", f"kind=json,path={report}", "--disable-console"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise SystemExit(f"guidellm: {done.stdout[-2000:]}")
    [found] = json.loads(report.read_text())["benchmarks"]
    metrics = found["metrics"]
    median = lambda name: metrics[name]["successful"]["median"]
    return {
        "completed": metrics["request_totals"]["successful"],
        "failed": metrics["request_totals"]["errored"] + metrics["request_totals"]["incomplete"],
        "output_tokens": int(metrics["output_token_count"]["successful"]["total_sum"]),
        "ttft_p50_ms": median("time_to_first_token_ms"),
        "tpot_p50_ms": median("inter_token_latency_ms"),
        "e2e_p50_ms": median("request_latency") * 1e3,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--baton", default=str(ROOT / "target/debug/baton"))
    parser.add_argument("--guidellm", required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--first-ms", type=int, default=100)
    parser.add_argument("--every-ms", type=int, default=20)
    args = parser.parse_args()
    version = subprocess.run([args.guidellm, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    rounds = []
    server, url = start(args.baton, args.first_ms, args.every_ms)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for index in range(args.rounds):
                pair = {"baton": baton_bench(args, url, pathlib.Path(folder))}
                pair["guidellm"] = guidellm(args, url, pathlib.Path(folder))
                pair["load_average"] = pathlib.Path("/proc/loadavg").read_text().split()[0]
                rounds.append(pair)
                print(f"round {index + 1}: {json.dumps(pair)}", file=sys.stderr)
    finally:
        server.terminate()
        server.wait()

    median = lambda tool, key: statistics.median(pair[tool][key] for pair in rounds)
    lines = [
        f"{args.rounds} rounds in turn, each {args.requests} requests of {args.tokens} tokens, {args.streams} in flight, against",
        f"`baton null --first-token-after {args.first_ms}ms --token-every {args.every_ms}ms`; {version}. Medians of the rounds.",
        "",
        "| | baton bench | guidellm | difference | agree |",
        "| --- | --- | --- | --- | --- |",
    ]
    agree = True
    for key in ["completed", "failed", "output_tokens"]:
        ours, theirs = ({pair[tool][key] for pair in rounds} for tool in ["baton", "guidellm"])
        same = ours == theirs and len(ours) == 1
        agree &= same
        shown = lambda values: ", ".join(map(str, sorted(values)))
        lines.append(f"| {key}, each round | {shown(ours)} | {shown(theirs)} | | {'yes' if same else 'NO'} |")
    for key in ["ttft_p50_ms", "tpot_p50_ms", "e2e_p50_ms"]:
        ours, theirs = median("baton", key), median("guidellm", key)
        # guidellm's end-to-end time ends with the stream, ours with the last token; what lies between is far below the bound.
        same = abs(ours - theirs) <= max(1.0, 0.05 * theirs)
        agree &= same
        lines.append(f"| {key} | {ours:.2f} | {theirs:.2f} | {ours - theirs:+.2f} ms | {'yes' if same else 'no'} |")
    itl = median("baton", "itl_p50_ms")
    same = abs(itl - args.every_ms) <= max(1.0, 0.05 * args.every_ms)
    agree &= same
    lines.append(f"| itl_p50_ms | {itl:.2f} | the server's {args.every_ms} | {itl - args.every_ms:+.2f} ms | {'yes' if same else 'no'} |")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "rounds.json").write_text(json.dumps(rounds, indent=2) + "\n")
    (args.output / "summary.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
