"""Asks the demo model its 200 held-out sums over HTTP and prints the share it gets right.

usage: heldout_sums.py http://HOST:PORT [PATH/heldout.json]; exits 1 under 0.98.
"""

import asyncio
import json
import os
import re
import sys
import time
from pathlib import Path

import openai

from expect import server_url

MODEL = "baton-demo"
REQUIRED = 0.98
CONCURRENCY = 8
HELDOUT = Path(__file__).resolve().parents[2] / "models" / "demo" / "heldout.json"


async def ask(client, permits, case):
    """The reply to one question, and whether the last number in it is the answer."""
    async with permits:
        reply = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": case["question"]}], temperature=0, max_tokens=32
        )
    text = reply.choices[0].message.content or ""
    numbers = re.findall(r"\d+", text)
    return text, bool(numbers) and numbers[-1] == case["answer"]


async def main():
    url = server_url()
    cases = json.loads(Path(sys.argv[2] if len(sys.argv) > 2 else HELDOUT).read_text())
    assert len(cases) == 200, f"{len(cases)} held-out sums, expected 200"
    permits = asyncio.Semaphore(CONCURRENCY)
    async with openai.AsyncOpenAI(
        base_url=url + "/v1", api_key=os.environ.get("OPENAI_API_KEY", "unused"), max_retries=0, timeout=60.0
    ) as client:
        started = time.monotonic()
        answers = await asyncio.gather(*(ask(client, permits, case) for case in cases))
        elapsed_s = time.monotonic() - started
    for case, (text, right) in zip(cases, answers):
        if not right:
            print(f"wrong: {case['question']} -> {text!r}, expected {case['answer']}")
    n_right = sum(right for _, right in answers)
    print(f"held-out sums: {n_right} of {len(cases)} right ({n_right / len(cases):.3f}) in {elapsed_s:.1f} s")
    sys.exit(0 if n_right >= REQUIRED * len(cases) else 1)


asyncio.run(main())
