# What the scripts of all brokers share: their commands, and the life of one process.
#
#   localstack/NAME prepare        installs the programs
#   localstack/NAME start DIR      starts the broker on loopback, on ports of its own, with everything it writes in DIR;
#                                  returns when it answers, and at once if it runs already
#   localstack/NAME stop DIR       stops it; DIR keeps its ports, and its data if it has any on disk
#   localstack/NAME restart DIR    stops and starts it
#   localstack/NAME kill DIR       ends it with SIGKILL
#   localstack/NAME env DIR        prints what the tests look for, as lines for `eval`
#
# Where the programs cannot be installed, Docker and compose.yaml are used, one broker of a kind at a time. Without Docker too,
# `prepare` and `start` end with the code 3.
#
# A script says what is its own in these functions, and ends with `broker "$@"`:
#
#   prepare     installs the programs, or calls `unavailable WHY`
#   ports       how many ports it needs, if not one; they are in the array `port`
#   launch      becomes the server, with `exec`
#   answers     whether the server is ready
#   variables   prints NAME=VALUE lines for `env`
#   service     its name in compose.yaml
#   stopped     what is left to do once the server has ended, if anything
#   killed      the same after `kill`
#   end_signal  not a function: the signal that ends it in good order, if not TERM
#
# and other commands in functions that are named command_NAME and take their arguments after DIR.
set -euo pipefail

name=$(basename "$0")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/onlyonce
# Where programs go that come from other registries than Debian's.
installed=$cache
end_signal=TERM
# How to run a program as the server's user, for those of lib/user.sh.
as_user=()

die() {
    echo "localstack/$name: $*" >&2
    exit 1
}

# The programs cannot be had here: 3, which the test script tells from a failure.
unavailable() {
    echo "localstack/$name: $*" >&2
    exit 3
}

# Runs a command with nobody else doing the same, in other scripts too.
alone() {
    local lock=$1
    shift
    mkdir -p "$cache"
    (
        flock 9
        "$@"
    ) 9>"$cache/$lock.lock"
}

# Installs Debian's packages. None of them starts a service of its own meanwhile.
debian_packages() { alone apt install_packages "$@"; }

install_packages() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    local log policy=/usr/sbin/policy-rc.d guarded= code=0
    log=$(mktemp)
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        guarded=1
    fi
    { apt-get update && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends "$@"; } >"$log" 2>&1 </dev/null || code=$?
    [ -z "$guarded" ] || rm -f "$policy"
    [ "$code" = 0 ] || tail -n 5 "$log" >&2
    rm -f "$log"
    return "$code"
}

taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

ports() { echo 1; }

# Ports that nobody listened on when they were chosen; a broker keeps its own for as long as there is DIR.
choose_ports() {
    if [ ! -e "$dir/ports" ]; then
        local candidate
        port=()
        while [ "${#port[@]}" -lt "$(ports)" ]; do
            candidate=$((20000 + RANDOM % 12000))
            case " ${port[*]} " in *" $candidate "*) continue ;; esac
            taken "$candidate" || port+=("$candidate")
        done
        echo "${port[@]}" >"$dir/ports"
    fi
    read -ra port <"$dir/ports"
}

# A number of a process may be somebody else's by now: ours has this directory in its environment. Of another user's process not
# even root may read it in a container, but that user may.
ours() { [ -n "$1" ] && "${as_user[@]}" grep -qzxF "ONLYONCE_BROKER=$dir" "/proc/$1/environ" 2>/dev/null; }

running() { ours "$(cat "$dir/pid" 2>/dev/null)"; }

# Waits until this process has ended, which may remove its file earlier, for this many seconds at most.
ended() {
    local end=$((SECONDS + $2))
    while ours "$1"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.1
    done
}

start() {
    local code=0
    # In a shell of its own, which ends at the first error.
    "$here/$name" prepare || code=$?
    case $code in
    0) prepare ;;
    3)
        start_docker
        return
        ;;
    *) exit "$code" ;;
    esac
    choose_ports
    local launched= end=$((SECONDS + 180))
    if ! running; then
        rm -f "$dir/pid"
        ! taken "${port[0]}" || die "somebody else listens on port ${port[0]}; without $dir/ports others are taken"
        (
            export ONLYONCE_BROKER=$dir
            launch
        ) >"$dir/console" 2>&1 </dev/null &
        launched=$!
        echo "$launched" >"$dir/pid"
    fi
    until running && answers; do
        [ -z "$launched" ] || kill -0 "$launched" 2>/dev/null || failed "it ended"
        [ "$SECONDS" -lt "$end" ] || failed "it does not answer"
        sleep 0.2
    done
}

failed() {
    tail -n 15 "$dir/console" >&2
    die "it does not start: $1, see $dir/console"
}

start_docker() {
    command -v docker >/dev/null && docker info >/dev/null 2>&1 || unavailable "nor is there a Docker that answers"
    # First, so that `stop` also ends what came up in part.
    touch "$dir/docker"
    docker compose -f "$here/compose.yaml" up --detach --wait "$(service)" >&2
}

in_docker() { [ -e "$dir/docker" ]; }

# Where the container's port PORT is on this machine.
docker_port() { docker compose -f "$here/compose.yaml" port "$(service)" "$1" | sed 's/.*://'; }

stopped() { :; }

killed() { :; }

stop() {
    if in_docker; then
        docker compose -f "$here/compose.yaml" stop "$(service)" >&2
        rm "$dir/docker"
        return
    fi
    if running; then
        local pid
        pid=$(cat "$dir/pid")
        # It may have been frozen for a test.
        kill -s "$end_signal" "$pid" && kill -CONT "$pid" || true
        ended "$pid" 30 || end_now "$pid"
    fi
    rm -f "$dir/pid"
    stopped
}

end_now() {
    # Whoever leads a group of its own takes its children along.
    kill -KILL -- "-$1" 2>/dev/null || kill -KILL "$1" || true
    ended "$1" 5 || die "process $1 does not end"
}

kill_broker() {
    if in_docker; then
        docker compose -f "$here/compose.yaml" kill "$(service)" >&2
        return
    fi
    ! running || end_now "$(cat "$dir/pid")"
    rm -f "$dir/pid"
    killed
}

# The lines of `env`: values may have blanks in them.
exports() {
    [ -e "$dir/docker" ] || [ -e "$dir/ports" ] || die "nothing was started in $dir"
    in_docker || read -ra port <"$dir/ports"
    local line
    variables | while IFS= read -r line; do
        printf 'export %s=%q\n' "${line%%=*}" "${line#*=}"
    done
}

broker() {
    local command=${1:-}
    if [ "$command" = prepare ] && [ $# = 1 ]; then
        prepare
        return
    fi
    [ $# -ge 2 ] || die "usage: localstack/$name start|stop|restart|kill|env DIR, or prepare"
    mkdir -p "$2"
    dir=$(cd "$2" && pwd)
    shift 2
    case $command in
    start | stop) "$command" ;;
    restart)
        stop
        start
        ;;
    kill) kill_broker ;;
    env) exports ;;
    *)
        [ "$(type -t "command_$command")" = function ] || die "unknown command $command"
        [ ! -e "$dir/ports" ] || read -ra port <"$dir/ports"
        "command_$command" "$@"
        ;;
    esac
}
