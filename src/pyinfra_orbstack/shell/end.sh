# shellcheck shell=sh disable=SC2086
# Ends a command. Goes with processes.sh.

# end [PID STARTED KIND]...: kills all that `orb_find` finds. What was killed may take a while to go
# where the computer is busy.
orb_end() {
  exec 2>/dev/null
  orb_from "$@" || exit 0
  orb_round=0
  while [ $orb_round -lt 60 ]; do
    orb_find
    [ -n "$orb_live" ] || exit 0
    kill -9 $orb_live
    orb_round=$((orb_round + 1))
    [ $orb_round -lt 5 ] || sleep 0.1 || sleep 1
  done
  exit 1
}
