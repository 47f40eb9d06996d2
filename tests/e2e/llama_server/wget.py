"""llama-server's tests download models with a package of this name; here, nothing is downloaded."""
