"""``python -m hf_flash_plus``: the same as ``hf-flash-plus``."""

from .cli import main

if __name__ == "__main__":
    main()
