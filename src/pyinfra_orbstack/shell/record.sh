# shellcheck shell=sh
# shellcheck disable=SC2034,SC2154
# The record of machines, on the OrbStack host: record.py describes its content, and takes the same
# lock. It contains only functions; Python sends those that a command needs, followed by the call.

# find_record: the record itself, behind symlinks; empty if none is set
find_record() {
    record=${PYINFRA_ORBSTACK_RECORD:-} links=0
    while [ -L "$record" ] && [ "$links" -lt 40 ]; do
        links=$((links + 1)) target=$(readlink "$record")
        case $target in
        /*) record=$target ;;
        *) record=$(dirname "$record")/$target ;;
        esac
    done
    case $record in -*) record=./$record ;; esac
    writer=$$.$(date +%s)
    # `orbctl` runs on another host.
    place=${PYINFRA_ORBSTACK_PLACE:-}
    [ -z "$place" ] || return 0
    place=$(command -v "$orbctl")
    case $place in /*) ;; *) place=$PWD/$place ;; esac
    place=$(printf '%s %s %s' "$place" "${HOME:-}" "${ORBCTL_SIMULATOR_HOME:-${XDG_STATE_HOME:-}}" |
        tr '\n' ' ' | sed 's/ *$//')
}

# is_gone WRITER: whether the process that a lock names has certainly ended
is_gone() (
    pid=${1%%.*} LC_ALL=C
    export LC_ALL
    case $pid in '' | 0 | *[!0-9]*) exit 1 ;; esac
    if said=$(kill -0 "$pid" 2>&1); then
        # A zombie remains in the list of processes.
        case $(cat "/proc/$pid/stat" 2>/dev/null) in *') Z '*) exit 0 ;; *) exit 1 ;; esac
    fi
    case $said in *'o such process'*) exit 0 ;; *) exit 1 ;; esac
)

# hold PATH: take a lock, and wait while another process holds it
hold() (
    tries=0 misses=0
    until said=$(ln -sn "$token" "$1" 2>&1) && [ "$(readlink "$1")" = "$token" ]; do
        tries=$((tries + 1))
        if ! holder=$(readlink "$1"); then
            # It was released just now, or it cannot be created at all.
            misses=$((misses + 1))
            if [ "$misses" -gt 20 ]; then
                printf '%s\n' "$said" >&2
                exit 1
            fi
        elif is_gone "$holder" || [ -n "$(find "$1" -prune -mmin +1)" ]; then
            # Under a lock of its own, so that no process removes a lock taken by a third meanwhile.
            own=$1.$(printf %s "$holder" | tr -dc 0-9.)
            hold "$own" || exit 1
            [ "$(readlink "$1")" != "$holder" ] || rm -f "$1"
            let_go "$own"
        elif [ "$tries" -gt 1800 ]; then
            echo "$1 is held by process ${holder%%.*}; if that is wrong, remove it" >&2
            exit 1
        else
            misses=0
            sleep 0.05 || sleep 1
        fi
    done
)

# let_go PATH: release a lock
let_go() {
    [ "$(readlink "$1")" != "$token" ] || rm -f "$1"
}

# with_record COMMAND...: run it while holding the record's lock
with_record() {
    if [ -L "$record" ]; then
        echo "$record: Too many levels of symbolic links" >&2
        return 1
    fi
    [ -d "$(dirname "$record")" ] || mkdir -p "$(dirname "$record")" || return 1
    # This very process, which may be a part of the shell that outlives it.
    token=$(exec sh -c 'echo "$PPID"').$(date +%s)
    # Only the next in line waits for the lock itself, however often others take it.
    hold "$record.next" || return 1
    hold "$record.lock" && held=yes || held=
    let_go "$record.next"
    [ -n "$held" ] || return 1
    "$@"
    set -- "$?"
    let_go "$record.lock"
    return "$1"
}

# begin FILE: set `file`, and `new` to an equally private copy of it
begin() {
    file=$1 new=$1.new.$token
    if [ -d "$file" ]; then
        echo "$file: Is a directory" >&2
        return 1
    fi
    # Files of killed writers; a writer that was only suspended fails then, as it should.
    rm -f "$file".new.*
    if [ -e "$file" ]; then
        cp -p "$file" "$new"
    else
        : >"$new"
    fi
}

# finish STATUS: replace the file with the copy, atomically, if it is complete and the lock is ours
finish() {
    [ "$1" = 0 ] && [ "$(readlink "$record.lock")" = "$token" ] && mv -f "$new" "$file" && return
    echo "$file: No space left, or the lock is lost" >&2
    rm -f "$new"
    return 1
}

# append FILE LINE
append() {
    begin "$1" && end_last_line && printf '%s\n' "$2" >>"$new" && [ "$(tail -n 1 "$new")" = "$2" ]
    finish "$?"
}

# A truncated last line is completed.
end_last_line() {
    [ -z "$(tail -c 1 "$new")" ] || echo >>"$new"
}

# rewrite FILE COMMAND...: replace a file's content with a filter's output
rewrite() {
    begin "$1"
    began=$?
    shift
    # Not every awk reports that a disk is full.
    [ "$began" = 0 ] && filter "$@" >"$new" && filter "$@" | cmp -s - "$new"
    finish "$?"
}

filter() {
    if [ -e "$file" ]; then
        "$@" <"$file"
    else
        "$@" </dev/null
    fi
}

# The lines of the record without those of the machine, followed by new ones for it. awk completes a
# truncated last line.
without_intents() {
    LC_ALL=C name=$name awk '!(NF > 4 && $2 ~ /^[?!]$/ && ($1 "") == (ENVIRON["name"] ""))'
}
without_ours() {
    LC_ALL=C name=$name writer=$writer awk '!(NF > 4 && $2 ~ /^[?!]$/ &&
        ($1 "") == (ENVIRON["name"] "") && ($5 "") == (ENVIRON["writer"] ""))'
}
with_made() {
    without_ours && printf '%s ! %s %s %s %s\n' "$name" "$since" "$until" "$writer" "$place"
}
with_machine() {
    without_intents && printf '%s %s\n' "$name" "$id"
}
without_machine() {
    LC_ALL=C id=$id awk '!(NF == 2 && ($2 "") == (ENVIRON["id"] ""))'
}
without_place() {
    LC_ALL=C id=$id awk '($1 "") != (ENVIRON["id"] "")'
}

# Called with the lock held.
confirm_both() {
    append "$record.orbctl" "$id $place" && rewrite "$record" with_machine
}
forget_both() {
    [ ! -e "$record" ] || rewrite "$record" without_machine || return 1
    [ ! -e "$record.orbctl" ] || rewrite "$record.orbctl" without_place
}

# write_down COMMAND...: change the record, if one is set, or say why that is impossible
write_down() {
    [ -n "$record" ] || return 0
    trouble=$(with_record "$@" 2>&1) && return
    trouble=$(printf '%s\n' "$trouble" | head -n 1)
    echo "cannot write the record $PYINFRA_ORBSTACK_RECORD: ${trouble##*: }" >&2
    return 1
}

# intend: record that a machine is being created
intend() {
    write_down append "$record" "$name ? $since - $writer $place"
}

# was_made UNTIL: record that it has been created, and that its id is not known yet
was_made() {
    until=$1
    write_down rewrite "$record" with_made
}

drop_intent() {
    write_down rewrite "$record" without_ours
}

confirm() {
    id=$1
    write_down confirm_both
}

forget() {
    id=$1
    write_down forget_both
}
