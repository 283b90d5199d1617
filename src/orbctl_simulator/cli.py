"""The command line's grammar: the commands and flags, and how cobra parses them.

OrbStack's executable is built with cobra and pflag. Their messages, exit code and rules (flags
anywhere except after the command of `run`, ``--flag=value``, bundled letters, ``--``) are public.
"""

from __future__ import annotations

from .state import Failure, profile


class Call:
    """What a command's handler has to know about the call: nothing, unless a test changes it."""

    #: Whether the call's streams have to be observed, and so cannot simply be passed on.
    watches = False
    #: Whether every byte of stdin has to be noted.
    logs = False
    #: How many seconds longer a machine stays in the transitional state that the call causes.
    hold = 0.0
    #: When to stop the machine while a command runs in it.
    stop_after: float | None = None
    #: The exit code after a stream was cut.
    cut_exit = 1

    @property
    def limits(self) -> dict[int, int]:
        """The number of bytes after which the streams of a `run` are cut."""
        return {}

    def stdin_seen(self, data: bytes) -> None:
        """Note what came from stdin."""


class Flag:
    """One flag; `kind` is "" for a switch, otherwise the name of its value in the help."""

    def __init__(
        self, name: str, short: str = "", kind: str = "", help: str = "", since: str = "2.0"
    ) -> None:
        self.name, self.short, self.kind, self.help, self.since = name, short, kind, help, since


class Command:
    """One command; `does` is the module and function that implement it."""

    def __init__(
        self,
        name: str,
        does: str,
        usage: str = "",
        help: str = "",
        flags: tuple[Flag, ...] = (),
        aliases: tuple[str, ...] = (),
        least: int = 0,
        most: int = 0,
        since: str = "2.0",
        words: bool = False,
    ) -> None:
        self.name, self.does, self.usage, self.help = name, does, usage, help
        self.flags, self.aliases, self.since = flags, aliases, since
        self.least, self.most, self.words = least, most, words


class Options:
    """The flags of one call, and what else its handler may need to know about the call."""

    def __init__(self, program: str, call: Call) -> None:
        self.program, self.call = program, call
        self._values: dict[str, list[str]] = {}

    def add(self, name: str, value: str) -> None:
        self._values.setdefault(name, []).append(value)

    def on(self, name: str) -> bool:
        return self.text(name) == "true"

    def text(self, name: str) -> str:
        return self._values.get(name, [""])[-1]

    def many(self, name: str) -> list[str]:
        return self._values.get(name, [])

    def has(self, name: str) -> bool:
        return name in self._values


MANY = 1 << 30
_ALL = Flag("all", "a", help="Apply to all machines")
_FORMAT = Flag("format", "f", "string", "Output format (text, json)")
_MACHINE = Flag("machine", "m", "string", "Use a specific machine")

