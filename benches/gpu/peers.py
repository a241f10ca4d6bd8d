"""Others' code on the shapes that Baton is measured on, timed the same way: torch's attention, FlashInfer, transformers.

    python3 benches/gpu/peers.py attention|flashinfer|transformers [--smoke] --output FILE

Each case is a line of JSON, named as Baton's own; what is not installed or fails is a line too. Attention reads K and V that lie
in one piece, torch's having no paged cache, and FlashInfer's in pages of 16 tokens. --smoke takes tiny shapes, on the CPU where
there is no card.
"""

import argparse
import inspect
import json
import statistics
import time

N_HEADS, N_KV_HEADS, HEAD_DIM = 64, 8, 128
N_RUNS = 15
DECODES = [(1, 8192), (1, 131072), (16, 1024), (16, 8192), (16, 32768), (64, 1024), (64, 8192), (256, 2048)]
PREFILLS = [2048, 8192, 32768]


class Report:
    def __init__(self, path, is_smoke):
        self.file = open(path, "w")
        self.is_smoke = is_smoke

    def line(self, **fields):
        self.file.write(json.dumps(fields) + "\n")
        self.file.flush()
        print(fields, flush=True)

    def attempt(self, peer, what, case):
        """Runs a case; what goes wrong is its result."""
        try:
            case()
        except Exception as error:  # Whatever a peer's version does not have.
            self.line(peer=peer, absent=f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def seconds_of(torch, work):
    """Median of single runs with cold caches, by the card's clock."""
    work()
    if not torch.cuda.is_available():
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    # Several times the largest cache; it also keeps the card busy until what is timed is queued.
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    samples = []
    for _ in range(N_RUNS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        before.record()
        work()
        after.record()
        torch.cuda.synchronize()
        samples.append(before.elapsed_time(after) / 1e3)
    return statistics.median(samples)


def attention(report):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = f"torch {torch.__version__.split('+')[0]} flash"

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    def case(op, name, batch, n_queries, n_tokens):
        def run():
            q = tensor(batch, N_HEADS, n_queries, HEAD_DIM)
            k, v = (tensor(batch, N_KV_HEADS, n_tokens, HEAD_DIM) for _ in range(2))
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.inference_mode():
                work = lambda: scaled_dot_product_attention(q, k, v, is_causal=n_queries > 1, enable_gqa=True)
                report.line(op=op, case=name, peer=peer, seconds=seconds_of(torch, work))

        report.attempt(peer, f"{op}, {name}", run)

    for n_tokens in [19] if report.is_smoke else PREFILLS:
        case("attention_prefill", f"{n_tokens} tokens", 1, n_tokens, n_tokens)
    for batch, n_tokens in [(1, 33)] if report.is_smoke else DECODES:
        case("attention_decode", f"batch {batch} at {n_tokens}", batch, 1, n_tokens)
    dim = 64 if report.is_smoke else 8192
    a, b = tensor(dim, dim), tensor(dim, dim)
    seconds = seconds_of(torch, lambda: a @ b)
    report.line(op="product", case=f"{dim} cubed", peer=peer, seconds=seconds, tflop_per_s=2 * dim**3 / seconds / 1e12)


def flashinfer(report):
    import torch

    import flashinfer

    peer = f"FlashInfer {flashinfer.__version__}"

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

    def decode(batch, n_tokens):
        def run():
            n_blocks = -(-n_tokens // 16)
            cache = tensor(batch * n_blocks, 2, N_KV_HEADS, 16, HEAD_DIM)
            indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * n_blocks
            indices = torch.randperm(batch * n_blocks, device="cuda").to(torch.int32)
            last = torch.full((batch,), n_tokens - 16 * (n_blocks - 1), dtype=torch.int32, device="cuda")
            workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
            shape = (N_HEADS, N_KV_HEADS, HEAD_DIM, 16)
            wrapper.plan(indptr, indices, last, *shape, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
            q = tensor(batch, N_HEADS, HEAD_DIM)
            seconds = seconds_of(torch, lambda: wrapper.run(q, cache))
            report.line(op="attention_decode", case=f"batch {batch} at {n_tokens}", peer=peer, seconds=seconds)

        report.attempt(peer, f"decode, batch {batch} at {n_tokens}", run)

    def prefill(n_tokens):
        def run():
            q = tensor(n_tokens, N_HEADS, HEAD_DIM)
            k, v = (tensor(n_tokens, N_KV_HEADS, HEAD_DIM) for _ in range(2))
            seconds = seconds_of(torch, lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True))
            report.line(op="attention_prefill", case=f"{n_tokens} tokens", peer=peer, seconds=seconds)

        report.attempt(peer, f"prefill, {n_tokens} tokens", run)

    for n_tokens in PREFILLS:
        prefill(n_tokens)
    for batch, n_tokens in DECODES:
        decode(batch, n_tokens)


def transformers(report):
    """Continuous batching of a random model in the shape of Llama-3.1-8B: the load "128 at once" of serving."""
    import torch
    import transformers

    peer = f"transformers {transformers.__version__}"
    n_requests, n_in, n_out = (2, 8, 2) if report.is_smoke else (128, 1024, 128)
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0}
    if report.is_smoke:
        sizes |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 200}
    config = transformers.LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, sizes["vocab_size"], (n_requests, n_in), generator=generator).tolist()

    def model_with(implementation):
        with torch.device(device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                # Random weights of the config's own spread; nothing is downloaded.
                return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
            finally:
                torch.set_default_dtype(before)

    def run():
        # Names of the paged attention that needs no other package, newest first.
        errors = []
        for implementation in ["paged|sdpa", "sdpa_paged", "sdpa"]:
            try:
                model = model_with(implementation)
                break
            except Exception as error:
                errors.append(f"{implementation}: {error}")
        else:
            raise RuntimeError("; ".join(errors))
        settings = transformers.GenerationConfig(
            max_new_tokens=n_out, do_sample=False, eos_token_id=None, pad_token_id=0, bos_token_id=None
        )
        takes = inspect.signature(model.generate_batch).parameters
        wanted = {"generation_config": settings, "progress_bar": False, "persistent_manager": True}
        if report.is_smoke:
            # Else it takes most of the memory that there is.
            wanted["continuous_batching_config"] = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
        flags = {name: value for name, value in wanted.items() if name in takes}
        # Graphs are captured and memory is taken before what is timed.
        model.generate_batch(prompts[:2], **flags)
        began = time.perf_counter()
        answers = model.generate_batch(prompts, **flags)
        seconds = time.perf_counter() - began
        n_tokens = sum(len(answer.generated_tokens) for answer in answers.values())
        if n_tokens != n_requests * n_out:
            raise RuntimeError(f"{n_tokens} tokens, expected {n_requests * n_out}")
        case = f"{n_requests} at once"
        rates = {"output_throughput": n_tokens / seconds, "request_throughput": n_requests / seconds}
        report.line(op="serving", case=case, peer=peer, completed=len(answers), num_prompts=n_requests, **rates)

    report.attempt(peer, "continuous batching", run)


PEERS = {"attention": attention, "flashinfer": flashinfer, "transformers": transformers}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    report = Report(arguments.output, arguments.smoke)
    # An absent package is found out by the peer's own imports.
    report.attempt(arguments.peer, "all of it", lambda: PEERS[arguments.peer](report))


if __name__ == "__main__":
    main()
