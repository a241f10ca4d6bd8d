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


def capped(body, generates):
    """The body with its length bounded, where it has the right shape for one."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    if generates:
        for name in ("max_tokens", "max_completion_tokens"):
            if name in CAPS and body.get(name) is None:
                body[name] = CAPS[name]
    for name, cap in CAPS.items():
        value = body.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > cap:
            body[name] = cap
    if isinstance(body.get("parameters"), dict):
        body["parameters"] = capped(body["parameters"], generates=False)
    return body


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
        if "generate" not in case.path:
            case.body = capped(case.body, case.path.endswith("completions"))
        else:
            case.body = capped(case.body, generates=False)
            if isinstance(case.body, dict) and not isinstance(case.body.get("parameters"), dict):
                case.body.setdefault("max_tokens", CAPS["max_tokens"])
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
