"""Kernels for Hopper (compute capability 9.0), written in Gluon, the layer of Triton that shows its machinery.

``config`` holds the tables of tile shapes, ``primitives`` the arithmetic on tiles, ``schedule`` says which keys belong
to which tile of query rows, ``intervals`` summarises row intervals by tile, ``forward`` is the kernel, and
``forward_launch`` turns one call into a launch. Importing this package imports no Gluon: ``forward_launch`` does, once
``available_reason`` has found that it is there.
"""
