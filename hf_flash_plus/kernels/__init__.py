"""The Triton kernels. Importing this package imports triton; only ``providers/triton.py`` does, and only when called.

``primitives`` holds the small device functions the kernels are made of, ``forward`` and ``backward`` the kernels,
``tiles`` the tile tables, ``launch`` turns one call into kernel launches, ``tune`` times candidate tiles.
``hopper`` holds faster kernels for one architecture, which serve fewer features.
"""
