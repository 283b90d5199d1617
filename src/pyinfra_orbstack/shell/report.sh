# shellcheck shell=sh
# Runs a command and writes its exit status to descriptor 3, on a line of its own.
#
# Descriptor 4 may be the other end of the command's output: while it is open here, a command that
# outlives its caller can still print.
"$@" 3>&- 4<&-
printf '\n%s' "$?" >&3
