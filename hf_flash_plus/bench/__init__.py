"""Benchmarks behind ``hf-flash-plus bench``: cases from a YAML file, peers side by side on the same inputs.

``config`` reads the file; ``problem`` makes a case's tensors and ``check`` its float reference; ``peers`` says how
each implementation is called; ``timing`` measures; ``kernels``, ``e2e`` and ``memory`` are the kinds of benchmark, each
giving a list of rows; ``report`` and ``plot`` show them.
"""
