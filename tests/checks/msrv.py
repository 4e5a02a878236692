"""The workspace's `rust-version` is the newest that a dependency asks for, neither older nor newer, and it compiles what is
published, if that toolchain is here."""

import json
import shutil
import subprocess
import sys


def version(text):
    return tuple(int(part) for part in (text + ".0.0").split(".")[:3])


metadata = json.loads(
    subprocess.check_output(
        ["cargo", "metadata", "--format-version", "1", "--locked", "--all-features"]
    )
)
members = set(metadata["workspace_members"])
packages = {p["id"]: p for p in metadata["packages"]}
library = {n["id"]: n for n in metadata["resolve"]["nodes"]}

# What the published crates depend on; tests, benchmarks and examples may ask for more.
todo = [i for i in members if packages[i]["publish"] != []]
stated = {packages[i]["rust_version"] for i in todo}
needed = {}
seen = set(todo)
while todo:
    for dep in library[todo.pop()]["deps"]:
        kinds = {k["kind"] for k in dep["dep_kinds"]}
        if dep["pkg"] in seen or kinds == {"dev"}:
            continue
        seen.add(dep["pkg"])
        todo.append(dep["pkg"])
        rust = packages[dep["pkg"]]["rust_version"]
        if rust and dep["pkg"] not in members:
            needed.setdefault(version(rust), []).append(packages[dep["pkg"]]["name"])

newest = max(needed)
print("stated:", stated, "needed:", ".".join(map(str, newest)), "by", sorted(needed[newest]))
if {version(v) for v in stated if v} != {newest} or None in stated:
    sys.exit("rust-version in Cargo.toml must be the newest that a dependency needs")

wanted = ".".join(map(str, newest))
here = subprocess.check_output(["rustc", "--version"], text=True).split()[1]
toolchains = []
if shutil.which("rustup"):
    toolchains = subprocess.check_output(["rustup", "toolchain", "list"], text=True).splitlines()
named = [name.split()[0] for name in toolchains if name.startswith(wanted)]
if here == wanted or named:
    choice = [] if here == wanted else [f"+{named[0]}"]
    published = [word for i in members if packages[i]["publish"] != [] for word in ("-p", packages[i]["name"])]
    subprocess.run(["cargo", *choice, "check", "--locked", "--all-features", *published], check=True)
else:
    print(f"LEFT OUT: nothing is built with Rust {wanted}: the toolchain is not here, but {here}")
