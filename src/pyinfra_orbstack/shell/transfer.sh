# shellcheck shell=sh
# shellcheck disable=SC2034,SC2154 # what the others set and read
# What uploads and downloads share. It runs in the target, in dash, bash or busybox, as the user
# that `_sudo` and similar arguments select, and reaches the shell on stdin: no wrapper alters it.

export LC_ALL=C
unset CDPATH IFS

# A transfer's messages: a line on stderr that begins with its token. Prompts of su may precede it,
# without a newline.
say() {
    printf '\n%s %s\n' "$token" "$*" >&2
}

# The reason at the end of a message of a command or of the shell, in the words of the C library.
reason_in() {
    reason=${1##*: }
    case $reason in
    'No such file' | 'no such file' | 'Directory nonexistent' | 'nonexistent directory')
        reason='No such file or directory'
        ;;
    'not found')
        reason=${1%: not found}
        reason="${reason##*: } was not found"
        ;;
    esac
}

# reason_against NAME MESSAGE: why NAME cannot be reached, else the message's reason. Some shells
# know fewer reasons than there are.
reason_against() {
    reason_in "$(ls -L -d -- "$1" 2>&1 >/dev/null || :)"
    [ -n "$reason" ] || reason_in "$2"
}

# Set `digester` to a command that computes a checksum of its stdin. The client knows all three.
choose_digester() {
    for digester in sha256sum cksum 'wc -c'; do
        ! command -v "${digester%% *}" >/dev/null || break
    done
}
