# shellcheck shell=sh
# shellcheck disable=SC2034,SC2154
# The calls of `orbctl` on the OrbStack host for operations, and for connecting. It contains only
# functions; Python sends those that a command needs, followed by the call.

# find_orbctl DIRECTORY...: OrbStack's `orbctl`, even if PATH is short
find_orbctl() {
    for folder; do
        case $folder in
        [~]/*) PATH=$PATH:${HOME:-}${folder#?} ;;
        *) PATH=$PATH:$folder ;;
        esac
    done
    orbctl=${PYINFRA_ORBSTACK_ORBCTL:-orbctl}
}

# orb ARGUMENT...: call it, without this command's own input
orb() {
    "$orbctl" "$@" </dev/null
}

# within SECONDS ARGUMENT...: call it, and kill it if it takes longer. A caller redirects with `exec`
# in a subshell: for a redirection of this call the shell would keep the old stream open, also in the
# watching process, and a reader of that stream would wait for it after all others were killed.
within() (
    seconds=$1
    shift
    "$orbctl" "$@" </dev/null &
    call=$!
    (
        trap 'kill "$!"; exit' TERM
        sleep "$seconds" &
        wait "$!" && kill -9 "$call"
    ) >/dev/null 2>&1 &
    wait "$call"
    status=$?
    kill "$!" 2>/dev/null
    exit "$status"
)

# look NAME: set `found` to the id of a machine, and `told` to `orbctl`'s output about it.
# 1: there is none. 2: it is unknown, and `told` says why.
look() {
    again=yes
    while :; do
        if told=$(exec 2>&1 && within 30 info "$1" --format json); then
            found=$(printf '%s\n' "$told" | sed -n 's/.*"id": *"\([0-9A-Za-z]*\)".*/\1/p' | head -n 1)
            [ -z "$found" ] || return 0
            told="orbctl did not report the id of $1"
        fi
        found=
        case $told in *'machine not found'* | *'no machine found'*) return 1 ;; esac
        [ -n "$again" ] || break
        again=
        sleep 1
    done
    told=$(printf '%s\n' "${told:-orbctl info did not answer}" | tail -n 1)
    return 2
}

# remove NAME ID: delete only that machine, by name, since `orbctl` requires it
remove() {
    find_record
    look "$1"
    case $? in
    0) ;;
    1) forget "$2" && return ;;
    *)
        printf '%s\n' "$told" >&2
        return 1
        ;;
    esac
    if [ "$found" != "$2" ]; then
        echo "$1 is another machine now; nothing was deleted" >&2
        return 1
    fi
    orb delete --force "$1" && forget "$2"
}

# make_machine NAME ARGUMENT...: call `orbctl ARGUMENT...`, which creates a machine of that name, and
# record it; stdout gets `orbctl`'s output about it. The caller has just checked that no machine has
# that name. After any interruption the machine is recorded, or removed, or named in a message: it
# is ours if the call created it, or was creating it when we killed the call.
make_machine() {
    name=$1
    shift
    find_record
    cut='' since=$(date +%s)
    trap 'cut=yes' HUP INT TERM
    # The caller may be gone; the shell itself reports a killed call.
    trap '' PIPE
    # An unwritable record is reported when there is something to write.
    intend 2>/dev/null
    said=$("$orbctl" "$@" 2>&1 </dev/null)
    status=$?
    [ -z "$said" ] || printf '%s\n' "$said" | tail -n 40 >&2
    if [ "$status" = 0 ]; then
        [ -n "$cut" ] || keep || status=1
    elif [ -z "$cut" ] || ! was_cut_off "$status" "$said"; then
        failed "$said"
        cut=
    fi
    if [ -n "$cut" ]; then
        give_up interrupted
        status=130
    fi
    trap - HUP INT TERM
    [ "$status" != 0 ] || printf '%s\n' "$told"
    return "$status"
}

# was_cut_off STATUS SAID: whether a signal ended the call before it knew that the name is taken
was_cut_off() {
    case $2 in *'already exists'*) return 1 ;; esac
    [ "$1" -gt 128 ]
}

# keep: record the machine that was just created; if that fails, remove it
keep() {
    made=$(date +%s)
    if ! look "$name"; then
        was_made "$made" 2>/dev/null
        echo "machine $name was created, but its id cannot be read: $told; $(advice "$name")" >&2
        return 1
    fi
    why=$(confirm "$found" 2>&1) && return
    give_up "$why"
    return 1
}

# give_up REASON: remove the machine that we created, if there is one
give_up() {
    # None of this must be interrupted.
    trap '' HUP INT TERM
    look "$name"
    case $? in
    0) ;;
    1)
        drop_intent 2>/dev/null
        return
        ;;
    *)
        echo "$1; machine $name may have been created: $told; $(advice "$name")" >&2
        return
        ;;
    esac
    settle_down "$name" 10
    if why=$(orb delete --force "$name" 2>&1); then
        { forget "$found" && drop_intent; } 2>/dev/null
        echo "machine $name was created, and deleted again: $1" >&2
        return
    fi
    confirm "$found" 2>/dev/null
    why=$(printf '%s\n' "$why" | tail -n 1)
    echo "$1: machine $name was created, and deleting it failed: $why; $(advice "$name")" >&2
}

# failed SAID: check what a failed call has left; its failure alone does not prove whose that is
failed() {
    case $1 in
    *'already exists'*)
        drop_intent 2>/dev/null
        return
        ;;
    esac
    look "$name"
    case $? in
    0) echo "there now is a machine $name, and it is unknown who created it; $(advice "$name")" >&2 ;;
    1) drop_intent 2>/dev/null ;;
    esac
}

