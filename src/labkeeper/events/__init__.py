"""Events: recorded as they happen, streamed to callers, and posted to a webhook."""
