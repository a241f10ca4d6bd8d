"""The SMG gateway's own stubs against a running `baton serve` with the demo model. usage: smg_engine.py http://HOST:PORT"""

import hashlib
import io
import json
import zipfile

import grpc
from smg_grpc_proto import vllm_engine_pb2 as engine
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2 as common

from expect import Checks, server_url

MODEL = "baton-demo"
SUM_PROMPT = "<|user|>What is 37 + 58?<|end|><|assistant|>"
TIMEOUT_S = 60.0

check = Checks()


def ask(stub, **fields):
    """Chunks and completes of one request."""
    messages = list(stub.Generate(engine.GenerateRequest(**fields), timeout=TIMEOUT_S))
    chunks = [message.chunk for message in messages if message.HasField("chunk")]
    completes = [message.complete for message in messages if message.HasField("complete")]
    return chunks, completes


def information(stub):
    health = stub.HealthCheck(engine.HealthCheckRequest(), timeout=TIMEOUT_S)
    check(health.healthy, f"it is healthy: {health.message!r}")
    info = stub.GetModelInfo(engine.GetModelInfoRequest(), timeout=TIMEOUT_S)
    check(info.served_model_name == MODEL and info.is_generation, f"GetModelInfo names the model: {info.served_model_name}")
    check(info.vocab_size > 0 and info.max_context_length > 0, f"{info.vocab_size} tokens, {info.max_context_length} positions")
    check(len(info.eos_token_ids) > 0 and info.model_type and info.architectures, f"{info.model_type}: {list(info.architectures)}")
    about = stub.GetServerInfo(engine.GetServerInfoRequest(), timeout=TIMEOUT_S)
    check(about.data_parallel_size == 1 and about.kv_role == "", "GetServerInfo: one rank, nothing to arrange")
    loads = stub.GetLoads(engine.GetLoadsRequest(), timeout=TIMEOUT_S)
    check(loads.dp_rank_count == 1 and len(loads.loads) == 1, "GetLoads: one rank")
    load = loads.loads[0]
    check(load.max_total_num_tokens > 0 and 0 <= load.token_usage <= 1, f"its room: {load.max_total_num_tokens} tokens, {load.token_usage:.3f} used")


def tokenizer(stub):
    chunks = list(stub.GetTokenizer(common.GetTokenizerRequest(), timeout=TIMEOUT_S))
    data = b"".join(chunk.data for chunk in chunks)
    check(hashlib.sha256(data).hexdigest() == chunks[-1].sha256, f"{len(data)} bytes with their SHA-256")
    check(not any(chunk.sha256 for chunk in chunks[:-1]), "in the last chunk only")
    archive = zipfile.ZipFile(io.BytesIO(data))
    names = archive.namelist()
    check(archive.testzip() is None and "tokenizer.json" in names, f"a sound archive: {names}")
    check(not any(name.endswith(".safetensors") for name in names), "without weights")
    vocab = json.loads(archive.read("tokenizer.json"))
    return vocab


def generate(stub):
    params = engine.SamplingParams(temperature=0.0, max_tokens=32, skip_special_tokens=True)
    _, completes = ask(stub, request_id="clients-smg-text", text=SUM_PROMPT, sampling_params=params)
    check(len(completes) == 1 and completes[0].finish_reason == "stop", "text in, one complete out")
    whole = completes[0]
    check(whole.completion_tokens == len(whole.output_ids) > 0 and whole.prompt_tokens > 0, "with its counts")
    params.logprobs = 2
    chunks, completes = ask(stub, request_id="clients-smg-stream", text=SUM_PROMPT, sampling_params=params, stream=True)
    ids = [token for chunk in chunks for token in chunk.token_ids]
    check(ids == list(whole.output_ids) and len(chunks) == len(ids), f"streamed, a chunk for each of the same tokens: {ids}")
    check(completes[0].output_ids == whole.output_ids, "and all of them in the complete")
    check(all(len(chunk.output_logprobs.top_logprobs[0].values) == 2 for chunk in chunks), "with two alternatives each")
    check([chunk.completion_tokens for chunk in chunks] == list(range(1, len(ids) + 1)), "counted as they come")

    tokenized = engine.TokenizedInput(input_ids=[0, 2, 40, 41, 42])
    params = engine.SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=1, n=2)
    chunks, completes = ask(stub, request_id="clients-smg-ids", tokenized=tokenized, sampling_params=params, stream=True)
    check([complete.index for complete in completes] == [0, 1], "two choices from token ids")
    check(all(complete.finish_reason == "length" and complete.prompt_tokens == 5 for complete in completes), "nothing is added to ids")
    prompt = chunks[0].input_logprobs
    check(len(prompt.token_logprobs) == 5 and not prompt.token_logprobs[0].HasField("value"), "the prompt's logprobs; the first has none")


