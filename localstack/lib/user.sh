# For servers that refuse to run as root. Root starts them as another user, who may be unable to reach DIR: it can be in a folder
# that is root's alone. So such a server is given a folder that is open already, and finds it under the name of the open file.

# Sets `as_user`, empty unless this is root.
choose_user() {
    as_user=()
    [ "$(id -u)" = 0 ] || return 0
    user=postgres
    id "$user" >/dev/null 2>&1 || user=nobody
    as_user=(setpriv "--reuid=$user" "--regid=$(id -g "$user")" --clear-groups)
}

# The folder, and all that is in it, belongs to the server's user from now on. In the variable `at`: what that user calls it.
hand_over() {
    at=$1
    [ "${#as_user[@]}" -gt 0 ] || return 0
    chown -R "$user:$(id -g "$user")" "$1"
    exec 8<"$1"
    at=/proc/self/fd/8
}

choose_user

# What that user runs is installed where it can be reached, which a folder of root's own cannot.
[ "$(id -u)" != 0 ] || installed=/var/cache/onlyonce
