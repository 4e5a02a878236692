# Programs from PyPI, each with an environment of its own that is made once.

# The first Python that is at least 3.MINOR.
find_python() {
    local candidate
    for candidate in python3 python3.{13,14,12,11,10} "$HOME"/.pyenv/versions/3.1?.*/bin/python; do
        if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, $1))" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# environment NAME PYTHON PACKAGES…   prints the interpreter of an environment with these packages. What it is called tells all
# that it was made from, and it gets that name when it is complete.
environment() {
    local label=$1 base=$2 home
    shift 2
    home=$installed/$label-$(cksum <<<"$base $("$base" -V) $*" | cut -d' ' -f1)
    [ -e "$home" ] || alone "$label" make_environment "$base" "$home" "$@"
    echo "$home/bin/python"
}

make_environment() {
    local base=$1 home=$2 new
    shift 2
    # Somebody else may have made it meanwhile.
    [ ! -e "$home" ] || return 0
    mkdir -p "$installed"
    new=$(mktemp -d "$home.XXXXXX")
    # Not only for whoever installs it.
    chmod 755 "$new"
    if ! { virtual_environment "$base" "$new" && "$new/bin/pip" install "$@"; } >"$new.log" 2>&1; then
        tail -n 5 "$new.log" >&2
        rm -rf "$new"
        die "cannot install $*, see $new.log"
    fi
    rm -f "$new.log"
    mv -T "$new" "$home"
}

# Debian has venv in a package of its own.
virtual_environment() {
    "$1" -m venv "$2" || {
        debian_packages python3-venv && "$1" -m venv "$2"
    }
}
