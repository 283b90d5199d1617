# shellcheck shell=sh disable=SC2034,SC2086,SC2154
# Finds all descendants of given processes: by parent, group or session, since the children of `su`
# have a session of their own.

# Counts the sets of processes that are found.
orb_set=0

# from [PID STARTED KIND]...: the processes to start from. A pid is ours only while its start time
# is the given one; a group that is gone may have left members.
orb_from() {
  orb_me=" $$ $PPID " orb_roots='' orb_any='' orb_set=$((orb_set + 1))
  while [ $# -gt 2 ]; do
    orb_lines "/proc/$1/stat"
    if [ -z "$orb_last" ]; then orb_word=$3; else orb_started ${orb_last##*) }; fi
    case $orb_word in "$2" | group) orb_any=1; orb_add "$1" "$2" ;; esac
    [ "$orb_word" != "$2" ] || orb_roots="$orb_roots $1"
    shift 3
  done
  [ -n "$orb_any" ]
}

# add PID STARTED: to the set, a variable for each: shells search long strings slowly.
orb_add() {
  eval "orb_in_$1=\$orb_set:\$2"
}

# lines FILE: its first and its last line. Between them is a name, which may contain newlines; only
# what precedes and follows it is the kernel's.
orb_lines() {
  orb_first='' orb_last=''
  while IFS= read -r orb_line; do
    orb_first=${orb_first:-$orb_line} orb_last=$orb_line
  done <"$1"
}

orb_started() {
  shift 19
  orb_word=$1
}

# find: adds the descendants to the set, and lists those that are alive in $orb_live. If new ones
# appear in every search, some are missing, and $orb_new stays 1.
orb_find() {
  orb_tries=0 orb_new=1
  while [ $orb_new = 1 ] && [ $orb_tries -lt 10 ]; do
    orb_search
    orb_tries=$((orb_tries + 1))
  done
}

# search: the same, but it may miss descendants of those that it finds; then $orb_new is 1.
# $orb_moving is 1 if some are not stopped. It starts no process, as a limit may be reached.
orb_search() {
  orb_new=0 orb_moving=0 orb_live='' orb_parents=' ' orb_seen=''
  for orb_file in /proc/[0-9]*/stat; do
    orb_lines "$orb_file"
    [ -z "$orb_last" ] || orb_sift "${orb_first%% *}" ${orb_last##*) }
  done
  # This shell is one of them.
  [ -n "$orb_seen" ] || exit 1
}

# sift PID STATE PARENT GROUP SESSION ...: argument 19 counts threads, 21 is the start time.
orb_sift() {
  orb_seen=1
  [ "$2" != X ] || return
  case $orb_me in *" $1 "*) return ;; esac
  # Nothing but digits may become a part of a command.
  case $1$3$4$5 in *[!0-9]*) return ;; esac
  eval "orb_marks=\" \${orb_in_$3-} \${orb_in_$4-} \${orb_in_$5-}\" orb_own=\${orb_in_$1-}"
  case $orb_own in
  "$orb_set:${21}") ;;
  "$orb_set:"*)
    # The one in the set is gone, and its number is used again; perhaps by another descendant.
    eval "orb_in_$1=" orb_new=1
    return
    ;;
  *)
    case $orb_marks in *" $orb_set:"*) ;; *) return ;; esac
    orb_add "$1" "${21}"
    orb_new=1
    ;;
  esac
  case $2 in
  T | t) ;;
  # It has ended, or only its first thread has. Either way it leads to its group and session.
  Z) [ "${19}" -gt 1 ] || return ;;
  *) orb_moving=1 ;;
  esac
  orb_live="$orb_live $1" orb_parents="$orb_parents$3 "
}
