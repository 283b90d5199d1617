# shellcheck shell=sh
# shellcheck disable=SC2154
# Asking `orbctl` on the host that has OrbStack. pyinfra takes no output, and a missing command, for
# "there is nothing", and shows all that a failed command printed: so everything is told on stdout,
# with exit code 0. asking.py reads it.

have_orbctl() {
    command -v "$orbctl" >/dev/null && return
    echo 'orbctl: missing'
    exit
}

# answer ARGUMENT...: what one call prints, and on a line of its own how it ended
answer() {
    exec 3>&1
    error=$("$orbctl" "$@" 2>&1 >&3 3>&- </dev/null)
    printf '\norbctl: exit %s: %s\n' "$?" "$(printf %s "$error" | tr '\n' '\t')"
}

# ask ARGUMENT...: the same, and once more after a failure that may pass and has printed nothing
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
    # One may go between the two calls: then its addresses are not known.
    for machine in $("$orbctl" list -r -q </dev/null); do
        ask info "$machine" --format json
    done
}

# ask_when_settled NAME SECONDS: about a machine, once it is not being made, started or stopped
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

# digest_of ID: the checksum of the cloud-init file that a machine was made with, or an empty line
digest_of() {
    digest=$(cloud_init_folder)/$1
    if [ -f "$digest" ]; then
        cat "$digest"
    else
        echo
    fi
}