COMMANDS = (
    Command(
        "clone",
        "lifecycle:clone",
        "OLD_NAME NEW_NAME",
        "Clone a machine",
        least=2,
        most=2,
    ),
    Command(
        "config",
        "config:config",
        "[command]",
        "Change OrbStack settings.",
        most=MANY,
        words=True,
    ),
    Command(
        "create",
        "creating:create",
        "DISTRO[:VERSION] [NAME]",
        "Create a new machine",
        (
            Flag("arch", "a", "string", "Architecture (arm64, amd64)"),
            Flag("cpus", "", "float", "CPU limit", since="2.2"),
            Flag("disk", "", "string", "Disk limit, such as 64G", since="2.2"),
            Flag("forward-ssh-agent", help="Forward the SSH agent", since="2.1"),
            Flag("isolate-network", help="With --isolated: no other networks", since="2.1"),
            Flag("isolated", help="No file sharing or host integration", since="2.1"),
            Flag("memory", "", "string", "Memory limit, in MiB or such as 4G", since="2.2"),
            Flag("mount", "", "stringArray", "With --isolated: share SRC[:DEST]", since="2.1"),
            Flag("set-password", "p", help="Set a password for the default user and root"),
            Flag("strict-images", help="Simulator: fail if the image is not available"),
            Flag("user", "u", "string", "Name of the default user"),
            Flag("user-data", "c", "string", "Path to cloud-init user data"),
            Flag("variant", "", "string", "Simulator: variant of the image (default, cloud)"),
        ),
        ("add", "new"),
        least=1,
        most=2,
    ),
    Command("default", "config:default", "[NAME]", "Get or set the default machine", most=1),
    Command(
        "delete",
        "lifecycle:delete",
        "NAME...",
        "Delete machines",
        (_ALL, Flag("force", "f", help="Do not ask for confirmation")),
        ("rm", "remove"),
        most=MANY,
    ),
    Command("doctor", "doctor:doctor", "", "Simulator: show what this host supports"),
    Command("export", "files:export", "NAME FILE", "Export a machine to a file", least=2, most=2),
    Command(
        "image",
        "image_command:image",
        "add NAME[:VERSION] ROOTFS | build NAME[:VERSION] | list | pull NAME[:VERSION]"
        " | remove NAME[:VERSION] | save NAME[:VERSION] FILE",
        "Simulator: manage base images",
        (
            Flag("arch", "a", "string", "Architecture (arm64, amd64)"),
            Flag("remote", help="With list: show images that can be pulled"),
            Flag("variant", "", "string", "Variant (default, cloud)"),
        ),
        least=1,
        most=3,
    ),
    Command(
        "import",
        "files:import_",
        "FILE",
        "Import a machine from a file",
        (Flag("name", "n", "string", "Name of the machine"),),
        least=1,
        most=1,
    ),
    Command("info", "show:info", "NAME", "Get info about a machine", (_FORMAT,), most=1, least=1),
    Command(
        "list",
        "show:list_",
        "",
        "List all machines",
        (
            _FORMAT,
            Flag("quiet", "q", help="Only print names"),
            Flag("running", "r", help="Only list running machines"),
        ),
        ("ls",),
    ),
    Command(
        "logs",
        "show:logs",
        "NAME",
        "Show a machine's log",
        (Flag("all", "a", help="Show all logs"),),
        ("log", "console"),
        least=1,
        most=1,
    ),
    Command(
        "pull",
        "files:pull",
        "SOURCE... [DEST]",
        "Copy files from Linux",
        (_MACHINE,),
        least=1,
        most=MANY,
    ),
    Command(
        "push",
        "files:push",
        "SOURCE... [DEST]",
        "Copy files to Linux",
        (_MACHINE,),
        least=1,
        most=MANY,
    ),
    Command("rename", "lifecycle:rename", "OLD_NAME NEW_NAME", "Rename a machine", (), (), 2, 2),
    Command("restart", "lifecycle:restart", "[NAME]...", "Restart machines", (_ALL,), most=MANY),
    Command(
        "run",
        "enter:run",
        "[COMMAND] [ARGS]...",
        "Run a command on Linux",
        (
            _MACHINE,
            Flag("path", "p", help="Translate absolute macOS paths in arguments"),
            Flag("shell", "s", help="Use the login shell instead of running directly"),
            Flag("user", "u", "string", "Run as a specific user"),
            Flag("workdir", "w", "string", "Set the working directory"),
        ),
        ("exec", "shell"),
        most=MANY,
        words=True,
    ),
    Command("ssh", "show:ssh", "", "Show SSH details"),
    Command("start", "lifecycle:start_", "[NAME]...", "Start machines", (_ALL,), most=MANY),
    Command("status", "show:status", "", "Check whether OrbStack is running"),
    Command(
        "stop",
        "lifecycle:stop_",
        "[NAME]...",
        "Stop machines",
        (_ALL, Flag("force", "f", help="Stop at once")),
        most=MANY,
    ),
    Command("version", "show:version", "", "Show version information"),
)

# OrbStack's commands that have nothing to do with machines; a deploy that uses them needs a Mac.
ELSEWHERE = (
    *("completion", "debug", "docker", "k8s", "login", "logout", "report", "reset", "serial"),
    *("update", "usb"),
)


def find_command(word: str) -> Command | None:
    for command in COMMANDS:
        if (word == command.name or word in command.aliases) and command.since <= profile():
            return command
    return None


