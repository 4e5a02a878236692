# What the PostgreSQL servers of all versions share. A script says in `find_server` where its programs are, in the variable `bin`, or
# fails; and where psql, pg_isready and pg_basebackup are, in the variable `clients`.
#
#   localstack/postgres… crash DIR            kills it and all its children with SIGKILL, and starts it
#   localstack/postgres… standby DIR OTHER    makes a streaming standby of it in OTHER and starts it; from then on OTHER is a DIR
#   localstack/postgres… promote OTHER        makes a primary of it
#   localstack/postgres… sync DIR on|off      whether a commit waits for a standby
#
# Settings go in DIR/settings.conf before the first start.
. "$here/lib/user.sh"

# It ends its sessions, while TERM waits for them.
end_signal=INT

# In the variable `found`: where this machine has these programs, in the newest version that the server's user may run.
find_newest() {
    local folder version program newest=12
    found=
    for folder in /usr/lib/postgresql/*/bin "$(pg_config --bindir 2>/dev/null)" "$(dirname "$(command -v "$1")")"; do
        for program in "$@"; do
            [ -x "$folder/$program" ] || continue 2
        done
        version=$("${as_user[@]}" "$folder/$1" --version 2>/dev/null | sed 's/.*(PostgreSQL) \([0-9]*\).*/\1/')
        [ "${version:-0}" -gt "$newest" ] || continue
        newest=$version
        found=$folder
    done
    [ -n "$found" ]
}

# The superuser's. Who has it can run any program as the server's user, so it is not one that everybody knows.
password() { if in_docker; then echo postgres; else cat "$dir/password"; fi; }

# Under another name until it is complete.
make_data() {
    rm -rf "$dir/data.new"
    mkdir -m 700 "$dir/data.new"
    hand_over "$dir/data.new"
    if [ -e "$dir/primary" ]; then copy_primary; else first_data; fi
    mv -T "$dir/data.new" "$dir/data"
}

