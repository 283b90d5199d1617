#!/bin/sh
# Load SSH_KEY into an SSH agent for the later steps of the job, without writing it to a file.
set -eu
if [ -z "${SSH_KEY:-}" ]; then
  echo '::error::this environment has no secret SSH_KEY: set it as docs/deploying.md describes'
  exit 1
fi
if ! grep -qs '^[^#]' known_hosts; then
  echo '::error::known_hosts contains no host keys: record those of your servers with make trust, and commit it'
  exit 1
fi
eval "$(ssh-agent -s)" >/dev/null
printf '%s\n' "SSH_AUTH_SOCK=$SSH_AUTH_SOCK" "SSH_AGENT_PID=$SSH_AGENT_PID" >>"$GITHUB_ENV"
printf '%s\n' "$SSH_KEY" | ssh-add -q -
