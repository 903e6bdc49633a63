"""The self-check behind ``hf-flash-plus check``: providers and models against references, on the user's own machine.

``oracle`` says what is right, ``features`` what is asked, ``compare`` judges one answer, ``models`` does the same for
whole models, ``isolate`` runs all of it where a crash or a hang costs one row, ``run`` puts them together, ``report``
prints.
"""
