"""More than one machine, by Ray: a folder of clips as a Ray Data job, the service on Ray Serve.

Needs the `cluster` extra; nothing is imported here, so that the runtime does without it.
"""
