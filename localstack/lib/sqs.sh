# What the emulators of SQS share.
#
#   localstack/… init DIR    creates the queues of init/queues.py there

# Whether it answers a request. Says nothing to a proxy that the environment may name.
answers() {
    "$python" - "${port[0]}" 2>/dev/null <<'PY'
import http.client
import sys

headers = {"X-Amz-Target": "AmazonSQS.ListQueues", "Content-Type": "application/x-amz-json-1.0"}
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=2)
connection.request("POST", "/", b"{}", headers)
sys.exit(connection.getresponse().status != 200)
PY
}

# What the programs write goes into DIR, too.
contained() {
    mkdir -p "$dir/tmp"
    export HOME=$dir TMPDIR=$dir/tmp XDG_CACHE_HOME=$dir/cache SERVICES=sqs
}

variables() {
    local at
    if in_docker; then at=$(docker_port 4566); else at=${port[0]}; fi
    echo "ONLYONCE_${name^^}_URL=http://127.0.0.1:$at"
    in_docker || echo "ONLYONCE_${name^^}_PID=$(cat "$dir/pid")"
}

command_init() {
    local clients url
    clients=$("$here/../tests/python")
    url=$(variables | sed -n 's/.*_URL=//p')
    AWS_ENDPOINT_URL=$url "$clients" "$here/init/queues.py"
}
