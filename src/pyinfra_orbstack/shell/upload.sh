# shellcheck shell=sh
# shellcheck disable=SC2154 # what transfer.sh sets
# The writing end of an upload.
#
# The content goes to `new` in a *room*, a private directory beside the target, and is renamed to
# the target if that keeps the target's attributes; else it is copied over it while `old` in the
# room keeps the old content. The working directory is the room, so it cannot be replaced by another
# one, and `..` is the directory of the target, wherever its name leads meanwhile.

# put TOKEN TARGET PLACE [SHA256 CRC LENGTH FORMAT]: write the output of `printf FORMAT` to TARGET,
# or stdin, which then ends with the three sums. PLACE takes the room if TARGET's directory cannot.
put() {
    token=$1 place=$3 unread=''
    [ $# -gt 3 ] || unread=1
    begin_writing
    find_target "$2"
    refuse_odd
    sweep keep .
    make_room
    shift 3
    receive "$@"
    case $kind in
    new) rename_it || fail "${reason:-one of its commands was killed}" ;;
    regular) { [ -n "$beside" ] && be_alike && rename_it; } || copy_over ;;
    *) write_special ;;
    esac
    [ -z "$unfinished" ] || sweep drop "$directory"
    leave_room
    say ok
}

# recover TOKEN TARGET PLACE: undo what a killed upload to TARGET left.
recover() {
    token=$1 place=$3 unread=''
    begin_writing
    find_target "$2"
    if [ -f "./$base" ] && [ -r "./$base" ]; then
        recover_locked 3<"./$base"
    else
        sweep keep . && sweep_places keep
    fi
    say ok
}

recover_locked() {
    lock_target
    sweep back . && sweep_places back
}

begin_writing() {
    room='' beside='' kept='' overwriting='' unfinished=''
    trap 'fail "it was interrupted by a signal"' HUP INT TERM
    say begun
    case $place in '' | /*) ;; *) place=$PWD/$place ;; esac
    IFS= read -r host </proc/sys/kernel/hostname
    choose_digester
}

fail() {
    trap '' HUP INT TERM
    said=$1
    [ -z "$overwriting" ] || put_back
    [ -n "$kept" ] || leave_room
    say "failed $said"
    [ -z "$unread" ] || read_the_rest
    exit 1
}

# Some clients, such as podman's, fail as if the connection were lost if content is left unread.
# The client stops sending now; this does not wait for a source that stands still.
read_the_rest() {
    exec 8<&0
    cat <&8 >/dev/null 2>&1 &
    rounds=0
    while kill -0 $! 2>/dev/null && [ $rounds -lt 30 ]; do
        sleep 0.1 2>/dev/null || sleep 1
        rounds=$((rounds + 1))
    done
    kill $! 2>/dev/null
}

fail_with() {
    reason_in "$1"
    fail "${reason:-one of its commands was killed}"
}

# The target --------------------------------------------------------------------------------------

# Follow NAME to the actual file: change to its directory and set `base` and `kind`.
find_target() {
    name=$1 hops=0
    while :; do
        [ -n "$name" ] || fail 'No such file or directory'
        case $name in
        */) if [ -e "$name" ] || [ ! -e "${name%/}" ]; then fail 'Is a directory'; else fail 'Not a directory'; fi ;;
        /*) ;;
        *) name=./$name ;;
        esac
        base=${name##*/}
        cd -P "${name%/*}/" 2>/dev/null || {
            reason_against "${name%/*}/." 'Permission denied'
            fail "$reason"
        }
        [ -L "./$base" ] || break
        hops=$((hops + 1))
        [ $hops -le 40 ] || fail 'Too many levels of symbolic links'
        follow_link
    done
    directory=$PWD
    [ "$directory" -ef . ] || fail 'its directory has no path'
    if [ -b "./$base" ] || [ -c "./$base" ]; then kind=special; else kind=regular; fi
    case $directory/ in /proc/* | /sys/*) kind=special ;; esac
    [ -e "./$base" ] || case $kind in
    special) fail 'No such file or directory' ;;
    *) kind=new ;;
    esac
}

# The kernel does not follow every link (fs.protected_symlinks), and neither do we: if a link
# leads to nothing, the kernel's own reason must be that there is nothing.
follow_link() {
    if [ ! -e "./$base" ]; then
        reason_against "./$base" ''
        [ "$reason" = 'No such file or directory' ] || fail "$reason"
    fi
    name=$(readlink "./$base" && printf x) || fail 'its symbolic link cannot be read'
    name=${name%
x}
}

refuse_odd() {
    [ ! -d "./$base" ] || fail 'Is a directory'
    [ ! -p "./$base" ] || fail 'it is a FIFO, which stores nothing'
    [ ! -S "./$base" ] || fail 'it is a socket'
    if [ "$kind" = regular ] && [ ! -w "./$base" ]; then
        why=$({ : >>"./$base"; } 2>&1) || fail_with "$why"
    fi
}

# Rooms -------------------------------------------------------------------------------------------

# Its name identifies its writer, so that the room of a killed writer can be recognized.
make_room() {
    start_of $$
    ours=.pyinfra-orbstack-$host-$$-$start-$token
    [ "$kind" = special ] || ! enter_room . || { beside=1 && return; }
    [ "$kind" != new ] || fail_with "$why"
    for where in "$place" "${TMPDIR:-}" /tmp "${HOME:-}" /var/tmp /dev/shm; do
        [ -z "$where" ] || ! enter_room "$where" || return 0
    done
    reason_in "$why"
    fail "no directory accepts a temporary file: $reason"
}

# A directory that passes its group on passes it on through the room.
enter_room() {
    why=$(mkdir -m 700 "$1/$ours" 2>&1) || {
        rmdir "$1/$ours" 2>/dev/null
        return 1
    }
    { cd -P "$1/$ours" && is_ours; } || fail 'its temporary directory was removed'
    room=$ours
    [ ! -g .. ] || [ -g . ] || chmod g+s .
}

# Whether the working directory is the one that was created, and not one that replaced it. If even
# a newly created file has another owner, as in a share, that is unknown.
# shellcheck disable=SC3067 # dash and busybox have -O
is_ours() {
    [ -O . ] || (
        set -C
        : >"$token" && [ ! -O "$token" ] && rm "$token"
    ) 2>/dev/null
}

leave_room() {
    [ -z "$room" ] || { cd -P .. && rm -rf "./$room"; }
}

# start_of PID: set `start` to the process's start time, or to nothing if it is gone.
start_of() {
    start=''
    { IFS= read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 0
    # shellcheck disable=SC2086 # words
    set -- ${stat##*) }
    case $1 in Z | X) ;; *) start=${20} ;; esac
}

# Whether the writer of a room is gone. Another machine's is not visible; a day is enough for it.
is_left() {
    rest=${1##*/.pyinfra-orbstack-}
    rest=${rest%-*}
    began=${rest##*-} rest=${rest%-*}
    if [ "${rest%-*}" = "$host" ]; then
        start_of "${rest##*-}"
        [ "$start" != "$began" ]
    else
        [ -n "$(find "$1" -prune -mtime +0 2>/dev/null)" ]
    fi
}

