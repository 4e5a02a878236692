"""Each feature alone compiles, and with a feature off, none of that adapter's SDK is in the tree."""

import subprocess
import sys

SDKS = {"postgres": "sqlx-postgres", "pubsub": "tonic", "rabbitmq": "lapin", "sqlite": "rusqlite", "sqs": "aws-sdk-sqs"}
# Programs, with what they bring when no feature is asked for.
PROGRAMS = {"events": {"rusqlite"}, "ledger": {"rusqlite"}}


def sdks(package, features):
    command = ["cargo", "tree", "-p", package, "-e", "normal", "--prefix", "none", "--locked"]
    output = subprocess.check_output(command + ["--no-default-features", "--features", features], text=True)
    return {line.split()[0] for line in output.splitlines() if line} & set(SDKS.values())


def expect(package, features, wanted):
    found = sdks(package, features)
    print(f"{package} with [{features}]: {sorted(found)}", flush=True)
    if found != wanted:
        sys.exit(f"{package} with [{features}] must bring {sorted(wanted)}")


def check(package, features):
    command = ["cargo", "check", "-p", package, "--locked", "--no-default-features", "--features", features]
    subprocess.run(command, check=True)


for feature in ["", *SDKS]:
    expect("onlyonce", feature, {SDKS[feature]} if feature else set())
    check("onlyonce", feature)
check("onlyonce-sqs", "")
for program, wanted in PROGRAMS.items():
    expect(program, "", wanted)
