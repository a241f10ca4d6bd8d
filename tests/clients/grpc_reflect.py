"""grpcio with nothing but reflection (no generated stubs) against a running server. usage: grpc_reflect.py http://HOST:PORT"""

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# The messages of v1 are those of v1alpha under another package name, so these classes read both.
from grpc_reflection.v1alpha import reflection_pb2

from expect import Checks, server_url

SERVICE = "baton.v1.Baton"
SUM_PROMPT = "<|user|>What is 37 + 58?<|end|><|assistant|>"
TIMEOUT_S = 60.0

check = Checks()


class Reflected:
    """Message classes and calls of a service that is known only by what the server says about itself."""

    def __init__(self, channel, version="v1"):
        self.channel = channel
        self.ask = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        self.pool = descriptor_pool.DescriptorPool()
        self.known = set()

    def question(self, **fields):
        # "Not found" comes as an error_response from some servers and as the call's status from others.
        try:
            answer = next(self.ask(iter([reflection_pb2.ServerReflectionRequest(**fields)]), timeout=TIMEOUT_S))
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                raise LookupError(f"{fields}: {error.details()}") from error
            raise
        if answer.HasField("error_response"):
            raise LookupError(f"{fields}: {answer.error_response.error_message}")
        return answer

    def services(self):
        return [service.name for service in self.question(list_services="*").list_services_response.service]

    def load(self, **which):
        """Adds the named file and everything it imports to the pool, imports first."""
        files = {}
        for data in self.question(**which).file_descriptor_response.file_descriptor_proto:
            proto = descriptor_pb2.FileDescriptorProto.FromString(data)
            files[proto.name] = proto
        for proto in files.values():
            for needed in proto.dependency:
                if needed not in self.known and needed not in files:
                    self.load(file_by_filename=needed)
        for name, proto in files.items():
            if name not in self.known:
                self.known.add(name)
                self.pool.Add(proto)

    def message(self, name):
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name))

    def call(self, service, method):
        described = self.pool.FindServiceByName(service).FindMethodByName(method)
        kind = self.channel.unary_stream if described.server_streaming else self.channel.unary_unary
        return kind(
            f"/{service}/{method}",
            request_serializer=message_factory.GetMessageClass(described.input_type).SerializeToString,
            response_deserializer=message_factory.GetMessageClass(described.output_type).FromString,
        )


def reflection(reflected):
    services = reflected.services()
    for name in (SERVICE, "inference.GRPCInferenceService", "vllm.grpc.engine.VllmEngine", "grpc.health.v1.Health"):
        check(name in services, f"{name} is listed: {services}")
    reflected.load(file_containing_symbol=SERVICE)
    methods = {method.name for method in reflected.pool.FindServiceByName(SERVICE).methods}
    check({"Generate", "Abort", "ModelInfo", "Load"} <= methods, f"its methods are described: {sorted(methods)}")
    check.raises(LookupError, lambda: reflected.question(file_containing_symbol="baton.v1.Nothing"), "an unknown symbol is not found")


def generate_text(reflected):
    request = reflected.message("baton.v1.GenerateRequest")(request_id="clients-text", text=SUM_PROMPT)
    request.sampling.max_tokens = 32
    request.sampling.temperature = 0.0
    request.sampling.logprobs = 2
    messages = list(reflected.call(SERVICE, "Generate")(request, timeout=TIMEOUT_S))
    text = "".join(message.text for message in messages)
    check("95" in text, f"37 + 58 is 95: {text!r}")
    check({message.request_id for message in messages} == {"clients-text"}, "each message carries the request id")
    finishes = [message.finish for message in messages]
    check(finishes[-1] == 1 and not any(finishes[:-1]), f"one finish, STOP, on the last message: {finishes}")
    tokens = [token for message in messages for token in message.tokens]
    check([token.index for token in tokens] == list(range(len(tokens))), "tokens are numbered from 0 without a gap")
    check(all(len(message.tokens) <= 1 for message in messages), "at most one token in a message")
    check(all(token.logprobs.logprob <= 0.0 and len(token.logprobs.top) == 2 for token in tokens), "logprobs as asked")
    check(all(token.logprobs.rank == 1 for token in tokens), "greedy takes rank 1")
    usage = messages[-1].usage
    check(usage.prompt_tokens > 0 and usage.completion_tokens == len(tokens), f"usage counts: {usage.prompt_tokens} + {usage.completion_tokens}")


