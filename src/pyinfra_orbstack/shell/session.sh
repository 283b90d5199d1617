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

# ready TOKEN START: nothing runs before the client has sent START.
orb_ready() {
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

# exec TOKEN TEXT: with `&` it would have SIGINT ignored.
orb_exec() {
  orb_begin "$1"
  exec $orb_setsid sh -c "$2" 4>&- 6>&- 7>&-
}

# child TOKEN SOURCE TEXT: runs the command with a stdin that is empty, the rest of ours, or the
# output of a format; reports its status in both of its outputs, so that a copy that ends too early
# lacks it.
orb_child() {
  case $2 in
    -none) ( orb_exec "$1" "$3" ) </dev/null 2>&1 >&4 ;;
    -rest) ( orb_exec "$1" "$3" ) 2>&1 >&4 ;;
    *) orb_input "$1" "$2" | ( orb_exec "$1" "$3" ) 2>&1 >&4 ;;
  esac
  orb_status=$?
  printf '%s status %s\n' "$1" "$orb_status" >&4
  printf '%s status %s\n' "$1" "$orb_status"
}

# input TOKEN FORMAT: the command's stdin, and whether all of it was written.
orb_input() {
  ( printf "$2" 4>&- 6>&- 7>&- )
  printf '%s input %s\n' "$1" "$?" >&4
}

# exchange TOKEN START SOURCE TEXT: over when the command has ended and both outputs are closed.
# A `cat` copies each output; the process that waits for it reports its status.
orb_exchange() {
  orb_ready "$1" "$2"
  { { orb_child "$1" "$3" "$4" | cat >&7 4>&- 6>&-
      printf '%s copied %s\n' "$1" "$?" >&7; } 4>&1 | cat >&6 4>&- 7>&-
    printf '%s copied %s\n' "$1" "$?" >&6; }
  printf '%s end\n' "$1" >&6
  printf '%s end\n' "$1" >&7
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

# terminal TOKEN START TEXT: one stream, no copies. Typed input may interrupt only the command.
orb_terminal() {
  orb_ready "$1" "$2"
  trap : INT QUIT
  ( orb_begin "$1"; exec sh -c "$3" >&6 2>&6 6>&- 7>&- )
  printf '%s status %s\n%s end\n' "$1" "$?" "$1" >&6
}
