# shellcheck shell=sh
# Ends a control connection of ssh: keeper FOLDER SSH... waits until no process has FOLDER/users, its
# input, open for writing any more, however those processes ended, calls SSH to end the connection,
# and removes FOLDER.
read -r _
folder=$1
shift
"$@"
rm -f "$folder/users" "$folder/orbctl" "$folder/s"
rmdir "$folder"
