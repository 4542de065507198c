"""``python -m robust_app``, for torchrun among others."""

from robust_app.cli import main

if __name__ == "__main__":
    main()
