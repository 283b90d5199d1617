# shellcheck shell=sh
# shellcheck disable=SC2034,SC2154 # what transfer.sh reads and sets
# The sending end of a download.

fail() {
    say "failed $1"
    exit 1
}

fail_with() {
    reason_in "$1"
    fail "${reason:-one of its commands was killed}"
}

# get HOW TOKEN SOURCE: print the content between two lines that begin with TOKEN, the second with
# the checksum of the sent content. HOW is `carefully`, or `quickly` if a file that changes
# meanwhile may fail.
get() {
    token=$2
    refuse_odd "$3"
    send "$1" 3<"$3" 5>&1 || {
        reason_against "$3" 'Permission denied'
        fail "$reason"
    }
}

refuse_odd() {
    [ ! -d "$1" ] || fail 'Is a directory'
    [ ! -p "$1" ] || fail 'it is a FIFO, which has no end'
    [ ! -S "$1" ] || fail 'it is a socket'
    [ ! -c "$1" ] || fail 'it is a device, which has no end'
}

# 3 is the file, 5 leads to the client. The size limits a file that grows; files of /proc have none.
send() {
    printf '%s begin\n' "$token"
    size=0 small=
    if [ -s /proc/self/fd/3 ]; then
        if [ "$1" = quickly ] && sum=$(cksum </proc/self/fd/3 2>/dev/null); then
            size=${sum#* }
            [ "$size" -gt 65536 ] || small=1
        else
            size=$(wc -c </proc/self/fd/3)
        fi
    fi
    if [ -n "$small" ]; then
        why=$(head -c "$size" <&3 2>&1 >&5) || fail_with "$why"
    else
        send_and_sum
    fi
    printf '%s end %s\n' "$token" "$sum"
}

# The checksum is that of the sent bytes: the file may change, and files of /proc are generated
# while they are read.
#
# 7 receives failures. `tee` may open the pipe to the checksum by name, since this user owns it; the
# pipe to the client may belong to another user.
send_and_sum() {
    choose_digester
    sum=$({
        { read_file 2>&7 || echo failed >&7; } |
            { tee /proc/self/fd/4 4>&1 >&5 2>&7 || echo failed >&7; } |
            $digester
    } 7>&1)
    case $sum in *failed*) fail_with "${sum%%
*}" ;; esac
}

# A file that grows is read up to its initial size.
read_file() {
    if [ "$size" -gt 0 ]; then head -c "$size"; else cat; fi </proc/self/fd/3
}
