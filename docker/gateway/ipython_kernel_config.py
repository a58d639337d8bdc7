"""Kernels begin where their notebook is, which has the same path here as where JupyterLab runs."""

import os

directory = os.environ.get("KERNEL_WORKING_DIR", "")
if os.path.isdir(directory):  # noqa: PTH112 - loaded at the start of each kernel: nothing more is imported
    os.chdir(directory)
