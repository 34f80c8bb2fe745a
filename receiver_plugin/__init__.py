"""The receiving side, inside every SGLang scheduler process that was started with `--load-plugin fp8sync`.

`entry`, `cpu_platform` and `sglang_*` are the only modules that import SGLang. The rest knows torch modules with a
`load_weights` method, and is tested without SGLang. Read `receiver` first.
"""
