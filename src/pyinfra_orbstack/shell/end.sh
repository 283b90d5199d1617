# shellcheck shell=sh disable=SC2086,SC2154
# Kills a command. Used with processes.sh.

# end [PID STARTED KIND]...: kills all that `orb_find` finds
orb_end() {
  exec 2>/dev/null
  # Otherwise the stopped processes would stay if this call's client is lost.
  trap '' HUP INT TERM
  orb_from "$@" || exit 0
  # At once, as the search takes a while on a busy host.
  [ -z "$orb_roots" ] || kill -STOP $orb_roots
  orb_stop || orb_find
  orb_round=0 orb_code=0
  while [ -n "$orb_live" ] || [ $orb_new = 1 ]; do
    [ $orb_round -lt 75 ] || exit 1
    # Killing these may cut the only link to those that are missing.
    [ $orb_new = 0 ] || orb_code=1
    kill -9 $orb_live
    orb_round=$((orb_round + 1))
    # On a busy host a killed process takes a while to go. Not in the first rounds: `sleep` cannot
    # be started while a limit of processes is reached.
    [ $orb_round -lt 20 ] || sleep 0.1 || sleep 1
    orb_find
  done
  exit $orb_code
}

# stop: stops them first, since nothing leads to a child with a session of its own if its parent is
# killed between `fork` and the next search. Fails if one cannot be stopped, for example because it
# waits in the kernel.
orb_stop() {
  orb_round=0 orb_waits=0 orb_still=-
  while [ $orb_round -lt 30 ] && [ $orb_waits -lt 5 ]; do
    orb_search
    case $orb_new$orb_moving in
    00)
      # They could not fork since the search before, which found the same ones.
      [ "$orb_still" != "$orb_live" ] || return 0
      orb_still=$orb_live
      ;;
    01) orb_waits=$((orb_waits + 1)) orb_still=- ;;
    esac
    kill -STOP $orb_live
    orb_round=$((orb_round + 1))
  done
  return 1
}
