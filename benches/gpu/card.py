"""What the parts run on: the card's libraries, the environment of what is started, and logs. Knows no part."""

import glob
import json
import os
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# What a card needs beside its driver and the driver's own libraries.
LIBRARIES = ["libcublasLt.so.13", "libnvrtc.so.13"]


def library_folders():
    """Folders of CUDA's libraries: those named, else Python's packages and the toolkit's, where they have them."""
    if named := os.environ.get("BATON_CUDA_LIBRARIES"):
        return named.split(":")
    places = [os.path.join(sysconfig.get_paths()["purelib"], "nvidia/*/lib")]
    places += ["/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib"]
    found = []
    for library in LIBRARIES:
        folders = [os.path.dirname(path) for place in places for path in sorted(glob.glob(f"{place}/{library}"))]
        found += [folder for folder in folders[:1] if folder not in found]
    return found


class Card:
    """Where binaries and results are, and how long everything may take."""

    def __init__(self, bundle, results, deadline):
        self.bundle = bundle
        self.commit = (bundle / "commit").read_text().strip()
        self.results = results
        self.deadline = deadline
        # Packed weights, compiled kernels: kept between parts, and between calls while the machine is.
        self.cache = Path(os.environ.get("XDG_CACHE_HOME", os.path.join(tempfile.gettempdir(), "baton-gpu")))
        self.images = self.cache / "baton" / "cuda-kernels"
        self.libraries = library_folders()
        self.log = None

    def environment(self):
        library_path = [*self.libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        # The caller's own settings would change what is measured, and servers refuse those that tests have.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
        return inherited | {
            "REQUIRE_GPU": "1",
            "BATON_CUDA_LIBRARIES": ":".join(self.libraries),
            "LD_LIBRARY_PATH": ":".join(library_path),
            "XDG_CACHE_HOME": str(self.cache),
            "RUST_BACKTRACE": "0",
        }

    def test(self, command):
        """Runs a test program; baton itself would not know its variable."""
        return self.run(command, BATON_TEST_DATA=str(ROOT / "tests" / "data"))

    def ops_flags(self):
        """Flags of the benches, which read no environment."""
        kernels = self.bundle / "cuda-kernels"
        flags = ["--libraries", ":".join(self.libraries), "--images", self.images]
        return flags + (["--kernels", kernels] if kernels.is_dir() else [])

    def seconds_left(self):
        return max(self.deadline - time.monotonic(), 0.0)

    def run(self, command, **variables):
        """Runs a command with its output in the log, within what is left; its exit status."""
        self.log.write("$ " + " ".join(str(word) for word in command) + "\n")
        self.log.flush()
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment() | variables,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            timeout=self.seconds_left(),
        )
        return done.returncode

    def output_of(self, command):
        done = subprocess.run(command, cwd=ROOT, env=self.environment(), stdout=subprocess.PIPE, stderr=self.log, text=True)
        return done.stdout if done.returncode == 0 else ""

    def append(self, name, line):
        with open(self.results / name, "a") as file:
            file.write(json.dumps(line) + "\n")


class Smoke(Card):
    """The same over the stand-in for the driver, where every kernel runs on the CPU: what is shown is that the parts run."""

    def __init__(self, bundle, results, deadline):
        super().__init__(bundle, results, deadline)
        stand_in = subprocess.run([bundle / "cuda_ops", "stand-in"], stdout=subprocess.PIPE, text=True, check=True)
        folder = stand_in.stdout.strip()
        self.libraries = [folder]
        # Both as tests have them, so that what they compiled is not compiled again.
        self.cache = Path(folder) / "cache"
        self.images = Path(folder) / "images"

    def environment(self):
        environment = super().environment()
        environment.pop("REQUIRE_GPU")
        return environment
