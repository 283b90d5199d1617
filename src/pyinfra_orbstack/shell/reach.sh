# shellcheck shell=sh
# shellcheck disable=SC2154
# Called with arguments of `orbctl` on a Mac: calls the function `reach` with a command line for any
# login shell there. It runs `text`, which ends in a call, with our arguments added to that.
for word; do
    word=$(printf %s. "$word" | sed "s/'/'\\\\''/g")
    text="$text '${word%.}'"
done
# shellcheck disable=SC1003
code=$(printf %s "$text" | od -An -v -to1 | tr -s ' \n' '\\\\')
reach "exec sh -c 'eval \"\$(printf \"${code%\\}\")\"'"
