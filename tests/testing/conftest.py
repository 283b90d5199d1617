from __future__ import annotations

import pytest

from pyinfra_orbstack.orbctl import Orbctl


@pytest.fixture(autouse=True, scope="session")
def same_orbctl(client: Orbctl) -> Orbctl:
    """The plugin uses the `orbctl` of the other tests, from the environment."""
    return client
