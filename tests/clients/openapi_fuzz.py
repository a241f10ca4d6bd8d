"""Requests that schemathesis makes from /openapi.json, against a running `baton serve` with the demo model: whatever is asked,
the answer is not a server error. usage: openapi_fuzz.py http://HOST:PORT"""

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from expect import Checks, server_url

N_EXAMPLES = 12
TIMEOUT_S = 60.0
# What a request may cost; the rest of its fields stay as they were made.
CAPS = {"max_tokens": 8, "max_completion_tokens": 8, "n": 2}

check = Checks()


def capped(body, path):
    """The body with its length bounded, where it has the right shape for one."""
    if not isinstance(body, dict):
        return body
    body = {name: capped(value, "") if name == "parameters" else value for name, value in body.items()}
    for name, cap in CAPS.items():
        value = body.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > cap:
            body[name] = cap
    if path.endswith("chat/completions"):
        body["max_completion_tokens"] = body.get("max_completion_tokens") or CAPS["max_completion_tokens"]
    if isinstance(body.get("messages"), list):
        # Which roles there are is for the model's template to say.
        body["messages"] = [turn | {"role": "user"} if known_role(turn) else turn for turn in body["messages"]]
    return body


def known_role(turn):
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and turn["role"] != ""


def fuzz(operation, mode):
    statuses = {}

    # Derandomized: the same requests every time.
    @settings(
        max_examples=N_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        case.body = capped(case.body, case.path)
        response = case.call(timeout=TIMEOUT_S)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code < 500, f"{response.status_code}: {response.text[:300]}"

    try:
        run()
    except Exception as error:
        check(False, f"{mode.name} {operation.label}: {error}")
    else:
        # A description that is too narrow, or too wide to be of use, would show here.
        right = mode == GenerationMode.NEGATIVE or 200 in statuses
        check(right, f"{mode.name} {operation.label}: {dict(sorted(statuses.items()))}")


def main():
    schema = schemathesis.openapi.from_url(server_url() + "/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        modes = [GenerationMode.POSITIVE]
        if operation.method.upper() == "POST":
            modes.append(GenerationMode.NEGATIVE)
        for mode in modes:
            fuzz(operation, mode)
    check.finish()


main()
