# shellcheck shell=sh
# Runs in a machine: waits for cloud-init if it is installed, and reports its errors.
command -v cloud-init >/dev/null || exit 0
# Its exit code 2 means success with warnings.
cloud-init status --wait >/dev/null || [ $? = 2 ] || {
    cloud-init status --long >&2
    exit 1
}
