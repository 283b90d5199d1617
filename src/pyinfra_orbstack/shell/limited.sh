# shellcheck shell=sh
# LIMIT COMMAND...: runs the command with this soft limit of open files.
# dash, bash and busybox support `ulimit -S`.
# shellcheck disable=SC3045
ulimit -S -n "$1"
shift
exec "$@"
