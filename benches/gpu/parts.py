"""The parts of a run on a card. Each takes a Card and returns 0 if it passed; what they measure goes to lines of JSON."""

import shutil
import subprocess
import sys
import time

import serving
from card import ROOT, Smoke

# Greedy choices through HTTP are compared for these, one of each kind of attention.
SERVED_MODELS = ["llama3-tied-ropescaled", "mistral-swa32", "gemma3-two-ropes", "qwen3-moe", "gpt-oss-bf16"]
LARGE_MODEL = ROOT / "benches" / "models" / "llama-3.1-8b"

# Under compute-sanitizer a test takes some fifty times as long, so these are what is looked at: every kernel once, the
# longest last. Races are looked for where only our own kernels run.
MEMCHECKED = ["operators::", "moe::", "kv::", "attention::"]
RACECHECKED = ["moe::", "operators::row_operators", "attention::"]


def is_smoke(card):
    return isinstance(card, Smoke)


def doctor(card):
    shutil.which("nvidia-smi") and card.run(["nvidia-smi"])
    if is_smoke(card):
        # It measures with gigabytes.
        return card.run([card.bundle / "baton", "doctor", "--help"])
    return card.run([card.bundle / "baton", "doctor", "cuda"])


def transfer(card):
    """KV from the card of one process to that of another, by each way."""
    if is_smoke(card):
        # It takes the kernels of a head size that nothing else here does.
        return card.run([card.bundle / "baton", "doctor", "transfer", "--device", "cpu", "--size", "1MiB", "--rounds", "1"])
    report = card.output_of([card.bundle / "baton", "doctor", "transfer", "--device", "cuda", "--json"])
    (card.results / "kv-between-processes.json").write_text(report)
    return 0 if report else 1


def device(card):
    tests = ["operators::weights_of_another_dtype"] if is_smoke(card) else []
    return card.test([card.bundle / "device", *tests, "--test-threads", "1"])


def goldens(card):
    tests = ["cuda::a_cache_is_sized"] if is_smoke(card) else ["cuda::"]
    return card.test([card.bundle / "goldens", *tests, "--test-threads", "1"])


def engine(card):
    """Recorded steps, and KV that leaves the card."""
    graphs = ["a_step_that_cannot_be_recorded"] if is_smoke(card) else []
    n_failed = card.test([card.bundle / "graphs", *graphs, "--test-threads", "1"])
    return n_failed + card.test([card.bundle / "transports", "--test-threads", "1"])


def http(card):
    flags = ["--dtype", "f32", "--disaggregation-threshold", "0"]
    if is_smoke(card):
        tolerances, answers = serving.greedy(card, SERVED_MODELS[0], flags, n_tokens=2, prompts=["short"])
        return serving.n_wrong(card, SERVED_MODELS[0], tolerances, answers)
    return sum(serving.n_wrong(card, model, *serving.greedy(card, model, flags)) for model in SERVED_MODELS)


def deterministic(card):
    """The same tokens disaggregated, by memory that is mapped or copied, mixed, and in small steps."""
    flags = ["--dtype", "bf16", "--deterministic", "on"]
    few = {"n_tokens": 2, "prompts": ["short"]} if is_smoke(card) else {}
    apart = ["--disaggregation-threshold", "0"]
    ways = [apart, [*apart, "--kv-transport", "shared-memory"], ["--mixed", "1"]]
    ways.append(["--mixed", "1", "--max-batch-tokens", "16", "--max-num-seqs", "16"])
    found = [serving.greedy(card, SERVED_MODELS[0], [*flags, *way], **few)[1] for way in ways]
    tokens = [[ids for _, ids in answers] for answers in found]
    card.log.write(f"{len(tokens[0])} answers in {len(ways)} ways\n")
    return 0 if all(ids == tokens[0] for ids in tokens) else 1


