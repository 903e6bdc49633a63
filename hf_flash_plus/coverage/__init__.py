"""``hf-flash-plus coverage``: every model type of the installed Transformers, ``flash_plus`` against eager.

``tiny_configs`` makes a small configuration of any model type by rule, ``overrides`` holds what rules cannot know,
``inputs`` and ``multimodal`` make inputs, ``subject`` the pair of models, ``checks`` compares them, ``worker`` turns
one model type into one row, ``pool`` runs all rows in subprocesses, ``record`` and ``report`` write them down.
"""
