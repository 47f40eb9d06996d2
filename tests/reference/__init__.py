"""An independent numpy model of the Λ-attention rule, and the tiny models it is tried on.

Nothing here is shared with the native code: it knows the rule from the paper (LM-Infinite, Han et al., NAACL 2024,
doi 10.18653/v1/2024.naacl-long.222) and reads GGUF files itself.

Why there are two, this and conformance/oracle.py: the oracle writes a policy as a table of distances and computes with
that, which is as near to the definition as code can be, of one architecture and in time and memory that are quadratic.
This one is for streams of thousands of tokens and for all architectures. It is checked against the oracle.
"""
