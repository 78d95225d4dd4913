"""Three NATS servers for the tests of jobs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.nats_servers import NatsServers, nats_servers


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServers]:
    with nats_servers(tmp_path_factory.mktemp("nats")) as found:
        yield found
