"""Collects the checks of one client script: prints each, and ends the process with 1 when any failed."""

import sys
import traceback


class Checks:
    def __init__(self):
        self.n_passed = 0
        self.failed = []

    def __call__(self, condition, what):
        """Records one check; returns whether it held."""
        if condition:
            self.n_passed += 1
            print(f"ok      {what}")
        else:
            self.failed.append(what)
            print(f"FAILED  {what}")
        return bool(condition)

    def raises(self, error_type, call, what, needle=None):
        """Checks that `call` raises `error_type` and that its message contains `needle`; returns the error."""
        try:
            call()
        except error_type as error:
            self(needle is None or needle in str(error), f"{what} (said: {error})")
            return error
        except Exception as error:  # The wrong kind is a failed check, not the end of the script.
            self(False, f"{what}: expected {error_type.__name__}, got {type(error).__name__}: {error}")
        else:
            self(False, f"{what}: expected {error_type.__name__}, nothing was raised")
        return None

    def group(self, name, call, *args):
        """Runs one group of checks; an exception in it fails that group and lets the next one run."""
        print(f"-- {name}", flush=True)
        try:
            call(*args)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            self(False, f"{name}: ended by an exception")

    def finish(self):
        print(f"{self.n_passed} checks passed, {len(self.failed)} failed")
        for what in self.failed:
            print(f"  failed: {what}")
        sys.stdout.flush()
        sys.exit(1 if self.failed else 0)


def server_url():
    """The server's URL from the command line, without a trailing slash."""
    if len(sys.argv) < 2 or not sys.argv[1].startswith("http"):
        print(f"usage: {sys.argv[0]} http://HOST:PORT", file=sys.stderr)
        sys.exit(2)
    return sys.argv[1].rstrip("/")
