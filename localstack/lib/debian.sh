# Programs that this machine's Debian does not have, from another one in a folder, entered with chroot.

# Prints the folder of Debian SUITE with these packages; makes it when it is missing.
second_debian() {
    local suite=$1 root
    root=$cache/debian-$suite-$2
    [ -e "$root" ] || alone "debian-$suite" make_debian "$root" "$@"
    echo "$root"
}

make_debian() {
    local root=$1 suite=$2 new
    shift 2
    # Somebody else may have made it meanwhile.
    [ ! -e "$root" ] || return 0
    [ "$(id -u)" = 0 ] && unshare --mount true 2>/dev/null ||
        unavailable "another Debian needs root, and a right to mount"
    [ -x /usr/sbin/debootstrap ] || debian_packages debootstrap || unavailable "there is no debootstrap"
    new=$(mktemp -d "$cache/debian-$suite.XXXXXX")
    chmod 755 "$new"
    if ! unshare --mount bash "$here/lib/debootstrap" "$new" "$suite" "$@" >"$new.log" 2>&1; then
        tail -n 10 "$new.log" >&2
        rm -rf --one-file-system "$new"
        die "Debian $suite was not made, see $new.log"
    fi
    rm -f "$new.log"
    mv -T "$new" "$root"
}

# Runs a program in another Debian, which sees the folder DIR as /srv/broker. The mounts end with the program.
in_debian() {
    local root=$1 dir=$2
    shift 2
    # shellcheck disable=SC2016
    exec unshare --mount sh -c 'mount --rbind /proc "$1/proc" && mount --rbind /dev "$1/dev" &&
        mount --bind "$2" "$1/srv/broker" && root=$1 && shift 2 && exec chroot "$root" "$@"' sh "$root" "$dir" "$@"
}