advice() {
    echo "to delete it, run: orbctl delete --force $1$(on_mac)"
}

# on_mac: where `orbctl` runs, if it is not this host
on_mac() {
    [ -z "${PYINFRA_ORBSTACK_PLACE:-}" ] || printf ' (on %s)' "${PYINFRA_ORBSTACK_PLACE#ssh }"
}

# state_of NAME: its state as `orbctl` reports it; empty if unknown
state_of() {
    (exec 2>/dev/null && within 30 info "$1" --format json) |
        sed -n 's/.*"state": *"\([^"]*\)".*/\1/p' | head -n 1
}

# settle_down NAME SECONDS: wait while a machine is being created, started or stopped
settle_down() {
    end=$(($(date +%s) + $2))
    while :; do
        case $(state_of "$1") in '' | running | stopped) return ;; esac
        [ "$(date +%s)" -lt "$end" ] || return 1
        sleep 1
    done
}

# until_it_answers NAME SECONDS: wait until a machine runs commands
until_it_answers() {
    end=$(($(date +%s) + $2))
    until said=$(exec 2>&1 && within 30 run -m "$1" -u root -w / true); do
        if [ "$(date +%s)" -ge "$end" ]; then
            echo "$1 does not answer: $said" >&2
            return 1
        fi
        sleep 1
    done
}

# finish_cloud_init NAME COMMAND: run the command that waits for cloud-init in the machine
finish_cloud_init() {
    if ! orb run -m "$1" -u root -w / sh -c "$2"; then
        printf '%s\n' "cloud-init failed in machine $1: see its errors above" >&2
        return 1
    fi
    look "$1" || return 0
    file=$(cloud_init_folder)/$found
    [ ! -f "$file" ] || { read -r digest _ <"$file" && echo "$digest" >"$file"; }
}

# check_user NAME USER: whether a running machine has that user
check_user() {
    said=$(orb run -m "$1" -u root -w / id -u "$2" 2>&1) && return
    printf '%s\n' "machine $1 has no user $2, which must exist first: $said" >&2
    return 1
}

# set_user NAME USER: change the default user, but only to an existing one, as no other can log in
set_user() {
    check_user "$1" "$2" && orb config set "machine.$1.username" "$2"
}

# set_user_when_stopped NAME USER SECONDS [stay]: start the machine, since checking the user requires
# it. If that fails, or the machine is not to keep running, stop it again.
set_user_when_stopped() {
    orb start "$1" && until_it_answers "$1" "$3" && set_user "$1" "$2"
    status=$?
    [ "$status" != 0 ] || [ "${4:-}" != stay ] || return 0
    orb stop "$1" && return "$status"
}

# change_settings NAME KEY VALUE...: change settings of a machine, up to the first that fails
change_settings() {
    machine=$1
    shift
    while [ $# -gt 1 ]; do
        orb config set "machine.$machine.$1" "$2" || return
        shift 2
    done
}

# restart_with NAME KEY VALUE...: change settings that take effect at the next start. The machine
# stops first, so that the next run completes an interrupted one; it runs again even if a value is
# refused.
restart_with() {
    orb stop "$1" || return
    change_settings "$@"
    status=$?
    orb start "$1" && return "$status"
}

# make_from_user_data DIGEST LENGTH NAME create ARGUMENT...: make_machine with the cloud-init file of
# that many bytes from stdin. No other user can read the file, and it is deleted once the machine
# exists.
make_from_user_data() {
    digest=$1 length=$2 name=$3
    shift 4
    new_user_data || return
    trap 'rm -f "$data"' EXIT
    trap 'exit 130' HUP INT TERM
    cat >"$data" || return
    # pyinfra may add a newline.
    if [ "$(wc -c <"$data")" -lt "$length" ]; then
        echo 'the cloud-init file arrived incomplete; nothing was created: try again' >&2
        return 1
    fi
    make_machine "$name" create --user-data "$data" "$@" &&
        echo "$digest pending" >"$folder/$found"
}

# new_user_data: set `data` to a new file for a cloud-init file, which no other user can read
new_user_data() {
    folder=$(cloud_init_folder)
    (umask 077 && mkdir -p "$folder") || return
    # A killed shell leaves its file; after an hour nothing can be using it any more.
    find "$folder" -name 'new.*' -mmin +60 -exec rm -f {} +
    data=$(mktemp "$folder/new.XXXXXX")
}

# Where the checksum of a machine's cloud-init file is recorded, followed by `pending` until
# cloud-init has been seen to succeed.
cloud_init_folder() {
    printf %s "${XDG_STATE_HOME:-$HOME/.local/state}/pyinfra-orbstack/cloud-init"
}

# remove_all_of NAME ID: the machine, and everything recorded about it
remove_all_of() {
    remove "$1" "$2" && rm -f "$(cloud_init_folder)/$2"
}

# export_to NAME PATH: export a machine to a file that is complete or absent, and is private from the
# first byte on, even if OrbStack itself creates it
export_to() {
    case $2 in
    */*) private=${2%/*}/.${2##*/}.partial ;;
    *) private=.$2.partial ;;
    esac
    rm -rf "$private" && mkdir -m 700 "$private" || return
    trap 'rm -rf "$private"' EXIT
    trap 'exit 130' HUP INT TERM
    orb export "$1" "$private/${2##*/}" && chmod 600 "$private/${2##*/}" &&
        mv -f "$private/${2##*/}" "$2"
}
