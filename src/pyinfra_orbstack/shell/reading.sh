# shellcheck shell=sh disable=SC2154
# Reports when a command waits for input on its terminal. Used with processes.sh.
#
# An end of file that is typed before a process reads it turns into a NUL byte if the mode of the
# terminal changes meanwhile: `sudo` does so, and passes it on to a terminal of its own.

# reading PID STARTED KIND: prints a line each time, until the process is gone.
orb_reading() {
  exec 2>/dev/null
  case $(uname -m) in
    # read, readv and splice, with which the `cat` of Ubuntu 26.04 reads; then calls that wait.
    x86_64) orb_read=' 0 19 275 ' orb_poll=' 7 23 232 270 271 281 441 ' ;;
    aarch64 | riscv64) orb_read=' 63 65 76 ' orb_poll=' 22 72 73 441 ' ;;
    *) orb_read=' 3 145 ' orb_poll=' ' ;;
  esac
  orb_self=$(id -u)
  orb_ids "$1"
  orb_login=$orb_id orb_scans=0 orb_same=0 orb_before=
  while orb_from "$@"; do
    orb_find
    orb_reads='' orb_doubt=''
    for orb_one in $orb_live; do orb_look "$orb_one"; done
    [ "$orb_doubt" = "$orb_before" ] || orb_same=0
    orb_same=$((orb_same + 1)) orb_before=$orb_doubt
    # A process that may wait for something else counts only after this many scans.
    if [ -n "$orb_reads" ] || { [ -n "$orb_doubt" ] && [ $orb_same -ge "${orb_doubt% *}" ]; }; then
      orb_same=0
      echo reading
    fi
    orb_scans=$((orb_scans + 1))
    if [ $orb_scans -lt 50 ]; then orb_nap 0.1; else orb_nap 0.5; fi
  done
}

# look PID: whether it waits in `read` on a terminal; or waits in `poll` or the like, with a
# terminal as its stdin; or hides what it does.
orb_look() {
  if IFS=' ' read -r orb_call orb_fd _ <"/proc/$1/syscall"; then
    case $orb_read in
      *" $orb_call "*) [ ! -c "/proc/$1/fd/$((orb_fd))" ] || orb_reads=yes ;;
    esac
    case $orb_poll in
      *" $orb_call "*) [ ! -c "/proc/$1/fd/0" ] || orb_leaf "$1" 40 ;;
    esac
  elif IFS= read -r orb_call <"/proc/$1/wchan" && [ "$orb_call" != 0 ]; then
    # Some systems show the call only to debuggers.
    case $orb_call in wait_woken | n_tty_read) ;; *) return ;; esac
    [ ! -c "/proc/$1/fd/0" ] || orb_reads=yes
  elif [ "$orb_self" = 0 ]; then
    orb_hidden "$1"
  fi
}

# hidden PID: a process that root without all its rights cannot inspect. Another call, of the user
# who logged in, inspects that user's; a process that changes users is about to do more.
orb_hidden() {
  orb_ids "$1"
  [ "$orb_id" != "$orb_login" ] || return
  orb_lines "/proc/$1/stat"
  case ${orb_first#* } in '(sudo) '* | '(sudo-rs) '* | '(su) '* | '(doas) '*) return ;; esac
  case ${orb_last##*) } in S*) orb_leaf "$1" 15 ;; esac
}

# leaf PID SCANS: marks it as doubtful, unless it waits for a child process.
orb_leaf() {
  case $orb_parents in *" $1 "*) ;; *) orb_doubt="$2 $1" ;; esac
}

orb_ids() {
  orb_id=
  while read -r orb_key orb_value; do
    if [ "$orb_key" = Uid: ]; then orb_id=$orb_value; fi
  done <"/proc/$1/status"
}

orb_nap() {
  sleep "$1" || sleep 1
}