def embed(stub):
    tokenized = engine.TokenizedInput(input_ids=[0, 2, 40, 41, 42])
    answer = stub.Embed(engine.EmbedRequest(request_id="clients-smg-embed", tokenized=tokenized), timeout=TIMEOUT_S)
    length = sum(value * value for value in answer.embedding) ** 0.5
    check(len(answer.embedding) == answer.embedding_dim > 0, f"an embedding of {answer.embedding_dim} numbers")
    check(abs(length - 1) < 1e-5 and answer.prompt_tokens == 5, f"of length 1, of 5 tokens: {length}")


def kv_events(stub):
    events = stub.SubscribeKvEvents(common.SubscribeKvEventsRequest(), timeout=TIMEOUT_S)
    blocks, numbers, is_cleared = {}, [], False
    ids = [2 + (7 * i) % 200 for i in range(50)]
    expected = [ids[i : i + 16] for i in (0, 16, 32)]
    params = engine.SamplingParams(max_tokens=1, ignore_eos=True)

    def chain():
        # A prompt's blocks, found as a router would: by tokens, each after its parent.
        found, parent = [], None
        for tokens in expected:
            hashes = [name for name, (known, before) in blocks.items() if known == tokens and before == parent]
            if not hashes:
                break
            parent = hashes[0]
            found.append(parent)
        return found

    for batch in events:
        numbers.append(batch.sequence_number)
        for event in batch.events:
            if event.HasField("cleared"):
                blocks.clear()
                is_cleared = True
                ask(stub, request_id="clients-smg-kv", tokenized=engine.TokenizedInput(input_ids=ids), sampling_params=params)
            elif event.HasField("stored"):
                parent = event.stored.parent_block_hash if event.stored.HasField("parent_block_hash") else None
                for block in event.stored.blocks:
                    blocks[block.block_hash] = (list(block.token_ids), parent)
                    parent = block.block_hash
            else:
                for name in event.removed.block_hashes:
                    del blocks[name]
        if len(chain()) == 3:
            break
    events.cancel()
    check(is_cleared and numbers == list(range(1, len(numbers) + 1)), f"events begin afresh, in {len(numbers)} numbered batches")
    check(len(chain()) == 3, f"the prompt's blocks form a chain: {chain()}")
    check(all(len(tokens) == 16 for tokens, _ in blocks.values()), f"{len(blocks)} blocks of 16 tokens")


def abort(stub):
    params = engine.SamplingParams(max_tokens=1900, ignore_eos=True)
    request = engine.GenerateRequest(request_id="clients-smg-abort", text=SUM_PROMPT, sampling_params=params, stream=True)
    stream = stub.Generate(request, timeout=TIMEOUT_S)
    next(stream)
    stub.Abort(engine.AbortRequest(request_ids=["clients-smg-abort", "clients-nobody"]), timeout=TIMEOUT_S)
    rest = list(stream)
    check(rest[-1].complete.finish_reason == "abort", "an aborted stream ends with abort")
    stream = stub.Generate(request, timeout=TIMEOUT_S)
    next(stream)
    stream.cancel()
    check(stub.HealthCheck(engine.HealthCheckRequest(), timeout=TIMEOUT_S).healthy, "a cancelled one leaves the server well")


def errors(stub):
    def status(call):
        try:
            call()
        except grpc.RpcError as error:
            return error.code(), error.details()
        return grpc.StatusCode.OK, ""

    def refused(needle, **fields):
        code, details = status(lambda: ask(stub, **fields))
        check(code == grpc.StatusCode.INVALID_ARGUMENT and needle in details, f"{needle} is refused by name: {code}, {details}")

    refused("input", request_id="x")
    refused("top_p", text="a", sampling_params=engine.SamplingParams(top_p=1.5))
    refused("logprobs", text="a", sampling_params=engine.SamplingParams(logprobs=-1))
    refused("kv_transfer_params", text="a", kv_transfer_params_json="{}")
    refused("data_parallel_rank", text="a", data_parallel_rank=3)
    code, details = status(lambda: stub.Embed(engine.EmbedRequest(), timeout=TIMEOUT_S))
    check(code == grpc.StatusCode.INVALID_ARGUMENT and "tokenized" in details, f"an embedding of nothing: {details}")
    events = common.SubscribeKvEventsRequest(start_sequence_number=5)
    code, details = status(lambda: list(stub.SubscribeKvEvents(events, timeout=TIMEOUT_S)))
    check(code == grpc.StatusCode.OUT_OF_RANGE and "start_sequence_number" in details, f"past events are not kept: {details}")


def main():
    with grpc.insecure_channel(server_url().split("://", 1)[1]) as channel:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        for group in (information, tokenizer, generate, embed, kv_events, abort, errors):
            check.group(group.__name__, group, stub)
    check.finish()


main()
