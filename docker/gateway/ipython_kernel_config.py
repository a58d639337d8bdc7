"""Start kernels in the directory of their notebook; its path is the same in both containers."""

import os

directory = os.environ.get("KERNEL_WORKING_DIR", "")
if os.path.isdir(directory):  # noqa: PTH112 - pathlib would slow down each kernel
    os.chdir(directory)
