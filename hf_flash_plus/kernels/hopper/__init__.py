"""Kernels for Hopper (compute capability 9.0), written in Gluon, the layer of Triton that shows its machinery.

``config`` holds the tables of tile shapes, ``primitives`` the arithmetic on tiles, ``schedule`` says which keys belong
to which tile of query rows, ``intervals`` summarises row intervals by tile, ``forward`` is the kernel, and
``forward_launch`` turns one call into a launch. ``backward`` (dk and dv, in one mode dq too), ``backward_dq``,
``backward_prepare``, ``backward_config`` and the two ``backward_*launch`` are the same for gradients; ``launching`` is
what all launches share, and ``direct`` repeats launches. Importing this package imports no Gluon: launches do, once it
was found that it is there.
"""
