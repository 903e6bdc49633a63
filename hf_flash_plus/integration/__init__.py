"""The only code that imports Transformers: the attention and mask functions, registration, and patching of models."""
