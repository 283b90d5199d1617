# shellcheck shell=sh
# shellcheck disable=SC2154
# Queries to `orbctl` on the OrbStack host. pyinfra treats missing output, and a missing command, as
# "there is nothing", and shows all output of a failed command: so these functions report everything
# on stdout, with exit code 0. asking.py parses it.

have_orbctl() {
    command -v "$orbctl" >/dev/null && return
    echo 'orbctl: missing'
    exit
}

# answer ARGUMENT...: the output of one call, and its exit status on a line of its own
answer() {
    exec 3>&1
    error=$("$orbctl" "$@" 2>&1 >&3 3>&- </dev/null)
    printf '\norbctl: exit %s: %s\n' "$?" "$(printf %s "$error" | tr '\n' '\t')"
}

# ask ARGUMENT...: the same, repeated once after a possibly temporary failure without output
ask() {
    told=$(answer "$@")
    case $told in
    *'orbctl: exit 0: '* | *'machine not found'* | *'no machine found'*) ;;
    '
orbctl: exit '*)
        sleep 1
        told=$(answer "$@")
        ;;
    esac
    printf '%s\n' "$told"
}

ask_all() {
    ask list --format json
    set -f
    # One may disappear between the two calls: then its addresses are unknown.
    for machine in $("$orbctl" list -r -q </dev/null); do
        ask info "$machine" --format json
    done
}

# ask_when_settled NAME SECONDS: about a machine, once it is not being created, started or stopped
ask_when_settled() {
    end=$(($(date +%s) + $2))
    while :; do
        told=$(ask info "$1" --format json)
        case $(printf '%s\n' "$told" | sed -n 's/.*"state": *"\([^"]*\)".*/\1/p' | head -n 1) in
        '' | running | stopped) break ;;
        esac
        [ "$(date +%s)" -lt "$end" ] || break
        sleep 1
    done
    printf '%s\n' "$told"
}

# kind_of PATH
kind_of() {
    if [ -d "$1" ]; then
        echo directory
    elif [ -e "$1" ]; then
        echo file
    else
        echo absent
    fi
}

# digest_of ID: the checksum of the cloud-init file that created a machine, or an empty line
digest_of() {
    digest=$(cloud_init_folder)/$1
    if [ -f "$digest" ]; then
        cat "$digest"
    else
        echo
    fi
}
