"""A site on `web` that shows what PostgreSQL on `db` answers."""

from io import StringIO

from pyinfra import config, host
from pyinfra.facts.postgres import PostgresRoles
from pyinfra.operations import apt, files, postgres, server, systemd
from pyinfra.operations.util import any_changed

config.SUDO = True
PASSWORD = "only-for-this-example"


def database() -> None:
    """PostgreSQL, with a database that `web` may use over the network."""
    place = "/etc/postgresql/15/main"
    apt.packages(name="Install PostgreSQL", packages=["postgresql"], update=True, cache_time=3600)
    listening = files.put(
        name="Listen on the network",
        src=StringIO("listen_addresses = '*'\n"),
        dest=f"{place}/conf.d/listen.conf",
    )
    allowed = files.line(
        name="Allow the shop to log in",
        path=f"{place}/pg_hba.conf",
        line="host shop shop samenet scram-sha-256",
    )
    systemd.service(name="Run PostgreSQL", service="postgresql", running=True, enabled=True)
    systemd.service(
        name="Restart PostgreSQL",
        service="postgresql",
        restarted=True,
        _if=any_changed(listening, allowed),
    )
    known = "shop" in host.get_fact(PostgresRoles, _sudo_user="postgres")
    postgres.role(
        name="Create the shop's role",
        role="shop",
        password=None if known else PASSWORD,  # setting it again would be a change
        _sudo_user="postgres",
    )
    postgres.database(name="Create the shop", database="shop", owner="shop", _sudo_user="postgres")


def site() -> None:
    """nginx behind a firewall, and a timer that queries the database."""
    packages = ["nginx", "nftables", "postgresql-client"]
    apt.packages(name="Install nginx", packages=packages, update=True, cache_time=3600)
    page = files.template(
        name="Configure the site",
        src="site.conf.j2",
        dest="/etc/nginx/sites-enabled/shop.conf",
        port=8080,
    )
    systemd.service(name="Run nginx", service="nginx", running=True, enabled=True)
    systemd.service(name="Reload nginx", service="nginx", reloaded=True, _if=page.did_change)

    rules = files.put(name="Write the firewall", src="nftables.conf", dest="/etc/nftables.conf")
    systemd.service(name="Run the firewall", service="nftables", running=True, enabled=True)
    systemd.service(
        name="Reload the firewall", service="nftables", reloaded=True, _if=rules.did_change
    )

    files.put(
        name="Write the database's address",
        src=StringIO(f"PGPASSWORD={PASSWORD}\n"),
        dest="/etc/shop.env",
        mode="600",
    )
    units = [
        files.put(name=f"Write {unit}", src=unit, dest=f"/etc/systemd/system/{unit}")
        for unit in ("shop.service", "shop.timer")
    ]
    systemd.service(
        name="Run the timer",
        service="shop.timer",
        running=True,
        enabled=True,
        daemon_reload=any(unit.will_change for unit in units),
    )


def tuning() -> None:
    """A kernel setting that survives a reboot."""
    limit = server.sysctl(
        name="Allow more connections",
        key="net.core.somaxconn",
        value=1024,
        persist=True,
        persist_file="/etc/sysctl.d/90-shop.conf",
    )
    server.reboot(name="Reboot", delay=5, reboot_timeout=60, _if=limit.did_change)


if "db" in host.groups:
    database()
else:
    site()
tuning()
