"""What the compiled kernels promise, proved without a GPU: `python -m benchmarks.offline`.

Each shipped launch is compiled for the architectures it runs on and its machine code is held to a
committed budget. To add a kernel's configuration, add a line to its op's list in
`variants`, then run
`python -m benchmarks.offline --update --only NAME` under each Triton version in `budgets.json`.
"""