# sweep HOW DIRECTORY: remove the rooms that killed writers left there. One that contains the old
# content of a target is removed only for that target: HOW is to `keep` it, to put it `back` (3 is
# the target, locked), or to `drop` it.
sweep() {
    for left in "$2"/.pyinfra-orbstack-*; do
        # shellcheck disable=SC3067 # dash and busybox have -O
        { [ -d "$left" ] && [ ! -L "$left" ] && [ -O "$left" ] && is_left "$left"; } || continue
        if [ -f "$left/begun" ]; then
            [ "$(cat "$left/name" && printf x)" = "$directory/${base}x" ] || continue
            case $1 in
            keep) unfinished=1 && continue ;;
            back) restore_from "$left" || { say "kept $left/old" && continue; } ;;
            esac
        fi
        rm -rf "$left"
    done
}

sweep_places() {
    for where in "$place" "${TMPDIR:-}" /tmp "${HOME:-}" /var/tmp /dev/shm; do
        [ -z "$where" ] || sweep "$1" "$where"
    done
}

# Writing -----------------------------------------------------------------------------------------

# Read the content and check that it is complete and unchanged.
receive() {
    if [ $# = 4 ]; then
        # shellcheck disable=SC2059 # it is a format, of octal numbers
        why=$(printf "$4" 2>&1 >new) || fail_with "$why"
    else
        why=$(cat 2>&1 >new) || fail_with "$why"
        unread=''
        set -f
        # shellcheck disable=SC2046 # words
        set -- $(tail -c 160 new 2>/dev/null)
        set +f
        [ "$1" = "$token" ] || fail 'its content arrived incomplete'
        [ "$2" = whole ] || fail 'its source failed'
        shift 2
        why=$(dd if=/dev/null of=new bs=1 seek="$3" 2>&1) || fail_with "$why"
    fi
    case $digester in
    sha*) wanted="$1  -" ;;
    ck*) wanted="$2 $3" ;;
    *) wanted=$3 ;;
    esac
    [ "$($digester <new)" = "$wanted" ] || fail mismatch
}

