"""What each route does: ask the keeper, wait, answer. Decides nothing; `api.routes` has the table."""
