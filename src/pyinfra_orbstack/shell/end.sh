# shellcheck shell=sh disable=SC2086,SC2154
# Kills a command. Used with processes.sh.

# end [PID STARTED KIND]...: kills all that `orb_find` finds. On a busy host a killed process may
# take a while to go.
orb_end() {
  exec 2>/dev/null
  orb_from "$@" || exit 0
  orb_stop
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

# stop: stops them first, since nothing leads to a child with a session of its own if its parent is
# killed between `fork` and the next search. A process that cannot be stopped is not waited for.
orb_stop() {
  orb_round=0 orb_still=
  while [ $orb_round -lt 30 ]; do
    orb_search
    if [ "$orb_new$orb_moving" = 00 ]; then
      # None of them could fork since the search before, which found the same ones.
      [ "$orb_still" != "$orb_live" ] || return
      orb_still=$orb_live
    fi
    [ -n "$orb_live" ] || return
    kill -STOP $orb_live
    orb_round=$((orb_round + 1))
  done
}
