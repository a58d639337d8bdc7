"""The handlers of the routes: ask the keeper, wait, answer. The table is in `api.routes`."""
