"""NVIDIA's tritonclient against a running `baton serve` with the demo model. usage: triton_infer.py http://HOST:PORT"""

import json
import queue
import urllib.error
import urllib.request

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from expect import Checks, server_url

MODEL = "baton-demo"
SUM_PROMPT = "<|user|>What is 37 + 58?<|end|><|assistant|>"
TIMEOUT_S = 60.0

check = Checks()


def text(name, value):
    tensor = triton.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([value.encode()], dtype=np.object_))
    return tensor


def flag(name, value):
    tensor = triton.InferInput(name, [1], "BOOL")
    tensor.set_data_from_numpy(np.array([value], dtype=bool))
    return tensor


def first(result, name):
    return result.as_numpy(name)[0].decode()


def sampling(**fields):
    """As samples of Triton's backends write it: a JSON object, numbers as text."""
    return text("sampling_parameters", json.dumps({name: str(value) for name, value in fields.items()}))


def information(client):
    check(client.is_server_live() and client.is_server_ready(), "the server lives and is ready")
    check(client.is_model_ready(MODEL), "the model is ready")
    check(not client.is_model_ready("no-such-model"), "another model is not")
    about = client.get_server_metadata()
    check(about.name == "baton" and about.version, f"the server names itself: {about.name} {about.version}")
    about = client.get_model_metadata(MODEL)
    inputs, outputs = {i.name: i for i in about.inputs}, {o.name: o for o in about.outputs}
    check(inputs["text_input"].datatype == "BYTES" and "stream" in inputs, f"inputs: {sorted(inputs)}")
    check({"text_output", "finish_reason"} <= set(outputs), f"outputs: {sorted(outputs)}")
    config = client.get_model_config(MODEL).config
    check(config.name == MODEL and config.model_transaction_policy.decoupled, "a decoupled model")
    check(any(i.name == "text_input" and not i.optional for i in config.input), "whose text is required")


def infer(client):
    asked = [text("text_input", SUM_PROMPT), sampling(temperature=0, max_tokens=32)]
    result = client.infer(MODEL, asked, request_id="clients-infer", client_timeout=TIMEOUT_S)
    answer = first(result, "text_output")
    check("95" in answer, f"37 + 58 is 95: {answer!r}")
    check(first(result, "finish_reason") == "stop", "it stops by itself")
    check(result.get_response().id == "clients-infer", "the request id comes back")

    cut = client.infer(MODEL, [text("text_input", SUM_PROMPT)], parameters={"temperature": 0.0, "max_tokens": 2})
    check(first(cut, "finish_reason") == "length", "options as parameters of the request")
    check(answer.startswith(first(cut, "text_output")), "and what they give is the beginning of the same answer")
    wanted = [triton.InferRequestedOutput("text_output")]
    only = client.infer(MODEL, asked, outputs=wanted)
    check(only.as_numpy("finish_reason") is None and first(only, "text_output") == answer, "only the outputs asked for")
    both = client.infer(MODEL, [*asked, flag("exclude_input_in_output", False)])
    check(first(both, "text_output") == SUM_PROMPT + answer, "the input first, when asked for")
    return answer


