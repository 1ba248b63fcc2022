"""GPU kernels in Triton. One file each: formula and shapes, `x_reference` (torch, the specification), `_x_kernel`, `x`.

`x` checks its arguments and runs the kernel on CUDA, the reference elsewhere; `kernel=True` asks for the kernel
wherever it is, which on a CPU takes Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is imported).
The kernels know tensors only: nothing of models, requests or strategies.
"""
