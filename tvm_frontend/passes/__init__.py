"""Graph rewrites, one a file; `tvm_frontend.pipeline` puts them in order."""
