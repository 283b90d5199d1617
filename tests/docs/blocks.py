"""What happens to the code blocks of README and docs that `make docs` does not run itself.

`make docs` runs every code block, except those listed here. A block is named by its page and by
the heading above it; `Heading (2)` is the second block below that heading. A value is one of:

- `run by: FILE`, perhaps with more words: a test or script runs the block. `*` stands for every
  block of the page.
- `not run: REASON`
- `run: fails`: `make docs` runs the block and requires that it fails.
"""

from __future__ import annotations

ADOPTING = "tests/template/test_adopting.py"
SERVICES = "run by: tests/simulator/services/test_services.py"
DIRECTORY = "from a directory, because the network may be unavailable"
ENGINE = "not run: it needs a container engine, which only a Mac with OrbStack is sure to have"

REMOTE = "not run: it needs a Mac that ssh reaches; tests/remote does the same on loopback"

EXCEPTIONS: dict[str, dict[str, str]] = {
    "README.md": {
        "pyinfra-orbstack": "run by: .ci/run",
        "Installation": "run by: scripts/rehearsal.py, with pip and uv, from an index on loopback",
        "Installation (2)": "not run: it would install the main branch over the network",
        "Scaffold a project": f"run by: tests/template/test_matrix.py, {DIRECTORY}",
        "Scaffold a project (2)": (
            "run by: tests/template/test_render.py, in test_library_comes_from_a_checkout"
        ),
    },
    "CONTRIBUTING.md": {"Set up": "run by: .ci/run"},
    "docs/adopting.md": {"*": f"run by: {ADOPTING}, {DIRECTORY}"},
    "docs/containers.md": {
        "Containers": ENGINE,
        "One inventory for all kinds of hosts": ENGINE,
        "One inventory for all kinds of hosts (2)": ENGINE,
        "pyinfra's own Docker support": ENGINE,
        "pyinfra's own Docker support (2)": ENGINE,
    },
    "docs/files.md": {
        "Directories with rsync": (
            "not run: this host may lack rsync; tests/conformance/test_files_rsync.py does the same"
        ),
    },
    "docs/getting-started.md": {
        "On a Mac": "not run: it needs a Mac; the rest of the page runs on Linux",
        "On Linux": "not run: scripts/rehearsal.py does the same, from an index on loopback",
    },
    "docs/inventory.md": {"Look without changing anything": "run: fails"},
    "docs/machines.md": {"*": "run by: tests/machines/test_docs.py"},
    "docs/performance.md": {
        "Repeat the measurement": (
            "not run: it takes about an hour; tests/benchmarks runs a hundredth of it"
        ),
    },
    "docs/remote.md": {"Set up": REMOTE, "Set up (2)": REMOTE},
    "docs/releasing.md": {"For each release": "run by: tests/release/test_faults.py"},
    "docs/services.md": {
        "A deploy of services": SERVICES,
        "A deploy of services (2)": SERVICES,
        "A deploy of services (3)": SERVICES,
        "A deploy of services (4)": SERVICES,
        "A deploy of services (5)": SERVICES,
        "A deploy of services (6)": SERVICES,
        "What happens": SERVICES,
    },
    "docs/simulator.md": {
        "The simulator: machines without OrbStack": (
            "not run: nginx comes over the network; README runs the other commands"
        ),
        "Images": (
            "not run: images come over the network; tests/simulator pulls small ones and builds "
            "a real one"
        ),
        "Your own images": (
            "not run: root file systems come over the network; tests/simulator adds small ones"
        ),
        "In CI": "not run: it is a GitHub workflow",
        "States": "not run: it shows an answer, not a command",
        "Faults": "run by: tests/conformance/test_faults.py, with many more rules",
        "The call log": "not run: it shows an answer, not a command",
    },
    "docs/template.md": {
        "The template": f"run by: tests/template/test_render.py, {DIRECTORY}",
        "The template (2)": (
            "run by: tests/template/test_render.py, in test_library_comes_from_a_checkout"
        ),
        "Updating": "run by: tests/template/test_update.py",
    },
    "docs/testing.md": {
        "Testing deploys": "not run: it tests your deploy; tests/testing does the same",
        "Fixtures": "not run: a fixture alone does nothing; tests/testing has such fixtures",
        "Several hosts": (
            "not run: it tests your deploy; tests/testing and tests/simulator/services do the same"
        ),
        "Several hosts (2)": "not run: it is part of the deploy that the block above tests",
        "Containers": "not run: it needs a container engine; tests/testing does the same",
        "A prepared image": "run by: tests/template/conftest.py, in prepare and prepared",
        "In CI": "not run: it needs GitLab; tests/template runs its commands",
    },
    "docs/web-server.md": {
        "Install": "not run: scripts/rehearsal.py does the same, from an index on loopback",
    },
}
