# shellcheck shell=sh disable=SC2059,SC2086
# The control shell: it runs commands in a target and reports them to the client.
#
# 6 and 7 are the streams to the client; 4 carries stdout inside one exchange. A command gets only 0
# to 2, and this shell's own stdout and stderr are /dev/null, so that its job messages never reach
# the client. Messages for the client begin with the exchange's token, which is in no argument list
# and in no environment. `read` is used only for ASCII words; it takes no byte after the newline.

# A session id of its own, which later identifies the command's descendants.
orb_setsid=$(command -v setsid)

# Streams: two pipes.
orb_pipes() {
  exec 6>&1 7>&2 >/dev/null 2>&1
}

# open TOKEN DIRECTORY
orb_open() {
  orb_in=home
  case $2 in
    '') cd || cd / ;;
    /*) cd "$2" || orb_in=missing ;;
    # Neither a flag nor a name in CDPATH.
    *) cd "./$2" || orb_in=missing ;;
  esac
  IFS= read -r orb_own <"/proc/$$/stat"
  IFS= read -r orb_init </proc/1/stat
  printf '%s hello %s %s init %s\n' "$1" "$orb_in" "$orb_own" "${orb_init##*) }" >&6
  printf '%s hello\n' "$1" >&7
  [ "$orb_in" = home ] || exit 1
}

# control PROGRAM TOKEN DIRECTORY: opens a session. Where perl works, it runs the exchanges from then
# on, unless its user adds something to all programs in perl. Once the client has the greeting, this
# shell must not read, since it would read ahead.
orb_control() {
  [ -n "${PERL5OPT-}" ] || perl -C0 -e "$1" check </dev/null
  orb_checked=$?
  orb_open "$2" "$3"
  [ $orb_checked != 42 ] || exec perl -C0 -e "$1" serve "$orb_setsid"
}

# ready TOKEN START: nothing runs before the client has sent START, unless it is empty.
orb_ready() {
  [ -n "$2" ] || return 0
  printf '%s ready\n' "$1" >&6
  IFS= read -r orb_start
  [ "$orb_start" = "$2" ] || exit 1
}

# begin TOKEN: reports the process that becomes the command, which is cheaper than an extra one.
orb_begin() {
  IFS= read -r orb_self </proc/self/stat
  printf '%s begin %s\n' "$1" "$orb_self" >&6
  printf '%s begin\n' "$1" >&7
}

# exec TOKEN WORD...: with `&` it would have SIGINT ignored.
orb_exec() {
  orb_begin "$1"
  shift
  exec $orb_setsid "$@" 4>&- 6>&- 7>&-
}

# child TOKEN SOURCE WORD...: runs the command with a stdin that is empty, the rest of ours, a part of
# ours that has a given length, or the output of a format; reports its status in both of its outputs,
# so that a copy that ends too early lacks it.
orb_child() {
  orb_token=$1 orb_source=$2
  shift 2
  case $orb_source in
    -none) ( orb_exec "$orb_token" "$@" ) </dev/null 2>&1 >&4 ;;
    -rest) ( orb_exec "$orb_token" "$@" ) 2>&1 >&4 ;;
    -*) orb_part "$orb_token" "${orb_source#-}" | orb_partly "$orb_token" "$@" 2>&1 >&4 ;;
    *) orb_input "$orb_token" "$orb_source" | ( orb_exec "$orb_token" "$@" ) 2>&1 >&4 ;;
  esac
  orb_status=$?
  printf '%s status %s\n' "$orb_token" "$orb_status" >&4
  printf '%s status %s\n' "$orb_token" "$orb_status"
}

# input TOKEN FORMAT: the command's stdin, and whether all of it was written.
orb_input() {
  ( printf "$2" 4>&- 6>&- 7>&- )
  printf '%s input %s\n' "$1" "$?" >&4
}

# part TOKEN LENGTH: the same, from our own stdin; the client sends no more before the end.
orb_part() {
  head -c "$2" 4>&- 6>&- 7>&-
  printf '%s input %s\n' "$1" "$?" >&4
}

# partly TOKEN WORD...: runs the command, and drops what it does not read: none of it is a frame.
orb_partly() (
  ( orb_exec "$@" )
  orb_status=$?
  cat >/dev/null
  exit "$orb_status"
)

# exchange TOKEN START SOURCE WORD...: over when the command has ended and both outputs are closed.
# A `cat` copies each output; the process that waits for it reports its status.
orb_exchange() {
  orb_ready "$1" "$2"
  orb_token=$1 orb_source=$3
  shift 3
  { { orb_child "$orb_token" "$orb_source" "$@" | cat >&7 4>&- 6>&-
      printf '%s copied %s\n' "$orb_token" "$?" >&7; } 4>&1 | cat >&6 4>&- 7>&-
    printf '%s copied %s\n' "$orb_token" "$?" >&6; }
  printf '%s end\n' "$orb_token" >&6
  printf '%s end\n' "$orb_token" >&7
}

# drain: reads the input that the command has left, until the client closes it. Some clients drop
# output if their input is not read; and a shell would run the rest as commands.
orb_drain() {
  exec cat >/dev/null
}

# typed TOKEN: reads its work from a terminal; nothing is typed before this is ready. The input is
# octal numbers, so that no echo contains a token, and counted, since a terminal drops input for
# which it has no room.
orb_typed() {
  stty -echo 2>/dev/null
  exec 6>&1 7>/dev/null 2>&1
  printf '%s ready\n' "$1" >&6
  orb_octal=
  while IFS= read -r orb_line; do
    case $orb_line in '. '*) break ;; esac
    orb_octal=$orb_octal$orb_line
  done
  [ "$orb_line" = ". ${#orb_octal}" ] || exit 1
  eval "$(printf "$orb_octal")"
}

# relayed: runs its first line of input, which is octal numbers, and leaves the rest to the command.
# Both outputs are the command's, so messages for the client come between those on stderr.
orb_relayed() {
  exec 6>&2 7>/dev/null
  IFS= read -r orb_line || exit 1
  eval "$(printf "$orb_line")"
}

# terminal TOKEN START WORD...: one stream, no copies. Typed input may interrupt only the command.
orb_terminal() {
  orb_ready "$1" "$2"
  orb_token=$1
  shift 2
  trap : INT QUIT
  ( orb_begin "$orb_token"; exec "$@" >&6 2>&6 6>&- 7>&- )
  printf '%s status %s\n%s end\n' "$orb_token" "$?" "$orb_token" >&6
}
