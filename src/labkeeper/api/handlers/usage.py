"""The usage of servers over time."""

from __future__ import annotations

import time
from datetime import timedelta

from labkeeper.api.handlers.common import Answer, find_server, json_answer
from labkeeper.api.services import Services
from labkeeper.api.views import usage_history_model
from labkeeper.schema.queries import ServerPath, UsageQuery


def get_usage(services: Services, path: ServerPath, query: UsageQuery) -> Answer:
    """Return a server's usage over time, also after it has ended.

    At the finest resolution that goes back to `since`: 5 seconds for an hour, a minute for a day,
    an hour for 30 days.
    """
    name, since = find_server(services, path).qualified_name, query.since
    if isinstance(since, timedelta):
        begin = time.time() - since.total_seconds()
    else:
        begin = since.timestamp()
    return json_answer(usage_history_model(services.usage_history(name, begin)))
