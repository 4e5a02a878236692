"""Runs every `sh` block of the README, but the commands that run this."""

import os
import re
import signal
import subprocess
import sys
import time

# Seconds for one block. With empty caches the longest one compiles everything.
TIMEOUT = 1800


def run(block):
    began = time.monotonic()
    # In a group of its own, so that what the shell has started ends with it.
    process = subprocess.Popen(["bash", "-euxo", "pipefail", "-c", block], start_new_session=True)
    try:
        code = process.wait(TIMEOUT)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if code != 0:
        sys.exit(f"exit code {code}")
    print(f"took {time.monotonic() - began:.0f} s", flush=True)


text = open("README.md", encoding="utf-8").read()
blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
if "./tests/run" not in "".join(blocks).splitlines():
    sys.exit("the README no longer names ./tests/run")
stops = re.findall(r"^localstack/\S+ stop .*", "".join(blocks), re.M)
if not stops:
    sys.exit("the README no longer stops what it starts")
try:
    for block in blocks:
        if "./tests/run" not in block:
            run(block)
finally:
    # Whatever came before: it may be run twice.
    for command in stops:
        subprocess.run(command, shell=True, check=False, timeout=120)
