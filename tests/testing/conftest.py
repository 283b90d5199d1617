from __future__ import annotations

import pytest

from pyinfra_orbstack.orbctl import Orbctl


@pytest.fixture(autouse=True, scope="session")
def same_orbctl(client: Orbctl) -> Orbctl:
    """The plugin shall use the `orbctl` of the other tests, which set it up in the environment."""
    return client
