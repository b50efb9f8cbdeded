"""What the compilers made of the kernels: registers, shared memory, spills."""
