"""What sender and receiver must agree on: configuration, numbers, names, buckets, messages, errors.

Nothing here imports SGLang, Ray, `sender` or `receiver_plugin`.
"""
