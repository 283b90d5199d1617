#!/bin/sh
# Keep one open issue of a kind, whose text is standard input: open it, or bring the one that is open
# up to date, or close that if there is no text.
#
#   one-issue.sh LABEL TITLE <TEXT
set -eu
label=$1 title=$2 text=$(cat)

number=$(gh issue list --state open --label "$label" --limit 1 --json number --jq '.[].number')
if [ -z "$text" ]; then
  [ -z "$number" ] || gh issue close "$number" --comment 'This is no longer so.'
elif [ -n "$number" ]; then
  printf '%s\n' "$text" | gh issue edit "$number" --title "$title" --body-file -
else
  gh label create "$label" --force --description 'Opened and closed by a workflow'
  printf '%s\n' "$text" | gh issue create --label "$label" --title "$title" --body-file -
fi
