"""`baton serve` on the card: greedy answers to compare, and loads to measure."""

import contextlib
import csv
import datetime
import json
import random
import subprocess
import urllib.request

from card import ROOT


@contextlib.contextmanager
def server(card, flags):
    """Runs a server; gives its address."""
    command = [card.bundle / "baton", "serve", "--device", "cuda", "--port", "0", *flags]
    card.log.write("$ " + " ".join(str(word) for word in command) + "\n")
    card.log.flush()
    process = subprocess.Popen(command, cwd=ROOT, env=card.environment(), stdout=subprocess.PIPE, stderr=card.log, text=True)
    try:
        ready = next((line for line in process.stdout if line.startswith("baton ready: ")), None)
        if ready is None:
            raise RuntimeError("the server ended before it was ready")
        yield ready.split(": ", 1)[1].strip()
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def complete(url, body, timeout_s):
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.load(answer)


def greedy(card, model, flags, n_tokens=None, prompts=None):
    """The goldens of a model with what the server says after the same prompts: [(prompt, token ids)]."""
    folder = ROOT / "tests" / "data" / "models" / model
    golden = json.loads((folder / "goldens.json").read_text())
    answers = []
    with server(card, ["--model", folder, "--kv-memory", "64MiB", *flags]) as url:
        for prompt in golden["prompts"]:
            if prompts is not None and prompt["name"] not in prompts:
                continue
            n_wanted = min(n_tokens or len(prompt["greedy"]["ids"]), len(prompt["greedy"]["ids"]))
            body = {
                "model": model,
                "prompt": prompt["input_ids"],
                "max_tokens": n_wanted,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            found = complete(url, body, min(card.seconds_left(), 120))["choices"][0]["token_ids"]
            if len(found) != n_wanted:
                raise RuntimeError(f"{model} {prompt['name']}: {len(found)} tokens, expected {n_wanted}")
            answers.append((prompt, found))
    if not answers:
        raise RuntimeError(f"{model}: none of the prompts {prompts}")
    return golden["tolerances"], answers


def n_wrong(card, model, tolerances, answers):
    """Tokens that are not the goldens', up to the first near tie, after which everything may differ."""
    wrong = 0
    for prompt, found in answers:
        for step, (want, got) in enumerate(zip(prompt["greedy"]["ids"], found)):
            if want != got:
                if prompt["greedy"]["gaps"][step] >= tolerances["f32_min_gap_for_equal_token"]:
                    card.log.write(f"{model} {prompt['name']}: token {step} is {got}, expected {want}\n")
                    wrong += 1
                break
    return wrong


def trace_window(source, target, seconds, seed):
    """A window of a trace of Azure's, as a trace of its own; how many requests it has."""
    with open(source, newline="") as file:
        header, *rows = csv.reader(file)
    times = [datetime.datetime.fromisoformat(row[0][:26]) for row in rows]
    span = (times[-1] - times[0]).total_seconds() - seconds
    start = times[0] + datetime.timedelta(seconds=random.Random(seed).uniform(0, max(span, 0)))
    end = start + datetime.timedelta(seconds=seconds)
    chosen = [row for row, time in zip(rows, times) if start <= time < end]
    with open(target, "w", newline="") as file:
        csv.writer(file).writerows([header, *chosen])
    return len(chosen)


# Requests per second and their lengths; the last sends all at once, as the peer gets them.
LOADS = {
    "poisson 4/s": ["--rate", "4", "--num-prompts", "120", "--input-len", "1024", "--output-len", "128"],
    "poisson 12/s": ["--rate", "12", "--num-prompts", "240", "--input-len", "1024", "--output-len", "128"],
    "128 at once": ["--rate", "inf", "--num-prompts", "128", "--input-len", "1024", "--output-len", "128"],
}
SMOKE_LOADS = {"2 at once": ["--rate", "inf", "--num-prompts", "2", "--input-len", "8", "--output-len", "2"]}

MODES = {
    "disaggregated": ["--prefill", "1", "--decode", "1", "--disaggregation-threshold", "0"],
    "mixed": ["--mixed", "1"],
    "one process": ["--prefill", "1", "--decode", "1", "--disaggregation-threshold", "0", "--colocate"],
}


def measure(card, modes, model_flags, loads):
    """Each load on each mode; 0 when every mode answered every request."""
    n_failed = 0
    (card.results / "serving.jsonl").unlink(missing_ok=True)
    for mode in modes:
        with server(card, [*model_flags, *MODES[mode]]) as url:
            for load, flags in loads.items():
                report = card.results / f"serving.{mode}.{load}.json".replace(" ", "-").replace("/", "-per-")
                command = [card.bundle / "baton", "bench", "--server", url, "--warmup", "2", "--seed", "1", *flags]
                status = card.run([*command, "--commit", card.commit, "--output", report])
                if status != 0 or not report.exists():
                    n_failed += 1
                    continue
                found = json.loads(report.read_text())
                n_failed += found["completed"] != found["num_prompts"]
                keys = ["completed", "num_prompts", "output_throughput", "request_throughput"]
                keys += [f"{p}_{what}_ms" for what in ("ttft", "itl") for p in ("p50", "p99")]
                line = {"op": "serving", "case": load, "peer": f"baton, {mode}"} | {key: found[key] for key in keys}
                card.append("serving.jsonl", line)
    return n_failed
