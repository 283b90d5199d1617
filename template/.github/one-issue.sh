#!/bin/sh
# Keep at most one open issue with a label. Its text comes from standard input: open the issue, update
# the open one, or close that one if there is no text.
#
#   one-issue.sh LABEL TITLE <TEXT
set -eu
label=$1 title=$2 text=$(cat)

number=$(gh issue list --state open --label "$label" --limit 1 --json number --jq '.[].number')
if [ -z "$text" ]; then
  [ -z "$number" ] || gh issue close "$number" --comment 'This no longer applies.'
elif [ -n "$number" ]; then
  printf '%s\n' "$text" | gh issue edit "$number" --title "$title" --body-file -
else
  gh label create "$label" --force --description 'Opened and closed by a workflow'
  printf '%s\n' "$text" | gh issue create --label "$label" --title "$title" --body-file -
fi
