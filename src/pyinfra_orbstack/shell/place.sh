# shellcheck shell=sh
# shellcheck disable=SC2154
# Commands on a Mac that OpenSSH reaches. They run there, in the Mac's `sh`, whatever the login shell.

# run_there HOW EXECUTABLE ARGUMENT...: run OrbStack's executable of that name. HOW is `piped` if our
# input is its own. If it is `idle`, our input never has data, and its end is that of the connection,
# so the command must end too.
run_there() {
    how=$1 program=$2
    shift 2
    case $program in
    orbctl) program=$orbctl ;;
    docker) program=${PYINFRA_ORBSTACK_DOCKER:-docker} ;;
    esac
    command -v "$program" >/dev/null || {
        echo "run_there: missing $program" >&2
        exit 127
    }
    [ "$how" = idle ] || exec "$program" "$@"
    exec 3<&0
    "$program" "$@" </dev/null 3<&- &
    call=$!
    {
        read -r _ <&3
        kill "$call"
    } >/dev/null 2>&1 &
    watch=$!
    wait "$call"
    status=$?
    kill "$watch" 2>/dev/null
    # Only ssh itself exits with 255.
    [ "$status" != 255 ] || status=254
    exit "$status"
}

# lend_user_data: write our input to a private file, and print its path
lend_user_data() {
    new_user_data && cat >"$data" && printf %s "$data"
}
