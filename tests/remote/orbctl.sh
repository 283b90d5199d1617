#!/bin/sh
# A fake `orbctl` to test the connection: its machines are this host. Each
# is a file in $ORBCTL_TEST_HOME that contains an id.
home=$ORBCTL_TEST_HOME
printf '%s\n' "$*" >>"$home/calls"

# show NAME
show() {
    name=$(printf %s "$1" | sed 's/[\\"]/\\&/g')
    printf '{"id": "%s", "name": "%s", "state": "running"}' "$(cat "$home/machines/$1")" "$name"
}

verb=$1
shift
case $verb in
list)
    comma=''
    printf '['
    for one in "$home"/machines/*; do
        [ ! -e "$one" ] || printf '%s%s' "$comma" "$(show "${one##*/}")"
        comma=,
    done
    printf ']\n'
    ;;
info)
    if [ ! -e "$home/machines/$1" ]; then
        echo "machine not found: '$1'" >&2
        exit 1
    fi
    printf '{"record": %s}\n' "$(show "$1")"
    ;;
create)
    printf '%s\n' "$@" >"$home/created"
    while [ $# -gt 1 ]; do
        [ "$1" != --user-data ] || cp "$2" "$home/user-data"
        shift
    done
    [ ! -e "$home/slow" ] || sleep 30
    echo "01KHVDCW7HTAGRPMB8$(date +%s | tail -c 9)" >"$home/machines/$1"
    ;;
delete)
    rm "$home/machines/$2"
    ;;
run)
    # -m NAME [-u USER] -w /
    shift 2
    [ "$1" != -u ] || shift 2
    shift 2
    # Nothing of this account's home is used.
    HOME=$home SHELL=/bin/sh exec "$@"
    ;;
*) exit 1 ;;
esac
