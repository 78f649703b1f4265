"""The pipeline as Triton kernels. Importing this needs no triton; its modules do."""
