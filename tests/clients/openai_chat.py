"""The official OpenAI package against a running `baton serve` with the demo model. usage: openai_chat.py http://HOST:PORT"""

import os
import typing

import openai
import pydantic

from expect import Checks, server_url

MODEL = "baton-demo"
QUESTION = [{"role": "user", "content": "What is 37 + 58?"}]
SUM_PROMPT = "<|user|>What is 37 + 58?<|end|><|assistant|>"

check = Checks()


def extra(response, name):
    """A field the package does not know, from the choice or from the response itself."""
    for holder in (response.choices[0], response):
        value = (holder.model_extra or {}).get(name)
        if value is not None:
            return value
    return None


def models(client):
    listed = client.models.list()
    check(listed.data[0].id == MODEL, f"models.list gives {MODEL} first: {[model.id for model in listed.data]}")
    check(listed.data[0].object == "model", "the entry is a model")
    check("root" in (listed.data[0].model_extra or {}), "the entry has a root")


def chat(client):
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=32, extra_headers={"x-request-id": "clients-chat-1"}
    )
    check(raw.headers.get("x-request-id") == "clients-chat-1", f"x-request-id comes back: {raw.headers.get('x-request-id')}")
    answer = raw.parse()
    message = answer.choices[0].message
    check(answer.object == "chat.completion" and answer.model == MODEL, "object and model are named")
    check(message.role == "assistant" and "95" in message.content, f"37 + 58 is 95: {message.content!r}")
    check(answer.choices[0].finish_reason == "stop", f"it stops by itself: {answer.choices[0].finish_reason}")
    usage = answer.usage
    check(usage.prompt_tokens > 0 and usage.completion_tokens > 0, f"usage counts: {usage}")
    check(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, "usage adds up")

    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 37 + 58?"}]}]
    same = client.chat.completions.create(model=MODEL, messages=parts, temperature=0, max_completion_tokens=32)
    check(same.choices[0].message.content == message.content, "content parts and max_completion_tokens mean the same")

    turns = [*QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": "What is 12 + 30?"}]
    second = client.chat.completions.create(model=MODEL, messages=turns, temperature=0, max_tokens=32)
    check("42" in second.choices[0].message.content, f"a second turn: {second.choices[0].message.content!r}")

    cut = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=2)
    check(cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2, "max_tokens cuts with finish_reason length")
    check(message.content.startswith(cut.choices[0].message.content), "and what it gives is the beginning of the same answer")


def chat_stream(client):
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=32)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=32, stream=True, stream_options={"include_usage": True}
        )
    )
    events = [chunk for chunk in chunks if chunk.choices]
    first = events[0].choices[0].delta
    check(first.role == "assistant" and first.content is not None, f"the first event carries the role: {first}")
    check(not any(chunk.choices[0].delta.role for chunk in events[1:]), "no later event repeats the role")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in events)
    check(text == whole.choices[0].message.content, f"the stream says the same as the whole answer: {text!r}")
    reasons = [chunk.choices[0].finish_reason for chunk in events]
    check(reasons[-1] == "stop" and not any(reasons[:-1]), f"one finish_reason, on the last choice: {reasons}")
    check(chunks[-1].choices == [] and chunks[-1].usage is not None, "the last chunk has no choices but the usage")
    check(not any(chunk.usage for chunk in chunks[:-1]), "no other chunk has a usage")
    n_tokens = chunks[-1].usage.completion_tokens
    check(chunks[-1].usage == whole.usage or n_tokens == whole.usage.completion_tokens, "usage is that of the whole answer")
    check(n_tokens <= len(events) <= n_tokens + 2, f"one event for each token: {len(events)} events, {n_tokens} tokens")
    check(len({chunk.id for chunk in chunks}) == 1, "all chunks have one id")
    check(all(chunk.object == "chat.completion.chunk" for chunk in chunks), "all are chat.completion.chunk")

    without = list(client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=4, stream=True))
    check(all(chunk.choices and not chunk.usage for chunk in without), "no usage unless asked for")

    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    again = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=32)
    check(again.choices[0].message.content == text, "a stream closed early leaves the server well")


