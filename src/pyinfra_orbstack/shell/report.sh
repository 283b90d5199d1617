# Runs a command and writes its exit status to descriptor 3.
# Descriptor 4 may be the other end of the command's stderr: while it is open here, a command that
# outlives its caller can still write there.
"$@" 3>&- 4<&-
printf %s "$?" >&3
