#!/bin/sh
# Give the key in SSH_KEY to an agent that the later steps of a job use: it is in no file.
set -eu
if [ -z "${SSH_KEY:-}" ]; then
  echo '::error::this environment has no secret SSH_KEY: docs/deploying.md says how to set it'
  exit 1
fi
if ! grep -qs '^[^#]' known_hosts; then
  echo '::error::known_hosts names no server: record the keys of your servers in it'
  exit 1
fi
eval "$(ssh-agent -s)" >/dev/null
printf '%s\n' "SSH_AUTH_SOCK=$SSH_AUTH_SOCK" "SSH_AGENT_PID=$SSH_AGENT_PID" >>"$GITHUB_ENV"
printf '%s\n' "$SSH_KEY" | ssh-add -q -