def completions(client):
    text = client.completions.create(
        model=MODEL, prompt=SUM_PROMPT, temperature=0, max_tokens=32, extra_body={"return_token_ids": True}
    )
    check(text.object == "text_completion", "object is text_completion")
    check("95" in text.choices[0].text, f"a text prompt: {text.choices[0].text!r}")
    prompt_ids, output_ids = extra(text, "prompt_token_ids"), extra(text, "token_ids")
    check(prompt_ids and len(prompt_ids) == text.usage.prompt_tokens, f"return_token_ids gives the prompt's ids: {prompt_ids}")
    check(output_ids and len(output_ids) == text.usage.completion_tokens, f"and the output's: {output_ids}")

    by_ids = client.completions.create(model=MODEL, prompt=prompt_ids, temperature=0, max_tokens=32)
    check(by_ids.choices[0].text == text.choices[0].text, "the same prompt as ids gives the same text")
    check(by_ids.usage.prompt_tokens == len(prompt_ids), "nothing is added to ids")

    chunks = list(
        client.completions.create(
            model=MODEL, prompt=SUM_PROMPT, temperature=0, max_tokens=32, stream=True, stream_options={"include_usage": True}
        )
    )
    streamed = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    check(streamed == text.choices[0].text, "streamed, it is the same text")
    check(chunks[-1].choices == [] and chunks[-1].usage.total_tokens == text.usage.total_tokens, "with the usage last")


def echo(client):
    answer = client.completions.create(
        model=MODEL, prompt="What is 37 + 58?", temperature=0, max_tokens=3, echo=True, logprobs=2, extra_body={"ignore_eos": True}
    )
    choice = answer.choices[0]
    logprobs = choice.logprobs
    n_tokens = answer.usage.prompt_tokens + answer.usage.completion_tokens
    check("What is 37 + 58?" in choice.text, f"echo repeats the prompt: {choice.text!r}")
    check(answer.usage.completion_tokens == 3, "ignore_eos goes on to max_tokens")
    check(
        len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == n_tokens,
        f"one entry for each of {n_tokens} tokens: {len(logprobs.token_logprobs)}",
    )
    check(logprobs.token_logprobs[0] is None, f"the first token has no logprob: {logprobs.token_logprobs[0]}")
    check(all(isinstance(p, float) and p <= 0.0 for p in logprobs.token_logprobs[1:]), "all others have one, at most 0")
    check(logprobs.text_offset == sorted(logprobs.text_offset), "text offsets do not go back")
    check(all(2 <= len(top) <= 3 for top in logprobs.top_logprobs[1:]), "each has its two most likely, and itself")

    twice = client.completions.create(
        model=MODEL, prompt="What is 37 + 58?", temperature=0, max_tokens=3, echo=True, logprobs=2, extra_body={"ignore_eos": True}
    )
    check(twice.choices[0].logprobs.token_logprobs == logprobs.token_logprobs, "asked again (prompt cached), the same numbers")


def chat_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=32, logprobs=True, top_logprobs=3
    )
    entries = answer.choices[0].logprobs.content
    n_tokens = answer.usage.completion_tokens
    check(n_tokens - 1 <= len(entries) <= n_tokens, f"an entry for each token: {len(entries)} of {n_tokens}")
    check(all(entry.logprob <= 0.0 for entry in entries), "logprobs are at most 0")
    check(all(len(entry.top_logprobs) == 3 for entry in entries), "three alternatives each")
    ordered = [[top.logprob for top in entry.top_logprobs] for entry in entries]
    check(all(row == sorted(row, reverse=True) for row in ordered), "most likely first")
    check(all(entry.token == entry.top_logprobs[0].token for entry in entries), "greedy takes the first")
    data = b"".join(bytes(entry.bytes) for entry in entries if entry.bytes is not None)
    check(answer.choices[0].message.content.encode() in data, "the bytes spell the answer")
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=32, logprobs=True, top_logprobs=3, stream=True
        )
    )
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content or []]
    check([e.logprob for e in streamed] == [e.logprob for e in entries], "streamed, the same logprobs")


def stop(client):
    messages = [{"role": "user", "content": "Count from 1 to 9."}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=64, stop=["5"])
    check(answer.choices[0].message.content == "1, 2, 3, 4, ", f"stops before the stop text: {answer.choices[0].message.content!r}")
    check(answer.choices[0].finish_reason == "stop", "with finish_reason stop")
    across = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=64, stop=", 4, 5")
    check(across.choices[0].message.content == "1, 2, 3", f"also across tokens: {across.choices[0].message.content!r}")
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=64, stop=", 4, 5", stream=True)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    check(text == "1, 2, 3", f"a stream holds back what may become a stop text: {text!r}")


def seeds(client):
    def sample(seed):
        answer = client.completions.create(model=MODEL, prompt="a", temperature=1.8, max_tokens=24, seed=seed, extra_body={"ignore_eos": True})
        return answer.choices[0].text

    check(sample(7) == sample(7), "one seed, one text")
    check(len({sample(seed) for seed in range(5)}) > 1, "different seeds, different texts")


