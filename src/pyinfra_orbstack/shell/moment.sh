# shellcheck shell=sh
# Gives a process, the leader of its group, a moment to end, then kills the group.
n=0
while [ "$n" -lt 30 ]; do
    kill -0 "$1" 2>/dev/null || exit 0
    n=$((n + 1))
    sleep 0.1 || sleep 1
done
kill -TERM "-$1"
