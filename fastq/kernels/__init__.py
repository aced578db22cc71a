"""The integer kernels: Numba functions built around LLVM vector code. NumPy and Numba only.

Every kernel is `void(args, begin, end)`: it computes tasks begin..end of its output and reads its
operands from `args`, a block of int64 fields named in its file. It is serial and allocates nothing;
`executor` has the one parallel loop. Kernels trust their caller: `fastq.ops` checks.
"""
