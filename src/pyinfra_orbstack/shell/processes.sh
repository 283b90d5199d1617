# shellcheck shell=sh disable=SC2034,SC2086
# Finds all descendants of given processes: by parent, group or session, since the children of `su`
# have a session of their own.

# from [PID STARTED KIND]...: the processes to start from. A pid is ours only while its start time
# is the given one; a group that is gone may have left members.
orb_from() {
  orb_me=" $$ $PPID " orb_all=' '
  while [ $# -gt 2 ]; do
    if IFS= read -r orb_stat <"/proc/$1/stat"; then
      orb_started ${orb_stat##*) }
      if [ "$orb_word" = "$2" ]; then orb_all="$orb_all$1 "; fi
    elif [ "$3" = group ]; then
      orb_all="$orb_all$1 "
    fi
    shift 3
  done
  [ "$orb_all" != ' ' ]
}

orb_started() {
  shift 19
  orb_word=$1
}

# find: adds the descendants to $orb_all, and lists those that are alive in $orb_live.
orb_find() {
  orb_new=1
  while [ $orb_new = 1 ]; do orb_search; done
}

# search: the same, but it may miss descendants of those that it finds; then $orb_new is 1.
# $orb_moving is 1 if some are not stopped.
orb_search() {
  orb_new=0 orb_moving=0 orb_live='' orb_parents=' '
  for orb_file in /proc/[0-9]*/stat; do
    IFS= read -r orb_stat <"$orb_file" && orb_sift "${orb_stat%% *}" ${orb_stat##*) }
  done
}

# sift PID STATE PARENT GROUP SESSION ...
orb_sift() {
  case $2 in Z | X) return ;; esac
  case $orb_me in *" $1 "*) return ;; esac
  case $orb_all in
    *" $1 "*) ;;
    *" $3 "* | *" $4 "* | *" $5 "*) orb_all="$orb_all$1 " orb_new=1 ;;
    *) return ;;
  esac
  case $2 in T | t) ;; *) orb_moving=1 ;; esac
  orb_live="$orb_live $1" orb_parents="$orb_parents$3 "
}