def generate_ids(reflected):
    request = reflected.message("baton.v1.GenerateRequest")()
    request.token_ids.ids.extend([0, 2, 40, 41, 42])
    request.sampling.max_tokens = 3
    request.sampling.temperature = 0.0
    request.sampling.ignore_eos = True
    request.sampling.prompt_logprobs = 1
    messages = list(reflected.call(SERVICE, "Generate")(request, timeout=TIMEOUT_S))
    tokens = [token for message in messages for token in message.tokens]
    check(len(tokens) == 3 and messages[-1].finish == 2, f"three tokens, then LENGTH: {len(tokens)}, {messages[-1].finish}")
    check(messages[-1].usage.prompt_tokens == 5, "nothing is added to token ids")
    check(all(message.request_id for message in messages), "the server made a request id")
    described = [message.prompt_logprobs for message in messages if message.HasField("prompt_logprobs")]
    check(len(described) == 1 and len(described[0].tokens) == 5, "prompt logprobs once, an entry for each prompt token")
    if described:
        check(len(described[0].tokens[0].top) == 0, "the first is empty")
        check(all(len(token.top) >= 1 and token.logprob <= 0.0 for token in described[0].tokens[1:]), "the others are filled")


def abort(reflected):
    request = reflected.message("baton.v1.GenerateRequest")(request_id="clients-abort", text=SUM_PROMPT)
    request.sampling.max_tokens = 1900
    request.sampling.temperature = 0.0
    request.sampling.ignore_eos = True
    stream = reflected.call(SERVICE, "Generate")(request, timeout=TIMEOUT_S)
    next(stream)
    ask = reflected.message("baton.v1.AbortRequest")
    answer = reflected.call(SERVICE, "Abort")(ask(request_ids=["clients-abort", "clients-nobody"]), timeout=TIMEOUT_S)
    rest = list(stream)
    check(answer.n_aborted == 1, f"one of the two was running: {answer.n_aborted}")
    check(rest and rest[-1].finish == 3, "the stream ends with ABORT")
    again = reflected.call(SERVICE, "Abort")(ask(request_ids=["clients-abort"]), timeout=TIMEOUT_S)
    check(again.n_aborted == 0, "aborting again finds nothing")


def information(reflected):
    info = reflected.call(SERVICE, "ModelInfo")(reflected.message("baton.v1.ModelInfoRequest")(), timeout=TIMEOUT_S)
    check(info.model == "baton-demo", f"ModelInfo names the model: {info.model}")
    check(info.vocab_size > 0 and info.max_model_len > 0 and info.dtype, f"{info.vocab_size} tokens, {info.max_model_len} positions, {info.dtype}")
    check(info.has_tokenizer and info.has_chat_template, "with tokenizer and chat template")
    load = reflected.call(SERVICE, "Load")(reflected.message("baton.v1.LoadRequest")(), timeout=TIMEOUT_S)
    roles = [instance.role for instance in load.instances]
    check(roles and set(roles) <= {"prefill", "decode", "mixed"}, f"Load lists the instances: {roles}")
    check(all(instance.ready and instance.n_blocks_free <= instance.n_blocks_total for instance in load.instances), "all ready, blocks add up")


def errors(reflected):
    def status(request):
        try:
            list(reflected.call(SERVICE, "Generate")(request, timeout=TIMEOUT_S))
        except grpc.RpcError as error:
            return error.code(), error.details()
        return grpc.StatusCode.OK, ""

    make = reflected.message("baton.v1.GenerateRequest")
    code, details = status(make())
    check(code == grpc.StatusCode.INVALID_ARGUMENT and "prompt" in details, f"no prompt: {code}, {details}")
    request = make(text="a")
    request.sampling.max_tokens = 0
    code, details = status(request)
    check(code == grpc.StatusCode.INVALID_ARGUMENT and "max_tokens" in details, f"no tokens: {code}, {details}")
    request = make(text="a")
    request.sampling.temperature = -1.0
    code, details = status(request)
    check(code == grpc.StatusCode.INVALID_ARGUMENT and "temperature" in details, f"a negative temperature: {code}, {details}")
    code, details = status(make(text="a", model="no-such-model"))
    check(code == grpc.StatusCode.NOT_FOUND and "no-such-model" in details, f"another model: {code}, {details}")


def main():
    target = server_url().split("://", 1)[1]
    with grpc.insecure_channel(target) as channel:
        reflected = Reflected(channel)
        check.group("reflection v1", reflection, reflected)
        for group in (generate_text, generate_ids, abort, information, errors):
            check.group(group.__name__, group, reflected)
        check.group("reflection v1alpha", lambda: check(SERVICE in Reflected(channel, "v1alpha").services(), "older tools find it too"))
    check.finish()


main()
