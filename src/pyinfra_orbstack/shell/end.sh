# shellcheck shell=sh disable=SC2086
# Kills a command. Used with processes.sh.

# end [PID STARTED KIND]...: kills all that `orb_find` finds. On a busy host a killed process may
# take a while to go.
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
