"""Response bodies: the API writes them, the client reads them."""
