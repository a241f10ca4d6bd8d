"""Tools and reasoning by the official OpenAI package. usage: openai_tools.py http://HOST:PORT [calls]

Against a server whose chat template shows tools; with `calls`, against one whose model says, in Hermes' format, that it
reasons "Hm.", says "I look." and calls weather with Köln.
"""

import json
import sys
import urllib.request

import openai

from expect import Checks, server_url

CITIES = ["Köln", "Oslo", "Rom"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": CITIES}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
QUESTION = [{"role": "user", "content": "What is 37 + 58?"}]

check = Checks()


def post(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def prompts(url):
    plain = post(url, "/tokenize", {"messages": QUESTION})
    with_tools = post(url, "/tokenize", {"messages": QUESTION, "tools": TOOLS})
    none = post(url, "/tokenize", {"messages": QUESTION, "tools": TOOLS, "tool_choice": "none"})
    text = post(url, "/detokenize", {"tokens": with_tools["tokens"]})["prompt"]
    check("weather" in text and "The weather of a city." in text, f"the prompt tells of the tools: {text!r}")
    check(with_tools["count"] > plain["count"] and none["tokens"] == plain["tokens"], "with tool_choice none it does not")
    turns = [
        *QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
    ids = post(url, "/tokenize", {"messages": turns, "tools": TOOLS})["tokens"]
    text = post(url, "/detokenize", {"tokens": ids})["prompt"]
    check('"arguments": {"city": "Rom"}' in text and "sun" in text, f"earlier calls are objects in it: {text!r}")


def answers(client, model):
    asked = {"model": model, "messages": QUESTION, "tools": TOOLS, "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**asked)
    check(whole.choices[0].finish_reason in ("stop", "length", "tool_calls"), f"a request with tools answers: {whole.choices[0]}")
    parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    check("".join(parts) == (whole.choices[0].message.content or ""), "and its stream says the same")


def forced(client, model):
    asked = {"model": model, "messages": QUESTION, "tools": TOOLS, "temperature": 0, "max_tokens": 128}
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        whole = client.chat.completions.create(**asked, tool_choice=choice, parallel_tool_calls=False).choices[0]
        check(whole.finish_reason == "tool_calls", f"tool_choice {choice} makes a call: {whole}")
        call = whole.message.tool_calls[0].function
        city = json.loads(call.arguments)["city"]
        check(call.name == "weather" and city in CITIES, f"as its schema has it: {call}")
        with client.chat.completions.stream(**asked, tool_choice=choice, parallel_tool_calls=False) as stream:
            added_up = stream.get_final_completion().choices[0].message.tool_calls[0].function
        check((added_up.name, added_up.arguments) == (call.name, call.arguments), f"and its stream the same: {added_up}")


def calls(client, model):
    asked = {"model": model, "messages": QUESTION, "tools": TOOLS}
    whole = client.chat.completions.create(**asked).choices[0]
    check(whole.finish_reason == "tool_calls", f"finish_reason: {whole.finish_reason}")
    check(whole.message.content == "I look.", f"content: {whole.message.content!r}")
    check((whole.message.model_extra or {}).get("reasoning_content") == "Hm.", f"reasoning: {whole.message.model_extra}")
    call = whole.message.tool_calls[0]
    check(call.type == "function" and call.function.name == "weather" and call.id, f"the call: {call}")
    check(json.loads(call.function.arguments) == {"city": "Köln"}, f"its arguments: {call.function.arguments}")

    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        added_up = stream.get_final_completion().choices[0]
    same = added_up.message.tool_calls[0].function
    check((same.name, same.arguments) == (call.function.name, call.function.arguments), f"the stream adds up to the same: {same}")
    check(added_up.finish_reason == "tool_calls" and added_up.message.content == "I look.", f"the rest too: {added_up}")
    reasoning = [
        (chunk.choices[0].delta.model_extra or {}).get("reasoning_content") or ""
        for chunk in client.chat.completions.create(**asked, stream=True)
    ]
    check("".join(reasoning) == "Hm.", f"reasoning is streamed: {reasoning}")


def refusals(client, model):
    asked = {"model": model, "messages": QUESTION, "tools": TOOLS}
    unknown = {"type": "function", "function": {"name": "clock"}}
    call = lambda: client.chat.completions.create(**asked, tool_choice=unknown)
    check.raises(openai.BadRequestError, call, "a choice that is none of the tools is refused", "tool_choice")
    broken = [{"type": "function", "function": {}}]
    call = lambda: client.chat.completions.create(model=model, messages=QUESTION, tools=broken)
    check.raises(openai.BadRequestError, call, "a tool without a name is refused", "tools[0].function.name")


def main():
    url = server_url()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    model = client.models.list().data[0].id
    check.group("prompts", prompts, url)
    if sys.argv[2:] == ["calls"]:
        check.group("calls", calls, client, model)
    else:
        check.group("answers", answers, client, model)
        check.group("forced calls", forced, client, model)
    check.group("refusals", refusals, client, model)
    check.finish()


main()