def sanitized(tool, filters):
    def part(card):
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            # In a smoke run anything that runs what it is given does.
            sanitizer = "env" if is_smoke(card) else None
        if sanitizer is None:
            card.log.write("compute-sanitizer is not in PATH\n")
            return 1
        # A test that asks for more memory than there is has an error of the driver as its point.
        options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
        prefix = [sanitizer] if sanitizer == "env" else [sanitizer, *options]
        chosen = ["operators::embed"] if is_smoke(card) else filters
        listed = card.output_of([card.bundle / "device", "--list"])
        tests = [line.removesuffix(": test") for line in listed.splitlines() if line.endswith(": test")]
        tests = [test for name in chosen for test in tests if test.startswith(name)]
        if not tests:
            card.log.write(f"none of {chosen} is among the tests\n")
            return 1
        failed = []
        for test in tests:
            began = time.monotonic()
            # Each in a process of its own, so that when time runs out it is known which were clean.
            status = card.test([*prefix, card.bundle / "device", "--exact", test, "--test-threads", "1"])
            card.log.write(f"{tool}: {test}: {status}, {time.monotonic() - began:.1f} s\n")
            if status != 0:
                failed.append(test)
        if tool == "racecheck" and not is_smoke(card):
            # Products by our own kernel.
            test = "cuda::deterministic_bits_do_not_depend_on_chunks_or_batch"
            failed += [test] if card.test([*prefix, card.bundle / "goldens", "--exact", test]) else []
        card.log.write(f"{tool}: {len(tests)} tests, failed: {failed}\n")
        return len(failed)

    return part


def operators(*names):
    def part(card):
        output = card.results / f"{names[0]}.jsonl"
        scale = ["--smoke"] if is_smoke(card) else []
        return card.run([card.bundle / "cuda_ops", *names, *scale, *card.ops_flags(), "--output", output])

    return part


def steps(card):
    if is_smoke(card):
        sizes = ["--model", ROOT / "tests/data/models" / SERVED_MODELS[0], "--batches", "1,2", "--context", "20"]
        sizes += ["--prefill", "24", "--steps", "2", "--measure-bytes", "65536"]
    else:
        sizes = ["--model", LARGE_MODEL, "--packed", card.cache / "baton" / "packed"]
    return card.run([card.bundle / "cuda_steps", *sizes, *card.ops_flags(), "--output", card.results / "steps.jsonl"])


def peers(*names):
    """Others' code on the same shapes. Whichever is absent or fails says so in the results, and the part passes."""

    def part(card):
        for name in names:
            output = card.results / f"peer-{name}.jsonl"
            scale = ["--smoke"] if is_smoke(card) else []
            command = [sys.executable, ROOT / "benches/gpu/peers.py", name, *scale, "--output", output]
            try:
                status = card.run(command)
            except subprocess.TimeoutExpired:
                status = "out of time"
            if status != 0:
                with open(output, "a") as file:
                    file.write(f'{{"peer": "{name}", "absent": "ended with {status}, see the log"}}\n')
        return 0

    return part


def served(card):
    if is_smoke(card):
        folder = ROOT / "tests/data/models" / SERVED_MODELS[0]
        flags = ["--model", folder, "--kv-memory", "4MiB", "--dtype", "f32"]
        return serving.measure(card, serving.MODES, flags, serving.SMOKE_LOADS)
    loads = dict(serving.LOADS)
    trace = card.bundle / "trace.csv"
    if trace.exists():
        loads["azure, 90 s"] = ["--trace", trace, "--max-input-len", "8192", "--max-output-len", "512"]
        del loads["poisson 4/s"]
    flags = ["--model", LARGE_MODEL, "--load-format", "dummy", "--max-model-len", "16384"]
    flags += ["--max-batch-tokens", "4096", "--max-num-seqs", "256"]
    return serving.measure(card, serving.MODES, flags, loads)


# In the order of what matters most: name, most seconds, what it does.
PARTS = {
    "doctor": (60, doctor),
    "device": (240, device),
    "goldens": (180, goldens),
    "engine": (120, engine),
    "http": (150, http),
    "deterministic": (90, deterministic),
    "decode": (90, operators("decode")),
    "prefill": (60, operators("prefill")),
    "peers": (120, peers("attention", "flashinfer")),
    "steps": (240, steps),
    "memcheck": (300, sanitized("memcheck", MEMCHECKED)),
    "racecheck": (300, sanitized("racecheck", RACECHECKED)),
    "operators": (120, operators("operators", "sampling", "transfers")),
    "products": (120, operators("products")),
    "transfer": (60, transfer),
    "serving": (480, served),
    "transformers": (240, peers("transformers")),
}
