"""Runs every command of the README's `sh` blocks, but the one that runs this."""

import os
import re
import signal
import subprocess
import sys
import time

# Seconds for one command. With empty caches the longest one compiles everything.
TIMEOUT = 1800


def run(command):
    began = time.monotonic()
    print("$", command, flush=True)
    # In a group of its own, so that what the shell has started ends with it.
    process = subprocess.Popen(command, shell=True, start_new_session=True)
    try:
        code = process.wait(TIMEOUT)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if code != 0:
        sys.exit(f"exit code {code}")
    print(f"took {time.monotonic() - began:.0f} s", flush=True)


text = open("README.md", encoding="utf-8").read()
commands = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    for line in block.splitlines()
    if line and not line.startswith("#")
]
if "./tests/run" not in commands:
    sys.exit("the README no longer names ./tests/run")
stops = [command for command in commands if re.match(r"localstack/\S+ stop ", command)]
if not stops:
    sys.exit("the README no longer stops what it starts")
try:
    for command in commands:
        if not command.startswith("./tests/run"):
            run(command)
finally:
    # Whatever came before: it may be run twice.
    for command in stops:
        subprocess.run(command, shell=True, check=False, timeout=120)
