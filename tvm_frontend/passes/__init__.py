"""Graph rewrites: one a file, put in order by `tvm_frontend.pipeline`."""