def parse(
    program: str, command: Command, words: list[str], options: Options
) -> tuple[list[str], bool]:
    """The words that are not flags, and whether help was requested."""
    flags = {"--help": Flag("help", "h"), "-h": Flag("help", "h")}
    for flag in command.flags:
        if flag.since <= profile():
            flags["--" + flag.name] = flag
            if flag.short:
                flags["-" + flag.short] = flag
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word == "--":
            rest += queue
            break
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            _take(program, command, options, flags.get(name), name, value, bool(equals), queue)
        elif word.startswith("-") and len(word) > 1:
            _take_letters(program, command, options, flags, word, queue)
        elif command.words:
            rest += [word, *queue]
            break
        else:
            rest.append(word)
        if options.has("help"):
            return rest, True
    count = len(rest)
    if count and not command.most:
        text = f'unknown command "{rest[0]}" for "{program} {command.name}"'
        raise usage_error(program, command, text)
    if command.least == command.most != count:
        raise usage_error(program, command, f"accepts {command.most} arg(s), received {count}")
    if count < command.least:
        text = f"requires at least {command.least} arg(s), only received {count}"
        raise usage_error(program, command, text)
    if count > command.most:
        text = f"accepts at most {command.most} arg(s), received {count}"
        raise usage_error(program, command, text)
    return rest, False


def _take_letters(
    program: str,
    command: Command,
    options: Options,
    flags: dict[str, Flag],
    word: str,
    queue: list[str],
) -> None:
    """``-rq``, ``-mNAME``, ``-m NAME``: a letter with a value takes the rest of its word."""
    for position, letter in enumerate(word[1:], 1):
        flag = flags.get("-" + letter)
        name = f"'{letter}' in {word}"
        rest = word[position + 1 :]
        if flag is not None and flag.kind:
            _take(program, command, options, flag, name, rest.lstrip("="), bool(rest), queue)
            return
        _take(program, command, options, flag, name, "", False, queue)


def _take(
    program: str,
    command: Command,
    options: Options,
    flag: Flag | None,
    name: str,
    value: str,
    given: bool,
    queue: list[str],
) -> None:
    if flag is None:
        kind = "unknown flag" if name.startswith("--") else "unknown shorthand flag"
        raise usage_error(program, command, f"{kind}: {name}")
    if flag.kind and not given:
        if not queue:
            raise usage_error(program, command, f"flag needs an argument: {name}")
        value = queue.pop(0)
    elif not flag.kind and not given:
        value = "true"
    elif not flag.kind and value not in ("true", "false"):
        shown = f"-{flag.short}, --{flag.name}" if flag.short else f"--{flag.name}"
        text = f'invalid argument "{value}" for "{shown}" flag: strconv.ParseBool: '
        raise usage_error(program, command, f'{text}parsing "{value}": invalid syntax')
    options.add(flag.name, value)


def usage_error(program: str, command: Command, text: str) -> Failure:
    return Failure(f"Error: {text}\n{_usage(program, command)}\n")


def _usage(program: str, command: Command) -> str:
    lines = ["Usage:", f"  {program} {command.name} {command.usage}".rstrip() + " [flags]"]
    if command.aliases:
        lines += ["", "Aliases:", "  " + ", ".join((command.name, *command.aliases))]
    lines += ["", "Flags:"]
    shown = [flag for flag in command.flags if flag.since <= profile()]
    shown = sorted([*shown, Flag("help", "h", help=f"help for {command.name}")], key=_by_name)
    heads = [
        (f"  -{flag.short}, " if flag.short else "      ") + f"--{flag.name} {flag.kind}".rstrip()
        for flag in shown
    ]
    width = max(map(len, heads)) + 3
    return "\n".join([*lines, *(head.ljust(width) + flag.help for head, flag in zip(heads, shown))])


def _by_name(flag: Flag) -> str:
    return flag.name


def help_for(program: str, command: Command) -> str:
    return f"{command.help}\n\n{_usage(program, command)}\n"


def help_all(program: str) -> str:
    shown = [command for command in COMMANDS if command.since <= profile()]
    return "\n".join(
        [
            "OrbStack's command line for Linux: machines without OrbStack.",
            "",
            "Usage:",
            f"  {program} [command]",
            "",
            "Available Commands:",
            *(f"  {command.name:<12}{command.help}" for command in shown),
            "",
            "Flags:",
            f"  -h, --help   help for {program}",
            "",
            f'Use "{program} [command] --help" for more information about a command.\n',
        ]
    )
