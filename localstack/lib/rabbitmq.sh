# What the RabbitMQ nodes of all versions share. A script sets `version`, and `programs` prints the folder of the Debian that
# has it: nothing for this machine's own.
#
#   localstack/rabbitmq-… ctl DIR ARGS…    rabbitmqctl against the node, for example close_all_connections cut
#
# Settings go in DIR/rabbitmq.conf before the first start.

bin=/usr/lib/rabbitmq/bin

# Fails unless the package in the Debian of this folder is of the version.
check_version() {
    local found
    found=$(dpkg-query --admindir="$1/var/lib/dpkg" -W -f '${Version}' rabbitmq-server 2>/dev/null || true)
    case $found in
    "$version".*) ;;
    *) unavailable "the package rabbitmq-server of ${1:-this machine} is ${found:-missing}, not $version" ;;
    esac
}

# Each node has a port mapper of its own.
ports() { echo 3; }

# Where the node sees DIR.
home() { if [ -n "$root" ]; then echo /srv/broker; else echo "$dir"; fi; }

# Runs one of RabbitMQ's programs with the node's settings, in its Debian.
with_node() {
    local home
    home=$(home)
    local settings=(
        "HOME=$home" "RABBITMQ_BASE=$home" "RABBITMQ_NODENAME=onlyonce${port[0]}@localhost"
        "RABBITMQ_NODE_IP_ADDRESS=127.0.0.1" "RABBITMQ_NODE_PORT=${port[0]}" "RABBITMQ_DIST_PORT=${port[1]}"
        "ERL_EPMD_PORT=${port[2]}" "ERL_EPMD_ADDRESS=127.0.0.1"
        "RABBITMQ_MNESIA_BASE=$home/data" "RABBITMQ_LOG_BASE=$home/log" "RABBITMQ_PID_FILE=$home/pid"
        "RABBITMQ_CONFIG_FILE=$home/rabbitmq" "RABBITMQ_GENERATED_CONFIG_DIR=$home/config"
        "RABBITMQ_ENABLED_PLUGINS_FILE=$home/enabled_plugins" "ERL_CRASH_DUMP=$home/log/erl_crash.dump"
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1}"
        "ONLYONCE_BROKER=$dir" PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 LC_ALL=C.UTF-8
    )
    if [ -n "$root" ]; then
        in_debian "$root" "$dir" env -i "${settings[@]}" "$@"
    else
        exec env -i "${settings[@]}" "$@"
    fi
}

prepare() { programs >/dev/null; }

launch() {
    root=$(programs)
    mkdir -p "$dir/log"
    [ -e "$dir/rabbitmq.conf" ] || echo 'disk_free_limit.absolute = 50MB' >"$dir/rabbitmq.conf"
    [ -e "$dir/enabled_plugins" ] || echo '[].' >"$dir/enabled_plugins"
    # The node writes its own number into DIR/pid.
    with_node setsid "$bin/rabbitmq-server"
}

answers() {
    root=$(programs)
    (with_node timeout 60 "$bin/rabbitmqctl" --quiet await_startup --timeout 60) >/dev/null 2>&1
}

# The node's port mapper ends too: nobody else's node is registered on its port.
stopped() {
    [ -e "$dir/ports" ] || return 0
    root=$(programs)
    read -ra port <"$dir/ports"
    local wait=50
    while taken "${port[2]}" && [ "$wait" -gt 0 ]; do
        (with_node epmd -kill) >/dev/null 2>&1 || true
        wait=$((wait - 1))
        sleep 0.1
    done
}

command_ctl() {
    if in_docker; then
        exec docker compose -f "$here/compose.yaml" exec -T "$(service)" rabbitmqctl "$@"
    fi
    [ -e "$dir/ports" ] || die "nothing was started in $dir"
    root=$(programs)
    with_node "$bin/rabbitmqctl" "$@"
}

service() { echo "rabbitmq-$version"; }

variables() {
    local at
    if in_docker; then at=$(docker_port 5672); else at=${port[0]}; fi
    echo "ONLYONCE_RABBITMQ_URL=amqp://guest:guest@127.0.0.1:$at/%2f"
    echo "ONLYONCE_RABBITMQ_CTL=$(printf '%q ' "$here/$name" ctl "$dir")"
    echo "ONLYONCE_RABBITMQ_RESTART=$(printf '%q ' "$here/$name" restart "$dir")"
    in_docker || echo "ONLYONCE_RABBITMQ_PID=$(cat "$dir/pid")"
}
