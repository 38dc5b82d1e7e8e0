"""The learned world as a service: WebSocket sessions batched over one rollout, and a page to play.

Needs the `serve` extra; nothing is imported here, so that the runtime does without it.
"""