first_data() {
    (umask 077 && od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$dir/password")
    # shellcheck disable=SC2016
    PASSWORD=$(password) "${as_user[@]}" bash -c '"$1" -D "$2" --username=postgres --pwfile=<(echo "$PASSWORD") \
        --auth=scram-sha-256 --encoding=UTF8 --no-locale --data-checksums' bash "$bin/initdb" "$at"
    # Most are the defaults, of which the tests need these.
    cat >>"$dir/data.new/postgresql.conf" <<'END'
fsync = on
synchronous_commit = on
full_page_writes = on
max_connections = 200
wal_level = replica
max_wal_senders = 10
max_replication_slots = 10
hot_standby = on
log_min_messages = warning
END
    [ ! -e "$dir/settings.conf" ] || cat "$dir/settings.conf" >>"$dir/data.new/postgresql.conf"
    # Before anybody can connect.
    "${as_user[@]}" "$bin/postgres" --single -D "$at" postgres <"$here/init/postgres.sql" >/dev/null
}

# DIR/primary has the port of the other one.
copy_primary() {
    local primary
    primary="host=127.0.0.1 port=$(cat "$dir/primary") user=postgres application_name=standby"
    PGPASSWORD=$(password) "${as_user[@]}" "$clients/pg_basebackup" -D "$at" --checkpoint=fast -d "$primary"
    touch "$dir/data.new/standby.signal"
    # It has no standby of its own to wait for, once it is a primary.
    sed -i '/^synchronous_standby_names/d' "$dir/data.new/postgresql.auto.conf"
    # What pg_basebackup would write here an older server does not understand.
    echo "primary_conninfo = '$primary password=$(password)'" >>"$dir/data.new/postgresql.auto.conf"
}

# Ends the children of a server that was killed, which need not have noticed: all that work in its data.
end_children() {
    [ -e "$dir/data" ] || return 0
    local folder children end=$((SECONDS + 10))
    folder=$(stat -Lc %d:%i "$dir/data")
    while true; do
        mapfile -t children < <("${as_user[@]}" stat -Lc '%d:%i %n' /proc/[0-9]*/cwd 2>/dev/null |
            sed -n "s|^$folder /proc/\([0-9]*\)/cwd$|\1|p")
        [ "${#children[@]}" -gt 0 ] || return 0
        [ "$SECONDS" -lt "$end" ] || die "the server's children do not end: ${children[*]}"
        kill -KILL "${children[@]}" 2>/dev/null || true
        sleep 0.05
    done
}

stopped() { end_children; }

killed() { end_children; }

launch() {
    # Of one that was killed by somebody else.
    end_children
    # It names the killed one, which may still count as a process, for as long as nobody has asked how it ended.
    rm -f "$dir/data/postmaster.pid"
    [ -e "$dir/data" ] || make_data
    hand_over "$dir/data"
    exec setsid "${as_user[@]}" "$bin/postgres" -D "$at" -c "port=${port[0]}" -c listen_addresses=127.0.0.1 \
        -c unix_socket_directories=
}

answers() { "$clients/pg_isready" -q -h 127.0.0.1 -p "${port[0]}"; }

# Calls psql as the superuser.
query() {
    local options=(-XAtq -v ON_ERROR_STOP=1 -U postgres -d postgres)
    if in_docker; then
        docker compose -f "$here/compose.yaml" exec -T "$(service)" psql "${options[@]}" "$@"
    else
        find_server
        PGPASSWORD=$(password) "$clients/psql" "${options[@]}" -h 127.0.0.1 -p "${port[0]}" "$@"
    fi
}

# Waits until a query answers with true.
await() {
    local end=$((SECONDS + 60))
    until [ "$(query -c "$1")" = t ]; do
        [ "$SECONDS" -lt "$end" ] || die "after a minute it is not so: $1"
        sleep 0.1
    done
}

command_crash() {
    kill_broker
    start
}

command_standby() {
    [ $# = 1 ] || die "usage: localstack/$name standby DIR OTHER"
    ! in_docker || die "there is no standby in Docker"
    running || die "it does not run in $dir"
    local primary=$dir
    mkdir -p "$1"
    dir=$(cd "$1" && pwd)
    if [ ! -e "$dir/data" ]; then
        cp "$primary/password" "$dir/password"
        echo "${port[0]}" >"$dir/primary"
    fi
    start
    await "SELECT NOT pg_is_in_recovery() OR EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')"
}

command_promote() {
    await "SELECT CASE WHEN pg_is_in_recovery() THEN pg_promote() ELSE true END"
}

command_sync() {
    local names states
    case "$*" in
    on)
        names="1 (*)"
        states="bool_or(sync_state = 'sync')"
        ;;
    off)
        names=
        states="bool_and(sync_state = 'async')"
        ;;
    *) die "usage: localstack/$name sync DIR on|off" ;;
    esac
    query -c "ALTER SYSTEM SET synchronous_standby_names = '$names'" -c "SELECT pg_reload_conf()" >/dev/null
    # Each query is a session of its own, which has the settings of its beginning.
    await "SELECT current_setting('synchronous_standby_names') = '$names'"
    # It is the checkpointer that tells the other sessions, before anything else that it has to do.
    query -c CHECKPOINT
    await "SELECT coalesce($states, true) FROM pg_stat_replication WHERE application_name = 'standby' AND state = 'streaming'"
}

service() { echo "$name"; }

variables() {
    local at
    if in_docker; then at=$(docker_port 5432); else at=${port[0]}; fi
    echo "ONLYONCE_POSTGRES_URL=postgres://onlyonce:onlyonce@127.0.0.1:$at/onlyonce"
    echo "ONLYONCE_POSTGRES_ADMIN=postgres://postgres:$(password)@127.0.0.1:$at/postgres"
    echo "ONLYONCE_POSTGRES_RESTART=$(printf '%q ' "$here/$name" restart "$dir")"
    echo "ONLYONCE_POSTGRES_KILL=$(printf '%q ' "$here/$name" crash "$dir")"
    ! in_docker || return 0
    echo "ONLYONCE_POSTGRES_SCRIPT=$here/$name"
    find_server && echo "ONLYONCE_POSTGRES_CLIENTS=$clients"
    echo "ONLYONCE_POSTGRES_PID=$(cat "$dir/pid")"
}
