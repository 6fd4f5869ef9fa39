"""Properties of the kernel, each against brute force."""
