"""An independent numpy model of the Λ-attention rule, and the tiny models it is tried on.

Nothing here is shared with the native code: it knows the rule from the paper (LM-Infinite, Han et al., NAACL 2024,
doi 10.18653/v1/2024.naacl-long.222) and reads GGUF files itself.
"""