# Give `new` the target's attributes; if that is impossible, it must not be renamed.
be_alike() {
    [ ! -r "../$base" ] || copy_attributes || return 1
    # shellcheck disable=SC2046 # words
    set -- $(stat -c '%u:%g %a %h' "../$base" new 2>/dev/null)
    [ "$3" = 1 ] || return 1
    if [ "$1 $2" != "$4 $5" ]; then
        chown "$1" new && chmod "$2" new || return 1
        [ "$(stat -c '%u:%g %a' new)" = "$1 $2" ] || return 1
    fi 2>/dev/null
    if command -v lsattr >/dev/null; then
        flags=$(lsattr -d "../$base" new 2>/dev/null) || return 0
        new_flags=${flags##*
}
        [ "${flags%% *}" = "${new_flags%% *}" ]
    fi
}

# GNU's cp copies access lists and extended attributes. Without it, they must not exist.
copy_attributes() {
    why=$(cp --attributes-only --preserve=mode,ownership,xattr "../$base" new 2>&1) && return
    case $why in
    *'nrecognized option'* | *'nknown option'* | *'nvalid option'* | *'unexpected argument'*) ;;
    *) return 1 ;;
    esac
    ! command -v getfacl >/dev/null || [ -z "$(getfacl -c -s "../$base" 2>&1)" ] || return 1
    ! command -v getfattr >/dev/null || [ -z "$(getfattr -m - "../$base" 2>&1)" ]
}

rename_it() {
    reason='Is a directory'
    [ ! -d "../$base" ] || return 1
    # Without -T, mv would move it into a directory that takes the target's place now.
    why=$(mv -f -T new "../$base" 2>&1) || case $why in
    *'nvalid option'* | *'nrecognized option'*) why=$(mv -f new "../$base" 2>&1) ;;
    esac
    reason_in "$why"
    [ ! -e new ]
}

write_special() {
    why=$(cat new 2>&1 >"$directory/$base") || fail_with "$why"
}

copy_over() {
    target=../$base
    [ -n "$beside" ] || target=$directory/$base
    [ -r "$target" ] || fail 'it cannot be replaced, nor read to back it up'
    swaps=0
    until overwrite 3<"$target"; do
        swaps=$((swaps + 1))
        [ $swaps -lt 9 ] || fail 'it was removed meanwhile'
    done
}

# 3 is the target. It is opened for writing through /proc, because a shell's own `>` would ask to
# create it, which fs.protected_regular forbids in directories such as /tmp.
overwrite() {
    lock_target
    [ "$target" -ef /proc/self/fd/3 ] || return 1
    sweep back "$directory"
    sweep_places back
    why=$({ cat <&3 >old && printf %s "$directory/$base" >name && : >begun; } 2>&1) || {
        reason_in "$why"
        fail "its old content cannot be backed up: $reason"
    }
    overwriting=1
    why=$(cat new 2>&1 >/proc/self/fd/3) || fail_with "$why"
    [ "$($digester </proc/self/fd/3)" = "$wanted" ] || fail 'it did not store the content unchanged'
    overwriting=''
}

# Two uploads that write over one file take turns.
lock_target() {
    command -v flock >/dev/null || return 0
    tries=0
    until flock -n 3 2>/dev/null; do
        [ $? = 1 ] && tries=$((tries + 1)) || return 0
        [ $tries -le 60 ] || fail 'another process has locked it'
        sleep 1
    done
}

put_back() {
    overwriting=''
    before=$($digester <old)
    [ -z "$before" ] || [ "$($digester </proc/self/fd/3)" != "$before" ] || return 0
    if cat old 2>/dev/null >/proc/self/fd/3 && [ "$($digester </proc/self/fd/3)" = "$before" ]; then
        said="$said; its old content was restored"
    else
        kept=1
        said="$said; its old content could not be restored and is kept in $PWD/old"
    fi
}

# restore_from ROOM: 3 is the target of its killed writer. The target's content is that writer's
# only while it is the beginning of what it wrote, or of what it put back.
restore_from() {
    size=$(wc -c </proc/self/fd/3)
    is=$($digester </proc/self/fd/3)
    for whole in "$1/new" "$1/old"; do
        [ "$(wc -c <"$whole")" -gt "$size" ] || continue
        [ "$(head -c "$size" "$whole" | $digester)" = "$is" ] || continue
        cat "$1/old" >/proc/self/fd/3 && [ "$($digester </proc/self/fd/3)" = "$($digester <"$1/old")" ]
        return
    done
} 2>/dev/null
