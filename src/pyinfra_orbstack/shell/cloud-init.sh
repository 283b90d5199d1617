# shellcheck shell=sh
# Run in a machine: waits for cloud-init where there is one, and says what went wrong.
command -v cloud-init >/dev/null || exit 0
# Its exit code 2 is a success with warnings.
cloud-init status --wait >/dev/null || [ $? = 2 ] || {
    cloud-init status --long >&2
    exit 1
}
