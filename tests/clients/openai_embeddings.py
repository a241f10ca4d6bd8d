"""Embeddings by the official OpenAI package against a running `baton serve` with the demo model. usage: openai_embeddings.py http://HOST:PORT"""

import os

import openai

from expect import Checks, server_url

MODEL = "baton-demo"

check = Checks()


def length(vector):
    return sum(value * value for value in vector) ** 0.5


def near(a, b):
    return len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b)) < 1e-6


def one(client):
    # The package asks for base64 by itself, and decodes it.
    answer = client.embeddings.create(model=MODEL, input="What is 37 + 58?")
    vector = answer.data[0].embedding
    check(answer.object == "list" and answer.model == MODEL, "object and model are named")
    check(answer.data[0].object == "embedding" and answer.data[0].index == 0, "one embedding, of input 0")
    check(abs(length(vector) - 1) < 1e-5, f"{len(vector)} numbers of length 1: {length(vector)}")
    check(answer.usage.prompt_tokens == answer.usage.total_tokens > 0, f"usage counts the input: {answer.usage}")
    as_numbers = client.embeddings.create(model=MODEL, input="What is 37 + 58?", encoding_format="float")
    check(near(vector, as_numbers.data[0].embedding), "base64 and numbers are the same")
    same = client.embeddings.create(model=MODEL, input="What is 37 + 58?", dimensions=len(vector), user="someone")
    check(same.data[0].embedding == vector, "again, with its own length asked for: the same bits")
    raw = client.embeddings.create(model=MODEL, input="What is 37 + 58?", extra_body={"normalize": False})
    scale = length(raw.data[0].embedding)
    check(near([value / scale for value in raw.data[0].embedding], vector), f"not normalised, its length is {scale:.3f}")


def many(client):
    texts = [f"What is {n} + {n + 1}?" for n in range(40)]
    batch = client.embeddings.create(model=MODEL, input=texts)
    check([one.index for one in batch.data] == list(range(40)), "40 inputs, in order")
    single = client.embeddings.create(model=MODEL, input=texts[7])
    check(batch.data[7].embedding == single.data[0].embedding, "each is what it is alone")
    ids = [[0, 2, 40, 41, 42], [7]]
    of_ids = client.embeddings.create(model=MODEL, input=ids)
    check(of_ids.usage.prompt_tokens == 6, "token ids are taken as they are")
    check(client.embeddings.create(model=MODEL, input=ids[0]).data[0].embedding == of_ids.data[0].embedding, "one list of ids is one input")


def errors(client):
    bad = openai.BadRequestError
    check.raises(bad, lambda: client.embeddings.create(model=MODEL, input="a", dimensions=3), "dimensions", "dimensions is 3")
    check.raises(bad, lambda: client.embeddings.create(model=MODEL, input=[]), "no input", "input is an empty array")
    check.raises(bad, lambda: client.embeddings.create(model=MODEL, input=[10**9]), "an unknown id", "token id")
    check.raises(bad, lambda: client.embeddings.create(model=MODEL, input=[5] * 100_000), "too long", "maximum context length")
    check.raises(openai.NotFoundError, lambda: client.embeddings.create(model="nobody", input="a"), "another model")


def main():
    key = os.environ.get("OPENAI_API_KEY", "none")
    with openai.OpenAI(base_url=server_url() + "/v1", api_key=key, max_retries=0, timeout=60) as client:
        for group in (one, many, errors):
            check.group(group.__name__, group, client)
    check.finish()


main()