def stream(client, whole):
    results = queue.Queue()
    client.start_stream(callback=lambda result, error: results.put((result, error)))

    def ask(request_id, *inputs):
        client.async_stream_infer(MODEL, list(inputs), request_id=request_id, enable_empty_final_response=True)

    def answers(n_final):
        texts, finals, errors = {}, [], []
        while len(finals) + len(errors) < n_final:
            result, error = results.get(timeout=TIMEOUT_S)
            if error is not None:
                errors.append(error)
                continue
            response = result.get_response()
            texts.setdefault(response.id, []).append(first(result, "text_output"))
            if response.parameters["triton_final_response"].bool_param:
                finals.append((response.id, first(result, "finish_reason")))
        return texts, finals, errors

    options = sampling(temperature=0, max_tokens=32)
    ask("pieces", text("text_input", SUM_PROMPT), options, flag("stream", True))
    ask("streaming", text("text_input", SUM_PROMPT), options, flag("streaming", True))
    ask("whole", text("text_input", SUM_PROMPT), options, flag("stream", False))
    texts, finals, errors = answers(3)
    check(not errors, f"no errors: {errors}")
    check(sorted(finals) == [("pieces", "stop"), ("streaming", "stop"), ("whole", "stop")], f"one end each: {finals}")
    for name in ("pieces", "streaming", "whole"):
        check("".join(texts[name]) == whole, f"{name} says the same: {texts[name]}")
    check(len(texts["whole"]) == 1 and len(texts["pieces"]) > 3, "tokens as they come, or all in one response")

    ask("wrong", text("text_input", SUM_PROMPT), sampling(temperature=-1))
    ask("right", text("text_input", SUM_PROMPT), options, flag("stream", True))
    texts, finals, errors = answers(2)
    check(len(errors) == 1 and "temperature" in str(errors[0]), f"a wrong request fails by name: {errors}")
    check("".join(texts["right"]) == whole, "and the stream goes on")

    ask("long", text("text_input", SUM_PROMPT), sampling(max_tokens=1900, ignore_eos="true"), flag("stream", True))
    result, error = results.get(timeout=TIMEOUT_S)
    check(error is None, f"a long answer begins: {error}")
    client.stop_stream(cancel_requests=True)
    check(client.is_server_ready(), "a stream that is cancelled leaves the server well")


def errors(client):
    def infer(*inputs, model=MODEL):
        return lambda: client.infer(model, list(inputs))

    wrong = InferenceServerException
    prompt = text("text_input", "a")
    error = check.raises(wrong, infer(prompt, model="no-such-model"), "another model is refused", "no-such-model")
    check(error is not None and "NOT_FOUND" in str(error.status()), f"as not found: {error and error.status()}")
    error = check.raises(wrong, infer(flag("stream", False)), "no text is refused by name", "text_input")
    check(error is not None and "INVALID_ARGUMENT" in str(error.status()), f"as invalid: {error and error.status()}")
    check.raises(wrong, infer(prompt, flag("stream", True)), "a stream needs ModelStreamInfer", "stream")
    check.raises(wrong, infer(prompt, text("image", "x")), "an input that is not there is refused by name", "image")
    check.raises(wrong, infer(prompt, sampling(top_p=2)), "top_p above 1 is refused by name", "top_p")


def generate(url, whole):
    def post(path, body):
        request = urllib.request.Request(f"{url}/v2/models/{MODEL}/{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.read().decode()

    body = {"text_input": SUM_PROMPT, "parameters": {"temperature": 0, "max_tokens": 32}}
    answer = json.loads(post("generate", body))
    check(answer["text_output"] == whole and answer["model_name"] == MODEL, f"generate says the same: {answer}")
    events = [json.loads(line[len("data: ") :]) for line in post("generate_stream", body).split("\n") if line]
    check("".join(event["text_output"] for event in events) == whole, "and so does generate_stream")
    check(events[-1]["finish_reason"] == "stop", "with the reason in its last event")
    try:
        post("generate", {"text_input": "a", "top_p": 2})
        check(False, "a wrong option is refused: it was not")
    except urllib.error.HTTPError as error:
        said = json.loads(error.read())["error"]
        check(error.code == 400 and "top_p" in said, f"a wrong option is refused by name: {said}")


def main():
    url = server_url()
    with triton.InferenceServerClient(url.split("://", 1)[1]) as client:
        check.group("information", information, client)
        whole = []
        check.group("infer", lambda: whole.append(infer(client)))
        if whole:
            check.group("stream", stream, client, whole[0])
            check.group("generate", generate, url, whole[0])
    with triton.InferenceServerClient(url.split("://", 1)[1]) as client:
        check.group("errors", errors, client)
    check.finish()


main()