class Sum(pydantic.BaseModel):
    first: int = pydantic.Field(ge=0, le=999)
    second: int = pydantic.Field(ge=0, le=999)
    kind: typing.Literal["sum", "difference"]


def structured(client):
    parsed = client.chat.completions.parse(model=MODEL, messages=QUESTION, temperature=0, max_tokens=200, response_format=Sum)
    check(isinstance(parsed.choices[0].message.parsed, Sum), f"a pydantic model comes back: {parsed.choices[0].message.content!r}")
    check(parsed.choices[0].finish_reason == "stop", "a complete document ends by itself")

    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, temperature=1, seed=3, n=1, max_tokens=200, response_format=Sum
    ) as stream:
        final = stream.get_final_completion()
    check(isinstance(final.choices[0].message.parsed, Sum), f"streamed too: {final.choices[0].message.content!r}")

    several = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=1, n=3, max_tokens=20, extra_body={"guided_choice": ["yes", "no", "perhaps"]}
    )
    texts = [choice.message.content for choice in several.choices]
    check(all(text in ("yes", "no", "perhaps") for text in texts), f"each is one of the choices: {texts}")

    wrong = lambda: client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=4,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strange"}}},
    )
    check.raises(openai.BadRequestError, wrong, "a schema that cannot be compiled is refused by name", "response_format")


def rules(client):
    plain = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=8, logprobs=True)
    first = plain.choices[0].logprobs.content[0].token
    ids = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=8, extra_body={"return_token_ids": True}
    )
    banned = extra(ids, "token_ids")[0]
    other = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, logit_bias={str(banned): -100}
    )
    check(other.choices[0].logprobs.content[0].token != first, f"logit_bias -100 rules {first!r} out")
    long = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=24, extra_body={"min_tokens": 24}
    )
    check(long.usage.completion_tokens == 24, "min_tokens holds the end back")
    best = client.completions.create(model=MODEL, prompt=SUM_PROMPT, temperature=1, max_tokens=8, n=1, best_of=4, seed=1)
    check(len(best.choices) == 1 and best.usage.completion_tokens > 8, f"best_of shows one of four: {best.usage}")


def errors(client):
    def ask(**changes):
        return lambda: client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, "max_tokens": 4} | changes)

    error = check.raises(openai.BadRequestError, ask(logit_bias={"5": 101}), "a logit_bias past 100 is refused by name", "logit_bias")
    if error is not None:
        body = error.body if isinstance(error.body, dict) else {}
        check({"message", "type", "param", "code"} <= set(body), f"the error has OpenAI's shape: {body}")
    missing = check.raises(openai.NotFoundError, ask(model="no-such-model"), "another model is not found", "no-such-model")
    check(missing is not None and missing.status_code == 404, "that is a 404")
    check.raises(openai.BadRequestError, ask(temperature=-1), "a negative temperature is refused by name", "temperature")
    check.raises(openai.BadRequestError, ask(top_p=1.5), "top_p above 1 is refused by name", "top_p")
    check.raises(openai.BadRequestError, ask(max_tokens=0), "no tokens are refused by name", "max_tokens")
    check.raises(openai.BadRequestError, ask(messages=[]), "no messages are refused by name", "messages")
    check.raises(openai.BadRequestError, ask(logprobs=True, top_logprobs=21), "too many logprobs are refused by name", "top_logprobs")
    long = [{"role": "user", "content": "baton " * 20_000}]
    check.raises(openai.BadRequestError, ask(messages=long), "a prompt longer than the model is refused")
    too_big = lambda: client.completions.create(model=MODEL, prompt=[0, 4_000_000_000], max_tokens=2)
    check.raises(openai.BadRequestError, too_big, "a token id outside the vocabulary is refused")
    fine = ask(temperature=0, extra_body={"repetition_penalty": 1.0, "logit_bias": None, "a_field_of_tomorrow": {"x": 1}})()
    check(fine.choices[0].finish_reason in ("length", "stop"), "neutral and unknown fields are accepted")


def main():
    client = openai.OpenAI(
        base_url=server_url() + "/v1", api_key=os.environ.get("OPENAI_API_KEY", "unused"), max_retries=0, timeout=60.0
    )
    for group in (models, chat, chat_stream, completions, echo, chat_logprobs, stop, seeds, structured, rules, errors):
        check.group(group.__name__, group, client)
    check.finish()


main()
