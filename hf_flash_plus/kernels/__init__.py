"""The Triton kernels. Importing this package imports triton; only ``providers/triton.py`` does, and only when called.

``primitives`` holds the small device functions the kernels are made of, ``forward`` and ``backward`` the kernels,
``tiles`` the tile tables, ``launch`` turns one call into kernel launches, ``tune`` times candidate tiles.
"""

#: Offsets inside a tile are 32 bits wide: 512 rows this far apart still fit. Tensors beyond are copied.
MAX_ROW_STRIDE = 2**31 // 512
