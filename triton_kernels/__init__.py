"""The update rules and the one generic kernel in Triton. Imported as `fusedstep.triton_kernels`; needs triton."""
